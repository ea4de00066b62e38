"""What a config.json may say: every field known, of the right type, and none passed over in silence."""

import types
import typing
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from typing import Any

import numpy as np
import torch

from minit2v_convert.rename import nearest

# Fields that describe a file's history, not a network.
HISTORY = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "model_type",
)

MOST_LAYERS = 64  # of anything: no published network has more, and a file with a wild number must not fill the memory


def make_config(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the frozen dataclass `cls` from the fields of a config file. Raises ValueError on unknown ones."""
    if "__dataclass_fields__" not in vars(cls):
        raise ValueError(f"{cls.__name__} has no fields of its own without @dataclass(frozen=True) above it")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclass_fields(cls)]
    kept = {}
    for name, value in values.items():
        value = _tuples(value)
        if name in known:
            if not _fits(value, hints[name]):
                hint = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                raise ValueError(f"{cls.__name__}: {name} must be {hint}, not {value!r}")
            if "layers" in name and any(isinstance(n, int) and n > MOST_LAYERS for n in (value, *_items(value))):
                raise ValueError(f"{cls.__name__}: {name} must be at most {MOST_LAYERS}, not {value!r}")
            kept[name] = value
        elif name in cls.FIXED:
            if value != cls.FIXED[name]:
                raise ValueError(f"{cls.__name__}: only {name}={cls.FIXED[name]!r} is supported, not {value!r}")
        elif name not in cls.IGNORED and name not in HISTORY:
            raise ValueError(f"{cls.__name__} has no field {name!r}{nearest(name, [*known, *cls.FIXED])}")
    return cls(**kept)


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def config_fields(config: Any) -> dict[str, Any]:
    """A config's fields as JSON has them, with those of which only one value is supported."""
    return {**config.FIXED, **{f.name: getattr(config, f.name) for f in dataclass_fields(config)}}


def _tuples(value: Any) -> Any:
    if isinstance(value, np.generic):  # NumPy's numbers are numbers
        return value.item()
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type. An int is a float, a bool is not an int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        of = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(of) and all(map(_fits, value, of))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def pick_dtype(torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """The one dtype that two spellings of one argument mean; float32 where neither is given."""
    given = []
    for value in (torch_dtype, dtype):
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {value!r}{nearest(name, [*DTYPES])}")
            given.append(DTYPES[name])
    if len(set(given)) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} are one argument: give one")
    return given[0] if given else torch.float32
