"""The base of all schedulers: noise, noise levels, prediction types, timesteps, the config, the state of a run.

x_t = alpha_t x_0 + sigma_t eps, with alpha_t**2 + sigma_t**2 = 1. The tables are float64. A step computes in float32 or
wider, and returns the dtype of the sample. The *grid* is the list of timesteps of a run, from noise to the clean
sample.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import numpy as np
import torch
from torch import Generator, Tensor

from minit2v_convert.rename import nearest

from .fields import MEANINGS, describe, signature
from .grids import BETA_SCHEDULES, GRIDS, zero_terminal_snr

CONFIG_NAME = "scheduler_config.json"
OWN_FIELDS = "_own_fields"  # in a config: the fields of a user's class; other classes keep them

Generators = Generator | list[Generator] | None
Device = torch.device | str | None
Timestep = int | float | Tensor

# The allowed values of fields, for every class that has them.
CHOICES: dict[str, tuple] = {
    "beta_schedule": tuple(BETA_SCHEDULES),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "final_sigmas_type": ("zero", "sigma_min"),
    # Flow matching is missing, because no text-to-video UNet was trained with it.
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "solver_order": (1, 2, 3),
    "predictor_order": (1, 2, 3, 4),
    "corrector_order": (1, 2, 3, 4),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "sigma_schedule": ("karras", "exponential"),
}
# Fields that diffusers does not have. The second value means diffusers' way, see minit2v/compat.py.
ADDED: dict[str, tuple] = {
    "average": ("epsilon", "prediction"),
    "final_level": ("config", "published"),
    "history": ("known", "counted"),
    "last_noise": ("none", "published"),
    "noise_path": ("exact", "published"),
    "noised_at": ("timestep", "counter"),
    "previous_timestep": ("grid", "ratio"),
    "spaced_timesteps": ("exact", "whole"),
    "third_order": ("corrected", "published"),
    "zero_snr": ("honoured", "ignored"),
}
CHOICES |= ADDED

# All fields of diffusers' schedulers, also of those that are missing here. A file may have fields of other classes:
# ModelScope's DDIM file has PNDM's `skip_prk_steps`. So these fields are kept. All others are misspelled.
DIFFUSERS_FIELDS = (MEANINGS.keys() - ADDED.keys()) | frozenset(
    """
    alpha_cum_end alpha_cum_start base_image_seq_len base_shift beta_max beta_min block_length clip_denoised
    correct_steps corrector_k corrector_selection corrector_selection_tau corrector_steps editing_threshold
    entropy_bound eps eta final_step_size_scale gamma gamma_cum_end gamma_cum_start invert_sigmas mask_token_id
    masking_schedule max_image_seq_len max_shift minimal_topk n_grid noise_mode num_inference_steps num_policy_substeps
    num_vec_classes s s_churn s_max s_min s_noise sampling_eps scale_factors scaler schedule_mode scheduler_type shift
    snr snr_shift_scale stage_range stages stochastic_sampling t_lim_ode t_lim_ode_below t_max t_min
    tail_step_multiplier tail_steps threshold tsr_k tsr_sigma upscale_mode
    """.split()
)


def randn(
    shape: Sequence[int], generator: Generators = None, device: Device = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Standard normal noise of `shape`. It is drawn on the generator's device, and then moved to `device`.

    So a CPU generator gives the same numbers on every device. With a list of n generators, each draws 1 / n of the
    rows: one row for each video, or f rows if frames are part of the batch.
    Raises ValueError if the rows cannot be divided equally, or if a GPU generator would have to draw for the CPU.
    """
    device = torch.device(device or "cpu")
    generators = each_generator(generator, shape[0])
    share = (shape[0] // len(generators), *shape[1:])
    parts = []
    for g in generators:
        source = device if g is None else g.device
        if source.type != device.type and source.type != "cpu":
            raise ValueError(f"a generator on {source} cannot draw noise for {device}: use torch.Generator('cpu')")
        parts.append(torch.randn(share, generator=g, device=source, dtype=dtype))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(device)


def each_generator(generator: Generators, rows: int) -> list[Generator | None]:
    """The generators as a list. Raises ValueError if they cannot divide a batch of `rows` rows equally."""
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if not generators or rows % len(generators):
        raise ValueError(f"{len(generators)} generators cannot divide a batch of {rows} equally: give one per video")
    return generators


class SchedulerConfig(dict):
    """A scheduler's fields: those of its class, and those of other classes that its file has. It is read-only.

    `_use_default_values` lists fields with their default values. Another class then uses its own defaults.
    `explicit` are the fields that were passed in code. No compatibility mode overrides them.
    """

    def __init__(self, values: Mapping[str, Any], explicit: Iterable[str] = ()):
        super().__init__(values)
        object.__setattr__(self, "explicit", frozenset(explicit))

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            near = nearest(name, list(self))
            raise AttributeError(f"the scheduler's config has no field {name!r}{near}") from None

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        raise AttributeError(_READ_ONLY)

    def _refuse(self, *args: Any, **kw: Any) -> NoReturn:
        raise TypeError(_READ_ONLY)

    __delattr__ = __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __reduce__(self) -> tuple:
        return SchedulerConfig, (dict(self), self.explicit)


_READ_ONLY = "a scheduler's config is read-only: make a new one with Class.from_config(scheduler.config, field=value)"


@dataclass(frozen=True)
class NoiseSchedule:
    """The fields of every scheduler. Each class adds its own, in diffusers' order."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: Sequence[float] | None = None


# Groups of fields that several classes share.
THRESHOLDED = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
SPACED = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}


def declare(base: type = NoiseSchedule, **defaults: Any) -> type[NoiseSchedule]:
    """A dataclass with the fields of `base`, followed by `defaults` in this order."""
    listed = [
        (name, Any, field(default_factory=value.copy) if isinstance(value, list) else value)
        for name, value in defaults.items()
    ]
    return make_dataclass("Fields", listed, bases=(base,), frozen=True)


@dataclass
class SchedulerOutput:
    """The result of a step.

    prev_sample: the next, less noisy sample, with the shape and dtype of the sample.
    pred_original_sample: the predicted x_0, or None if the solver does not compute it.
    With return_dict=False a step returns `to_tuple()` of it instead.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None

    def to_tuple(self) -> tuple[Tensor, ...]:
        return tuple(v for v in (self.prev_sample, self.pred_original_sample) if v is not None)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.to_tuple())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]


class Scheduler:
    """Base class of the schedulers. A solver adds its fields, `set_timesteps` and `step`."""

    Fields: ClassVar[type[NoiseSchedule]] = NoiseSchedule
    # choices: allowed values of fields, in addition to CHOICES. aliases: values of other schedulers -> values of ours.
    choices: ClassVar[dict[str, tuple]] = {}
    aliases: ClassVar[dict[str, dict[str, str]]] = {}
    # The last alpha_bar with zero terminal SNR. Solvers in sigma cannot use 0; they use float16's smallest number.
    smallest_alpha_bar: ClassVar[float] = 0.0
    order: ClassVar[int] = 1
    if TYPE_CHECKING:  # each solver defines it, with its own arguments
        step: Callable[..., SchedulerOutput]

    def __init_subclass__(cls, **kw: Any):
        super().__init_subclass__(**kw)
        cls.__doc__ = describe(vars(cls).get("__doc__") or "", cls.field_defaults(), CHOICES | cls.choices)
        cls.__signature__ = signature(cls.field_defaults())

    def __init__(self, *args: Any, compat: str | None = None, **values: Any):
        """The fields by position or by name. compat: None or "diffusers" (see minit2v/compat.py).

        Raises TypeError if a field does not exist, and ValueError if a value is wrong.
        """
        own = self.field_defaults()
        if len(args) > len(own):
            raise TypeError(f"{type(self).__name__} takes at most {len(own)} positional arguments, not {len(args)}")
        passed = dict(zip(own, args, strict=False))
        self._check_fields(values)
        if twice := passed.keys() & values.keys():
            raise TypeError(f"{type(self).__name__} got {sorted(twice)[0]!r} twice")
        passed |= values
        self._set_config(_compat_fields(type(self), compat) | passed, explicit=passed)

        self._make_tables()
        self._constant = frozenset(vars(self)) | {"_constant"}
        self.num_inference_steps: int | None = None
        self._put_timesteps(range(self.config.num_train_timesteps - 1, -1, -1))

    def _make_tables(self) -> None:
        """Computes the noise levels of the training timesteps."""
        self.betas = self._betas(torch.float64)
        self.alphas_cumprod = self._alphas_cumprod(self.betas)
        # The noise level after the last step: none, or that of timestep 0, as Stable Diffusion's config asks for.
        self.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        if self._own("set_alpha_to_one") is False:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def _put_timesteps(self, grid: Iterable[float], device: Any = None, dtype: torch.dtype = torch.int64) -> None:
        """Stores the timesteps as a tensor on `device` for the network, and as numbers, so that steps need not wait."""
        here = torch.tensor(list(grid), dtype=dtype)
        self._grid: list[float] = here.tolist()
        self.timesteps = here.to(device or "cpu")

    def _number(self, timestep: Timestep) -> float:
        """A timestep as a number. Elements of `timesteps` are known by their address, without waiting for a GPU."""
        if isinstance(timestep, Tensor) and timestep.device.type != "cpu":
            if timestep.untyped_storage() is self.timesteps.untyped_storage():
                return self._grid[timestep.storage_offset() - self.timesteps.storage_offset()]
        return getattr(timestep, "item", lambda: timestep)()

    # --- the state of a run

    def state_dict(self) -> dict[str, Any]:
        """The state of a run between two steps. torch.save and torch.load(weights_only=True) can handle it.

        It does not contain the state of the generator.
        """
        names = [n for n in vars(self) if n not in self._constant and not n.startswith("_cached")]
        run = {n: list(v) if isinstance(v := getattr(self, n), list) else v for n in names}
        config = {name: value for name, value in self.config.items() if not callable(value)}
        return {"class": type(self).__name__, "config": config, "run": run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a run from its `state_dict`, bit by bit. Raises ValueError if it belongs to another scheduler."""
        if state["class"] != type(self).__name__:
            raise ValueError(f"the state belongs to a {state['class']}, not to a {type(self).__name__}")
        for name in self.field_defaults():
            if not callable(self.config[name]) and state["config"].get(name) != self.config[name]:
                was = state["config"].get(name)
                raise ValueError(f"the state belongs to a scheduler with {name}={was!r}, not {self.config[name]!r}")
        for name in vars(self).keys() - self._constant:
            delattr(self, name)
        for name, value in state["run"].items():
            setattr(self, name, list(value) if isinstance(value, list) else value)

    # --- config

    @classmethod
    def field_defaults(cls) -> dict[str, Any]:
        return {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(cls.Fields)}

    @classmethod
    def _check_fields(cls, names: Iterable[str]) -> None:
        own = list(cls.field_defaults())
        for name in names:
            if name not in own:
                raise TypeError(f"{cls.__name__} has no field {name!r}{nearest(name, own)}")

    def _set_config(self, passed: Mapping[str, Any], explicit: Iterable[str]) -> None:
        passed = {name: v.item() if isinstance(v, np.generic) else v for name, v in passed.items()}
        values = self.field_defaults() | passed
        for name, other in self.aliases.items():
            values[name] = next((new for old, new in other.items() if old == values[name]), values[name])
        for name, default in self.field_defaults().items():
            if not _fits(values[name], default):
                wanted = type(default).__name__
                raise ValueError(f"{type(self).__name__}: {name} must be of type {wanted}, not {values[name]!r:.200}")
        for name, allowed in (CHOICES | self.choices).items():
            if name in self.field_defaults() and values[name] not in allowed:
                listed = ", ".join(map(repr, allowed))
                raise ValueError(f"{type(self).__name__}: {name} must be one of {listed}, not {values[name]!r:.200}")
        if isinstance(values.get("trained_betas"), np.ndarray | Tensor):
            values["trained_betas"] = values["trained_betas"].tolist()
        if unset := [name for name in self.field_defaults() if name not in passed]:
            values["_use_default_values"] = unset
        if own := sorted(self.field_defaults().keys() - DIFFUSERS_FIELDS - ADDED.keys()):
            values[OWN_FIELDS] = own
        self._config = SchedulerConfig(values, explicit)
        self._own_values = {name: values[name] for name in self.field_defaults()}

    @property
    def config(self) -> SchedulerConfig:
        return self._config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, compat: str | None = None, **overrides: Any) -> Self:
        """A scheduler of this class from the config of any scheduler.

        Fields that were not set in `config` get the defaults of this class. `compat` overrides the fields of `config`
        that were not passed in code. `overrides` win over both.
        Raises TypeError if this class does not have an override. Raises ValueError if `config` has a field that no
        scheduler of diffusers has.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"from_config needs a config, not a {type(config).__name__}: for a folder: from_pretrained")
        cls._check_fields(overrides)
        own = cls.field_defaults()
        unset = config.get("_use_default_values", ())
        of_users = config.get(OWN_FIELDS, ())
        values = {k: v for k, v in config.items() if k not in unset and k != "_use_default_values"}
        known = DIFFUSERS_FIELDS | own.keys() | ADDED.keys() | {*of_users}
        for name in values:
            if name not in known and not name.startswith("_"):
                raise ValueError(f"scheduler config: unknown field {name!r}{nearest(name, sorted(known))}")
        explicit = overrides.keys() | getattr(config, "explicit", frozenset())
        forced = {k: v for k, v in _compat_fields(cls, compat).items() if k not in explicit}
        fields_of_class = {k: v for k, v in values.items() if k in own} | forced | overrides
        hidden = {k: v for k, v in values.items() if k not in fields_of_class}
        if "_class_name" in hidden:
            hidden["_class_name"] = cls.__name__

        new = cls(**fields_of_class)
        merged = hidden | new.config
        if of_users:
            merged[OWN_FIELDS] = sorted({*of_users, *new.config.get(OWN_FIELDS, ())})
        new._config = SchedulerConfig(merged, explicit)
        return new

    def with_compat(self, compat: str | None) -> Self:
        """This scheduler with the fields of a compatibility mode. Fields that were passed in code do not change.

        If nothing changes, it is this scheduler itself. Otherwise it is a new one that needs `set_timesteps`.
        """
        forced = {k: v for k, v in _compat_fields(type(self), compat).items() if k not in self.config.explicit}
        if all(self.config[k] == v for k, v in forced.items()):
            return self
        return self.from_config(self.config, compat=compat)

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, *, subfolder: str | None = None, revision: str | None = None,
        local_files_only: bool = False, token: str | bool | None = None, cache_dir: str | Path | None = None,
        force_download: bool = False, compat: str | None = None, **overrides: Any,
    ) -> Self:  # fmt: skip
        """Loads a scheduler from a folder with a scheduler_config.json, from such a file, or from a hub id.

        `overrides` are fields that win over the file. Raises FileNotFoundError, ValueError or TypeError if the file is
        missing, broken, or has unknown fields.
        """
        from ..files.config import read_from
        from ..files.hub import parse_json, read_json

        if Path(path_or_id).is_file():
            config = parse_json(Path(path_or_id))
        else:
            config = read_json(
                path_or_id,
                CONFIG_NAME,
                subfolder=subfolder,
                revision=revision,
                local_files_only=local_files_only,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
            )
        cls._check_fields(overrides)
        with read_from(f"{path_or_id}{f'/{subfolder}' if subfolder else ''}/{CONFIG_NAME}"):
            return cls.from_config(config, compat=compat, **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes scheduler_config.json with all fields. Raises ValueError if a field is a function."""
        from ..files.hub import write_json

        values = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        if functions := [name for name, value in values.items() if callable(value)]:
            raise ValueError(f"{type(self).__name__}: {functions[0]} is a function, which cannot be saved in a file")
        values["_class_name"] = type(self).__name__
        write_json(Path(folder) / CONFIG_NAME, values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={self.config[k]!r}' for k in self.field_defaults())})"

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _own(self, name: str) -> Any:
        """The value of a field of this class. None if the class does not have the field, even if the config has it."""
        return self._own_values.get(name)

    # --- noise levels

    def _betas(self, dtype: torch.dtype) -> Tensor:
        c = self.config
        if not 1 <= c.num_train_timesteps <= 10**5:
            raise ValueError(f"num_train_timesteps must be at least 1, not {c.num_train_timesteps}")
        if c.trained_betas is None:
            betas = BETA_SCHEDULES[c.beta_schedule](c.beta_start, c.beta_end, c.num_train_timesteps, dtype)
        else:
            betas = torch.tensor(c.trained_betas, dtype=dtype)
        if len(betas) != c.num_train_timesteps:
            raise ValueError(f"trained_betas must have {c.num_train_timesteps} entries (num_train_timesteps), "
                             f"not {len(betas)}")  # fmt: skip
        if not ((betas > 0) & (betas < 1)).all():
            wrong = betas[~((betas > 0) & (betas < 1))][0]
            raise ValueError(f"every beta must be between 0 and 1, and one is {wrong:g}")
        return zero_terminal_snr(betas) if self._ends_in_noise else betas

    @property
    def _ends_in_noise(self) -> bool:
        """Whether the last training timestep is pure noise (zero terminal SNR)."""
        return bool(self._own("rescale_betas_zero_snr")) and self._own("zero_snr") != "ignored"

    def _alphas_cumprod(self, betas: Tensor) -> Tensor:
        bar = torch.cumprod(1 - betas, 0)
        if self._ends_in_noise:
            bar[-1] = self.smallest_alpha_bar
        return bar

    def _count(self, n: int) -> int:
        total = self.config.num_train_timesteps
        if isinstance(n, bool) or not isinstance(n, Integral) or not 1 <= n <= total:
            raise ValueError(f"num_inference_steps must be a whole number from 1 to {total}, not {n!r}")
        return int(n)

    def _in_range(self, timesteps: np.ndarray) -> np.ndarray:
        total = self.config.num_train_timesteps
        if timesteps.min() < 0 or timesteps.max() > total - 1:
            raise ValueError(
                f"timesteps must be in 0 ... {total - 1}, not from {timesteps.max():g} to {timesteps.min():g}: "
                "use fewer steps or a smaller steps_offset"
            )
        return timesteps

    def _custom(self, values: Sequence[float], name: str) -> np.ndarray:
        """Checks timesteps or sigmas that the caller chose."""
        chosen = np.array(values, dtype=np.float64)
        if chosen.ndim != 1 or not len(chosen) or (np.diff(chosen) > 0).any() or not np.isfinite(chosen).all():
            raise ValueError(f"{name} must be a list of numbers that never rise, not {values!r}")
        if name == "sigmas" and (len(chosen) < 2 or (np.diff(chosen) == 0).any() or chosen[-1] < 0):
            raise ValueError(f"sigmas must be at least two different numbers, none below 0, not {values!r}")
        return chosen

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Sets the grid: `num_inference_steps` timesteps, or the given `timesteps` (falling whole numbers).

        Raises ValueError if both or none are given, or if timesteps are not training timesteps.
        """
        grid = self._whole_grid(num_inference_steps, timesteps)
        self._check_first(grid[0])
        self.num_inference_steps = len(grid)
        self._put_timesteps(grid, device)

    def _whole_grid(self, n: int | None, timesteps: Sequence[int] | None) -> list[int]:
        """The grid of solvers that need whole timesteps: n timesteps by the config's rule, or the given ones."""
        c = self.config
        if (n is None) == (timesteps is None):
            raise ValueError("give exactly one of them: num_inference_steps or timesteps")
        if timesteps is None:
            grid = GRIDS[c.timestep_spacing](c.num_train_timesteps, self._count(n), c.steps_offset).round()
        else:
            grid = self._custom(timesteps, "timesteps")
            if (grid != grid.round()).any() or (np.diff(grid) == 0).any():
                raise ValueError(f"{type(self).__name__} needs whole timesteps, each once, not {timesteps!r}")
        return self._in_range(grid).astype(np.int64).tolist()

    def _check_first(self, first: int) -> None:
        """Raises ValueError for an epsilon prediction at zero SNR: x is pure noise, so x_0 would be 0 / 0."""
        if self.config.prediction_type == "epsilon" and self.alphas_cumprod[first] == 0:
            raise ValueError(
                "with rescale_betas_zero_snr a model with prediction_type='epsilon' cannot begin at the last timestep: "
                "use a v_prediction or sample model, or timestep_spacing='leading'"
            )

    def _lower_timestep(self, t: int) -> int:
        """The timestep at which the step from t ends. It is -1 for the last step."""
        if self._own("previous_timestep") == "ratio":
            return t - self.config.num_train_timesteps // self.num_inference_steps
        return next((s for s in self._grid if s < t), -1)

    def _places(self, t: float, timesteps: Tensor | None = None) -> list[int]:
        """The indices of a timestep in the grid. Raises ValueError if there are none."""
        grid = self._grid if timesteps is None else timesteps.tolist()
        places = [i for i, s in enumerate(grid) if s == t]
        if not places:
            raise ValueError(f"{t:g} is not one of scheduler.timesteps: call set_timesteps first")
        return places

    def _alpha_bar(self, t: int) -> float:
        """alpha_bar at a timestep. A negative t means after the last step."""
        return (self.alphas_cumprod[t] if t >= 0 else self.final_alpha_cumprod).item()

    def _rows(self, values: Tensor, x: Tensor) -> Tensor:
        """(n,) float64 noise levels -> (n, 1, 1, ...) on the device of x, in the dtype of its computation."""
        values = values.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        return values.reshape(-1, *[1] * (x.ndim - 1))

    def _levels(self, x: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        bar = self.alphas_cumprod[torch.as_tensor(timesteps).cpu().long()]
        return self._rows(bar.sqrt(), x), self._rows((1 - bar).sqrt(), x)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Adds noise: alpha_t x_0 + sigma_t eps.

        original_samples: x_0 (b, ...). noise: eps, of the same shape. timesteps: one for all, or one per row (b,).
        """
        alpha, sigma = self._levels(original_samples, timesteps)
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha_t eps - sigma_t x_0 (Salimans and Ho 2022, arXiv:2202.00512, appendix D).

        sample: x_0 (b, ...). noise: eps, of the same shape. timesteps: one for all, or one per row (b,).
        """
        alpha, sigma = self._levels(sample, timesteps)
        return (alpha * noise - sigma * sample).to(sample.dtype)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that the first step expects."""
        return 1.0

    def scale_model_input(self, sample: Tensor, timestep: int | Timestep | None = None) -> Tensor:
        """The input of the network at this timestep. Here it is the sample itself."""
        return sample

    # --- parts of a step

    def _upcast(self, model_output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Both in float32 or wider. Raises ValueError if their shapes differ or if set_timesteps was not called."""
        if self.num_inference_steps is None:
            raise ValueError("call set_timesteps before step")
        if model_output.shape != sample.shape:
            raise ValueError(f"prediction {tuple(model_output.shape)} and sample {tuple(sample.shape)} differ in shape")
        dtype = torch.promote_types(torch.promote_types(model_output.dtype, sample.dtype), torch.float32)
        return model_output.to(dtype), sample.to(dtype)

    def _x0_and_eps(self, out: Tensor, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """x_0 and eps from the network's output for x = alpha x_0 + sigma eps."""
        match self.config.prediction_type:
            case "epsilon":
                return (x - sigma * out) / alpha, out
            case "sample":
                return out, (x - alpha * out) / sigma
            case "v_prediction":
                return alpha * x - sigma * out, alpha * out + sigma * x
        raise ValueError(f"unknown prediction_type {self.config.prediction_type!r}")

    def _clip(self, x0: Tensor) -> Tensor:
        """x_0, clipped as the config says."""
        c = self.config
        if self._own("thresholding"):
            return self._threshold(x0)
        return x0.clamp(-c.clip_sample_range, c.clip_sample_range) if self._own("clip_sample") else x0

    def _threshold(self, x0: Tensor) -> Tensor:
        """Dynamic thresholding per row, only for pixels (Imagen: Saharia et al. 2022, arXiv:2205.11487, 2.3)."""
        c = self.config
        s = torch.quantile(x0.flatten(1).abs(), c.dynamic_thresholding_ratio, dim=1).clamp(1, c.sample_max_value)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s

    def _end(self, x: Tensor, dtype: torch.dtype, return_dict: bool, x0: Tensor | None = None) -> SchedulerOutput:
        """The result of a step: the next sample, and the predicted x_0 if the solver computes it."""
        output = SchedulerOutput(*(value.to(dtype) for value in (x, x0) if value is not None))
        return output if return_dict else output.to_tuple()


def _fits(value: Any, default: Any) -> bool:
    """Whether a value has the type of a field's default. Flags may be None, as in published files."""
    match default:
        case bool():
            return isinstance(value, bool | None)
        case int():
            return isinstance(value, Integral) and not isinstance(value, bool) and abs(value) < 2**63
        case float():  # no NaN; infinity only if the default is infinite
            return (isinstance(value, Real) and not isinstance(value, bool)
                    and (abs(value) < 1e30 or value == default))
    return True


def _compat_fields(cls: type[Scheduler], compat: str | None) -> dict[str, Any]:
    if compat is None:
        return {}
    from ..compat import compat_fields

    # A user's subclass deviates like its base class.
    return {k: v for c in reversed(cls.__mro__) for k, v in compat_fields(c.__name__, compat).items()}
