"""What is learned from a clip: noise, timesteps, targets, losses. With diffusers: parity/test_trained_lora.py."""

import math

import pytest
import torch
from einops import repeat

from minit2v import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler
from minit2v.schedulers.edm import EDMEulerScheduler
from minit2v.training.objective import Objective, debiased, drop_text, generators

STABLE_DIFFUSIONS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
EPSILON = DDIMScheduler(**STABLE_DIFFUSIONS)
V = DPMSolverMultistepScheduler(**STABLE_DIFFUSIONS, prediction_type="v_prediction", rescale_betas_zero_snr=True)


def latents(b=3, f=4, seed=0):
    return torch.randn(b, 4, f, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels(objective, t):
    bar = objective.scheduler.alphas_cumprod[t]
    return (x.sqrt()[:, None, None, None, None] for x in (bar, 1 - bar))


@pytest.mark.parametrize("name", ["epsilon", "v", "x0"])
def test_noise_target_and_conversion(name):
    objective, x = Objective(EPSILON, objective=name), latents()
    noisy, t, target, eps = objective.noised(x, 7, [4, 11, 2])
    alpha, sigma = levels(objective, t)
    v = alpha * eps - sigma * x
    assert torch.allclose(noisy, alpha * x + sigma * eps, atol=1e-12)
    assert torch.allclose(target, {"epsilon": eps, "v": v, "x0": x}[name], atol=1e-12)
    for to, want in (("epsilon", eps), ("v", v), ("x0", x)):
        assert torch.allclose(objective.convert(target, noisy, t, to), want, atol=1e-9), to
    assert noisy.dtype == torch.float64 and objective.noised(x.float(), 7, [4, 11, 2]).noisy.dtype == torch.float32


def test_a_sample_is_the_same_in_every_batch():
    x = latents(1).expand(6, -1, -1, -1, -1)
    for options in ({}, {"timesteps": "high", "noise_offset": 0.1}, {"timesteps": "logit-normal"}):
        objective = Objective(EPSILON, **options)
        whole = objective.noised(x, 0, range(10, 16))
        for rows in ([0, 1], [2, 3, 4], [5]):
            part = objective.noised(x[rows], 0, [10 + r for r in rows])
            assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True))
        assert len({e.sum().item() for e in whole.eps}) == 6
        assert not torch.equal(objective.noised(x, 1, range(10, 16)).eps, whole.eps)
    # An option changes its own random numbers alone.
    plain, offset = (Objective(EPSILON, noise_offset=n).noised(x, 0, range(6)) for n in (0, 0.1))
    assert torch.equal(plain.t, offset.t)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    Objective(EPSILON, noise_offset=0.1).noised(x, 0, range(6))
    assert torch.equal(torch.random.get_rng_state(), state)  # PyTorch's own generator is left alone


def test_streams_are_of_their_own():
    names = ["timestep", "noise", "noise offset", "text dropout"]
    drawn = [torch.rand(4, generator=generators(0, name, n)[1]) for name in names for n in range(3)]
    assert len({tuple(x.tolist()) for x in drawn}) == 12


def test_timesteps():
    def draw(count=4000, **options):
        objective = Objective(EPSILON, **options)
        return torch.tensor([objective.draw_timestep(0, n) for n in range(count)]).float()

    t = draw()
    assert t.min() >= 0 and t.max() <= 999 and abs(t.mean() - 499.5) < 15 and abs(t.std() - 288.7) < 10
    t = draw(timesteps="high", high_share=0.5)
    assert abs((t >= 700).float().mean() - (0.5 + 0.5 * 0.3)) < 0.03 and t.max() <= 999
    assert (draw(200, timesteps="high", high_share=1) >= 700).all()
    t = draw(200, timesteps=(3, 5))
    assert {*t.tolist()} == {3, 4, 5}
    assert {*draw(3, timesteps=[999, 999]).tolist()} == {999}
    t = draw(timesteps="logit-normal") / 1000
    within = 1 / (1 + math.exp(-1)) - 1 / (1 + math.exp(1))  # one deviation around the middle
    assert abs(((t - 0.5).abs() < within / 2).float().mean() - 0.6827) < 0.03


def test_text_dropout():
    dropped = [drop_text(3, n, 0.1) for n in range(10_000)]
    assert abs(sum(dropped) / 10_000 - 0.1) < 0.01
    assert dropped[:50] == [drop_text(3, n, 0.1) for n in range(50)]
    assert not any(drop_text(0, n, 0) for n in range(50)) and all(drop_text(0, n, 1) for n in range(50))


def test_noise_offset():
    x = latents(2, f=3)
    plain = Objective(EPSILON).noised(x, 0, [0, 1]).eps
    for per, kept in (("frame", (2, 4, 3)), ("clip", (2, 4, 1))):
        objective = Objective(EPSILON, noise_offset=0.5, offset_per=per)
        noisy, t, target, eps = objective.noised(x, 0, [0, 1])
        offset = eps - plain
        one = offset[:, :, : kept[2], 0, 0]
        assert torch.allclose(offset, repeat(one, "b c f -> b c (f g) h w", g=3 // kept[2], h=6, w=5), atol=1e-6)
        assert len({*one.flatten().tolist()}) == math.prod(kept)
        alpha, sigma = levels(objective, t)
        assert torch.equal(target, eps) and torch.allclose(noisy, alpha * x + sigma * eps)
    many = torch.stack([objective.draw_noise(0, n, (64, 1, 2, 2)).mean((1, 2, 3)) for n in range(50)])
    assert abs(many.var() - (0.5**2 + 1 / 4)) < 0.03


def test_loss_is_one_number_a_sample_with_its_weight():
    objective, (a, b) = Objective(EPSILON), (latents(seed=s) for s in (1, 2))
    t = torch.tensor([0, 500, 999])
    want = torch.stack([(x - y).square().mean() for x, y in zip(a, b, strict=True)])
    assert torch.allclose(objective.loss(a, b, t), want, atol=1e-14)
    assert objective.loss(a.bfloat16(), b.float(), t).dtype == torch.float32
    for name in ("epsilon", "v", "x0"):
        objective = Objective(EPSILON, objective=name, min_snr=5)
        bar = objective.scheduler.alphas_cumprod[t]
        snr = bar / (1 - bar)
        assert snr[0] > 5 > snr[1]
        weights = torch.tensor([min(s, 5) / {"epsilon": s, "v": s + 1, "x0": 1}[name] for s in snr.tolist()])
        assert torch.allclose(objective.loss(a, b, t), want * weights)
    with pytest.raises(ValueError, match="differ in shape"):
        objective.loss(a, b[:, :, :2], t)


def test_motion_directors_loss():
    """Written out from the paper: frame by frame."""
    objective = Objective(EPSILON)
    e, eps, t, anchor = latents(seed=1), latents(seed=2), torch.tensor([10, 20, 900]), torch.tensor([3, 0, 1])
    want = []
    for i in range(3):
        org = sum(((e[i, :, j] - eps[i, :, j]) ** 2).mean() for j in range(4)) / 4
        ad = 0
        for j in range(4):
            phi_e, phi_eps = (2**0.5 * x[i, :, j] - x[i, :, anchor[i]] for x in (e, eps))
            ad += ((phi_e - phi_eps) ** 2).mean() / 4
        want.append(org + ad)
    assert torch.allclose(objective.motion_loss(e, eps, t, anchor), torch.stack(want), atol=1e-12, rtol=0)
    y = debiased(e, anchor)
    assert torch.allclose(y[0, :, 3], (2**0.5 - 1) * e[0, :, 3], atol=1e-14)  # the anchor counts little
    same = e[:, :, :1].expand(-1, -1, 4, -1, -1)
    assert torch.allclose(debiased(same, anchor), (2**0.5 - 1) * same, atol=1e-14)


def test_published_betas():
    def of(scheduler, **options):
        return Objective(scheduler, **options).scheduler.config

    assert of(EPSILON).beta_schedule == "scaled_linear"
    c = of(PNDMScheduler(**STABLE_DIFFUSIONS, skip_prk_steps=True, steps_offset=1), motion=True)
    assert (c.beta_schedule, c.beta_start, c.beta_end) == ("linear", 0.00085, 0.012)
    assert of(EPSILON, motion=True, betas="scaled_linear").beta_schedule == "scaled_linear"
    c = of(V, motion=True)  # the embedded model's, which had its motion modules trained with the same
    assert c.beta_schedule == "scaled_linear" and c.rescale_betas_zero_snr
    assert Objective(V).prediction == "v" and Objective(EPSILON).prediction == "epsilon"
    assert torch.equal(Objective(V).scheduler.alphas_cumprod[:-1], V.alphas_cumprod[:-1])
    assert Objective(EPSILON.config).prediction == "epsilon"


def test_zero_snr():
    objective = Objective(EPSILON, objective="v", zero_snr=True, timesteps=(999, 999), min_snr=5)
    noisy, t, target, eps = objective.noised(latents(), 0, [0, 1, 2])
    assert torch.equal(noisy, eps) and torch.allclose(target, -latents())
    assert torch.isfinite(objective.weights).all()
    assert Objective(V, zero_snr=False).scheduler.alphas_cumprod[-1] > 0
    with pytest.raises(ValueError, match="zero_snr does not go with the objective epsilon"):
        Objective(EPSILON, zero_snr=True)


def test_the_scheduler_that_samples_as_was_trained():
    objective = Objective(EPSILON, objective="v", zero_snr=True, betas="linear")
    new = objective.scheduler_for(V)
    assert type(new) is type(V) and new.config.prediction_type == "v_prediction"
    assert torch.equal(new.alphas_cumprod[:-1], objective.scheduler.alphas_cumprod[:-1])
    assert Objective(V, zero_snr=False).scheduler_for(PNDMScheduler()).config.beta_schedule == "scaled_linear"
    with pytest.raises(ValueError, match="EDMEulerScheduler has no .*: this model needs another scheduler"):
        objective.scheduler_for(EDMEulerScheduler())
    with pytest.raises(ValueError, match="the scheduler has no betas"):
        Objective(EDMEulerScheduler())


@pytest.mark.parametrize("options, message", [
    ({"objective": "epsilom"}, "objective must be one of epsilon, v, x0, not 'epsilom' .nearest: 'epsilon'."),
    ({"betas": "scaled-linear"}, "nearest: 'scaled_linear'"),
    ({"timesteps": "hi"}, "timesteps must be one of uniform, high"),
    ({"timesteps": (5, 3)}, "from 0 to 999, not .5, 3."),
    ({"timesteps": (0, 1000)}, "two whole numbers"),
    ({"timesteps": (0.0, 0.5)}, "two whole numbers"),
    ({"timesteps": (1,)}, "two whole numbers"),
    ({"noise_offset": -0.1}, "noise_offset must be a number of at least 0"),
    ({"noise_offset": float("nan")}, "noise_offset must be a number"),
    ({"offset_per": "pixel"}, "offset_per must be one of frame, clip"),
    ({"min_snr": 0}, "min_snr must be a number of at least"),
    ({"high_share": 2}, "high_share must be a number from 0 to 1"),
])  # fmt: skip
def test_options_that_do_not_exist(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Objective(EPSILON, **options)
    assert "\n" not in str(error.value)


def test_latents_and_numbers_belong_together():
    with pytest.raises(ValueError, match="with a number for each of the batch"):
        Objective(EPSILON).noised(latents(), 0, [1, 2])
    with pytest.raises(ValueError, match="batch, channels, frames"):
        Objective(EPSILON).noised(latents()[:, :, 0], 0, [1, 2, 3])
