"""DDIM, and DDIM backwards."""

import math
from typing import Any

from torch import Tensor

from .base import Device, Generators, Scheduler, SchedulerOutput, Timestep, declare, randn


class DDIMScheduler(Scheduler):
    """Denoising diffusion implicit models (Song, Meng, Ermon 2020, arXiv:2010.02502)."""

    Fields = declare(
        clip_sample=True, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon", thresholding=False,
        dynamic_thresholding_ratio=0.995, clip_sample_range=1.0, sample_max_value=1.0, timestep_spacing="leading",
        rescale_betas_zero_snr=False, previous_timestep="grid",
    )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, eta: float = 0.0,
        use_clipped_model_output: bool = False, generator: Generators = None, variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s, equations (12) and (16) of the paper.

        eta: 0 is deterministic, 1 is DDPM. use_clipped_model_output: compute the noise again from the clipped x_0.
        variance_noise: the noise to add, instead of drawing it with `generator`.
        Raises ValueError if eta is not between 0 and 1, or if variance_noise and generator are both given.
        """
        out, x = self._upcast(model_output, sample)
        t = int(self._number(timestep))
        bar_t, bar_s = self._alpha_bar(t), self._alpha_bar(self._lower_timestep(t))
        alpha, sigma = math.sqrt(bar_t), math.sqrt(1 - bar_t)

        x0, eps = self._x0_and_eps(out, x, alpha, sigma)
        x0 = self._clip(x0)
        if use_clipped_model_output:
            eps = (x - alpha * x0) / sigma

        std = eta * math.sqrt((1 - bar_s) / (1 - bar_t) * (1 - bar_t / bar_s))
        direction = 1 - bar_s - std**2
        if eta < 0 or direction < -1e-9:
            raise ValueError(f"eta must be between 0 and 1, not {eta}")
        x = math.sqrt(bar_s) * x0 + math.sqrt(max(direction, 0.0)) * eps
        if eta > 0:
            if variance_noise is None:
                # In the dtype of the prediction, as in diffusers, because the drawn numbers depend on the dtype.
                variance_noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            elif generator is not None:
                raise ValueError("give variance_noise or generator, not both")
            x = x + std * variance_noise
        return self._end(x, sample.dtype, return_dict, x0)


class DDIMInverseScheduler(Scheduler):
    """DDIM's steps in reverse, from a clean sample to its noise (arXiv:2010.02502, section 4.3).

    DDIM goes from timestep t to s. As in diffusers, the reverse step uses the prediction for the sample of s at t.
    """

    Fields = declare(
        clip_sample=True, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon", clip_sample_range=1.0,
        timestep_spacing="leading", rescale_betas_zero_snr=False, previous_timestep="grid",
    )  # fmt: skip

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._put_timesteps(range(self.config.num_train_timesteps))

    def set_timesteps(self, num_inference_steps: int, device: Device = None) -> None:
        """Sets the grid, in rising order. Raises ValueError if it does not fit the training timesteps."""
        grid = self._whole_grid(num_inference_steps, None)
        self.num_inference_steps = len(grid)
        self._put_timesteps(grid[::-1], device)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_s (b, ...) -> the noisier x_t at this timestep, equation (12) of the paper."""
        out, x = self._upcast(model_output, sample)
        t = int(self._number(timestep))
        bar_s, bar_t = self._alpha_bar(self._lower_timestep(t)), self._alpha_bar(t)
        if bar_s == 1 and self.config.prediction_type == "sample":
            raise ValueError("prediction_type='sample' cannot begin at a clean sample, because the noise is unknown: "
                             "set set_alpha_to_one=False")  # fmt: skip
        x0, eps = self._x0_and_eps(out, x, math.sqrt(bar_s), math.sqrt(1 - bar_s))
        x0 = self._clip(x0)
        x = math.sqrt(bar_t) * x0 + math.sqrt(1 - bar_t) * eps
        return self._end(x, sample.dtype, return_dict, x0)

    def _lower_timestep(self, t: int) -> int:
        """The timestep of the sample: the one before t in the grid, or -1 (clean) before the first."""
        if self.config.previous_timestep == "ratio":
            return t - self.config.num_train_timesteps // self.num_inference_steps
        return max((s for s in self._grid if s < t), default=-1)
