"""The base of the solvers in sigma: the noise levels of the steps, and the counter of steps.

Here sigma means sigma_t / alpha_t, the ratio of noise to signal. lambda is -log(sigma). A *place* is an index in the
grid.
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

Stage = tuple[Tensor, Tensor]  # (sample, predicted x_0)
SPACINGS = (*SPACED, "use_lu_lambdas")


class SigmaScheduler(Scheduler):
    """Base class of the solvers in sigma. `sigmas` has one entry more than `timesteps`. A counter selects the step."""

    smallest_alpha_bar = 2.0**-24

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._put_timesteps(self._grid, dtype=torch.float32)
        self._put_sigmas([*self._table().flip(0).tolist(), 0.0])
        chosen = [name for name in SPACINGS if self._own(name)]
        if len(chosen) > 1:
            raise ValueError(f"{type(self).__name__}: {' and '.join(chosen)} exclude each other: set one of them")

    def _table(self, bar: Tensor | None = None) -> Tensor:
        """(num_train_timesteps,) sigmas, rising."""
        bar = self.alphas_cumprod if bar is None else bar
        return ((1 - bar) / bar) ** 0.5

    def _spaced(self, high: float, low: float, n: int) -> np.ndarray | None:
        """n sigmas with the spacing of the config, or None if it has none."""
        # sigma_min and sigma_max are fields of Euler's. Other classes use them, too, if their config has them.
        low = low if self.config.get("sigma_min") is None else self.config["sigma_min"]
        high = high if self.config.get("sigma_max") is None else self.config["sigma_max"]
        if self._own("use_karras_sigmas"):
            return karras_sigmas(high, low, n)
        if self._own("use_lu_lambdas") or self._own("use_exponential_sigmas"):
            return exponential_sigmas(high, low, n)
        return beta_sigmas(high, low, n) if self._own("use_beta_sigmas") else None

    def _one_of(self, n: int | None, timesteps: Any, sigmas: Any) -> None:
        if sum(v is not None for v in (n, timesteps, sigmas)) != 1:
            raise ValueError("give exactly one of them: num_inference_steps, timesteps or sigmas")
        if timesteps is not None and any(self._own(name) for name in SPACINGS):
            raise ValueError("timesteps and a spacing of sigmas (use_..._sigmas) exclude each other: give one of them")

    def _spread(self, n: int) -> np.ndarray:
        """n timesteps by the config's rule."""
        raise NotImplementedError

    def _lay(self, n: int | None, timesteps: Any, sigmas: Any) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps (n,), and the sigmas at the starts and ends of the steps (n + 1,)."""
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
            if last >= levels[-1] * (1 - 1e-9):  # the spacing already ends there
                last = levels[-1]
        return grid, np.append(levels, last)

    def _whole(self, grid: np.ndarray) -> np.ndarray:
        """Diffusers' whole timesteps for spaced sigmas."""
        return grid.round() if self.config.use_karras_sigmas else grid

    @staticmethod
    def _sigma_to_t(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
        """The fractional timesteps at which the noise schedule has these sigmas."""
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
        """Clears what the solver remembers of a run."""

    def _last_sigma(self) -> float:
        return 0.0 if self._own("final_sigmas_type") != "sigma_min" else self._table()[0].item()

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at this index of the grid, as in video to video."""
        self.begin_index = begin_index

    def index_for_timestep(self, timestep: Timestep, schedule_timesteps: Tensor | None = None) -> int:
        """The index of a timestep in the grid. If it occurs twice, the second one, so that no noise level is repeated.

        Raises ValueError if it does not occur.
        """
        return self._places(self._number(timestep), schedule_timesteps)[:2][-1]

    def _start(self, timestep: Timestep) -> int:
        """The index in the grid at which this step begins."""
        if self.step_index is None and self.begin_index is None:
            # A run begins at index 0 even if the first timestep occurs twice, as truncated timesteps may.
            first = self._number(timestep) == self._grid[0]
            self.step_index = 0 if first else self.index_for_timestep(timestep)
        elif self.step_index is None:
            self.step_index = self.begin_index
        if self.step_index >= len(self._grid):
            raise ValueError(f"all {len(self._grid)} steps are done: call set_timesteps for another video")
        return self.step_index

    def _scales(self, sigma: float) -> tuple[float, float]:
        """(alpha, sigma) of the solver's x at a noise level: x = alpha x_0 + sigma eps."""
        raise NotImplementedError

    def _end(self, x: Tensor, dtype: torch.dtype, return_dict: bool, x0: Tensor | None = None) -> SchedulerOutput:
        self.step_index += 1
        return super()._end(x, dtype, return_dict, x0)

    def _place(self, t: float) -> int | None:
        """The index of a timestep in the grid, or None. The solver's current index is preferred."""
        if self.begin_index is not None:
            at = self.begin_index if self.step_index is None else self.step_index
            if self._own("noised_at") == "counter" or (at < len(self._grid) and self._grid[at] == t):
                return at
        return self.index_for_timestep(t) if t in self._grid else None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Adds noise to x_0 (b, ...), in the solver's scale. timesteps: one for all, or one per row (b,).

        They may be timesteps of the grid or any training timesteps.
        """
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
    """Base class of k-diffusion's solvers: x = x_0 + sigma eps grows with sigma. The network sees a scaled copy of x.

    They integrate dx / dsigma = eps = (x - x_0) / sigma (Karras et al. 2022, arXiv:2206.00364, equation 3).
    """

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._scaled = False
        if self._continuous:
            self._put_timesteps([math.log(s) / 4 for s in self._sigmas[:-1]], dtype=torch.float32)

    @property
    def _continuous(self) -> bool:
        """Whether the network gets log(sigma) / 4 instead of the timestep, as some models were trained."""
        return False

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial latents: the largest sigma, or sqrt(sigma**2 + 1) with `leading`."""
        top = max(self._sigmas)
        return math.hypot(top, 1) if self.config.timestep_spacing == "leading" else top

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Sets the grid: `num_inference_steps` steps, or given timesteps, or given sigmas.

        sigmas: falling; the last one, usually 0, is the noise level after the last step.
        Raises ValueError unless exactly one of the three is given, or if the config does not allow it.
        """
        grid, levels = self._lay(num_inference_steps, timesteps, sigmas)
        if self._continuous:
            if timesteps is not None:
                raise ValueError("a model with timestep_type='continuous' has no whole timesteps: give sigmas")
            grid = np.log(levels[: len(grid)]) / 4
        self._set_grid(*self._calls(grid, levels), device, torch.float32)
        self.num_inference_steps = len(grid)

    def _calls(self, grid: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Timesteps and sigmas of the steps -> those of the calls of the network."""
        return grid, levels

    def _spread(self, n: int) -> np.ndarray:
        c = self.config
        return GRIDS[c.timestep_spacing](c.num_train_timesteps, n, c.steps_offset)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """The network's input x / sqrt(sigma**2 + 1), which has about unit variance."""
        sigma = self._sigmas[self._start(timestep)]
        self._scaled = True
        return sample / math.hypot(sigma, 1)

    def _scales(self, sigma: float) -> tuple[float, float]:
        return 1.0, sigma

    def _x0(self, out: Tensor, x: Tensor, sigma: float) -> Tensor:
        alpha = 1 / math.hypot(sigma, 1)
        return self._clip(self._x0_and_eps(out, alpha * x, alpha, alpha * sigma)[0])

    def _begin(self, timestep: Timestep) -> int:
        """The index at which this step begins. It also checks common mistakes of the caller."""
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"{type(self).__name__}.step needs one of scheduler.timesteps, not an index ({timestep})")
        if not self._scaled:
            warnings.warn("scale_model_input was not called: the network's input has the wrong scale", stacklevel=3)
            self._scaled = True
        return self._start(timestep)


class TwoStageScheduler(ExplodingScheduler):
    """Base class of the solvers that call the network twice in every step except the last.

    `timesteps` and `sigmas` have one entry per call of the network. A subclass says at which noise levels the second
    calls are (`_second_levels`), and computes a step from both predictions (`_advance`).
    """

    order = 2

    def _calls(self, grid: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        n, second = len(grid), self._second_levels(levels[: len(grid)])
        calls, at = np.empty(2 * n - 1), np.empty(2 * n)
        calls[::2], at[: 2 * n - 1 : 2], at[-1] = grid, levels[:n], levels[n]
        calls[1::2], at[1:-1:2] = self._second_timesteps(grid, second), second
        return calls, at

    def _reset(self) -> None:
        self._first: Stage | None = None  # the stage at the start of the step

    def _second_levels(self, levels: np.ndarray) -> np.ndarray:
        """Sigmas (n,) -> the sigmas of the second calls (n - 1,)."""
        return np.sqrt(levels[:-1] * levels[1:])

    def _second_timesteps(self, grid: np.ndarray, second: np.ndarray) -> np.ndarray:
        return self._sigma_to_t(second, self._table().numpy())

    def _two_stages(self, out: Tensor, timestep: Any, sample: Tensor, return_dict: bool, **more: Any) -> Any:
        """x (b, ...) -> x for the next call of the network."""
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
        """Whether sigma is so large (thousands) that x is pure noise. A second-order step would be very inaccurate."""
        return self._ends_in_noise and sigma == self._table()[-1].item()

    def _leave(self, x: Tensor, x0: Tensor, levels: list[float], **more: Any) -> Tensor:
        """Euler's step from levels[0] to levels[1], with the prediction at levels[0]."""
        return x0 + levels[1] / levels[0] * (x - x0)

    def _advance(self, first: Stage, second: Stage, levels: list[float], **more: Any) -> Tensor:
        """The midpoint rule: stages (x, x_0) at levels[0] and levels[1] -> x at levels[2]."""
        (x, _), (x_mid, x0_mid), (sigma, middle, target) = first, second, levels
        if self._is_noise(sigma):
            return x0_mid + target / sigma * (x - x0_mid)
        return x + (target - sigma) / middle * (x_mid - x0_mid)
