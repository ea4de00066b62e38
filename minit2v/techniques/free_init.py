"""FreeInit: the video is made several times, each time from noise that keeps the low frequencies of the last result.

Wu et al., "FreeInit: Bridging Initialization Gap in Video Diffusion Models", arXiv:2312.07537. In training even the
noisiest video still shows its slowest, largest forms; at inference the first step is given noise that shows none, and
the frames do not hold together. So the finished video is noised again with the noise that it began with, and of that
only the low frequencies in time and space are kept; the high ones are drawn anew:

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
    """The settings, under diffusers' names; `DiffusionPipeline.enable_free_init` checks them.

    noise: "scaled" begins every round in the solver's own scale (Euler's latents are of size sigma), and a video with
    the noise of its strength; "published", diffusers' way, takes the noise as if every solver kept latents at variance
    1, at timestep T - 1 whatever the strength, and applies that to what the round before has left of the steps.
    frequencies: "centred" puts the frequency 0 into the middle of the filter; "published" half a bin beside it along
    axes of odd length. Both are deviations of minit2v/compat.py.
    """

    num_iters: int = 3
    use_fast_sampling: bool = False  # rounds of growing length, of which only the last has all steps
    method: str = "butterworth"
    order: float = 4  # of butterworth: higher is steeper
    spatial_stop_frequency: float = 0.25  # of the highest frequency, 0 to 1
    temporal_stop_frequency: float = 0.25
    generator: Generator | Sequence[Generator] | None = None  # for the new noise; otherwise that of the call
    noise: str = "scaled"
    frequencies: str = "centred"

    def mix(self, x: Tensor, z: Tensor) -> Tensor:
        """x, z (b c f h w) -> the low frequencies of x with the high ones of z, in float32 or wider."""
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
    """What is kept of each frequency, 0 to 1: (f h w) in float64, in the order of fftn, frequency 0 first.

    Frequencies count from -1 to 1, which is one period in two frames or pixels. d_s and d_t: the stop frequencies in
    space and in time; where one is 0 nothing is kept. "ideal" ends at the radius (2 d_s) ** 0.5 and not at d_s, and
    "box" at d of the way to -1 but one bin short of it on the way to 1: so the authors' code has them.
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
    """(n,): 1 for the frequencies from -d to d, of which there is at least 0."""
    k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64).round()
    edge = max(1, round(n // 2 * d))
    return ((-edge <= k) & (k < edge)).double()


@dataclass(frozen=True)
class NoisedVideo:
    """What a run of video to video begins with. None where the caller gave noisy latents and not what is in them."""

    strength: float
    latents: Tensor | None = None  # (b c f h w), of the video
    noise: Tensor | None = None  # (b c f h w), which was added


class Round(NamedTuple):
    grid: int  # steps from pure noise on, as for set_timesteps
    first: int  # the place in the timesteps of that grid at which the round begins
    steps: int  # that the round makes


class FreeInitRounds:
    """The rounds of one call, and where each begins: `plan`, and `begin(i, x)` once for every i in turn."""

    def __init__(self, settings: FreeInit, scheduler: Any, x: Tensor, timesteps: Tensor, steps: int,
                 video: NoisedVideo | None, generator: Generator | Sequence[Generator] | None):
        """x (b c f h w): the first beginning, for `timesteps` of the scheduler's grid.

        Raises ValueError where a second round is not defined.
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
            raise ValueError("FreeInit lays the scheduler's own grid for every round: leave out timesteps and sigmas, "
                             "or call disable_free_init()")
        if self.settings.noise == "published":
            self.noise = x
            if hasattr(scheduler, "index_for_timestep"):  # solvers that can add noise only at a place of their grid
                scheduler.index_for_timestep(self._last_timestep)
        elif video is None:
            self.noise = x.to(torch.promote_types(x.dtype, torch.float32)) / scheduler.init_noise_sigma
        elif video.noise is None:
            raise ValueError("FreeInit needs the noise that was added, which noisy latents do not tell: give a video, "
                             "or call disable_free_init()")
        else:
            self.noise = video.noise

    @property
    def _last_timestep(self) -> int:
        return self.scheduler.config.num_train_timesteps - 1

    def _plan(self, steps: int) -> list[Round]:
        s, k, order = self.settings, self.settings.num_iters, self.scheduler.order
        n, calls = self.scheduler.num_inference_steps, len(self.scheduler.timesteps)
        skipped = calls - len(self.timesteps) - (n - steps) * order  # left out before the first, beside whole steps
        rounds = []
        for i in range(k):
            part = i + 1 if s.use_fast_sampling else k  # of k
            if s.noise == "scaled" or self.video is None:
                grid = max(n * part // k, -(-n // steps))  # long enough for one step of the share that is made
                made = grid * steps // n
                rounds.append(Round(grid, (grid - made) * order + (skipped if made < grid else 0), made))
            else:  # the share of a share; PNDM calls the network more often than it steps, and each call counts
                grid = max(1, steps * part // k)
                steps = int((grid + calls - n) * self.video.strength)
                if steps == 0:
                    raise ValueError(f"strength {self.video.strength} leaves no step in round {i + 1} of FreeInit")
                rounds.append(Round(grid, (grid + calls - n - steps) * order, steps))
        return rounds

    def begin(self, i: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (b c f h w): the first beginning (i = 0) or the last result -> where round i begins, and its timesteps."""
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
        """x (b c f h w) with new high frequencies, drawn in float32 whatever its dtype, as in diffusers."""
        return self.settings.mix(x, randn(x.shape, self.generator, x.device, torch.float32))
