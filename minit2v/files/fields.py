"""Checks whether a value has an annotated type. This module does not import torch."""

import types
import typing
from typing import Any


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` has the annotated type. An int counts as a float, but a bool does not count as an int."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        of = args[:1] * len(value) if args[-1] is Ellipsis else args
        return len(value) == len(of) and all(map(fits, value, of))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)
