"""FreeU: on the coarse half of the way up, the backbone counts for more and the broad forms in the skips for less.

Si et al., "FreeU: Free Lunch in Diffusion U-Net", arXiv:2309.11497. The backbone carries what is to be drawn, the skip
connections carry detail back in, and too much of the noise with it. In the two coarsest levels, where a skip is joined
(section 3.2), half of the backbone's channels are multiplied by b and the lowest frequencies of the skip by s. Nothing
is trained.
"""

import math
from dataclasses import dataclass
from itertools import product
from numbers import Real

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreeU:
    """The factors of the paper: 1 for the coarsest level, 2 for the next. Raises ValueError on what is not a factor."""

    s1: float
    s2: float
    b1: float
    b2: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
                raise ValueError(f"FreeU: {name} must be a number above 0, not {value!r} (1 changes nothing)")

    def __call__(self, x: Tensor, skip: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """x, skip (n c h w), of the `level`-th on the way up -> what is joined there instead of them."""
        if level > 1:
            return x, skip
        s, b = ((self.s1, self.b1), (self.s2, self.b2))[level]
        half = x.shape[1] // 2
        return torch.cat([x[:, :half] * b, x[:, half:]], dim=1), scale_low_frequencies(skip, s)


def scale_low_frequencies(x: Tensor, s: float) -> Tensor:
    """x (n c h w) with the frequencies -1 and 0 of both axes times s: the mean and one period across the picture.

    The transform is taken in float32 or wider: in half precision it exists only on some devices and for some sizes.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    change = torch.zeros(x.shape[-2:], device=x.device, dtype=wide.dtype)
    for i, j in product((0, -1), repeat=2):  # in the order of fft2, which ends with the frequency -1
        change[i, j].fill_(s - 1)  # a number: a list of places would have to be sent to the device first
    # Added to x, and not filtered as a whole: so the result lies in memory as x does.
    return (wide + torch.fft.ifft2(torch.fft.fft2(wide) * change).real).to(x.dtype)
