"""Guidance with one branch after the other: half of the activations, the same numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Any, Any], Tensor]  # (x, t, context) -> the prediction


class OneByOne:
    """(x, t, context) -> the prediction, of so many equal parts of the batch one after the other.

    parts: a function for each, which may keep what it makes of its texts: it sees the same tensor as long as it is the
    same context.
    """

    def __init__(self, parts: Sequence[Predict]):
        self.parts = parts
        self.last: tuple[Any, Sequence[Tensor]] = (None, ())

    def __call__(self, x: Tensor, t: Any, context: Tensor) -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d) or (b f l d), b a multiple of the parts."""
        n = len(self.parts)
        if self.last[0] is not context:
            self.last = context, context.chunk(n)
        times = t.chunk(n) if isinstance(t, Tensor) and t.numel() > 1 else [t] * n
        pieces = zip(self.parts, x.chunk(n), times, self.last[1], strict=True)
        return torch.cat([predict(*piece) for predict, *piece in pieces])
