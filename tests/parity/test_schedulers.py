"""Whole trajectories against diffusers, to 1e-5 of the sample's size at every step."""

import importlib
import inspect
import itertools
import json
import pkgutil
import sys
import warnings
from types import SimpleNamespace

import diffusers
import mpmath
import numpy as np
import pytest
import torch

import minit2v.schedulers as ours
from minit2v.schedulers.base import PUBLISHED_FIELDS

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TOLERANCE = 1e-5
COUNTS = (1, 2, 3, 7, 25, 50)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (3, 2, 3, 4)
LATENT = {"clip_sample": False}


@pytest.fixture(autouse=True)
def beta_distribution(monkeypatch):
    """diffusers asks scipy for the quantiles of the beta distribution; here mpmath answers."""

    def ppf(p, a, b):
        if p in (0, 1):
            return p
        low, high = mpmath.mpf(0), mpmath.mpf(1)
        for _ in range(45):
            x = (low + high) / 2
            low, high = (x, high) if mpmath.betainc(a, b, 0, x, regularized=True) < p else (low, x)
        return float(x)

    stats = SimpleNamespace(stats=SimpleNamespace(beta=SimpleNamespace(ppf=ppf)))
    for name in list(sys.modules):
        if not name.startswith("diffusers.schedulers.scheduling_"):
            continue
        module = sys.modules[name]
        monkeypatch.setattr(module, "scipy", stats, raising=False)
        monkeypatch.setattr(module, "is_scipy_available", lambda: True)


def network(x, t):
    """Smooth, not linear in x, different at every t; pulls x towards 0 as a denoiser does."""
    t = float(t)
    return (0.2 + t / 1250) * x / (1 + 0.1 * x**2).sqrt() + 0.2 * torch.sin(2 * x + t / 150)


def trajectory(scheduler, n=None, start=0, grid=None, dtype=torch.float32, **step):
    """The samples after each step, beginning with noise or, for start > 0, with a noised sample."""
    scheduler.set_timesteps(n) if grid is None else scheduler.set_timesteps(**grid)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = noise * scheduler.init_noise_sigma
    timesteps = scheduler.timesteps[start:]
    # Without set_begin_index diffusers would start at the second of two like timesteps, and not reach the end.
    twice = len(timesteps) > 1 and timesteps[0] == timesteps[1]
    if (start or twice) and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if start:
        x = scheduler.add_noise(torch.linspace(-1, 1, noise.numel()).reshape(SHAPE).to(dtype), noise, timesteps[:1])
    samples = [x]
    for t in timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **step).prev_sample
        assert x.dtype == dtype
        samples.append(x)
    return scheduler.timesteps, samples


def assert_same(mine, peer, tolerance=TOLERANCE, **run):
    """Both along the same way. A generator is made for each of the two from `generators`, a list of seeds."""
    # With our tables, those that leave the dtype alone are compared in float64.
    if peer.alphas_cumprod.dtype == torch.float64 and type(peer).__name__ in ("DDIMScheduler", "PNDMScheduler"):
        cosine = peer.config.beta_schedule == "squaredcos_cap_v2"  # 1 / alpha up to 2e4
        run["dtype"], tolerance = torch.float64, 1e-6 if cosine else 1e-10
    seeds = run.pop("generators", None)

    def make():
        made = [torch.Generator().manual_seed(s) for s in seeds or ()]
        return {"generator": made if len(made) > 1 else made[0]} if made else {}

    timesteps, samples = trajectory(mine, **make(), **run)
    peer_timesteps, peer_samples = trajectory(peer, **make(), **run)
    assert timesteps.tolist() == pytest.approx(peer_timesteps.tolist(), rel=1e-5, abs=1e-3)
    assert len(samples) == len(peer_samples)
    sizes = [max(1.0, x.abs().max().item()) for x in peer_samples]
    for i, (a, b) in enumerate(zip(samples, peer_samples, strict=True)):
        assert torch.isfinite(b).all()
        # Beginning at a sigma in the hundreds, diffusers keeps the rounding errors of that size to the end.
        size = sizes[i] if sizes[0] < 200 else max(sizes)
        error = (a - b).abs().max() / size
        assert error < tolerance, f"step {i}: {error:.1e}"


def pair(name, **config):
    """Ours, told to do as published, and diffusers'.

    diffusers' tables are float32, and 1 - alpha_bar loses up to four of their seven digits where the noise is small.
    With the schedule of the checkpoints that stays below 1e-5; with the others the peer gets our float64 tables, which
    `test_tables` compares on its own.
    """
    mine = getattr(ours, name)(**config, compat="diffusers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = getattr(diffusers, name)(**config)
    truncated = any(k.startswith("use_") for k in config) and name in WHOLE
    if (config.get("beta_schedule") != "scaled_linear" or config.get("prediction_type") == "sample") and not truncated:
        give_tables(mine, peer)
    return mine, peer


# These cut fractional timesteps off, and where hangs on their own float32 tables.
WHOLE = [f"{n}Scheduler" for n in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")]


def give_tables(mine, peer):
    if "EDM" in type(mine).__name__:
        return
    bar = mine.alphas_cumprod.clone()
    peer.alphas_cumprod = bar
    if hasattr(peer, "final_alpha_cumprod"):
        peer.final_alpha_cumprod = bar[0] if not peer.config.set_alpha_to_one else torch.ones_like(bar[0])
    if hasattr(peer, "initial_alpha_cumprod"):
        peer.initial_alpha_cumprod = bar[0] if not peer.config.set_alpha_to_one else torch.ones_like(bar[0])
    if hasattr(peer, "lambda_t"):
        peer.lambda_t = (bar / (1 - bar)).log() / 2


@pytest.mark.parametrize("name", ours.__all__)
def test_tables(name):
    for config in (*SCHEDULES, BETAS, {"num_train_timesteps": 321}):
        for zero in ({},) if name == "PNDMScheduler" else ({}, ZERO):
            mine, peer = getattr(ours, name)(**config, **zero), getattr(diffusers, name)(**config, **zero)
            assert mine.alphas_cumprod.dtype == torch.float64
            for a, b in ((mine.alphas_cumprod, peer.alphas_cumprod), (mine.betas, peer.betas)):
                torch.testing.assert_close(a, b.double(), rtol=2e-4, atol=1e-6)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def cases(*options):
    """Every combination of one dict from each list."""
    return [dict(itertools.chain(*(o.items() for o in combination))) for combination in itertools.product(*options)]


def ids(config):
    return "-".join(f"{v}"[:20] for v in config.values()) or "default"


SCHEDULES = [SD, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
SPACINGS = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing")]
PREDICTIONS = [{"prediction_type": p} for p in ("epsilon", "v_prediction", "sample")]
ZERO = {"rescale_betas_zero_snr": True}
BETAS = {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()}

DDIM = [
    *cases([LATENT], SCHEDULES, SPACINGS, PREDICTIONS),
    *cases([SD | LATENT | {"set_alpha_to_one": False, "steps_offset": 1}], SPACINGS, PREDICTIONS),
    *cases([SD | LATENT | ZERO], SPACINGS, PREDICTIONS[1:]),
    SD | LATENT | ZERO,
    {},
    {"clip_sample_range": 0.7},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 1.3, "dynamic_thresholding_ratio": 0.8},
    BETAS | LATENT,
    SD | LATENT | {"num_train_timesteps": 600},
]


@pytest.mark.parametrize("config", DDIM, ids=ids)
def test_ddim(config):
    for n in COUNTS:
        assert_same(*pair("DDIMScheduler", **config), n=n)


@pytest.mark.parametrize("config", [*cases([SD | LATENT], SPACINGS, PREDICTIONS), {}], ids=ids)
def test_ddim_with_noise(config):
    for eta, n in ((1.0, 7), (0.4, 25)):
        assert_same(*pair("DDIMScheduler", **config), n=n, eta=eta, generators=[5])
        assert_same(*pair("DDIMScheduler", **config), n=n, eta=eta, generators=[5, 6, 7])
    assert_same(*pair("DDIMScheduler", **config), n=7, eta=1.0, use_clipped_model_output=True, generators=[5])
    assert_same(*pair("DDIMScheduler", **config), n=7, eta=0.5, variance_noise=torch.full(SHAPE, 0.3))


LOW = {"final_sigmas_type": "sigma_min"}
ORDERS = [{"solver_order": n} for n in (1, 2, 3)]
RULES = [{"solver_type": s} for s in ("midpoint", "heun")]
DPM = [
    *cases(SCHEDULES, SPACINGS, PREDICTIONS),
    *cases([SD], ORDERS, RULES, [{}, LOW]),
    *cases([SD | LOW], ORDERS, PREDICTIONS, [{"algorithm_type": "dpmsolver"}]),
    SD | LOW | {"algorithm_type": "dpmsolver", "solver_type": "heun"},
    *cases([SD], [{f"use_{s}": True} for s in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")]),
    *cases([SD | ZERO | PREDICTIONS[1]], SPACINGS, ORDERS),
    SD | ZERO | PREDICTIONS[1] | {"use_karras_sigmas": True},
    SD | {"euler_at_final": True, **LOW},
    SD | {"euler_at_final": True},
    SD | {"lower_order_final": False},
    SD | {"lower_order_final": False, "solver_order": 3, **LOW},
    SD | {"steps_offset": 1, "timestep_spacing": "leading"},
    SD | {"thresholding": True},
    SD | LOW | {"thresholding": True, "algorithm_type": "dpmsolver"},
    *cases([{"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}], SPACINGS),
    BETAS,
    SD | LOW | {"solver_type": "logrho", "algorithm_type": "deis"},
    SD | {"num_train_timesteps": 600},
]


@pytest.mark.parametrize("config", DPM, ids=ids)
def test_dpm(config):
    for n in COUNTS:
        assert_same(*pair("DPMSolverMultistepScheduler", **config), n=n)


@pytest.mark.parametrize("spacing", ["karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas"])
@pytest.mark.parametrize("config", SCHEDULES[1:], ids=ids)
def test_dpm_spacings_of_other_schedules(config, spacing):
    """Against float32 tables, which decide where fractional timesteps are cut off: so to the tables' accuracy."""
    if spacing == "lu_lambdas" and config == SCHEDULES[2]:
        config = BETAS  # with the cosine, 999 or 998 is decided by the last bit of exp(log(sigma)) in diffusers
    for n in COUNTS:
        assert_same(*pair("DPMSolverMultistepScheduler", **config, **{f"use_{spacing}": True}), n=n, tolerance=3e-4)


@pytest.mark.parametrize(
    "config",
    [
        *cases([SD | {"algorithm_type": "sde-dpmsolver++"}], ORDERS, RULES),
        *cases([SD | LOW | {"algorithm_type": "sde-dpmsolver"}], RULES),
        SD | ZERO | PREDICTIONS[1] | {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "trailing"},
        SD | {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "euler_at_final": True},
    ],
    ids=ids,
)
def test_dpm_with_noise(config):
    for n in (3, 7, 25):
        assert_same(*pair("DPMSolverMultistepScheduler", **config), n=n, generators=[1])
        assert_same(*pair("DPMSolverMultistepScheduler", **config), n=n, generators=[1, 2, 3])
    assert_same(*pair("DPMSolverMultistepScheduler", **config), n=7, variance_noise=torch.full(SHAPE, -0.4))


EULER = [
    *cases(SCHEDULES, SPACINGS, PREDICTIONS),
    *cases(SCHEDULES, [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")], [{}, LOW]),
    *cases([SD | ZERO], SPACINGS, PREDICTIONS[1:]),
    SD | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
    SD | {"interpolation_type": "log_linear"},
    SD | {"interpolation_type": "log_linear", "use_karras_sigmas": True},
    SD | {"timestep_type": "continuous", **PREDICTIONS[1]},
    SD | {"timestep_type": "continuous"},
    SD | {"prediction_type": "original_sample"},
    SD | {"timestep_spacing": "leading", "steps_offset": 1},
    SD | LOW,
    BETAS,
]


@pytest.mark.parametrize("config", EULER, ids=ids)
def test_euler(config):
    for n in COUNTS:
        assert_same(*pair("EulerDiscreteScheduler", **config), n=n)


@pytest.mark.parametrize("config", cases([SD], PREDICTIONS, [{}, {"use_karras_sigmas": True}]), ids=ids)
def test_euler_with_churn(config):
    churn = {"s_churn": 8.0, "s_tmin": 0.3, "s_tmax": 9.0, "s_noise": 1.1}
    assert_same(*pair("EulerDiscreteScheduler", **config), n=7, generators=[4], **churn)
    assert_same(*pair("EulerDiscreteScheduler", **config), n=25, generators=[4, 5, 6], s_churn=30.0)


@pytest.mark.parametrize(
    "config",
    [
        *cases(SCHEDULES, SPACINGS, PREDICTIONS[:2]),
        *cases([SD | ZERO | PREDICTIONS[1]], SPACINGS),
        SD | {"timestep_spacing": "leading", "steps_offset": 1},
        BETAS,
    ],
    ids=ids,
)
def test_euler_ancestral(config):
    for n in COUNTS:
        assert_same(*pair("EulerAncestralDiscreteScheduler", **config), n=n, generators=[4])
    assert_same(*pair("EulerAncestralDiscreteScheduler", **config), n=7, generators=[4, 5, 6])


@pytest.mark.parametrize(
    "config",
    cases(
        SCHEDULES,
        SPACINGS,
        PREDICTIONS[:2],
        [{"skip_prk_steps": s} for s in (True, False)],
        [{}, {"set_alpha_to_one": True, "steps_offset": 1}],
    ),
    ids=ids,
)
def test_pndm(config):
    for n in COUNTS if config["skip_prk_steps"] else (4, 7, 25, 50):
        assert_same(*pair("PNDMScheduler", **config), n=n)


@pytest.mark.parametrize("name", ours.__all__)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_starts_in_the_middle(name, spacing):
    config = SD | {"timestep_spacing": spacing} | ({"skip_prk_steps": True} if name == "PNDMScheduler" else {})
    config |= LATENT if name == "DDIMScheduler" else {}
    noise = {"generators": [1]} if "Ancestral" in name else {}
    for n, start in ((7, 3), (25, 10), (25, 24)):
        assert_same(*pair(name, **config), n=n, start=start, **noise)


def test_takes_timesteps_and_sigmas():
    grid = {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}
    sigmas = {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]}
    assert_same(*pair("DPMSolverMultistepScheduler", **SD), grid=grid)
    assert_same(*pair("EulerDiscreteScheduler", **SD), grid=grid)
    assert_same(*pair("EulerDiscreteScheduler", **SD), grid=sigmas)


def test_every_published_field_is_known():
    found = set()
    for module in pkgutil.walk_packages(diffusers.schedulers.__path__, "diffusers.schedulers."):
        try:
            members = vars(importlib.import_module(module.name))
        except ModuleNotFoundError:  # torchsde
            continue
        for cls in members.values():
            if inspect.isclass(cls) and issubclass(cls, diffusers.ConfigMixin) and cls.__module__ == module.name:
                found |= set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}
    assert len(found) > 90
    assert found <= PUBLISHED_FIELDS
    assert PUBLISHED_FIELDS - found <= {"noise_sampler_seed"}


@pytest.mark.parametrize("name", ours.__all__)
def test_has_the_published_defaults(name):
    mine, peer = getattr(ours, name)(), getattr(diffusers, name)()
    theirs = {k: v for k, v in peer.config.items() if k != "_use_default_values"}
    assert list(theirs) == list(mine.field_defaults())[: len(theirs)]  # by position too
    assert {k: mine.config[k] for k in theirs} == theirs
    assert set(peer.config["_use_default_values"]) <= set(mine.config["_use_default_values"])


@pytest.mark.parametrize("name", ours.__all__)
@pytest.mark.parametrize("repo", ["ms-1.7b", "zeroscope_v2_576w", "sd15", "rv51"])
def test_loads_every_folder_into_every_class(name, repo, published_config, tmp_path):
    file = published_config(repo, "scheduler")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    _, peer = pair(name)
    peer = type(peer).from_pretrained(tmp_path)
    for mine in (getattr(ours, name).from_pretrained(tmp_path, compat=None), getattr(ours, name).from_config(file)):
        _same_config(mine, peer)
    n = 8  # leading and linspace_open: grid and ratio are the same
    assert_same(mine, peer, n=n, **({"generators": [3]} if "Ancestral" in name else {}))


def _same_config(mine, peer):
    extra = mine.field_defaults().keys() - {k for k in peer.config}
    a = {k: v for k, v in mine.config.items() if k not in extra and k != "_use_default_values"}
    b = {k: v for k, v in peer.config.items() if k != "_use_default_values"}
    assert a == b
    unset = set(mine.config.get("_use_default_values", ())) - extra
    assert unset == set(peer.config.get("_use_default_values", ()))


CHAINS = list(itertools.permutations(ours.__all__, 2))


@pytest.mark.parametrize("first,second", CHAINS)
def test_from_config_across_classes(first, second, published_config):
    """A field nobody set falls to the next class's default; hidden ones travel and come back."""
    passed = SD | ({"steps_offset": 1} if first != "DDIMScheduler" else {"clip_sample": False})
    mine, peer = getattr(ours, first)(**passed), getattr(diffusers, first)(**passed)
    mine, peer = getattr(ours, second).from_config(mine.config), getattr(diffusers, second).from_config(peer.config)
    _same_config(mine, peer)
    mine, peer = getattr(ours, first).from_config(mine.config), getattr(diffusers, first).from_config(peer.config)
    _same_config(mine, peer)
    file = published_config("ms-1.7b", "scheduler")
    mine = getattr(ours, second).from_config(getattr(ours, first).from_config(file).config, beta_start=0.002)
    peer = getattr(diffusers, second).from_config(
        getattr(diffusers, first).from_config(file).config, beta_start=0.002
    )
    _same_config(mine, peer)


@pytest.mark.parametrize("name", ours.__all__)
def test_files_go_both_ways(name, tmp_path):
    passed = SD | {"steps_offset": 1}
    mine, peer = getattr(ours, name)(**passed), getattr(diffusers, name)(**passed)
    mine.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    a = json.loads((tmp_path / "ours/scheduler_config.json").read_text())
    b = json.loads((tmp_path / "theirs/scheduler_config.json").read_text())
    extra = mine.field_defaults().keys() - b.keys()
    assert {k: v for k, v in a.items() if k not in extra} == {k: v for k, v in b.items() if k != "_diffusers_version"}
    # After a file every field counts as set: another class takes them over.
    for other in ours.__all__:
        reloaded = getattr(ours, other).from_pretrained(tmp_path / "theirs")
        _same_config(reloaded, getattr(diffusers, other).from_pretrained(tmp_path / "theirs"))
        there = getattr(diffusers, other).from_pretrained(tmp_path / "ours")
        back = getattr(ours, other).from_pretrained(tmp_path / "ours")
        fields = there.config.keys() & back.field_defaults().keys()
        assert {k: back.config[k] for k in fields} == {k: there.config[k] for k in fields}


def test_configs_in_memory_go_both_ways():
    mine = ours.DDIMScheduler(**SD)
    there = diffusers.DPMSolverMultistepScheduler.from_config(mine.config)
    expected = diffusers.DPMSolverMultistepScheduler.from_config(diffusers.DDIMScheduler(**SD).config)
    assert there.config.timestep_spacing == expected.config.timestep_spacing == "linspace"
    back = ours.PNDMScheduler.from_config(there.config)
    assert back.config.timestep_spacing == "leading" and back.config.beta_start == SD["beta_start"]


@pytest.mark.parametrize("name", ours.__all__)
@pytest.mark.parametrize("config", [{}, SD | {"prediction_type": "v_prediction"}], ids=ids)
def test_add_noise(name, config):
    mine, peer = pair(name, **config)
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    for scheduler in (mine, peer):
        scheduler.set_timesteps(25)
    t = peer.timesteps[[3, 20, 11]]
    for dtype in (torch.float32, torch.float64):
        got = mine.add_noise(x.to(dtype), noise.to(dtype), t)
        assert got.dtype == dtype
        close(got, peer.add_noise(x.to(dtype), noise.to(dtype), t))
    if hasattr(peer, "set_begin_index"):
        for scheduler in (mine, peer):
            scheduler.set_begin_index(4)
        close(mine.add_noise(x, noise, t[:1]), peer.add_noise(x, noise, t[:1]))
        for scheduler in (mine, peer):  # after a step: the noise of the place where it stands
            scheduler.scale_model_input(x, scheduler.timesteps[4])
            scheduler.step(x, scheduler.timesteps[4], x)
        assert mine.step_index == peer.step_index == 5
        close(mine.add_noise(x, noise, t[:1]), peer.add_noise(x, noise, t[:1]))


def test_repeated_timesteps_start_at_the_second():
    for name in ("DPMSolverMultistepScheduler", "EulerDiscreteScheduler"):
        mine, peer = pair(name, **SD)
        for scheduler in (mine, peer):
            scheduler.set_timesteps(timesteps=[900, 700, 700, 300])
            assert scheduler.index_for_timestep(scheduler.timesteps[1]) == 2
        assert mine.index_for_timestep(mine.timesteps[3]) == peer.index_for_timestep(peer.timesteps[3]) == 3


def test_velocity():
    mine, peer = pair("DDIMScheduler", **SD)
    x, noise, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([0, 500, 999])
    close(mine.get_velocity(x, noise, t), peer.get_velocity(x, noise, t))


def test_outputs():
    for name in ours.__all__:
        mine, peer = pair(name, **SD)
        x = torch.randn(SHAPE)
        for scheduler in (mine, peer):
            scheduler.set_timesteps(5)
        t = peer.timesteps[0]
        for scheduler in (mine, peer):
            scheduler.scale_model_input(x, t)
        a, b = mine.step(x, t, x, return_dict=False), peer.step(x, t, x, return_dict=False)
        assert isinstance(a, tuple) and len(a) == len(b)
        if len(b) == 2:
            close(a[1], b[1])
        for scheduler in (mine, peer):
            scheduler.set_timesteps(5)
            scheduler.scale_model_input(x, t)
        out = mine.step(x, t, x)
        assert out[0] is out.prev_sample is out["prev_sample"]
        assert len(out.to_tuple()) == len(a)
