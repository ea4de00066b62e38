"""What the solvers in sigma share: the noise levels between which a step goes, and the counter that knows where it is.

sigma here is sigma_t / alpha_t, the noise per unit of signal; lambda is -log(sigma).
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import SPACED, Device, Scheduler, SchedulerOutput, Timestep
from .grids import GRIDS, beta_sigmas, exponential_sigmas, karras_sigmas

Stage = tuple[Tensor, Tensor]  # a sample, and the x_0 that the network sees in it
SPACINGS = (*SPACED, "use_lu_lambdas")


class SigmaScheduler(Scheduler):
    """Base of the solvers that walk down `sigmas`, one longer than `timesteps`, by a counter."""

    smallest_alpha_bar = 2.0**-24

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._put_timesteps(self._grid, dtype=torch.float32)
        self._put_sigmas([*self._table().flip(0).tolist(), 0.0])
        chosen = [name for name in SPACINGS if self._own(name)]
        if len(chosen) > 1:
            raise ValueError(f"{type(self).__name__}: choose one of {' and '.join(chosen)}")

    def _table(self, bar: Tensor | None = None) -> Tensor:
        """(num_train_timesteps,) sigmas, rising."""
        bar = self.alphas_cumprod if bar is None else bar
        return ((1 - bar) / bar) ** 0.5

    def _spaced(self, high: float, low: float, n: int) -> np.ndarray | None:
        """n sigmas by the spacing that the config asks for, None where it asks for none."""
        # sigma_min and sigma_max are fields of Euler's that others heed too where their config holds them.
        low = low if self.config.get("sigma_min") is None else self.config["sigma_min"]
        high = high if self.config.get("sigma_max") is None else self.config["sigma_max"]
        if self._own("use_karras_sigmas"):
            return karras_sigmas(high, low, n)
        if self._own("use_lu_lambdas") or self._own("use_exponential_sigmas"):
            return exponential_sigmas(high, low, n)
        return beta_sigmas(high, low, n) if self._own("use_beta_sigmas") else None

    def _one_of(self, n: int | None, timesteps: Any, sigmas: Any) -> None:
        if sum(v is not None for v in (n, timesteps, sigmas)) != 1:
            raise ValueError("give num_inference_steps, timesteps or sigmas, one of them")
        if timesteps is not None and any(self._own(name) for name in SPACINGS):
            raise ValueError("timesteps and a spacing of sigmas (use_..._sigmas) exclude each other")

    def _spread(self, n: int) -> np.ndarray:
        """The grid of n timesteps that the config asks for."""
        raise NotImplementedError

    def _lay(self, n: int | None, timesteps: Any, sigmas: Any) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps, and the sigmas between which the steps go, one more."""
        self._one_of(n, timesteps, sigmas)
        table = self._table().numpy()
        if sigmas is not None:
            levels = self._custom(sigmas, "sigmas")
            return self._sigma_to_t(levels[:-1], table), levels
        grid = self._spread(self._count(n)) if timesteps is None else self._custom(timesteps, "timesteps")
        levels, last = np.interp(self._in_range(grid), np.arange(len(table)), table), self._last_sigma()
        if self._own("interpolation_type") == "log_linear":
            levels = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), len(grid) + 1))
        spaced = self._spaced(levels[0].item(), levels[-1].item(), len(grid))
        if spaced is not None:
            levels, grid = spaced, self._sigma_to_t(spaced, table)
            if self._own("spaced_timesteps") == "whole":
                grid = self._whole(grid)
            if last >= levels[-1] * (1 - 1e-9):  # the spacing ends there already
                last = levels[-1]
        return grid, np.append(levels, last)

    def _whole(self, grid: np.ndarray) -> np.ndarray:
        """Diffusers' timesteps of spaced sigmas."""
        return grid.round() if self.config.use_karras_sigmas else grid

    @staticmethod
    def _sigma_to_t(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Fractional timesteps at which the training schedule has these sigmas."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))

    def _put_sigmas(self, sigmas: Sequence[float]) -> None:
        self._sigmas = [float(s) for s in sigmas]
        self.sigmas = torch.tensor(self._sigmas, dtype=torch.float64)
        self.step_index: int | None = None
        self.begin_index: int | None = None

    def _set_grid(self, timesteps: Sequence[float], sigmas: Sequence[float], device: Any, dtype: torch.dtype) -> None:
        self.num_inference_steps = len(timesteps)
        self._put_timesteps(timesteps, device, dtype)
        self._put_sigmas(sigmas)
        self._reset()

    def _reset(self) -> None:
        """What a solver remembers of a run, empty."""

    def _last_sigma(self) -> float:
        return 0.0 if self._own("final_sigmas_type") != "sigma_min" else self._table()[0].item()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this place of the grid (a pipeline that begins with a noised video)."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """The place of a timestep in the grid; the second one where it occurs twice, so that a start in the middle does
        not repeat a noise level. Raises ValueError where it does not occur."""
        return self._places(self._number(timestep), schedule_timesteps)[:2][-1]

    def _start(self, timestep: Timestep) -> int:
        """The place at which this step starts."""
        if self.step_index is None and self.begin_index is None:
            # From the top even where the top occurs twice (fractional timesteps, cut off): a run begins there.
            first = self._number(timestep) == self._grid[0]
            self.step_index = 0 if first else self.index_for_timestep(timestep)
        elif self.step_index is None:
            self.step_index = self.begin_index
        if self.step_index >= len(self._grid):
            raise ValueError(f"all {len(self._grid)} steps are done; call set_timesteps for another video")
        return self.step_index

    def _scales(self, sigma: float) -> tuple[float, float]:
        """(alpha, sigma) of the solver's own x at a noise level."""
        raise NotImplementedError

    def _end(self, x: Tensor, dtype: torch.dtype, return_dict: bool, x0: Tensor | None = None) -> SchedulerOutput:
        self.step_index += 1
        return super()._end(x, dtype, return_dict, x0)

    def _place(self, t: float) -> int | None:
        """Where the grid has a timestep, None where it does not; first of all the place where the solver stands."""
        if self.begin_index is not None:
            at = self.begin_index if self.step_index is None else self.step_index
            if self._own("noised_at") == "counter" or (at < len(self._grid) and self._grid[at] == t):
                return at
        return self.index_for_timestep(t) if t in self._grid else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise for the solver's own x, at one timestep or at one per row: of the grid, or any of the training's."""
        levels = []
        for t in torch.as_tensor(timesteps).reshape(-1).tolist():
            i = self._place(t)
            if i is None:
                self._in_range(np.array([t]))
            level = self._sigmas[i] if i is not None else np.interp(t, np.arange(len(self)), self._table().numpy())
            levels.append(self._scales(float(level)))
        alpha, sigma = (self._rows(torch.tensor(v, dtype=torch.float64), original_samples)
                        for v in zip(*levels, strict=True))  # fmt: skip
        return (alpha * original_samples + sigma * noise).to(original_samples.dtype)


class ExplodingScheduler(SigmaScheduler):
    """Base of k-diffusion's solvers: x = x_0 + sigma eps, which grows with sigma; the network sees a scaled copy.

    They integrate dx / dsigma = eps = (x - x_0) / sigma (Karras et al., arXiv:2206.00364, equation 3).
    """

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._scaled = False
        if self._continuous:
            self._put_timesteps([math.log(s) / 4 for s in self._sigmas[:-1]], dtype=torch.float32)

    @property
    def _continuous(self) -> bool:
        """Whether the network is told log(sigma) / 4 in place of the timestep, as models that were trained so want."""
        return False

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma; with `leading`, which stops short of pure noise, that of data and noise together."""
        top = max(self._sigmas)
        return math.hypot(top, 1) if self.config.timestep_spacing == "leading" else top

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Lay the grid: so many steps, or these timesteps, or these sigmas (with the last, usually 0, at the end)."""
        grid, levels = self._lay(num_inference_steps, timesteps, sigmas)
        if self._continuous:
            if timesteps is not None:
                raise ValueError("timesteps exclude continuous timesteps: give sigmas")
            grid = np.log(levels[: len(grid)]) / 4
        self._set_grid(*self._calls(grid, levels), device, torch.float32)
        self.num_inference_steps = len(grid)

    def _calls(self, grid: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The timesteps and sigmas of steps -> those of the calls of the network."""
        return grid, levels

    def _spread(self, n: int) -> np.ndarray:
        c = self.config
        return GRIDS[c.timestep_spacing](c.num_train_timesteps, n, c.steps_offset)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """x / sqrt(sigma**2 + 1), of about unit variance."""
        sigma = self._sigmas[self._start(timestep)]
        self._scaled = True
        return sample / math.hypot(sigma, 1)

    def _scales(self, sigma: float) -> tuple[float, float]:
        return 1.0, sigma

    def _x0(self, out: Tensor, x: Tensor, sigma: float) -> Tensor:
        alpha = 1 / math.hypot(sigma, 1)
        return self._clip(self._x0_and_eps(out, alpha * x, alpha, alpha * sigma)[0])

    def _begin(self, timestep: Timestep) -> int:
        """The place at which this step starts, after what callers get wrong."""
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"{type(self).__name__}.step wants one of scheduler.timesteps, not an index ({timestep})")
        if not self._scaled:
            warnings.warn("call scale_model_input before the network, or its input is of the wrong size", stacklevel=3)
            self._scaled = True
        return self._start(timestep)


class TwoStageScheduler(ExplodingScheduler):
    """Base of the solvers with two calls of the network in every step but the last: at its start and a second level.

    `timesteps` and `sigmas` have an entry per call of the network. A subclass says where the second calls are
    (`_second_levels`), and makes of both predictions a step (`_advance`).
    """

    order = 2

    def _calls(self, grid: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, second = len(grid), self._second_levels(levels[: len(grid)])
        calls, at = np.empty(2 * n - 1), np.empty(2 * n)
        calls[::2], at[: 2 * n - 1 : 2], at[-1] = grid, levels[:n], levels[n]
        calls[1::2], at[1:-1:2] = self._second_timesteps(grid, second), second
        return calls, at

    def _reset(self) -> None:
        self._first: Stage | None = None  # at the start of the step

    def _second_levels(self, levels: np.ndarray) -> np.ndarray:
        """(n,) sigmas -> (n - 1,), where the second calls are."""
        return np.sqrt(levels[:-1] * levels[1:])

    def _second_timesteps(self, grid: np.ndarray, second: np.ndarray) -> np.ndarray:
        return self._sigma_to_t(second, self._table().numpy())

    def _two_stages(self, out: Tensor, timestep: Any, sample: Tensor, return_dict: bool, **more: Any) -> Any:
        """x (b, ...) from one call to the next."""
        out, x = self._upcast(out, sample)
        i = self._begin(timestep)
        sigma = self._sigmas[i]
        x0 = self._x0(out, x, sigma)
        if i % 2 and self._first is not None:
            x, self._first = self._advance(self._first, (x, x0), self._sigmas[i - 1 : i + 2], **more), None
        else:
            if i % 2 == 0 and i + 1 < len(self._grid):
                self._first = x, x0
            x = self._leave(x, x0, self._sigmas[i : i + 3], **more)
        return self._end(x, sample.dtype, return_dict, x0)

    def _is_noise(self, sigma: float) -> bool:
        """Whether this is pure noise, sigma in the thousands: times that, the difference of two slopes would be all."""
        return self._ends_in_noise and sigma == self._table()[-1].item()

    def _leave(self, x: Tensor, x0: Tensor, levels: list[float], **more: Any) -> Tensor:
        """From the first of these levels to the second, by the prediction at the first: Euler's step."""
        return x0 + levels[1] / levels[0] * (x - x0)

    def _advance(self, first: Stage, second: Stage, levels: list[float], **more: Any) -> Tensor:
        """From (x, x_0) at levels[0], and at levels[1] where the first led, to x at levels[2]: the midpoint rule."""
        (x, _), (x_mid, x0_mid), (sigma, middle, target) = first, second, levels
        if self._is_noise(sigma):
            return x0_mid + target / sigma * (x - x0_mid)
        return x + (target - sigma) / middle * (x_mid - x0_mid)
