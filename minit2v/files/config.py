"""Checks a config.json: every field must be known and have the right type. No field is ignored silently."""

import math
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minit2v_convert.rename import nearest

from .fields import fits

# Fields about the origin of a file, which do not describe the network.
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

MOST_LAYERS = 64  # more than in any published network; a larger number in a bad file would fill the memory
LARGEST = 2**20  # the limit for all other numbers; a vocabulary has 49,408
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)


@contextmanager
def read_from(path: str | Path, kinds: tuple[type[Exception], ...] = BROKEN) -> Iterator[None]:
    """Turn every error about a file's content into a ValueError in one line that names the file."""
    try:
        yield
    except kinds as error:
        if type(error) is ValueError and str(path) in str(error):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: {text if len(text) <= 1000 else text[:997] + '...'}") from error


def quoted(value: Any) -> str:
    """A value from a file for a message, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def make_config(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the frozen dataclass `cls` from a config's fields. ValueError on unknown or wrong ones."""
    if "__dataclass_fields__" not in vars(cls):
        raise ValueError(f"{cls.__name__} is not a dataclass: write @dataclass(frozen=True) above it")
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclass_fields(cls)]
    ours = {f.name for c in cls.__mro__ if c.__module__.startswith("minit2v.") and is_dataclass(c)
            for f in dataclass_fields(c)}  # fmt: skip
    kept = {}
    for name, value in values.items():
        value = _tuples(value)
        if name in known:
            if not fits(value, hints[name]):
                hint = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
                raise ValueError(f"{cls.__name__}: {name} must be {hint}, not {quoted(value)}")
            if name in ours:
                _check_range(f"{cls.__name__}: {name}", value, 0 if "layers" in name or name == "dropout" else 1,
                             MOST_LAYERS if "layers" in name else LARGEST)  # fmt: skip
            kept[name] = value
        elif name in cls.FIXED:
            if value != cls.FIXED[name]:
                raise ValueError(f"{cls.__name__}: only {name}={cls.FIXED[name]!r} is supported, not {quoted(value)}")
        elif name not in cls.IGNORED and name not in HISTORY:
            raise ValueError(f"{cls.__name__} has no field {quoted(name)}{nearest(name, [*known, *cls.FIXED])}")
    return cls(**kept)


def _check_range(what: str, value: Any, low: int, high: int) -> None:
    """ValueError on numbers that no network can have. Not for the fields of a user's own class."""
    for n in (value, *_items(value)):
        if type(n) is int and not low <= n <= high:
            bound = f"at least {low}" if n < low else f"at most {high}"
            raise ValueError(f"{what} must be {bound}, not {quoted(value)}")
        if type(n) is float and not 0 < n < math.inf and n != low:
            raise ValueError(f"{what} must be a number above 0, not {quoted(value)}")
    if len(_items(value)) > MOST_LAYERS:
        raise ValueError(f"{what} must have at most {MOST_LAYERS} items, not {len(value)}")


def _items(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


def config_fields(config: Any) -> dict[str, Any]:
    """A config's fields for JSON, together with the fields that have only one supported value."""
    return {**config.FIXED, **{f.name: getattr(config, f.name) for f in dataclass_fields(config)}}


def _tuples(value: Any) -> Any:
    if isinstance(value, np.generic):  # a NumPy number
        return value.item()
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def one_dtype(torch_dtype: torch.dtype | str | None = None, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """The dtype from the arguments `torch_dtype` and `dtype`, which mean the same. float32 if neither is given."""
    dtypes = []
    for value in (torch_dtype, dtype):
        if value is not None:
            name = str(value).removeprefix("torch.")
            if name not in DTYPES:
                raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {value!r}{nearest(name, [*DTYPES])}")
            dtypes.append(DTYPES[name])
    if len(set(dtypes)) > 1:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} differ, but mean the same argument: give one")
    return dtypes[0] if dtypes else torch.float32
