"""Sequential guidance: the negative and the positive prediction run one after the other, with half of the memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Predict = Callable[[Tensor, Any, Any], Tensor]  # (x, t, context) -> the prediction


class OneByOne:
    """(x, t, context) -> the prediction. The batch is split into equal parts, which run one after the other.

    parts: one function for each part. As long as the context is the same, a function gets the same tensor, so that it
    can cache keys and values.
    """

    def __init__(self, parts: Sequence[Predict]):
        self.parts = parts
        self.last: tuple[Any, Sequence[Tensor]] = (None, ())

    def __call__(self, x: Tensor, t: Any, context: Tensor) -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d) or (b f l d). b is a multiple of the number of parts."""
        n = len(self.parts)
        if self.last[0] is not context:
            self.last = context, context.chunk(n)
        times = t.chunk(n) if isinstance(t, Tensor) and t.numel() > 1 else [t] * n
        pieces = zip(self.parts, x.chunk(n), times, self.last[1], strict=True)
        return torch.cat([predict(*piece) for predict, *piece in pieces])
