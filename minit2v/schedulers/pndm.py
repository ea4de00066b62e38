"""PNDM and PLMS."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import NoiseSchedule, Scheduler, SchedulerOutput
from .grids import BETA_SCHEDULES, leading, linspace, trailing

# Adams-Bashforth: the weights of the last predictions, newest first.
BASHFORTH = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


class PNDMScheduler(Scheduler):
    """Pseudo numerical methods for diffusion models: Liu et al., arXiv:2202.09778, algorithm 2 (F-PNDM).

    Three Runge-Kutta steps of four predictions each, then Adams-Bashforth. With skip_prk_steps (every Stable Diffusion
    folder) one improved Euler step instead, which visits the second timestep twice.

    previous_timestep: "grid" steps to the timestep at which the network is asked next, wherever the run begins;
    "ratio" always num_train_timesteps // num_inference_steps further down, and counts from the first call.
    average: the predictions are averaged as "epsilon", or as they come ("prediction"), which with v_prediction costs
    the method its order.
    """

    @dataclass(frozen=True)
    class Fields(NoiseSchedule):
        skip_prk_steps: bool = False
        set_alpha_to_one: bool = False
        prediction_type: str = "epsilon"
        timestep_spacing: str = "leading"
        steps_offset: int = 0
        previous_timestep: str = "grid"
        average: str = "epsilon"

    choices = {
        "beta_schedule": tuple(BETA_SCHEDULES),
        "prediction_type": ("epsilon", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "previous_timestep": ("grid", "ratio"),
        "average": ("epsilon", "prediction"),
    }

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at this place of the grid. "ratio" counts from the first call all the same."""
        self._i = 0 if self.config.previous_timestep == "ratio" else begin_index

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay the grid, with the timesteps of the Runge-Kutta steps or the repeated one. At least 4 steps without
        skip_prk_steps. Raises ValueError where the grid does not fit the training timesteps."""
        c, n = self.config, self._count(num_inference_steps)
        if c.get("rescale_betas_zero_snr"):
            warnings.warn("PNDMScheduler has no rescale_betas_zero_snr and ignores it", stacklevel=2)
        rule = {"leading": leading, "linspace": linspace, "trailing": trailing}[c.timestep_spacing]
        grid = self._in_range(rule(c.num_train_timesteps, n, c.steps_offset).round().astype(np.int64)).tolist()
        self._ratio = c.num_train_timesteps // n
        if c.skip_prk_steps:
            self._places = grid[:2] + grid[1:]
            self._prk = 0
        else:
            if n < 4:
                raise ValueError(f"PNDMScheduler needs at least 4 steps, not {n}, unless skip_prk_steps=True")
            half = self._ratio // 2
            # Each Runge-Kutta step asks at its start, twice in the middle, and at its end.
            self._places = [t for a, b in zip(grid[:3], grid[1:4], strict=True) for t in (a, b + half, b + half, b)]
            self._prk = len(self._places)
            self._places += grid[3:]
        self.num_inference_steps = n
        self.timesteps = torch.tensor(self._places, dtype=torch.int64, device=device)
        self._i: int | None = None  # the place in the grid
        self._history: list[Tensor] = []  # predictions at the ends of whole steps, newest first
        self._base: tuple[Tensor, int] | None = None  # sample and timestep from which this step starts again
        self._sum: Tensor | float = 0.0

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput:
        """x_t (b, ...) -> the next sample at which the network is to be asked; equations (12) and (13) of the paper."""
        out, x = self._widen(model_output, sample)
        t, by_ratio = int(timestep), self.config.previous_timestep == "ratio"
        if self._i is None:
            self._i = 0 if by_ratio else self._place(t)
        i = self._i
        if i >= len(self._places):
            raise ValueError(f"all {len(self._places)} steps are done; call set_timesteps for another video")
        here, there = self._places[i], self._places[i + 1] if i + 1 < len(self._places) else -1
        eps = out if self.config.average == "prediction" else self._eps(out, x, t)

        if i < self._prk:
            phase = i % 4
            if by_ratio:
                there = t - (0 if phase % 2 else self._ratio // 2)
            if phase == 0:
                self._base, self._sum, self._history = (x, here), 0.0, [eps, *self._history]
            if self._base is not None:  # None: the run began within this step, so it goes down by plain steps
                x, here = self._base
                self._sum = self._sum + (1 / 6, 1 / 3, 1 / 3, 1 / 6)[phase] * eps
                if phase == 3:
                    eps, self._base = self._sum, None
        elif self._base is not None:  # the repeated timestep: the first step again, with the mean of its two ends
            x, here = self._base
            if by_ratio:
                here, there = t + self._ratio, t
            eps, self._base = (eps + self._history[0]) / 2, None
        else:
            if by_ratio:
                here, there = t, t - self._ratio
            if i == 0:
                self._base = x, here
            if there != here:
                self._history = [eps, *self._history[:3]]
                eps = sum(w * e for w, e in zip(BASHFORTH[len(self._history)], self._history, strict=True))

        self._i = i + 1
        x = self._transfer(x, eps, here, there).to(sample.dtype)
        return SchedulerOutput(x) if return_dict else (x,)

    def _place(self, t: int) -> int:
        if t not in self._places:
            raise ValueError(f"{t} is not one of scheduler.timesteps")
        return self._places.index(t)

    def _eps(self, out: Tensor, x: Tensor, t: int) -> Tensor:
        bar = self.alphas_cumprod[t].item()
        return self._x0_and_eps(out, x, math.sqrt(bar), math.sqrt(1 - bar))[1]

    def _transfer(self, x: Tensor, eps: Tensor, here: int, there: int) -> Tensor:
        """x along eps from one timestep to another, equation (9) of the paper: DDIM's step."""
        if self.config.average == "prediction":
            eps = self._eps(eps, x, here)
        bar_t = self.alphas_cumprod[here].item()
        bar_s = (self.alphas_cumprod[there] if there >= 0 else self.final_alpha_cumprod).item()
        scale = math.sqrt(bar_s / bar_t)
        return scale * x + (math.sqrt(1 - bar_s) - scale * math.sqrt(1 - bar_t)) * eps
