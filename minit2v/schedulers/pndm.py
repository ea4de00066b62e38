"""PNDM and PLMS."""

import math
import warnings

from torch import Tensor

from .base import Device, Scheduler, SchedulerOutput, Timestep, declare

# Adams-Bashforth: the weights of the last predictions, newest first.
BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods for diffusion models (Liu et al. 2022, arXiv:2202.09778, algorithm 2, F-PNDM).

    It begins with three Runge-Kutta steps of four predictions each, and goes on with Adams-Bashforth. With
    skip_prk_steps (as in every Stable Diffusion config), it begins with one improved Euler step. That step uses the
    second timestep twice.
    """

    Fields = declare(
        skip_prk_steps=False, set_alpha_to_one=False, prediction_type="epsilon", timestep_spacing="leading",
        steps_offset=0, previous_timestep="grid", average="epsilon", rescale_betas_zero_snr=False, zero_snr="honoured",
    )  # fmt: skip

    smallest_alpha_bar = 2.0**-24

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begins at this index of the grid. previous_timestep="ratio" ignores it, as diffusers does."""
        self._i = 0 if self.config.previous_timestep == "ratio" else begin_index

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Sets the grid, with the additional timesteps of the first steps.

        Raises ValueError if it does not fit the training timesteps, or for less than 4 steps without skip_prk_steps.
        """
        c, n = self.config, self._count(num_inference_steps)
        if c.rescale_betas_zero_snr and c.zero_snr == "ignored":
            warnings.warn("PNDMScheduler ignores rescale_betas_zero_snr, because zero_snr='ignored'", stacklevel=2)
        grid = self._whole_grid(n, None)
        self._ratio = c.num_train_timesteps // n
        if c.skip_prk_steps:
            places = grid[:2] + grid[1:]
            self._prk = 0
        else:
            if n < 4:
                raise ValueError(f"PNDMScheduler needs at least 4 steps, not {n}, unless skip_prk_steps=True")
            half = self._ratio // 2
            # Each Runge-Kutta step calls the network at its start, twice at its middle, and at its end.
            places = [t for a, b in zip(grid[:3], grid[1:4], strict=True) for t in (a, b + half, b + half, b)]
            self._prk = len(places)
            places += grid[3:]
        self.num_inference_steps = n
        self._put_timesteps(places, device)
        self._i: int | None = None  # the index in the grid
        self._history: list[Tensor] = []  # predictions at the ends of whole steps, newest first
        self._base: tuple[Tensor, int] | None = None  # (sample, timestep) at the start of this step
        self._sum: Tensor | float = 0.0

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x for the next call of the network, equations (12) and (13) of the paper."""
        out, x = self._upcast(model_output, sample)
        t, by_ratio = int(self._number(timestep)), self.config.previous_timestep == "ratio"
        if self._i is None:
            self._i = 0 if by_ratio else self._places(t)[0]
        i = self._i
        if i >= len(self._grid):
            raise ValueError(f"all {len(self._grid)} steps are done: call set_timesteps for another video")
        here, there = self._grid[i], self._grid[i + 1] if i + 1 < len(self._grid) else -1
        eps = out if self.config.average == "prediction" else self._eps(out, x, t)

        if i < self._prk:
            phase = i % 4
            if by_ratio:
                there = t - (0 if phase % 2 else self._ratio // 2)
            if phase == 0:
                self._sum, self._history = 0.0, [eps, *self._history]
                self._base = None if self._is_noise(here) else (x, here)
            if self._base is not None:  # None: the run began in the middle of this step, so it makes plain steps
                x, here = self._base
                self._sum = self._sum + (1 / 6, 1 / 3, 1 / 3, 1 / 6)[phase] * eps
                if phase == 3:
                    eps, self._base = self._sum, None
        elif self._base is not None:  # the repeated timestep: make the first step again, with the mean prediction
            x, here = self._base
            if by_ratio:
                here, there = t + self._ratio, t
            newer = 0.0 if self._is_noise(here) else 0.5
            eps, self._base = newer * eps + (1 - newer) * self._history[0], None
        else:
            if by_ratio:
                here, there = t, t - self._ratio
            if i == 0:
                self._base = x, here
            if there != here:
                self._history = [eps, *self._history[:3]]
                eps = sum(w * e for w, e in zip(BASHFORTH[len(self._history)], self._history, strict=True))

        self._i = i + 1
        return self._end(self._transfer(x, eps, here, there), sample.dtype, return_dict)

    def _is_noise(self, t: int) -> bool:
        """Whether t is pure noise. There x_0 is a quotient by an alpha near 0, so only one prediction is used."""
        return self._ends_in_noise and self._alpha_bar(t) < 1e-6

    def _eps(self, out: Tensor, x: Tensor, t: int) -> Tensor:
        bar = self._alpha_bar(t)
        return self._x0_and_eps(out, x, math.sqrt(bar), math.sqrt(1 - bar))[1]

    def _transfer(self, x: Tensor, eps: Tensor, here: int, there: int) -> Tensor:
        """DDIM's step: x from one timestep to another with this eps, equation (9) of the paper."""
        if self.config.average == "prediction":
            eps = self._eps(eps, x, here)
        bar_t, bar_s = self._alpha_bar(here), self._alpha_bar(there)
        scale = math.sqrt(bar_s / bar_t)
        return scale * x + (math.sqrt(1 - bar_s) - scale * math.sqrt(1 - bar_t)) * eps
