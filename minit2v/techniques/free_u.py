"""FreeU: in the coarse half of the up path, it amplifies the backbone and damps low frequencies of skip connections.

Si et al. 2023, "FreeU: Free Lunch in Diffusion U-Net", arXiv:2309.11497. The backbone mainly removes noise. The skip
connections add detail, but also noise. FreeU acts where the two coarsest levels join a skip connection (section 3.2).
There half of the backbone's channels are multiplied by b, and the lowest frequencies of the skip by s. Nothing is
trained.
"""

import math
from dataclasses import dataclass
from itertools import product
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """The factors of the paper: 1 for the coarsest level, 2 for the next. Raises ValueError unless all are above 0."""

    s1: float
    s2: float
    b1: float
    b2: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"FreeU: {name} must be a number above 0, not {value!r} (1 changes nothing)")

    def __call__(self, x: Tensor, skip: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """x, skip (n c h w) -> the changed x and skip. level: in the up path, 0 is the coarsest."""
        if level > 1:
            return x, skip
        s, b = ((self.s1, self.b1), (self.s2, self.b2))[level]
        half = x.shape[1] // 2
        return torch.cat([x[:, :half] * b, x[:, half:]], dim=1), scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """x (n c h w) with the frequencies -1 and 0 of both axes times s: the mean, and one period across the picture.

    It is computed in float32 or wider. In half precision, FFTs exist only on some devices and for some sizes.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    change = torch.zeros(x.shape[-2:], device=x.device, dtype=wide.dtype)
    for i, j in product((0, -1), repeat=2):  # the frequency -1 is the last in fft2's order
        change[i, j].fill_(s - 1)  # one by one, because a list of indices would be copied to the device first
    # The change is added to x, so that the result has the memory layout of x.
    return (wide + torch.fft.ifft2(torch.fft.fft2(wide) * change).real).to(x.dtype)
