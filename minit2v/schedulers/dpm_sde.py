"""DPM-Solver++ for the stochastic equation (SDE). The noise comes from one Brownian path for all numbers of steps."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .base import SPACED, Generators, SchedulerOutput, Timestep, declare, each_generator
from .sigma import Stage, TwoStageScheduler


class BrownianPath:
    """Brownian motion B(u) with the time u = exp(2 lambda). It depends only on the seeds, and not on the grid.

    The noise that a step of the SDE adds is exactly sigma exp(-lambda) (B(u_end) - B(u_start)). So runs with more or
    fewer steps converge to the same video. The path is a binary tree over lambda: each middle is drawn given its two
    ends. The generator for it is seeded with the seed and the place in the tree. It runs on the CPU, so that the path
    is the same for every device.
    """

    LOW, HIGH, DEPTH = -12.0, 12.0, 20

    def __init__(self, seeds: Sequence[int], shape: Sequence[int]):
        """One path of `shape` for each seed, concatenated along the first axis."""
        self.seeds, self.shape = list(seeds), tuple(shape)
        self._way: list[tuple[int, Tensor]] = []  # places on the last path through the tree, and their values

    def _draw(self, place: int, depth: int) -> Tensor:
        if depth < len(self._way) and self._way[depth][0] == place:
            return self._way[depth][1]
        drawn = [torch.randn(self.shape, generator=Generator().manual_seed(_mix(seed, place))) for seed in self.seeds]
        self._way[depth:] = [(place, torch.cat(drawn))]
        return self._way[depth][1]

    def __call__(self, lam: float) -> Tensor:
        """(len(seeds) * shape[0], ...): B at u = exp(2 lam)."""
        a, b, place = self.LOW, self.HIGH, 1
        lam = min(max(lam, a), b)
        u_a, u_b = math.exp(2 * a), math.exp(2 * b)
        w_b = self._draw(0, 0) * math.sqrt(u_b - u_a)
        w_a = torch.zeros_like(w_b)
        for depth in range(1, self.DEPTH + 1):
            middle = (a + b) / 2
            u = math.exp(2 * middle)
            share = (u - u_a) / (u_b - u_a)
            w = torch.lerp(w_a, w_b, share) + math.sqrt(share * (u_b - u)) * self._draw(place, depth)
            if lam < middle:
                b, u_b, w_b, place = middle, u, w, 2 * place
            else:
                a, u_a, w_a, place = middle, u, w, 2 * place + 1
        return torch.lerp(w_a, w_b, (math.exp(2 * lam) - u_a) / (u_b - u_a))


def _mix(seed: int, place: int) -> int:
    """A 63-bit seed for a place in the tree. splitmix64 makes the seeds of neighbours independent."""
    x = (seed * 0x9E3779B97F4A7C15 + place * 0xD1B54A32D192ED03 + 1) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return (x ^ (x >> 31)) >> 1


class DPMSolverSDEScheduler(TwoStageScheduler):
    """k-diffusion's dpmpp_sde: it solves the reverse SDE in x_0, with a second prediction at the middle of lambda."""

    Fields = declare(
        beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", **SPACED, noise_sampler_seed=None,
        timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False, zero_snr="honoured",
        noised_at="timestep", noise_path="exact",
    )  # fmt: skip

    _seeds: list[int] | None = None
    _cached_path: Any = None  # it depends only on the seeds, so the state does not contain it

    def _reset(self) -> None:
        super()._reset()
        self._seeds = self._cached_path = None

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True, s_noise: float = 1.0,
        generator: Generators = None,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x for the next call of the network. Each step has two calls. s_noise: a factor of the noise."""
        if self._seeds is None:
            generators, seed = each_generator(generator, len(sample)), self.config.noise_sampler_seed
            self._seeds = [seed] if seed is not None else [_seed(g) for g in generators]
        return self._two_stages(model_output, timestep, sample, return_dict, s_noise=s_noise)

    def _leave(self, x: Tensor, x0: Tensor, levels: list[float], s_noise: float) -> Tensor:
        return self._stochastic(x, x0, levels[0], levels[1], s_noise)

    def _advance(self, first: Stage, second: Stage, levels: list[float], s_noise: float) -> Tensor:
        return self._stochastic(first[0], second[1], levels[0], levels[2], s_noise)

    def _stochastic(self, x: Tensor, x0: Tensor, sigma: float, target: float, s_noise: float) -> Tensor:
        """From sigma to the target for this x_0: x_0 + (target / sigma)**2 (x - x_0), plus noise."""
        if target == 0:
            return x0
        ratio = target / sigma
        std = s_noise * target * math.sqrt(1 - ratio**2)
        return x0 + ratio**2 * (x - x0) + std * self._noise(x, sigma, target)

    def _noise(self, x: Tensor, sigma: float, target: float) -> Tensor:
        """Standard normal noise: the increment of the path between two sigmas."""
        exact = self.config.noise_path == "exact"
        if self._cached_path is None:
            shape = (len(x) // len(self._seeds), *x.shape[1:])
            levels = [s for s in self._sigmas if s > 0]
            self._cached_path = (BrownianPath(self._seeds, shape) if exact else
                                 _published_path(self._seeds, shape, x, min(levels), max(levels)))  # fmt: skip
        path = self._cached_path
        if not exact:
            return -torch.cat([p(target, sigma) for p in path]).to(x.device) / math.sqrt(sigma - target)
        step = (path(-math.log(target)) - path(-math.log(sigma))) / math.sqrt(target**-2 - sigma**-2)
        return step.to(x.device, x.dtype)


def _seed(generator: Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(0, 2**62, (), generator=generator, device=device))


def _published_path(seeds: list[int], shape: tuple[int, ...], x: Tensor, low: float, high: float) -> list[Any]:
    try:
        import torchsde
    except ImportError:
        raise ImportError("noise_path='published' needs torchsde; noise_path='exact' does not") from None
    same = {"t0": low, "t1": high, "size": shape, "dtype": x.dtype, "device": x.device}
    return [torchsde.BrownianInterval(**same, entropy=s, tol=1e-6, pool_size=24, halfway_tree=True) for s in seeds]
