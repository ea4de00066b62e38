"""FreeInit: the video is made several times. Each time the initial noise keeps the low frequencies of the last result.

Wu et al. 2023, "FreeInit: Bridging Initialization Gap in Video Diffusion Models", arXiv:2312.07537. In training, even
the noisiest latents contain low frequencies of the video. At inference the first step gets pure noise without them, and
the frames do not fit together well. So FreeInit adds the initial noise to the finished video again. It keeps only the
low frequencies of the sum, in time and space. The high frequencies are drawn again:

    z_T = alpha_T x_0 + sigma_T eps        x_T = lowpass(z_T) + z - lowpass(z)        z ~ N(0, 1)
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ..schedulers.base import randn

METHODS = ("butterworth", "gaussian", "ideal", "box")
NOISES = ("scaled", "published")
FREQUENCIES = ("centred", "published")


@dataclass(frozen=True)
class FreeInit:
    """The settings, under diffusers' names. `DiffusionPipeline.enable_free_init` explains and checks them.

    noise: "scaled" begins every round in the solver's own scale (Euler's latents have the standard deviation sigma).
    In video to video, a round begins with the noise level of `strength`. "published" is diffusers' way. It assumes
    latents of variance 1 and noise of timestep T - 1 for all solvers. In video to video it applies `strength` again to
    the steps of the round before.
    frequencies: "centred" puts the frequency 0 into the middle of the filter. "published" is half a frequency beside
    it along axes of odd length. Both fields are deviations from diffusers, see minit2v/compat.py.
    """

    num_iters: int = 3
    use_fast_sampling: bool = False  # the first rounds have fewer steps; only the last has all
    method: str = "butterworth"
    order: float = 4  # of the Butterworth filter; higher is steeper
    spatial_stop_frequency: float = 0.25  # a share of the highest frequency, 0 to 1
    temporal_stop_frequency: float = 0.25
    generator: Generator | Sequence[Generator] | None = None  # for the new noise; None: that of the call
    noise: str = "scaled"
    frequencies: str = "centred"

    def mix(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (b c f h w) -> the low frequencies of x plus the high frequencies of z, in float32 or wider."""
        wide = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
        x, z = x.to(wide), z.to(wide)
        low = low_pass(tuple(x.shape[-3:]), self.method, self.order, self.spatial_stop_frequency,
                       self.temporal_stop_frequency, self.frequencies).to(x)
        axes = (-3, -2, -1)
        return z + torch.fft.ifftn(torch.fft.fftn(x - z, dim=axes) * low, dim=axes).real


@lru_cache(maxsize=4)
def low_pass(
    shape: tuple[int, int, int], method: str, order: float, d_s: float, d_t: float, frequencies: str = "centred"
) -> Tensor:
    """The filter: factors from 0 to 1 for all frequencies, (f h w) in float64, in the order of fftn.

    Frequencies are from -1 to 1. 1 means one period in two frames or pixels. d_s and d_t are the stop frequencies in
    space and in time. If one is 0, nothing is kept. As in the authors' code, "ideal" ends at the radius (2 d_s) ** 0.5,
    not at d_s. "box" keeps the frequencies from -d up to, but not including, d.
    """
    if d_s == 0 or d_t == 0:
        return torch.zeros(shape, dtype=torch.float64)
    if method == "box":
        axes = [_band(n, d) for n, d in zip(shape, (d_t, d_s, d_s), strict=True)]
        return torch.einsum("f,h,w->fhw", *axes)

    def axis(n: int) -> Tensor:
        if frequencies == "centred":
            return 2 * torch.fft.fftfreq(n, dtype=torch.float64)
        return torch.fft.ifftshift(2 * torch.arange(n, dtype=torch.float64) / n - 1)

    t, h, w = torch.meshgrid(*map(axis, shape), indexing="ij")
    square = (d_s / d_t * t) ** 2 + h**2 + w**2
    match method:
        case "butterworth":
            return 1 / (1 + (square / d_s**2) ** order)
        case "gaussian":
            return torch.exp(-square / (2 * d_s**2))
        case "ideal":
            return (square <= 2 * d_s).double()
    raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")


def _band(n: int, d: float) -> Tensor:
    """(n,): 1 for the frequencies from -d to below d, 0 for the others. Frequency 0 is always 1."""
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).round()
    edge = max(1, round(n // 2 * d))
    return ((-edge <= k) & (k < edge)).double()


@dataclass(frozen=True)
class NoisedVideo:
    """The beginning of video to video. Latents and noise are None if the caller passed noisy latents."""

    strength: float
    latents: Tensor | None = None  # (b c f h w), the video without noise
    noise: Tensor | None = None  # (b c f h w), the added noise


class Round(NamedTuple):
    grid: int  # number of steps from pure noise to the video, the argument of set_timesteps
    first: int  # index of the round's first timestep in that grid
    steps: int  # number of steps of the round


class FreeInitRounds:
    """The rounds of one call: `plan` lists them. Call `begin(i, x)` once for every i in turn."""

    def __init__(self, settings: FreeInit, scheduler: Any, x: Tensor, timesteps: Tensor, steps: int,
                 video: NoisedVideo | None, generator: Generator | Sequence[Generator] | None):
        """x (b c f h w): the latents at the beginning of the first round. timesteps: those of the first round.

        Raises ValueError if further rounds are not possible.
        """
        self.settings = settings
        self.scheduler, self.video, self.timesteps = scheduler, video, timesteps
        self.generator = self.settings.generator or generator
        self.plan = self._plan(steps)
        if self.settings.num_iters == 1:
            return
        own = copy(scheduler)
        own.set_timesteps(scheduler.num_inference_steps, device=x.device)
        if own.timesteps.tolist() != scheduler.timesteps.tolist():
            raise ValueError("FreeInit needs the scheduler's own timesteps in every round: leave out timesteps and "
                             "sigmas, or call disable_free_init()")
        if self.settings.noise == "published":
            self.noise = x
            if hasattr(scheduler, "index_for_timestep"):  # such solvers add noise only at their timesteps
                scheduler.index_for_timestep(self._last_timestep)
        elif video is None:
            self.noise = x.to(torch.promote_types(x.dtype, torch.float32)) / scheduler.init_noise_sigma
        elif video.noise is None:
            raise ValueError("FreeInit needs to know the added noise, which noisy latents do not tell: give a video, "
                             "or call disable_free_init()")
        else:
            self.noise = video.noise

    @property
    def _last_timestep(self) -> int:
        return self.scheduler.config.num_train_timesteps - 1

    def _plan(self, steps: int) -> list[Round]:
        s, k, order = self.settings, self.settings.num_iters, self.scheduler.order
        n, calls = self.scheduler.num_inference_steps, len(self.scheduler.timesteps)
        skipped = calls - len(self.timesteps) - (n - steps) * order  # calls left out, in addition to whole steps
        rounds = []
        for i in range(k):
            part = i + 1 if s.use_fast_sampling else k  # the round has part / k of the steps
            if s.noise == "scaled" or self.video is None:
                grid = max(n * part // k, -(-n // steps))  # long enough for at least one step
                made = grid * steps // n
                rounds.append(Round(grid, (grid - made) * order + (skipped if made < grid else 0), made))
            else:  # `strength` is applied to the steps of the round before; PNDM has more calls than steps
                grid = max(1, steps * part // k)
                steps = int((grid + calls - n) * self.video.strength)
                if steps == 0:
                    raise ValueError(f"strength {self.video.strength} leaves no step in round {i + 1} of FreeInit: "
                                     "raise strength or num_inference_steps")  # fmt: skip
                rounds.append(Round(grid, (grid + calls - n - steps) * order, steps))
        return rounds

    def begin(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The initial latents of round i, (b c f h w), and its timesteps. x: see `__init__`, or the last result."""
        scheduler, (grid, first, _) = self.scheduler, self.plan[i]
        if self.settings.noise == "published":
            if i > 0:
                t = torch.tensor([self._last_timestep])
                x = self._fresh(scheduler.add_noise(x, self.noise, t)).to(x.dtype)
            scheduler.set_timesteps(grid, device=x.device)
            return x, scheduler.timesteps[first:]
        if i == 0 and grid == scheduler.num_inference_steps:
            return x, self.timesteps

        scheduler.set_timesteps(grid, device=x.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(first)
        timesteps = scheduler.timesteps[first:]
        if self.video is not None:
            noise = self._fresh(self.noise) if i > 0 else self.noise
            clean = x if i > 0 else self.video.latents
            return scheduler.add_noise(clean, noise.to(x.dtype), timesteps[:1]), timesteps
        noise = self.noise
        if i > 0:
            bar = scheduler.alphas_cumprod[-1].item()
            noise = self._fresh(bar**0.5 * x + (1 - bar) ** 0.5 * noise)
        return (noise * scheduler.init_noise_sigma).to(x.dtype), timesteps

    def _fresh(self, x: Tensor) -> Tensor:
        """x (b c f h w) with new high frequencies. They are drawn in float32 for every dtype, as in diffusers."""
        return self.settings.mix(x, randn(x.shape, self.generator, x.device, torch.float32))
