"""Whole trajectories against diffusers, to 1e-5 of the sample's size at every step."""

import functools
import importlib
import inspect
import itertools
import json
import math
import pkgutil
import sys
import warnings
from types import SimpleNamespace

import diffusers
import diffusers.schedulers.scheduling_euler_discrete
import numpy as np
import pytest
import torch

import minit2v.schedulers as ours
from minit2v.schedulers.base import DIFFUSERS_FIELDS
from minit2v.schedulers.grids import beta_quantiles

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

TOLERANCE = 1e-5
COUNTS = (1, 2, 3, 7, 25, 50)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (3, 2, 3, 4)
LATENT = {"clip_sample": False}


# --- the peer


@functools.cache
def beta_quantile(p, a, b):
    """In the place of scipy, which the reference asks (tests/test_schedulers.py compares it with mpmath)."""
    return float(beta_quantiles(np.array([p]), a)[0])


GAUSS = np.polynomial.legendre.leggauss(4)


def quad(f, a, b, epsrel=None):
    """In the place of scipy: 4 points of Gauss and Legendre, exact for the polynomials of LMS."""
    middle, half = (float(a) + float(b)) / 2, (float(b) - float(a)) / 2
    return half * sum(w * float(f(middle + half * x)) for x, w in zip(*GAUSS, strict=True)), 0


class Interval:
    """In the place of torchsde's: a path that is the same for the same seed, and smooth, so that rounding is small."""

    def __init__(self, t0, t1, size, dtype, device, entropy, **others):
        g = torch.Generator().manual_seed(entropy)
        self.waves = torch.randn(4, *size, generator=g).to(dtype)

    def __call__(self, a, b):
        return sum(w * (math.sin(k * b) - math.sin(k * a)) for k, w in enumerate(self.waves, 1))


class Double:
    """numpy for a module that rounds its tables to float32, so that it does not."""

    float32 = np.float64

    def __getattr__(self, name):
        return getattr(np, name)


SCIPY = SimpleNamespace(
    stats=SimpleNamespace(beta=SimpleNamespace(ppf=beta_quantile)), integrate=SimpleNamespace(quad=quad)
)


PEERS = {}


def reference(name):
    """diffusers' class, also where it wants a package that is not installed here."""
    module = {
        "LMSDiscreteScheduler": "scheduling_lms_discrete", "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
    }.get(name)  # fmt: skip
    if module is None or name in PEERS:
        return PEERS.get(name) or getattr(diffusers, name)
    stubs = {"scipy": SCIPY, "torchsde": SimpleNamespace(BrownianInterval=Interval)}
    with pytest.MonkeyPatch.context() as patch:
        for package, stub in stubs.items():
            patch.setitem(sys.modules, package, stub)
        PEERS[name] = getattr(importlib.import_module(f"diffusers.schedulers.{module}"), name)
    return PEERS[name]


def remembered(sigma_to_t):
    """Its constructors ask for a thousand timesteps, one by one."""
    known = {}

    def answer(self, sigma, log_sigmas):
        key = float(sigma), float(log_sigmas[0]), float(log_sigmas[-1]), log_sigmas.dtype
        if key not in known:
            known[key] = sigma_to_t(self, sigma, log_sigmas)
        return known[key]

    return answer


for _slow in (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler):
    _slow._sigma_to_t = remembered(_slow._sigma_to_t)


@pytest.fixture(autouse=True)
def without_scipy(monkeypatch):
    for name in ours.__all__:
        module = sys.modules[reference(name).__module__]
        monkeypatch.setattr(module, "scipy", SCIPY, raising=False)
        monkeypatch.setattr(module, "integrate", SCIPY.integrate, raising=False)
        monkeypatch.setattr(module, "is_scipy_available", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "torchsde", SimpleNamespace(BrownianInterval=Interval))


@pytest.fixture
def in_double(monkeypatch):
    """The reference's tables in float64: float32 ones cost it up to four digits, which would hide a difference."""
    for name in set(ours.__all__) - {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"}:
        monkeypatch.setattr(sys.modules[reference(name).__module__], "np", Double())


# --- the way


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
    double = getattr(peer, "alphas_cumprod", torch.ones(1)).dtype == torch.float64
    if double and type(peer).__name__ in ("DDIMScheduler", "PNDMScheduler"):
        cosine = peer.config.beta_schedule == "squaredcos_cap_v2"  # 1 / alpha up to 2e4
        run["dtype"], tolerance = torch.float64, 1e-6 if cosine else 1e-10
    if doubled(peer):  # the timesteps stay float32, and the network is told them
        run["dtype"], tolerance = torch.float64, 1e-6 if tolerance <= TOLERANCE else tolerance
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
        # Beginning at a sigma near the hundreds, diffusers keeps the rounding errors of that size to the end.
        size = sizes[i] if sizes[0] < 100 else max(sizes)
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
        peer = reference(name)(**config)
    truncated = any(k.startswith("use_") for k in config) and name in WHOLE
    if doubled(peer):
        give_tables(mine, peer)
    elif not truncated and (config.get("beta_schedule"), config.get("prediction_type")) not in AS_TRAINED:
        give_tables(mine, peer)
    return mine, peer


AS_TRAINED = [("scaled_linear", kind) for kind in (None, "epsilon", "v_prediction", "original_sample")]


def doubled(peer):
    """Whether `in_double` holds, and makes a difference."""
    return "EDM" not in type(peer).__name__ and sys.modules[type(peer).__module__].np.float32 is np.float64


# These cut fractional timesteps off, and where hangs on their own float32 tables.
WHOLE = [
    f"{name}Scheduler"
    for name in ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep", "SASolver")
]


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


@pytest.mark.parametrize("name", [name for name in ours.__all__ if "EDM" not in name])
def test_tables(name):
    for config in (*SCHEDULES, BETAS, {"num_train_timesteps": 321}):
        for zero in ({}, ZERO):
            own, known = getattr(ours, name), inspect.signature(reference(name).__init__).parameters
            if not config.keys() | zero.keys() <= known.keys():
                continue
            mine, peer = own(**config, **zero), reference(name)(**config, **zero)
            assert mine.alphas_cumprod.dtype == torch.float64
            for a, b in ((mine.alphas_cumprod, peer.alphas_cumprod), (mine.betas, peer.betas)):
                torch.testing.assert_close(a, b.double(), rtol=2e-4, atol=1e-6)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def cases(*options):
    """Every combination of one dict from each list."""
    return [dict(itertools.chain(*(o.items() for o in combination))) for combination in itertools.product(*options)]


def pairs(*options):
    """So many of `cases` that each two dicts of different lists are in one of them."""
    every = list(itertools.product(*(range(len(o)) for o in options)))
    left = {pair for numbers in every for pair in itertools.combinations(enumerate(numbers), 2)}
    found = []
    while left:
        best = max(every, key=lambda numbers: len(left.intersection(itertools.combinations(enumerate(numbers), 2))))
        left.difference_update(itertools.combinations(enumerate(best), 2))
        found += cases(*([o[n]] for o, n in zip(options, best, strict=True)))
    return found


def ids(config):
    return "-".join(f"{v}"[:20] for v in config.values()) or "default"


SCHEDULES = [SD, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"}]
SPACINGS = [{"timestep_spacing": s} for s in ("leading", "linspace", "trailing")]
PREDICTIONS = [{"prediction_type": p} for p in ("epsilon", "v_prediction", "sample")]
ZERO = {"rescale_betas_zero_snr": True}
BETAS = {"trained_betas": np.linspace(0.001, 0.015, 1000).tolist()}

DDIM = [
    *pairs([LATENT], SCHEDULES, SPACINGS, PREDICTIONS),
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
    *pairs(SCHEDULES, SPACINGS, PREDICTIONS),
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
    *pairs(SCHEDULES, SPACINGS, PREDICTIONS),
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
        *pairs(SCHEDULES, SPACINGS, PREDICTIONS[:2]),
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
    pairs(
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


KARRAS = [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")]
BASIC = [*cases([SD], SPACINGS, PREDICTIONS[:2]), *cases(SCHEDULES[1:], SPACINGS[1:2]), SD | KARRAS[0], BETAS]
FROM_SD = [*BASIC, *cases([SD], KARRAS[1:])]
THRESHOLD = SD | {"thresholding": True}
UNIPC = cases([SD | LOW], ORDERS, [{"solver_type": "bh1"}, {}], [{"predict_x0": False}, {"predict_x0": True}])
SINGLE = cases([SD], ORDERS, RULES, [{}, LOW, LOW | {"algorithm_type": "dpmsolver"}])
SINGLE += cases([SD | LOW | {"lower_order_final": True}], ORDERS, RULES)
SA = [{"predictor_order": p, "corrector_order": c} for p, c in ((1, 1), (1, 2), (2, 1), (2, 2), (3, 3), (2, 4), (4, 2))]
EDM = [{}, {"sigma_schedule": "exponential"}, {"prediction_type": "v_prediction"}, {"sigma_data": 1.0}]
ONE, MANY = {"generators": [4]}, {"generators": [4, 5, 6]}
# Class, configs, counts, arguments of the run. What is not here, the reference turns to NaN or refuses.
SOLVERS = [
    ("LMSDiscreteScheduler", [*FROM_SD, SD | PREDICTIONS[2]], (1, 3, 25), {}),
    ("LMSDiscreteScheduler", [SD], (25,), {"order": 2}),
    ("HeunDiscreteScheduler", [*FROM_SD, SD | PREDICTIONS[2]], (1, 2, 25), {}),
    ("HeunDiscreteScheduler", [SD | {"clip_sample": True, "clip_sample_range": 0.7}], (7,), {}),
    ("KDPM2DiscreteScheduler", BASIC[1::2] + FROM_SD[-1:], (1, 2, 25), {}),
    ("KDPM2AncestralDiscreteScheduler", BASIC[1::2] + FROM_SD[-1:], (3, 25), ONE),
    ("KDPM2AncestralDiscreteScheduler", BASIC[:1], (7,), MANY),
    ("DPMSolverSDEScheduler", [c | {"noise_sampler_seed": 3} for c in FROM_SD], (2, 7), {}),
    ("DPMSolverSDEScheduler", [SD | {"noise_sampler_seed": 3}], (7,), {"s_noise": 0.6}),
    ("DDPMScheduler", [*cases([SD | LATENT], SPACINGS, PREDICTIONS), {}, {"thresholding": True}], (1, 7, 25), ONE),
    ("DDPMScheduler", [SD | LATENT | {"variance_type": f"fixed_{v}"} for v in ("small_log", "large")], (7,), MANY),
    ("DDPMScheduler", cases([SD | LATENT | ZERO], SPACINGS[1:], PREDICTIONS[1:]), (7,), ONE),
    ("UniPCMultistepScheduler", [*BASIC, SD | PREDICTIONS[2], THRESHOLD, *UNIPC], (1, 3, 16), {}),
    ("UniPCMultistepScheduler", cases([SD | ZERO | PREDICTIONS[1]], SPACINGS, ORDERS[1:]), (7, 16), {}),
    ("UniPCMultistepScheduler", [SD | LOW | {"lower_order_final": False, "disable_corrector": [0, 3]}], (7,), {}),
    ("DEISMultistepScheduler", [*BASIC, SD | PREDICTIONS[2], THRESHOLD, *cases([SD], ORDERS)], (2, 3, 16), {}),
    ("DEISMultistepScheduler", [SD | {"lower_order_final": False, "solver_order": 3}], (7,), {}),
    ("DPMSolverSinglestepScheduler", [*cases(SCHEDULES, PREDICTIONS), SD | KARRAS[0], THRESHOLD], (7,), {}),
    ("DPMSolverSinglestepScheduler", SINGLE, (3, 6, 7, 8), {}),
    ("DPMSolverSinglestepScheduler", cases([SD | {"algorithm_type": "sde-dpmsolver++"}], ORDERS, RULES), (7, 8), ONE),
    ("DPMSolverSinglestepScheduler", [SCHEDULES[2] | {"lambda_min_clipped": -5.1}], (7, 8), {}),
    ("SASolverScheduler", [*BASIC, SD | PREDICTIONS[2], THRESHOLD], (2, 7), ONE),
    ("SASolverScheduler", cases([SD], SA, [{"algorithm_type": "noise_prediction"}, {}]), (7, 16), ONE),
    ("SASolverScheduler", [SD | {"tau_func": lambda t: 0.4}, SD | {"lower_order_final": False}], (7, 16), MANY),
    ("LCMScheduler", [*cases([SD], PREDICTIONS), SCHEDULES[1], THRESHOLD, SD | {"clip_sample": True}], (1, 4, 9), ONE),
    ("LCMScheduler", [SD | ZERO | PREDICTIONS[1]], (4,), MANY),
    ("TCDScheduler", [*cases([SD], PREDICTIONS), SD | ZERO | PREDICTIONS[1]], (1, 4, 9), ONE),
    ("TCDScheduler", [SD], (4,), MANY | {"eta": 0.8}),
    ("TCDScheduler", [SD], (4,), {"eta": 0.0}),
    ("DDIMInverseScheduler", cases([SD | LATENT], SPACINGS[::2], PREDICTIONS[:2]), (7, 25), {}),
    ("DDIMInverseScheduler", cases([LATENT | {"set_alpha_to_one": False}], SPACINGS[::2], PREDICTIONS), (7,), {}),
    ("DDIMInverseScheduler", [{}, {"clip_sample_range": 0.5}], (7,), {}),
    ("EDMEulerScheduler", [*EDM, LOW], (2, 7, 25), {}),
    ("EDMEulerScheduler", EDM[:2], (7,), ONE | {"s_churn": 9.0}),
    ("EDMDPMSolverMultistepScheduler", [*cases(EDM, ORDERS), *RULES, LOW, {"thresholding": True}], (2, 7, 16), {}),
    ("EDMDPMSolverMultistepScheduler", cases([{"algorithm_type": "sde-dpmsolver++"}], ORDERS[:2], RULES), (7,), MANY),
]


@pytest.mark.parametrize("name,configs,counts,run", SOLVERS, ids=[f"{s[0]}-{i}" for i, s in enumerate(SOLVERS)])
def test_solvers(name, configs, counts, run, in_double):
    diffusers.utils.logging.set_verbosity_error()  # singlestep's, of every count that its order does not divide
    for config in configs:
        both = pair(name, **config)
        for n in counts:
            if name == "DPMSolverSinglestepScheduler":  # whose peer changes its config in set_timesteps
                both = pair(name, **config)
            try:
                assert_same(*both, n=n, **run)
            except Exception as error:
                error.add_note(f"{n} steps, {config}")
                raise


WITH_TABLE = [n for n in ours.__all__ if "EDM" not in n]
NOISY = {n for n in ours.__all__ if "Ancestral" in n or n[:3] in ("DDP", "LCM", "TCD", "SAS")}


def plain(name):
    """A config of the checkpoints for any class, and the arguments of a run."""
    own = getattr(ours, name).field_defaults()
    seed = {"noise_sampler_seed": 3}
    fields = {k: v for k, v in (SD | LATENT | seed | {"skip_prk_steps": True}).items() if k in own}
    return fields, ONE if name in NOISY else {}


# --- every pair of options

# Values of options, of which each class is run with all pairs that are its own.
OPTIONS = {
    "prediction_type": ["v_prediction", "sample"],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "rescale_betas_zero_snr": [True],
    "use_karras_sigmas": [True],
    "use_exponential_sigmas": [True],
    "use_beta_sigmas": [True],
    "use_lu_lambdas": [True],
    "final_sigmas_type": ["zero", "sigma_min"],
    "solver_order": [1, 3],
    "predictor_order": [1, 3],
    "corrector_order": [1, 3],
    "solver_type": ["midpoint", "heun", "bh1"],
    "algorithm_type": ["sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "noise_prediction"],
    "lower_order_final": [True, False],
    "euler_at_final": [True],
    "predict_x0": [False],
    "thresholding": [True],
    "clip_sample": [True],
    "set_alpha_to_one": [True, False],
    "steps_offset": [1],
    "variance_type": ["fixed_large", "fixed_small_log"],
    "interpolation_type": ["log_linear"],
    "timestep_type": ["continuous"],
    "skip_prk_steps": [False],
    "sigma_schedule": ["exponential"],
    "beta_schedule": ["linear"],
}
CUT = {"use_exponential_sigmas", "use_beta_sigmas"}  # their fractions of timesteps are cut off by those in WHOLE
SLOW = ("KDPM2", "DPMSolverSDE", "LMS")  # the reference takes a tenth of a second for a config: here every third


def option_pairs(name):
    """Configs of two options each, with what these need to be run at all."""
    own = getattr(ours, name)
    fields = own.field_defaults().keys() & inspect.signature(reference(name).__init__).parameters.keys()
    may = ours.base.CHOICES | own.choices
    values = [(field, v) for field in OPTIONS if field in fields for v in OPTIONS[field] if v in may.get(field, (v,))]
    for one, two in itertools.combinations(values, 2):
        if one[0] == two[0] or {one[0], two[0]} <= {"use_karras_sigmas", "use_lu_lambdas", *CUT}:
            continue
        if {one, two} == {("predict_x0", False), ("thresholding", True)}:
            continue  # the reference forgets to threshold
        config = {k: v for k, v in plain(name)[0].items() if k in fields}
        if ("rescale_betas_zero_snr", True) in (one, two):
            config["prediction_type"] = "v_prediction"
        if {"dpmsolver", "sde-dpmsolver", "bh1"} & {one[1], two[1]} or "predict_x0" in (one[0], two[0]):
            config["final_sigmas_type"] = "sigma_min"
        yield config | dict((one, two))


def check_pairs(name, configs, tolerance):
    """Every config that the reference can run, which is most of them."""
    diffusers.utils.logging.set_verbosity_error()
    run = ONE if "generator" in inspect.signature(reference(name).step).parameters else {}
    configs, refused = configs[:: 3 if name.startswith(SLOW) else 1], 0
    for config in configs:
        # Its samples are float32 all the same, and integrating the noise from pure noise multiplies them by 4096.
        rough = config.get("rescale_betas_zero_snr") and config.get("algorithm_type", "").endswith("dpmsolver")
        try:
            assert_same(*pair(name, **config), n=7, tolerance=3e-5 if rough else tolerance, **run)
        except Exception as error:
            if reference_runs(name, config, run):
                error.add_note(f"{config}")
                raise
            refused += 1
    assert refused < 0.3 * len(configs)


def reference_runs(name, config, run):
    """Whether the reference comes to numbers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = reference(name)(**config)
        more = {"generator": torch.Generator()} if run else {}
        return all(torch.isfinite(x).all() for x in trajectory(peer, n=7, **more)[1])
    except (ValueError, NotImplementedError, RuntimeError, UnboundLocalError):
        return False


@pytest.mark.parametrize("name", ours.__all__)
def test_every_pair_of_options(name, in_double):
    check_pairs(name, [c for c in option_pairs(name) if name not in WHOLE or not CUT & c.keys()], 1e-6)


@pytest.mark.parametrize("name", WHOLE)
def test_every_pair_with_timesteps_that_are_cut_off(name):
    """On float32 tables, which decide where; and to their accuracy."""
    check_pairs(name, [c for c in option_pairs(name) if CUT & c.keys()], 5e-5)


@pytest.fixture(scope="module")
def unet():
    """A small UNet3D, every parameter random, that answers with numbers of the size of noise."""
    from minit2v.models.unet3d import UNet3DConditionModel

    torch.manual_seed(0)
    model = UNet3DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32, attention_head_dim=8, sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    context = torch.randn(1, 4, 32)
    with torch.inference_mode():
        scale = 1 / model(torch.randn(1, 4, 2, 8, 8), torch.tensor(500), context).std()
    return lambda x, t: scale * model(x, t, context)


@pytest.mark.parametrize("name", [n for n in WITH_TABLE if n != "DDIMInverseScheduler"])
def test_a_network_in_float32(name, unet, in_double):
    """5 steps in float32, as they are run; the reference's tables in float64, for its own rounding is not compared."""
    fields, run = plain(name)
    mine, peer = pair(name, **fields)
    ends = []
    for scheduler in (mine, peer):
        scheduler.set_timesteps(5)
        x = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * float(scheduler.init_noise_sigma)
        g = torch.Generator().manual_seed(2)
        for t in scheduler.timesteps:
            with torch.inference_mode():
                seen = scheduler.scale_model_input(x, t).float()
                x = scheduler.step(unet(seen, t.float()), t, x, **({"generator": g} if run else {})).prev_sample.float()
        ends.append(x)
    assert (ends[0] - ends[1]).abs().max() < TOLERANCE * ends[1].abs().max()


@pytest.mark.parametrize("name", WHOLE[1:])
def test_timesteps_that_are_cut_off(name):
    for config, n in itertools.product(cases([SD], KARRAS), (3, 25)):
        assert_same(*pair(name, **config), n=n, tolerance=2e-5, **(ONE if name in NOISY else {}))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_the_others_in_double(name, in_double):
    for config in BASIC:
        known = {k: v for k, v in config.items() if k in getattr(ours, name).field_defaults()}
        assert_same(*pair(name, **known), n=16)


@pytest.mark.parametrize("name", [n for n in ours.__all__ if n != "DDIMInverseScheduler" and "EDM" not in n])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_starts_in_the_middle(name, spacing):
    config, run = plain(name)
    if "timestep_spacing" in getattr(ours, name).field_defaults():
        config["timestep_spacing"] = spacing
    for n, start in ((7, 3), (25, 10), (25, 24)):
        start *= getattr(ours, name).order
        assert_same(*pair(name, **config), n=n, start=start, tolerance=2e-5, **run)


def test_takes_timesteps_and_sigmas():
    grid = {"timesteps": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]}
    sigmas = {"sigmas": [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.0]}
    assert_same(*pair("DPMSolverMultistepScheduler", **SD), grid=grid)
    assert_same(*pair("EulerDiscreteScheduler", **SD), grid=grid)
    assert_same(*pair("EulerDiscreteScheduler", **SD), grid=sigmas)
    assert_same(*pair("HeunDiscreteScheduler", **SD), grid=grid, tolerance=3e-5)
    assert_same(*pair("DPMSolverSinglestepScheduler", **SD), grid=grid)
    for name in ("LCMScheduler", "TCDScheduler"):
        assert_same(*pair(name, **SD), grid={"timesteps": [999, 759, 499, 259]}, **ONE)
        for more in ({"strength": 0.6}, {"original_inference_steps": 30}):
            assert_same(*pair(name, **SD), grid={"num_inference_steps": 4, **more}, **ONE)


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
    assert found <= DIFFUSERS_FIELDS
    assert DIFFUSERS_FIELDS - found <= {"noise_sampler_seed"}


@pytest.mark.parametrize("name", ours.__all__)
def test_has_the_published_defaults(name):
    mine, peer = getattr(ours, name)(), reference(name)()
    theirs = {k: v for k, v in peer.config.items() if k != "_use_default_values"}
    assert list(theirs) == list(mine.field_defaults())[: len(theirs)]  # by position too
    assert {k: mine.config[k] for k in theirs} == theirs
    assert set(peer.config["_use_default_values"]) <= set(mine.config["_use_default_values"])


@pytest.mark.parametrize("name", WITH_TABLE)
@pytest.mark.parametrize("repo", ["ms-1.7b", "zeroscope_v2_576w", "sd15", "rv51"])
def test_loads_every_folder_into_every_class(name, repo, published_config, tmp_path):
    file = published_config(repo, "scheduler")
    (tmp_path / "scheduler_config.json").write_text(json.dumps(file))
    peer = reference(name).from_pretrained(tmp_path)
    for mine in (getattr(ours, name).from_pretrained(tmp_path, compat=None), getattr(ours, name).from_config(file)):
        _same_config(mine, peer)
    if repo != "sd15" or name in ("DPMSolverSDEScheduler", "DPMSolverMultistepScheduler"):
        return  # the same fields for the others, as far as a run goes
    mine = getattr(ours, name).from_pretrained(tmp_path, compat="diffusers")
    assert_same(mine, peer, n=8, tolerance=5e-5, **plain(name)[1])


def _same_config(mine, peer):
    extra = mine.field_defaults().keys() - {k for k in peer.config}
    a = {k: v for k, v in mine.config.items() if k not in extra and k != "_use_default_values"}
    b = {k: v for k, v in peer.config.items() if k != "_use_default_values"}
    assert a == b
    unset = set(mine.config.get("_use_default_values", ())) - extra
    assert unset == set(peer.config.get("_use_default_values", ()))


CHAINS = [  # around, from the widest, to the widest
    *zip(WITH_TABLE, WITH_TABLE[1:] + WITH_TABLE[:1], strict=True),
    *(("DDIMScheduler", name) for name in WITH_TABLE),
    *((name, "DPMSolverMultistepScheduler") for name in WITH_TABLE),
]


@pytest.mark.parametrize("first,second", CHAINS)
def test_from_config_across_classes(first, second, published_config):
    """A field nobody set falls to the next class's default; hidden ones travel and come back."""
    own = getattr(ours, first).field_defaults()
    passed = SD | {k: v for k, v in {"steps_offset": 1, "clip_sample": False}.items() if k in own}
    mine, peer = getattr(ours, first)(**passed), reference(first)(**passed)
    mine, peer = getattr(ours, second).from_config(mine.config), reference(second).from_config(peer.config)
    _same_config(mine, peer)
    mine, peer = getattr(ours, first).from_config(mine.config), reference(first).from_config(peer.config)
    _same_config(mine, peer)
    file = published_config("ms-1.7b", "scheduler")
    mine = getattr(ours, second).from_config(getattr(ours, first).from_config(file).config, beta_start=0.002)
    peer = reference(second).from_config(
        reference(first).from_config(file).config, beta_start=0.002
    )
    _same_config(mine, peer)


@pytest.mark.parametrize("name", WITH_TABLE)
def test_files_go_both_ways(name, tmp_path):
    passed = plain(name)[0]
    mine, peer = getattr(ours, name)(**passed), reference(name)(**passed)
    mine.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    a = json.loads((tmp_path / "ours/scheduler_config.json").read_text())
    b = json.loads((tmp_path / "theirs/scheduler_config.json").read_text())
    extra = mine.field_defaults().keys() - b.keys()
    assert {k: v for k, v in a.items() if k not in extra} == {k: v for k, v in b.items() if k != "_diffusers_version"}
    # After a file every field counts as set: another class takes them over.
    takes = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
    if name in ("DEISMultistepScheduler", "SASolverScheduler"):  # whose algorithm_type the reference then refuses
        takes = ()
    for other in ("DDIMScheduler", "LCMScheduler", *takes):
        reloaded = getattr(ours, other).from_pretrained(tmp_path / "theirs")
        _same_config(reloaded, reference(other).from_pretrained(tmp_path / "theirs"))
        there = reference(other).from_pretrained(tmp_path / "ours")
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


@pytest.mark.parametrize("name", sorted(set(WITH_TABLE) - {"DDIMInverseScheduler"}))  # whose peer cannot
@pytest.mark.parametrize("config", [{}, SD | {"prediction_type": "v_prediction"}], ids=ids)
def test_add_noise(name, config):
    mine, peer = pair(name, **config)
    g = torch.Generator().manual_seed(0)
    x, noise = torch.randn(SHAPE, generator=g), torch.randn(SHAPE, generator=g)
    for scheduler in (mine, peer):
        scheduler.set_timesteps(25)
    t = peer.timesteps[[4, 20, 12]]  # even places: at the second calls of a step the reference takes another level
    for dtype in (torch.float32, torch.float64):
        got = mine.add_noise(x.to(dtype), noise.to(dtype), t)
        assert got.dtype == dtype
        close(got, peer.add_noise(x.to(dtype), noise.to(dtype), t))
    if "noised_at" in mine.config:
        for scheduler in (mine, peer):
            scheduler.set_begin_index(4)
        close(mine.add_noise(x, noise, t[:1]), peer.add_noise(x, noise, t[:1]))
        for scheduler in (mine, peer):  # after a step: the noise of the place where it stands
            scheduler.scale_model_input(x, scheduler.timesteps[4])
            scheduler.step(x, scheduler.timesteps[4], x)
        assert mine.step_index == peer.step_index == 5
        if mine.order == 1:
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
        mine, peer = pair(name, **plain(name)[0])
        x = torch.randn(SHAPE)
        for scheduler in (mine, peer):
            scheduler.set_timesteps(5)
        t = peer.timesteps[0]
        for scheduler in (mine, peer):
            scheduler.scale_model_input(x, t)
        torch.manual_seed(0)
        a = mine.step(x, t, x, return_dict=False)
        torch.manual_seed(0)
        b = peer.step(x, t, x, return_dict=False)
        assert isinstance(a, tuple) and len(a) == len(b)
        if len(b) == 2:
            close(a[1], b[1])
        for scheduler in (mine, peer):
            scheduler.set_timesteps(5)
            scheduler.scale_model_input(x, t)
        out = mine.step(x, t, x)
        assert out[0] is out.prev_sample is out["prev_sample"]
        assert len(out.to_tuple()) == len(a)
