"""FreeInit and FreeU by themselves: their formulas, spelled out slowly, and what they keep right around them."""

import cmath
import itertools
import math

import pytest
import torch
from torch import nn

import minit2v.schedulers as schedulers
from minit2v.pipelines import DiffusionPipeline, TextToVideoSDPipeline
from minit2v.pipelines.base import StepCallbacks
from minit2v.schedulers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from minit2v.techniques.free_init import FREQUENCIES, METHODS, FreeInit, NoisedVideo, low_pass
from minit2v.techniques.free_u import FreeU, scale_low_frequencies

SOLVERS = [
    "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "PNDMScheduler",
]  # fmt: skip
STABLE_DIFFUSION = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def make_scheduler(name, **fields):
    own = {"DDIMScheduler": dict(clip_sample=False), "PNDMScheduler": dict(skip_prk_steps=True)}.get(name, {})
    return getattr(schedulers, name)(**STABLE_DIFFUSION, **own, **fields)


def levels(scheduler, t):
    """alpha and sigma at a timestep, which Euler's grids may put between two of the training's."""
    ratio = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt()
    low = min(int(t), len(ratio) - 2)
    at = torch.lerp(ratio[low], ratio[low + 1], t - low).item()
    return 1 / math.sqrt(1 + at**2), at / math.sqrt(1 + at**2)


class Oracle(nn.Module):
    """A network that knows all, and keeps what it was shown: timestep, x, text.

    Of white videos, every latent N(0, 1): then x_t is N(0, 1), too, and E[eps | x_t] = sigma x_t. Or of the one `video`
    that there is, white as well, to which every solver leads without error.
    """

    dtype = torch.float32

    def __init__(self, scheduler, video=None):
        super().__init__()
        self.scheduler, self.video, self.seen = scheduler, video, []

    def keys_values(self, context):
        return context

    def forward(self, x, t, context):
        self.seen.append((float(t), x, context))
        alpha, sigma = levels(self.scheduler, float(t))
        return sigma * x if self.video is None else (x - alpha * self.video) / sigma


def make_pipe(name, axes=None, compat=None, video=None, **fields):
    scheduler = make_scheduler(name, **fields)
    pipe = TextToVideoSDPipeline(None, None, None, Oracle(scheduler, video), scheduler, compat=compat)
    pipe.STEP_AXES = axes or pipe.STEP_AXES
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoise(pipe, noise, n=4, generator=None, callbacks=None, eta=0.0):
    """A run from noise (b c f h w), as the text-to-video pipelines make it -> the latents."""
    pipe.unet.seen.clear()
    pipe.scheduler.set_timesteps(n)
    text = torch.zeros(len(noise), 1, 1)
    return pipe.denoise(noise * pipe.scheduler.init_noise_sigma, pipe.scheduler.timesteps, n, text, None, 1.0, eta,
                        generator, callbacks or StepCallbacks())


def denoise_video(pipe, video, noise, strength, n, generator=None):
    """A run from a noised video, as the video-to-video pipelines make it."""
    pipe.unet.seen.clear()
    scheduler, steps = pipe.scheduler, int(n * strength)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(n - steps)
    timesteps = scheduler.timesteps[n - steps :]
    x = scheduler.add_noise(video, noise, timesteps[:1])
    return pipe.denoise(x, timesteps, steps, torch.zeros(len(x), 1, 1), None, 1.0, 0.0, generator, StepCallbacks(),
                        NoisedVideo(strength, video, noise))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def firsts(pipe, rounds):
    """What the network saw at the first step of each of `rounds` equally long rounds."""
    seen = pipe.unet.seen
    return seen[:: len(seen) // rounds]


# The filter -------------------------------------------------------------------------------------------------


def slow_low_pass(shape, method, order, d_s, d_t, shifted):
    """Frequency by frequency, from -1 on; shifted: the published centre, which odd sizes miss."""
    mask = torch.zeros(shape, dtype=torch.float64)
    for place in itertools.product(*map(range, shape)):
        k = [i - n // 2 for i, n in zip(place, shape, strict=True)]
        f, h, w = (2 * i / n - 1 if shifted else 2 * j / n for i, j, n in zip(place, k, shape, strict=True))
        square = (d_s / d_t * f) ** 2 + h * h + w * w
        if method == "butterworth":
            mask[place] = 1 / (1 + (square / d_s**2) ** order)
        elif method == "gaussian":
            mask[place] = math.exp(-square / (2 * d_s**2))
        elif method == "ideal":
            mask[place] = square <= 2 * d_s
        else:
            edges = [max(1, round(n // 2 * d)) for n, d in zip(shape, (d_t, d_s, d_s), strict=True)]
            mask[place] = all(-e <= i < e for i, e in zip(k, edges, strict=True))
    return torch.fft.ifftshift(mask)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("frequencies", FREQUENCIES)
def test_low_pass_against_a_slow_one(method, frequencies):
    for shape, order, d_s, d_t in (((4, 6, 8), 4, 0.25, 0.25), ((3, 5, 2), 2, 0.5, 0.3), ((1, 7, 1), 1.5, 1, 0.2)):
        got = low_pass(shape, method, order, d_s, d_t, frequencies)
        want = slow_low_pass(shape, method, order, d_s, d_t, frequencies == "published")
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_low_pass_keeps_the_mean_and_is_even():
    for method, shape in itertools.product(METHODS, [(16, 8, 6), (5, 7, 3)]):
        mask = low_pass(shape, method, 4, 0.25, 0.25)
        assert mask[0, 0, 0] == 1 and mask.min() < 0.1
        if method != "box":  # as a band from -n to n - 1, which the real part makes even
            torch.testing.assert_close(mask, mask.flip(0, 1, 2).roll((1, 1, 1), (0, 1, 2)))
    for d_s, d_t in ((0, 0.25), (0.25, 0)):
        assert not low_pass((4, 4, 4), "gaussian", 4, d_s, d_t).any()


def test_low_pass_is_made_once_per_shape():
    low_pass.cache_clear()
    x = randn(1, 2, 4, 4, 4)
    for _ in range(3):
        FreeInit().mix(x, x)
    assert (low_pass.cache_info().misses, low_pass.cache_info().hits) == (1, 2)


def dft(x, sign):
    """x (f h w), complex, by the definition."""
    out = torch.zeros_like(x)
    places = list(itertools.product(*map(range, x.shape)))
    for k in places:
        for i in places:
            phase = sum(a * b / n for a, b, n in zip(k, i, x.shape, strict=True))
            out[k] += x[i] * cmath.exp(sign * 2j * math.pi * phase)
    return out


@pytest.mark.parametrize("method", ["butterworth", "box"])
def test_mix_against_the_definition(method):
    x, z = randn(2, 3, 4, 2).double()
    low = slow_low_pass(x.shape, method, 2, 0.5, 0.5, False)
    spectrum = dft(x + 0j, -1) * low + dft(z + 0j, -1) * (1 - low)
    want = dft(spectrum, 1).real / x.numel()
    settings = FreeInit(method=method, order=2, spatial_stop_frequency=0.5, temporal_stop_frequency=0.5)
    torch.testing.assert_close(settings.mix(x[None, None], z[None, None])[0, 0], want, rtol=1e-12, atol=1e-12)


def test_mix_in_half_precision_is_computed_wider():
    x, z = randn(2, 1, 2, 4, 5, 6)
    got = FreeInit().mix(x.half(), z)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, FreeInit().mix(x, z), rtol=0, atol=2e-3)


# Rounds from noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_every_round_begins_at_the_size_that_the_network_knows(name, spacing):
    noise, video = randn(2, 2, 4, 8, 16, 16)
    pipe = make_pipe(name, video=video, timestep_spacing=spacing)
    # Filters with a sharp edge: a soft one keeps h of x and 1 - h of z, of which the sizes add up to less than 1.
    for settings in (dict(), dict(use_fast_sampling=True), dict(method="ideal", temporal_stop_frequency=0.7)):
        pipe.enable_free_init(num_iters=3, **settings)
        denoise(pipe, noise, 6, torch.Generator().manual_seed(1))
        lengths = [2, 4, 6] if "use_fast_sampling" in settings else [6, 6, 6]
        extra = name == "PNDMScheduler"  # asks twice at its second timestep
        assert len(pipe.unet.seen) == sum(lengths) + 3 * extra
        for i, length in enumerate(lengths):
            start = sum(lengths[:i]) + i * extra
            t, x, _ = pipe.unet.seen[start]
            assert t == max(t for t, _, _ in pipe.unet.seen[start : start + length])
            assert abs(x.std().item() - 1) < 0.02, (settings, start)
            assert abs(x.mean().item()) < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_a_round_begins_from_the_last_result_noised_and_new_high_frequencies(name):
    pipe = make_pipe(name)
    noise, results = randn(1, 4, 4, 6, 5), []
    pipe.enable_free_init(num_iters=3, generator=torch.Generator().manual_seed(7), spatial_stop_frequency=0.5)
    on_end = StepCallbacks(on_end=lambda pipe, step, t, tensors: results.append(tensors["latents"]))
    final = denoise(pipe, noise, 4, torch.Generator().manual_seed(1), on_end)
    assert torch.equal(final, results[-1])

    fresh = torch.Generator().manual_seed(7)
    bar = pipe.scheduler.alphas_cumprod[-1].item()
    low = slow_low_pass((4, 6, 5), "butterworth", 4, 0.5, 0.25, False)
    per_round = len(results) // 3
    for i, (_, seen, _) in enumerate(firsts(pipe, 3)[1:], 1):
        z = torch.randn(noise.shape, generator=fresh)
        noised = math.sqrt(bar) * results[i * per_round - 1] + math.sqrt(1 - bar) * noise
        spectrum = torch.fft.fftn(noised, dim=(2, 3, 4)) * low + torch.fft.fftn(z, dim=(2, 3, 4)) * (1 - low)
        want = torch.fft.ifftn(spectrum, dim=(2, 3, 4)).real.float()
        if name.startswith("Euler"):  # what the network sees of x = scale * want
            top = pipe.scheduler.sigmas[0].item()
            want = want * pipe.scheduler.init_noise_sigma / math.sqrt(top**2 + 1)
        torch.testing.assert_close(seen, want, rtol=1e-5, atol=1e-5)


def test_without_the_scale_of_the_solver_the_network_is_shown_the_wrong_size():
    noise, video = randn(2, 2, 4, 8, 16, 16)
    for compat in (None, "diffusers"):
        pipe = make_pipe("EulerDiscreteScheduler", compat=compat, video=video)
        pipe.enable_free_init(num_iters=2)
        denoise(pipe, noise, 6, torch.Generator().manual_seed(1))
        (_, _, _), (_, x, _) = firsts(pipe, 2)
        white = x.diff(dim=-1).std() / math.sqrt(2)  # between neighbours, where low frequencies hardly count
        assert white < 0.3 if compat else abs(white - 1) < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_one_round_is_a_run_without(name):
    pipe = make_pipe(name, **dict(steps_offset=1, timestep_spacing="leading"))
    noise, video = randn(2, 2, 4, 3, 5, 6)
    for fast in (False, True):
        results = []
        for enable in (True, False):
            pipe.enable_free_init(num_iters=1, use_fast_sampling=fast)
            if not enable:
                pipe.disable_free_init()
            assert pipe.free_init_enabled == enable
            eta = 1.0 if name == "DDIMScheduler" else 0.0
            results.append(denoise(pipe, noise, 4, torch.Generator().manual_seed(1), eta=eta))
            results.append(denoise_video(pipe, video, noise, 0.5, 6, torch.Generator().manual_seed(1)))
        assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


# Rounds from a video ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOLVERS)
def test_strength_holds_once_for_every_round(name):
    video, noise, known = randn(3, 2, 4, 8, 16, 16)
    pipe = make_pipe(name, video=known)
    pipe.enable_free_init(num_iters=3)
    denoise_video(pipe, video, noise, 0.8, 10, torch.Generator().manual_seed(1))
    extra = name == "PNDMScheduler"
    rounds = [[t for t, _, _ in pipe.unet.seen[i : i + 8 + extra]] for i in range(0, 3 * (8 + extra), 8 + extra)]
    assert len(pipe.unet.seen) == 3 * (8 + extra) and rounds[0] == rounds[1] == rounds[2]
    assert rounds[0] == pipe.scheduler.timesteps[2:].tolist()
    for _, x, _ in firsts(pipe, 3):
        assert abs(x.std().item() - 1) < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_a_round_noises_the_last_video_to_the_level_of_its_strength(name):
    pipe = make_pipe(name)
    video, noise = randn(2, 1, 4, 4, 6, 5)
    pipe.enable_free_init(num_iters=2, generator=torch.Generator().manual_seed(7))
    denoise_video(pipe, video, noise, 0.5, 6, torch.Generator().manual_seed(1))
    first, second = (x for _, x, _ in firsts(pipe, 2))
    pipe.disable_free_init()
    last = denoise_video(pipe, video, noise, 0.5, 6, torch.Generator().manual_seed(1))  # the first round by itself
    mixed = FreeInit().mix(noise, torch.randn(noise.shape, generator=torch.Generator().manual_seed(7)))
    alpha, sigma = levels(pipe.scheduler, pipe.unet.seen[0][0])
    for seen, clean, eps in ((first, video, noise), (second, last, mixed)):
        torch.testing.assert_close(seen, alpha * clean + sigma * eps, rtol=1e-4, atol=1e-5)


def test_fast_sampling_of_a_video_keeps_the_level():
    video, noise, known = randn(3, 2, 4, 8, 16, 16)
    pipe = make_pipe("DDIMScheduler", video=known, timestep_spacing="trailing")
    for strength, n, counts in ((0.5, 30, (5, 10, 15)), (0.9, 10, (2, 5, 9)), (0.1, 10, (1, 1, 1)), (1, 4, (1, 2, 4))):
        pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
        denoise_video(pipe, video, noise, strength, n)
        assert len(pipe.unet.seen) == sum(counts)
        starts = [pipe.unet.seen[sum(counts[:i])] for i in range(3)]
        for t, x, _ in starts:
            assert t <= starts[2][0]  # never noisier than asked for
            assert abs(x.std().item() - 1) < 0.02


def test_calls_that_are_left_out_at_the_start_stay_out():
    """PNDM's repeated timestep, where the number of steps is enforced."""
    pipe = make_pipe("PNDMScheduler")
    video, noise = randn(2, 1, 4, 4, 8, 8)
    for fast, counts in ((False, (8, 8)), (True, (4, 8))):
        pipe.unet.seen.clear()
        pipe.scheduler.set_timesteps(10)
        pipe.scheduler.set_begin_index(3)
        timesteps = pipe.scheduler.timesteps[3:]
        pipe.enable_free_init(num_iters=2, use_fast_sampling=fast)
        x = pipe.scheduler.add_noise(video, noise, timesteps[:1])
        pipe.denoise(x, timesteps, 8, torch.zeros(1, 1, 1), None, 1.0, 0.0, None, StepCallbacks(),
                     NoisedVideo(0.8, video, noise))
        seen = [t for t, _, _ in pipe.unet.seen]
        assert len(seen) == sum(counts) and seen[counts[0] :] == timesteps.tolist()
        assert seen[0] <= seen[counts[0]] and seen[: counts[0]] == sorted(set(seen[: counts[0]]), reverse=True)


def test_the_published_rounds_take_a_share_of_a_share():
    pipe = make_pipe("DDIMScheduler", compat="diffusers")
    pipe.enable_free_init(num_iters=3)
    video, noise = randn(2, 1, 4, 4, 8, 8)
    denoise_video(pipe, video, noise, 0.8, 10)
    assert len(pipe.unet.seen) == 6 + 4 + 3
    with pytest.raises(ValueError, match="strength 0.3 leaves no step in round 1"):
        denoise_video(pipe, video, noise, 0.3, 10)
    pipe.enable_free_init(num_iters=3, noise="scaled")  # a field that is passed wins over the mode
    denoise_video(pipe, video, noise, 0.3, 10)
    assert len(pipe.unet.seen) == 9


def test_what_cannot_begin_again_is_refused_before_any_work():
    pipe, x = make_pipe("EulerDiscreteScheduler"), randn(1, 4, 2, 4, 4)
    pipe.enable_free_init()
    text = torch.zeros(1, 1, 1)
    rest = (2, text, None, 1.0, 0.0, None, StepCallbacks())
    pipe.scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="know the added noise, which noisy latents do not tell"):
        pipe.denoise(x, pipe.scheduler.timesteps[2:], *rest, NoisedVideo(0.5))
    pipe.scheduler.set_timesteps(timesteps=[800, 300])
    with pytest.raises(ValueError, match="leave out timesteps and sigmas"):
        pipe.denoise(x, pipe.scheduler.timesteps, *rest)
    pipe.enable_free_init(generator=[torch.Generator()] * 2)
    with pytest.raises(ValueError, match="2 generators for 1 videos"):
        denoise(pipe, x)
    pipe = make_pipe("DPMSolverMultistepScheduler", compat="diffusers", timestep_spacing="leading")
    pipe.enable_free_init()
    with pytest.raises(ValueError, match="999 is not one of scheduler.timesteps"):
        denoise(pipe, x)
    assert not pipe.unet.seen


# What goes on around ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["(b f) c h w", "b c f h w"])
def test_a_video_does_not_depend_on_its_batch(axes):
    for own in (False, True):
        pipe = make_pipe("EulerAncestralDiscreteScheduler", axes)
        results = []
        for seeds in ((3, 4), (3,), (4,)):
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            fresh = [torch.Generator().manual_seed(10 + s) for s in seeds] if own else None
            pipe.enable_free_init(generator=fresh)
            noise = torch.cat([randn(1, 4, 3, 4, 5, seed=s) for s in seeds])
            results.append(denoise(pipe, noise, 3, generators))
        torch.testing.assert_close(results[0], torch.cat(results[1:]), rtol=1e-5, atol=1e-5)
        assert (results[1] - results[2]).abs().max() > 0.1


def test_its_own_generator_leaves_that_of_the_call_alone():
    pipe, noise = make_pipe("DDIMScheduler"), randn(1, 4, 3, 4, 5)
    used = [torch.Generator().manual_seed(0) for _ in range(2)]
    pipe.enable_free_init(generator=torch.Generator().manual_seed(1))
    denoise(pipe, noise, 2, used[0])
    pipe.enable_free_init()
    denoise(pipe, noise, 2, used[1])
    untouched = torch.Generator().manual_seed(0).get_state()
    assert torch.equal(used[0].get_state(), untouched) and not torch.equal(used[1].get_state(), untouched)


def test_bar_callbacks_and_texts(monkeypatch):
    pipe, noise = make_pipe("PNDMScheduler"), randn(1, 4, 3, 4, 5)
    pipe.enable_free_init(num_iters=3, use_fast_sampling=True)
    bars, steps, legacy = [], [], []
    make = pipe.progress_bar
    monkeypatch.setattr(pipe, "progress_bar", lambda **kw: bars.append(make(**kw)) or bars[-1])
    pipe.set_progress_bar_config(disable=False, file=open("/dev/null", "w"))  # noqa: SIM115

    def on_end(pipe, step, t, tensors):
        steps.append(step)
        return {"prompt_embeds": tensors["prompt_embeds"] + 1}

    denoise(pipe, noise, 6, callbacks=StepCallbacks(lambda step, t, x: legacy.append(step), 2, on_end,
                                                    ("latents", "prompt_embeds")))
    assert steps == [0, 1, 0, 1, 2, 3, 0, 1, 2, 3, 4, 5] and legacy == [0, 0, 2, 0, 2, 4]
    (bar,) = bars
    assert bar.n == bar.total == 12
    assert [c.max().item() for _, _, c in pipe.unet.seen] == [0, 0, 1] + [0, 0, 1, 2, 3] + [0, 0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(num_iters=0), "num_iters must be a positive integer, not 0"),
        (dict(num_iters=2.0), "num_iters must be a positive integer"),
        (dict(use_fast_sampling="yes"), "use_fast_sampling must be True or False, not 'yes'"),
        (dict(method="butterwort"), "method must be one of .*nearest: 'butterworth'"),
        (dict(order=0), "order must be above 0"),
        (dict(order=math.nan), "order must be a finite number"),
        (dict(spatial_stop_frequency=1.5), r"spatial_stop_frequency must be in \[0, 1\], not 1.5"),
        (dict(temporal_stop_frequency="low"), "temporal_stop_frequency must be a finite number"),
        (dict(generator=7), "generator must be a torch.Generator or a list of them, not 7"),
        (dict(noise="scale"), "noise must be one of scaled, published, not 'scale'"),
        (dict(frequencies="odd"), "frequencies must be one of"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message):
    pipe = make_pipe("DDIMScheduler")
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        pipe.enable_free_init(**arguments)
    assert "\n" not in str(caught.value) and not pipe.free_init_enabled


# FreeU ------------------------------------------------------------------------------------------------------


def test_scale_low_frequencies_against_the_definition():
    for h, w in ((4, 6), (5, 3), (1, 4), (2, 1), (1, 1)):
        x = randn(2, 3, h, w).double()
        spectrum = torch.stack([dft(plane[None] + 0j, -1)[0] for plane in x.flatten(0, 1)])
        for u, v in {(a % h, b % w) for a in (-1, 0) for b in (-1, 0)}:
            spectrum[:, u, v] *= 0.3
        want = torch.stack([dft(plane[None], 1)[0].real for plane in spectrum]) / (h * w)
        torch.testing.assert_close(scale_low_frequencies(x, 0.3).flatten(0, 1), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scale_low_frequencies_in_half_precision(dtype):
    x = randn(2, 3, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last)
    got = scale_low_frequencies(x, 0.3)
    assert got.dtype == dtype and got.stride() == x.stride()
    assert torch.equal(got, scale_low_frequencies(x.double(), 0.3).to(dtype))


def test_free_u_in_the_two_coarsest_levels():
    x, skip = randn(2, 2, 6, 4, 4)
    free_u = FreeU(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    for level, (s, b) in enumerate(((0.9, 1.2), (0.2, 1.4))):
        got, got_skip = free_u(x, skip, level)
        torch.testing.assert_close(got, torch.cat([x[:, :3] * b, x[:, 3:]], dim=1))
        torch.testing.assert_close(got_skip.mean((2, 3)), skip.mean((2, 3)) * s)
        assert torch.equal(got_skip, scale_low_frequencies(skip, s))
    assert all(a is b for a, b in zip(free_u(x, skip, 2), (x, skip), strict=True))


@pytest.mark.parametrize("name, value", [("s1", 0), ("s2", -1), ("b1", math.inf), ("b2", "1"), ("s1", True)])
def test_bad_factors_get_one_line(name, value):
    with pytest.raises(ValueError, match=f"FreeU: {name} must be a number above 0"):
        FreeU(**dict(s1=1, s2=1, b1=1, b2=1) | {name: value})


# Whole pipelines --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory, make_official_folder):
    pipe = DiffusionPipeline.from_pretrained(make_official_folder(tmp_path_factory.mktemp("t2v"), small=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_with_each_technique_and_without(pipe):
    def run():
        return pipe("a cat", num_frames=2, num_inference_steps=2, height=16, width=16,
                    generator=torch.Generator().manual_seed(0), output_type="latent").frames

    plain = run()
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    free_u = run()
    pipe.disable_freeu()
    pipe.enable_free_init(num_iters=2, method="gaussian", use_fast_sampling=True)
    free_init = run()
    assert torch.equal(run(), free_init)
    pipe.disable_free_init()
    assert torch.equal(run(), plain)
    assert (free_u - plain).abs().max() > 0.01 and (free_init - plain).abs().max() > 0.01
    pipe.enable_freeu(1, 1, 1, 1)
    assert torch.equal(run(), plain)
    pipe.disable_freeu()
    empty = TextToVideoSDPipeline(None, None, None, None, None)
    with pytest.raises(ValueError, match="FreeU needs the pipeline's unet, which is None"):
        empty.enable_freeu(1, 1, 1, 1)


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler])
def test_video_to_video_makes_as_many_steps_in_each_round(pipe, cls):
    from minit2v.pipelines import VideoToVideoSDPipeline

    v2v = VideoToVideoSDPipeline.from_pipe(pipe, scheduler=cls.from_config(pipe.scheduler.config))
    v2v.enable_free_init(num_iters=2)
    calls = []
    hook = v2v.unet.register_forward_pre_hook(lambda module, args: calls.append(float(args[1])))
    try:
        v2v("a cat", video=randn(2, 4, 4, 4), strength=0.5, num_inference_steps=4, guidance_scale=1,
            output_type="latent")
        assert len(calls) == (6 if cls is PNDMScheduler else 4) and calls[: len(calls) // 2] * 2 == calls
        calls.clear()
        with pytest.raises(ValueError, match="noisy latents do not tell"):
            v2v("a cat", latents=randn(1, 4, 2, 4, 4), num_inference_steps=4)
        assert not calls
    finally:
        hook.remove()
