"""Every solver: its order of convergence, its distribution, and what a run must stand."""

import copy
import importlib
import inspect
import io
import itertools
import json
import math
import pickle
import re
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minit2v import schedulers
from minit2v.schedulers.dpm_sde import BrownianPath
from minit2v.schedulers.names import ENDINGS, NAMES, scheduler_of, solver_of, table

ALL = [getattr(schedulers, name) for name in schedulers.__all__]
DOWN = [cls for cls in ALL if cls.__name__ != "DDIMInverseScheduler"]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield importlib.import_module("solvers")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        sys.modules.pop("solvers", None)


@pytest.fixture(scope="module")
def measured(bench):
    return bench.Measured(bench.Mixture(), videos=4)


def make(cls, **fields):
    """For the models of Stable Diffusion and ModelScope."""
    known = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
        "skip_prk_steps": True,
    }  # fmt: skip
    return cls(**{k: v for k, v in known.items() if k in cls.field_defaults()} | fields)


def graded(n, high=14.6, low=0.03, halvings=10):
    """n even steps in lambda. The first is cut into halves, so that what a multistep solver lacks at its start, where
    it does not know enough predictions for its order, is too small to be seen beside the rest."""
    even = np.linspace(-math.log(high), -math.log(low), n + 1)
    start = even[0] + (even[1] - even[0]) * 2.0 ** np.arange(-halvings, 0)
    return np.exp(-np.concatenate([even[:1], start, even[1:]])).tolist()


# --- the order

FULL = {"lower_order_final": False}
LOW = FULL | {"final_sigmas_type": "sigma_min"}
EPS = {"algorithm_type": "dpmsolver"}
ORDERS = [
    ("euler", {}, 1), ("heun", {}, 2), ("dpm2", {}, 2), ("lms", {}, 4), ("deis", FULL | {"solver_order": 1}, 1),
    *(("dpm++-2m", LOW | kind | {"solver_order": n}, n) for n in (1, 2, 3) for kind in ({}, EPS)),
    *(("dpm++-2m", LOW | kind | {"solver_type": "heun"}, 2) for kind in ({}, EPS)),
    *(("dpm++-2s", LOW | kind | {"solver_order": n}, n) for n in (1, 2, 3) for kind in ({}, EPS)),
    *(("dpm++-2s", LOW | {"solver_type": "heun", "solver_order": n}, n) for n in (2, 3)),
    *(("deis", FULL | {"solver_order": n}, n) for n in (2, 3)),
    # The corrector is worth an order.
    *(("unipc", FULL | {"solver_order": n, "predict_x0": x0}, n + 1) for n in (1, 2, 3) for x0 in (True, False)),
    ("unipc", FULL | {"solver_type": "bh1"}, 3),
    ("unipc", FULL | {"disable_corrector": list(range(500))}, 2),
    *(("sa", FULL | {"predictor_order": n, "corrector_order": n, "tau_func": lambda t: 0.0}, n) for n in (1, 2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("name,fields,order", ORDERS, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(ORDERS)])
def test_the_error_falls_as_the_paper_says(name, fields, order, measured):
    single = name == "dpm++-2s"
    counts = {"dpm++-2s": (192, 384), "sa": (30, 60) if order > 2 else (80, 160), "lms": (100, 200)}
    counts = counts.get(name, (50, 100))
    errors = []
    for n in counts:
        scheduler = scheduler_of(name)
        scheduler = type(scheduler).from_config(scheduler.config, **fields)
        scheduler.set_timesteps(sigmas=graded(n, halvings=0 if single else 10))
        errors.append(measured.error(scheduler))
    found = math.log2(errors[0] / errors[1])
    assert found > order - 0.2, errors
    if order == 1:
        assert found < 1.3


@pytest.mark.parametrize("name,order", [("EDMEulerScheduler", 1),
                                        *(("EDMDPMSolverMultistepScheduler", n) for n in (1, 2, 3))])  # fmt: skip
def test_the_order_of_solvers_for_edm(name, order, measured):
    """The same mixture, told as such a network does: x_0 = c_skip x + c_out F (arXiv:2206.00364, table 1)."""
    fields = FULL | {"solver_order": order} if "DPM" in name else {}
    errors, data = [], 0.5
    for n in (50, 100):
        scheduler = getattr(schedulers, name)(**fields)
        scheduler.set_timesteps(sigmas=graded(n))
        levels = scheduler.sigmas.tolist()
        x = levels[0] * measured.noise
        for sigma, t in zip(levels, scheduler.timesteps, strict=False):
            alpha = 1 / math.hypot(sigma, 1)
            x0 = measured.mixture.x0(alpha * x, alpha, alpha * sigma)
            assert 0.6 < scheduler.scale_model_input(x, t).std() < 1.6
            out = (x0 - data**2 / (sigma**2 + data**2) * x) * math.hypot(sigma, data) / (sigma * data)
            x = scheduler.step(out, t, x).prev_sample
        errors.append((x - measured.truth(levels[0], levels[-1])).square().mean().sqrt().item())
    assert order - 0.2 < math.log2(errors[0] / errors[1]) < order + 1.3, errors


def test_solvers_on_the_table_of_timesteps(bench, measured):
    """Their grid is whole timesteps: DDIM is of first order, F-PNDM of second (its theorem), TCD without noise is DDIM.

    Down to timestep 200: below, the noise is not a smooth function of the timestep, and PNDM has no full order in any.
    """

    def error(name, n):
        scheduler, mixture = scheduler_of(name, bench.MODEL), measured.mixture
        scheduler.set_timesteps(n)
        alpha, sigma = first = bench.level(scheduler, 0)
        x = sigma * measured.noise
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = bench.level(scheduler, i)
            if t == 200:
                break
            x = scheduler.step((x - alpha * mixture.x0(x, alpha, sigma)) / sigma, t, x).prev_sample
        return (x / alpha - measured.truth(first[1] / first[0], sigma / alpha)).square().mean().sqrt().item()

    for name in ("ddim", "plms", "pndm"):
        assert math.log2(error(name, 50) / error(name, 100)) > {"ddim": 0.8}.get(name, 1.8)
    ddim = scheduler_of("ddim", bench.MODEL | {"steps_offset": 19})  # LCM's and TCD's grid: 999, 979, ..., 19
    tcd = scheduler_of("tcd", bench.MODEL)
    for scheduler in (ddim, tcd):
        scheduler.set_timesteps(50)
    assert ddim.timesteps.tolist() == tcd.timesteps.tolist()
    assert measured.error(tcd, eta=0.0) == pytest.approx(measured.error(ddim), rel=1e-9)


def test_the_published_third_order_is_of_second(measured):
    errors = []
    for n in (120, 240):
        scheduler = scheduler_of("dpm++-3m")
        scheduler = type(scheduler).from_config(scheduler.config, **LOW, third_order="published")
        scheduler.set_timesteps(sigmas=graded(n))
        errors.append(measured.error(scheduler))
    assert math.log2(errors[0] / errors[1]) < 2.3


def test_ddim_backwards_and_down_again(bench):
    """From data up to its noise and down: the data again, the nearer the finer the grid."""
    mixture = bench.Mixture()
    x = mixture.sample(4, torch.Generator().manual_seed(0))
    misses = []
    for n in (50, 200):
        up = scheduler_of("DDIMInverseScheduler", bench.MODEL)
        down = scheduler_of("ddim", bench.MODEL)
        y = x
        for scheduler in (up, down):
            scheduler.set_timesteps(n)
            for t in scheduler.timesteps:
                s = scheduler._lower_timestep(int(t)) if scheduler is up else int(t)
                bar = scheduler._alpha_bar(s)
                alpha, sigma = bar**0.5, (1 - bar) ** 0.5
                eps = (y - alpha * mixture.x0(y, alpha, sigma)) / sigma
                y = scheduler.step(eps, t, y).prev_sample
        misses.append((y - x).abs().max().item())
    assert misses[1] < misses[0] / 3 and misses[1] < 0.1


# --- the distribution


@pytest.mark.parametrize("name,fields,step", [
    ("ddpm", {}, {}), ("ddim", {}, {"eta": 1.0}), ("euler-a", {}, {}), ("dpm2-a", {}, {}), ("dpm++-sde", {}, {}),
    ("dpm++-2m-sde", {}, {}), ("dpm++-3m-sde", {}, {}), ("sa", {}, {}), ("sa", {"tau_func": lambda t: 1.0}, {}),
    ("sa", {"algorithm_type": "noise_prediction"}, {}), ("dpm++-2s", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ("dpm++-2s", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}), ("tcd", {}, {"eta": 0.05}),
])  # fmt: skip
def test_stochastic_solvers_make_the_data(name, fields, step, bench):
    """Two peaks on a line, 4000 samples: mean, width and fourth moment."""
    mixture = bench.Mixture((1,), modes=2, width=0.3, seed=3)
    mixture.means = torch.tensor([[-0.7], [0.9]], dtype=torch.float64)
    scheduler = scheduler_of(name, bench.MODEL)
    scheduler = type(scheduler).from_config(scheduler.config, **fields)
    scheduler.set_timesteps({"dpm2-a": 200, "dpm++-sde": 200, "tcd": 50}.get(name, 400))
    g = torch.Generator().manual_seed(0)
    alpha, sigma = bench.level(scheduler, 0)
    clean = mixture.sample(4000, g)
    noisy = clean + sigma / alpha * torch.randn(4000, 1, generator=g, dtype=torch.float64)
    found = bench.run(scheduler, mixture.x0, noisy, **step, **with_generator(scheduler, g))
    assert abs(found.mean() - 0.1) < 0.045
    width = math.sqrt(0.3**2 + 0.8**2)
    assert abs(found.std() - width) < 0.03
    fourth, true = ((found - 0.1) ** 4).mean() / width**4, 0.8**4 + 6 * 0.8**2 * 0.3**2 + 3 * 0.3**4
    allowed = {"tcd": 0.2, "dpm++-sde": 0.14, "dpm++-2s": 0.14}.get(name, 0.08)  # their bias falls as the step
    assert abs(fourth - true / width**4) < allowed


def with_generator(scheduler, generator):
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_consistency_solvers_are_exact_for_a_consistent_model(name, bench):
    """For data of one point, any prediction of x_0 is the consistency function."""
    scheduler = scheduler_of(name, bench.MODEL | {"set_alpha_to_one": True})
    scheduler.set_timesteps(4)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bench.run(scheduler, lambda x, alpha, sigma: torch.full_like(x, 0.4), x, generator=torch.Generator())
    assert (found - 0.4).abs().max() < 1e-3


def test_one_brownian_path_whatever_the_steps(bench, measured):
    """The same seed with more steps goes to the same video; the grid's own noise does not."""

    def end(name, n):
        scheduler = scheduler_of(name, bench.MODEL)
        scheduler.set_timesteps(n)
        g = torch.Generator().manual_seed(7)
        return bench.run(scheduler, measured.mixture.x0, 14.6 * measured.noise, generator=g)

    assert (end("dpm++-sde", 60) - end("dpm++-sde", 120)).std() < 0.1
    assert (end("dpm2-a", 60) - end("dpm2-a", 120)).std() > 0.2


def test_the_path_is_brownian():
    path, places = BrownianPath(range(800), (1, 1)), np.linspace(-2, 3, 9)
    values = torch.cat([path(p) for p in places], 1)
    steps = values.diff(dim=1) / torch.from_numpy(np.sqrt(np.diff(np.exp(2 * places))))
    assert (steps.mean(0).abs() < 0.14).all() and (steps.std(0) - 1).abs().max() < 0.1
    off = torch.corrcoef(steps.T) - torch.eye(8)
    assert off.abs().max() < 0.14
    one, other = BrownianPath([5], (2, 3)), BrownianPath([5, 6], (2, 3))
    assert torch.equal(one(0.3), other(0.3)[:2])  # a seed's path does not depend on its neighbours
    assert torch.equal(one(-1.1), BrownianPath([5], (2, 3))(-1.1))  # nor on what was asked before


# --- one model, four ways to say it


@pytest.mark.parametrize("cls", [cls for cls in DOWN if "EDM" not in cls.__name__], ids=lambda c: c.__name__)
@pytest.mark.parametrize("zero", [False, True])
def test_predictions_agree(cls, zero, bench):
    """epsilon, v and sample of one model make one video, also where the schedule ends in pure noise."""
    fields = {"rescale_betas_zero_snr": True} if zero else {}
    if zero and "timestep_spacing" in cls.field_defaults():
        fields["timestep_spacing"] = "trailing"
    mixture, ends = bench.Mixture(), []
    noise = torch.randn(2, *mixture.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("v_prediction", "sample", "epsilon"):
        if zero and kind == "epsilon" and cls.__name__.startswith(("DDIM", "DDPM", "LCM", "TCD")):
            with pytest.raises(ValueError, match="rescale_betas_zero_snr.*epsilon"):
                make(cls, **fields, prediction_type=kind).set_timesteps(12)
            continue
        scheduler = make(cls, **fields, prediction_type=kind)
        scheduler.set_timesteps(12)
        x = noise * bench.level(scheduler, 0)[1] * (scheduler.init_noise_sigma if hasattr(scheduler, "_begin") else 1)
        for i, t in enumerate(scheduler.timesteps):
            alpha, sigma = bench.level(scheduler, i)
            seen = scheduler.scale_model_input(x, t)
            x0 = mixture.x0(seen, alpha, sigma)
            eps = (seen - alpha * x0) / sigma
            out = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}[kind]
            more = with_generator(scheduler, torch.Generator().manual_seed(i))
            x = scheduler.step(out, t, x, **more).prev_sample
        ends.append(x)
    for other in ends[1:]:
        assert (other - ends[0]).abs().max() < 1e-6
    assert 0.4 < ends[0].std() < 1.3  # the data's is 0.7


# --- a run, and what it must stand

SHAPES = [(2, 4, 3, 2, 2), (6, 4, 2, 2)]  # b c f h w, and frames merged into the batch


def network(x, t):
    return torch.tanh(x * (0.3 + float(t) / 2000))


def begin(scheduler, shape, n=8, dtype=torch.float32, start=0):
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    g = torch.Generator().manual_seed(9)
    return torch.randn(shape, generator=g).to(dtype) * scheduler.init_noise_sigma


def go(scheduler, x, places, generator):
    for i in places:
        t = scheduler.timesteps[i]
        seen = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(seen, t), t, x, **with_generator(scheduler, generator)).prev_sample
    return x


@pytest.mark.parametrize("cls", DOWN, ids=lambda c: c.__name__)
def test_the_state_of_a_run(cls):
    """Saved, and loaded by another scheduler of the config, also through a file: the same video to the bit."""
    for shape, dtype in ((SHAPES[0], torch.float32), (SHAPES[1], torch.bfloat16)):
        whole, first, second = make(cls), make(cls), make(cls)
        x = begin(whole, shape, dtype=dtype)
        calls = len(whole.timesteps)
        g = torch.Generator().manual_seed(1)
        expected = go(whole, x, range(calls), g)
        for cut in (3, 4):
            y = begin(first, shape, dtype=dtype)
            g = torch.Generator().manual_seed(1)
            y = go(first, y, range(cut), g)
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            second.load_state_dict(torch.load(file, weights_only=True))
            middle = g.get_state()
            assert torch.equal(go(second, y, range(cut, calls), g), expected)
            for twin in (pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
                g.set_state(middle)
                assert torch.equal(go(twin, y, range(cut, calls), g), expected)


def test_a_state_of_another_scheduler_is_refused():
    a, b = make(schedulers.DDIMScheduler), make(schedulers.LMSDiscreteScheduler)
    with pytest.raises(ValueError, match="the state belongs to a DDIMScheduler, not to a LMSDiscreteScheduler"):
        b.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="beta_end=0.012, not 0.02"):
        make(schedulers.DDIMScheduler, beta_end=0.02).load_state_dict(a.state_dict())


@pytest.mark.parametrize("cls", DOWN, ids=lambda c: c.__name__)
def test_a_video_does_not_depend_on_its_neighbours(cls):
    for shape in SHAPES:
        rows, scheduler = shape[0] // 2, make(cls)
        x = begin(scheduler, shape)

        def end(x, seeds, scheduler=scheduler):
            scheduler.set_timesteps(4)
            return go(scheduler, x, range(len(scheduler.timesteps)), [torch.Generator().manual_seed(s) for s in seeds])

        together = end(x, [3, 4])
        assert torch.equal(together, torch.cat([end(x[:rows], [3]), end(x[rows:], [4])]))
    if with_generator(scheduler, 0) and "eta" not in inspect.signature(scheduler.step).parameters:
        noisy = "Ancestral" in cls.__name__ or cls.__name__[:4] in ("DDPM", "LCMS", "SASo") or "SDE" in cls.__name__
        assert torch.equal(together, end(x, [5, 6])) != noisy


class Waits(TorchDispatchMode):
    """Counts what reads a value of a tensor that is not on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.device.type != "cpu"]
        name = func.name()
        if tensors and ("_local_scalar_dense" in name or "is_nonzero" in name or "nonzero" in name):
            self.found.append(name)
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", ALL, ids=lambda c: c.__name__)
def test_no_step_waits_for_the_device(cls):
    """On the meta device, where there is nothing to read: every value that a step needs is known on the host."""
    scheduler = make(cls)
    scheduler.set_timesteps(6, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    x = torch.empty(2, 4, 3, 2, 2, device="meta")
    g = torch.Generator().manual_seed(0)
    for start in (0, 2):
        with Waits() as waits:
            if start:
                scheduler.set_timesteps(6, device="meta")
            for t in scheduler.timesteps[start * scheduler.order :]:
                seen = scheduler.scale_model_input(x, t)
                x = scheduler.step(seen, t, x, **with_generator(scheduler, g)).prev_sample
        assert not waits.found and x.device.type == "meta"


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_compiled_step(name):
    """torch.compile of a step makes the same video."""
    plain, compiled = scheduler_of(name), scheduler_of(name)
    x = begin(plain, SHAPES[0])
    begin(compiled, SHAPES[0])
    step = torch.compile(compiled.step, backend="eager")
    y = x
    for i in range(3):
        t = plain.timesteps[i]
        x = plain.step(network(plain.scale_model_input(x, t), t), t, x).prev_sample
        y = step(network(compiled.scale_model_input(y, t), t), t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("name,microseconds", [("ddim", 60), ("euler", 60)])
def test_what_a_step_costs_the_host(name, microseconds):
    """The best of many, on latents of a few numbers. With room for a slow machine: 60 on an idle one."""
    scheduler, best = scheduler_of(name, {"clip_sample": False}), math.inf
    x = torch.zeros(1, 4, 1, 2, 2)
    for _ in range(20):
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            began = time.perf_counter()
            scheduler.step(x, t, x)
            best = min(best, time.perf_counter() - began)
    assert best * 1e6 < 2 * microseconds


@pytest.mark.parametrize("cls", [cls for cls in DOWN if "EDM" not in cls.__name__], ids=lambda c: c.__name__)
def test_noise_for_any_timestep_at_any_time(cls):
    """Training with validation between: after a run, and in the middle of one, with or without set_begin_index."""
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(3, 4, 2, 2, generator=g), torch.randn(3, 4, 2, 2, generator=g)
    t = torch.tensor([1, 500, 998])
    expected = make(cls).add_noise(x, noise, t)
    for start, stop in ((0, 4), (0, 2), (2, 4)):
        scheduler = make(cls)
        y = begin(scheduler, (2, 4, 2, 2), n=4, start=start * cls.order)
        go(scheduler, y, range(start * cls.order, min(stop * cls.order, len(scheduler.timesteps))), torch.Generator())
        torch.testing.assert_close(scheduler.add_noise(x, noise, t), expected, rtol=1e-5, atol=1e-5)
        if hasattr(scheduler, "sigmas"):
            with pytest.raises(ValueError, match="timesteps must be in 0 ... 999"):
                scheduler.add_noise(x, noise, torch.tensor([1, 500, 1000]))


@pytest.mark.parametrize("cls", [cls for cls in DOWN if "sigmas" in vars(make(cls))], ids=lambda c: c.__name__)
def test_sigmas_and_timesteps_of_the_caller(cls):
    scheduler, levels = make(cls), [9.0, 3.0, 1.0, 0.2, 0.0]
    scheduler.set_timesteps(sigmas=levels)
    assert scheduler.num_inference_steps == 4
    assert scheduler.sigmas[:: cls.order].tolist()[:4] == levels[:4] and scheduler.sigmas[-1] == 0
    if "EDM" not in cls.__name__:
        scheduler.set_timesteps(timesteps=[900, 600, 100])
        assert scheduler.timesteps[:: cls.order].tolist() == [900, 600, 100]
    for wrong in ({}, {"num_inference_steps": 3, "sigmas": levels}):
        with pytest.raises(ValueError, match="one of them"):
            scheduler.set_timesteps(**wrong)
    with pytest.raises(ValueError, match="sigmas must be a list of numbers that never rise"):
        scheduler.set_timesteps(sigmas=[1.0, 3.0])


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_timesteps_of_the_caller(name):
    scheduler = make(getattr(schedulers, name))
    scheduler.set_timesteps(timesteps=[999, 500, 19])
    assert scheduler.timesteps.tolist() == [999, 500, 19] and scheduler.num_inference_steps == 3
    for wrong in ([999, 500.5, 3], [999, 500, 500]):
        with pytest.raises(ValueError, match="whole timesteps, each once"):
            scheduler.set_timesteps(timesteps=wrong)


def test_consistency_grids_are_checked():
    lcm = make(schedulers.LCMScheduler)
    for wrong in ({"num_inference_steps": 60}, {"num_inference_steps": 20, "strength": 0.3}):
        with pytest.raises(ValueError, match="the distillation has"):
            lcm.set_timesteps(**wrong)
    lcm.set_timesteps(60, original_inference_steps=100)
    assert len(lcm.timesteps) == 60
    with pytest.raises(ValueError, match="eta must be between 0 and 1"):
        tcd = make(schedulers.TCDScheduler)
        tcd.set_timesteps(4)
        tcd.step(torch.ones(1, 2), 999, torch.ones(1, 2), eta=1.2)


def test_a_function_does_not_go_into_a_file(tmp_path):
    with pytest.raises(ValueError, match="SASolverScheduler: tau_func is a function, which cannot be saved in a file"):
        make(schedulers.SASolverScheduler, tau_func=lambda t: 1.0).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# --- names


def test_every_name_leads_to_its_class():
    for row in NAMES:
        for name in {row.name, row.name.upper(), row.a1111, row.comfyui, f"sample_{row.comfyui}"} - {"", "sample_"}:
            cls, fields = solver_of(name)
            assert cls.__name__ == row.solver
            assert row.fields.items() <= fields.items()
        assert row.name in table() and row.solver in table()
    for cls in ALL:
        assert solver_of(cls.__name__) == (cls, {})


def test_endings():
    for name in ("dpm++-2m-karras", "DPM++ 2M Karras", "dpmpp_2m_karras", "sample_dpmpp_2m-karras"):
        assert scheduler_of(name).config.use_karras_sigmas
    assert scheduler_of("euler_sgm_uniform").config.timestep_spacing == "trailing"
    for row, ending in itertools.product(NAMES, ENDINGS):
        field = next(iter(ENDINGS[ending]))
        if field in getattr(schedulers, row.solver).field_defaults():
            assert scheduler_of(f"{row.name}-{ending}").config[field]
        else:
            with pytest.raises(ValueError, match=f"leave out the ending -{ending}, because .* has no {field}"):
                scheduler_of(f"{row.name}-{ending}")
    # The name is meant, whatever the model's file says.
    assert not scheduler_of("lms-exponential", {"use_karras_sigmas": True}).config.use_karras_sigmas
    assert scheduler_of("lms", {"use_karras_sigmas": True, "beta_end": 0.012}).config.use_karras_sigmas


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="no scheduler is called 'dpm--2m' .nearest: 'dpm"):
        scheduler_of("dpm--2m")


# --- configs


def test_every_published_config_loads_by_its_class(published_config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for repo in ("ms-1.7b", "zeroscope_v2_576w", "sd15", "rv51"):
            file = published_config(repo, "scheduler")
            scheduler = getattr(schedulers, file["_class_name"]).from_config(file)
            assert scheduler.config.beta_end == 0.012
            for cls in (c for c in ALL if "EDM" not in c.__name__):
                own = cls.from_config(file)
                own.set_timesteps(10)
                own.save_pretrained  # noqa: B018


@pytest.mark.parametrize("first", ALL, ids=lambda c: c.__name__)
def test_every_class_makes_every_other(first, tmp_path):
    """from_config, from memory and from what save_pretrained wrote."""
    scheduler = make(first)
    scheduler.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "scheduler_config.json").read_text())
    for second, config in itertools.product(ALL, (scheduler.config, file)):
        if first is second or ("EDM" in first.__name__) == ("EDM" in second.__name__):
            other = second.from_config(config)
            other.set_timesteps(5)


# --- the page


def test_the_page_shows_what_was_measured(bench):
    page = (ROOT / "docs" / "samplers.md").read_text()
    assert bench.table(json.loads(bench.RESULT.read_text())["curves"]) in page
    right = json.loads(bench.SHAPES.read_text())
    assert all(rows.keys() == {*bench.DETERMINISTIC, *bench.STOCHASTIC} for rows in right["right"].values())
    solvers = {solver_of(name)[0] for name in (*bench.DETERMINISTIC, *bench.STOCHASTIC)}
    assert solvers == {cls for cls in DOWN if "EDM" not in cls.__name__}
    assert all(n == right["videos"] for rows in right["right"].values() for points in rows.values()
               for calls, n in points if calls > 15)  # fmt: skip


def test_the_page_adds_a_solver_in_25_lines(measured):
    page = (ROOT / "docs" / "samplers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    names: dict = {}
    for code in blocks:
        exec(compile(code, "samplers.md", "exec"), names)
    assert torch.isfinite(torch.as_tensor(names["video"])).all()
    source = blocks[-1]
    assert len(source[source.index("class AB2") : source.index("pipe =")].rstrip().splitlines()) <= 25
    errors = []
    for n in (50, 100):
        scheduler = scheduler_of("euler")
        scheduler = names["AB2"].from_config(scheduler.config)
        scheduler.set_timesteps(sigmas=graded(n))
        errors.append(measured.error(scheduler))
    assert math.log2(errors[0] / errors[1]) > 1.8
    table_rows = {row.name for row in NAMES}
    listed = set(re.findall(r"`([a-z0-9+-]+)`", page[page.index("| name |") : page.index("There are three more")]))
    assert table_rows - listed <= {"dpm++-2m-sde-heun", "unipc-bh2"}
