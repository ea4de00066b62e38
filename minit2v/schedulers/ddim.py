"""DDIM."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from .base import NoiseSchedule, Scheduler, SchedulerOutput, randn
from .grids import BETA_SCHEDULES, leading, linspace, trailing


class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models: Song, Meng, Ermon, arXiv:2010.02502.

    previous_timestep says where a step ends: "grid", the next timestep of the scheduler's own grid; "ratio", always
    num_train_timesteps // num_inference_steps further down, which misses the grid with `linspace` and often with
    `trailing`.
    """

    @dataclass(frozen=True)
    class Fields(NoiseSchedule):
        clip_sample: bool = True
        set_alpha_to_one: bool = True
        steps_offset: int = 0
        prediction_type: str = "epsilon"
        thresholding: bool = False
        dynamic_thresholding_ratio: float = 0.995
        clip_sample_range: float = 1.0
        sample_max_value: float = 1.0
        timestep_spacing: str = "leading"
        rescale_betas_zero_snr: bool = False
        previous_timestep: str = "grid"

    choices = {
        "beta_schedule": tuple(BETA_SCHEDULES),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": ("leading", "linspace", "trailing"),
        "previous_timestep": ("grid", "ratio"),
    }

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        if self.config.timestep_spacing != "leading":
            self._check_terminal(self.config.num_train_timesteps - 1)
        # The level after the last step: clean, or that of timestep 0, on which Stable Diffusion's were trained to end.
        self.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        if not self.config.set_alpha_to_one:
            self.final_alpha_cumprod = self.alphas_cumprod[0]

    def _check_terminal(self, first: int) -> None:
        """At zero SNR x is pure noise, and an epsilon prediction says nothing about x_0: 0 / 0."""
        if self.config.prediction_type == "epsilon" and self.alphas_cumprod[first] == 0:
            raise ValueError(
                "rescale_betas_zero_snr and prediction_type='epsilon' do not go together from the last timestep on: "
                "use a v_prediction or sample model, or timestep_spacing='leading'"
            )

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay the grid. Raises ValueError where it does not fit the training timesteps."""
        c, n = self.config, self._count(num_inference_steps)
        grid = {"leading": leading, "linspace": linspace, "trailing": trailing}[c.timestep_spacing]
        timesteps = self._in_range(grid(c.num_train_timesteps, n, c.steps_offset).round().astype(np.int64))
        self._falling = timesteps.tolist()
        self._check_terminal(self._falling[0])
        self.num_inference_steps = n
        self.timesteps = torch.tensor(self._falling, device=device)

    def _alpha_bar_after(self, t: int) -> Tensor:
        """alpha_bar where the step from t ends."""
        if self.config.previous_timestep == "grid":
            after = next((s for s in self._falling if s < t), -1)
        else:
            after = t - self.config.num_train_timesteps // self.num_inference_steps
        return self.alphas_cumprod[after] if after >= 0 else self.final_alpha_cumprod

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator | list[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """x_t (b, ...) -> x_s, equations (12) and (16) of the paper; eta = 0 is deterministic, 1 is DDPM.

        use_clipped_model_output: the noise is worked out again from the clipped x_0. variance_noise: instead of
        drawing. Raises ValueError where eta is too large for the step, or noise and generator are both given.
        """
        out, x = self._widen(model_output, sample)
        c, t = self.config, int(timestep)
        bar_t, bar_s = self.alphas_cumprod[t].item(), self._alpha_bar_after(t).item()
        alpha, sigma = math.sqrt(bar_t), math.sqrt(1 - bar_t)

        x0, eps = self._x0_and_eps(out, x, alpha, sigma)
        if c.thresholding:
            x0 = self._threshold(x0)
        elif c.clip_sample:
            x0 = x0.clamp(-c.clip_sample_range, c.clip_sample_range)
        if use_clipped_model_output:
            eps = (x - alpha * x0) / sigma

        std = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        direction = 1 - bar_s - std**2
        if eta < 0 or direction < -1e-9:
            raise ValueError(f"eta must lie between 0 and 1, not {eta}")
        x = math.sqrt(bar_s) * x0 + math.sqrt(max(direction, 0.0)) * eps
        if eta > 0:
            if variance_noise is None:
                # In the dtype of the prediction, as published: the dtype decides which numbers are drawn.
                variance_noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            elif generator is not None:
                raise ValueError("give variance_noise or generator, not both")
            x = x + std * variance_noise
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return SchedulerOutput(x, x0) if return_dict else (x, x0)
