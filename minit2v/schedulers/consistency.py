"""Solvers for distilled models, which need only a few steps: LCM and TCD."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .base import THRESHOLDED, Device, Generators, Scheduler, SchedulerOutput, Timestep, declare, randn


class _Consistency(Scheduler):
    """The base of both. The grid is a part of the timesteps with which the model was distilled."""

    Fields = declare(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", original_inference_steps=50,
        clip_sample=False, clip_sample_range=1.0, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon",
        **THRESHOLDED, timestep_spacing="leading", timestep_scaling=10.0, rescale_betas_zero_snr=False,
    )  # fmt: skip

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None,
        original_inference_steps: int | None = None, timesteps: Sequence[int] | None = None, strength: float = 1.0,
    ) -> None:  # fmt: skip
        """Sets the grid: `num_inference_steps` of the timesteps of the distillation, or the given `timesteps`.

        original_inference_steps: the number of timesteps of the distillation, instead of the config's.
        strength: use only this share of them, those with the least noise.
        Raises ValueError if there are too few timesteps.
        """
        c, n = self.config, num_inference_steps
        if timesteps is not None:
            grid = self._whole_grid(n, timesteps)
            grid = grid[len(grid) - min(int(len(grid) * strength), len(grid)) :]
        else:
            n, total = self._count(n), c.num_train_timesteps
            overridden = original_inference_steps is not None
            trained = original_inference_steps if original_inference_steps is not None else c.original_inference_steps
            origin = self._origin(trained, total, strength, overridden)
            if trained > total or n > len(origin):
                raise ValueError(f"num_inference_steps is {n}, but the distillation has {len(origin)} timesteps: "
                                 f"lower it, or raise original_inference_steps (to {total} at most) or strength")
            grid = origin[::-1][np.floor(np.linspace(0, len(origin), n, endpoint=False)).astype(int)].tolist()
        self._check_first(grid[0])
        self.num_inference_steps = len(grid)
        self._put_timesteps(grid, device)

    def _origin(self, steps: int, total: int, strength: float, overridden: bool) -> np.ndarray:
        """The timesteps of the distillation, in rising order."""
        return np.arange(1, int(steps * strength) + 1) * (total // max(steps, 1)) - 1


class LCMScheduler(_Consistency):
    """Latent consistency models (Luo et al. 2023, arXiv:2310.04378, algorithm 2): go to x_0, then add noise again."""

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_0 plus the noise of the next timestep of the grid. The last step adds no noise."""
        out, x = self._upcast(model_output, sample)
        t = int(self._number(timestep))
        s, bar_t = self._lower_timestep(t), self._alpha_bar(t)
        x0 = self._clip(self._x0_and_eps(out, x, math.sqrt(bar_t), math.sqrt(1 - bar_t))[0])
        # With c_skip and c_out the result is the input at t = 0 (Song et al. 2023, arXiv:2303.01469, eq. 5).
        data, scaled = 0.5, t * self.config.timestep_scaling
        denoised = scaled / math.hypot(scaled, data) * x0 + data**2 / (scaled**2 + data**2) * x
        x = denoised
        if s >= 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = math.sqrt(self._alpha_bar(s)) * denoised + math.sqrt(1 - self._alpha_bar(s)) * noise
        return self._end(x, sample.dtype, return_dict, denoised)


class TCDScheduler(_Consistency):
    """Trajectory consistency distillation (Zheng et al. 2024, arXiv:2402.19159, algorithm 4, strategic sampling)."""

    Fields = declare(_Consistency.Fields, final_level="config")

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, eta: float = 0.3, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> the sample at the next timestep s, through an intermediate sample at timestep (1 - eta) s.

        eta is the paper's gamma: 0 is DDIM, 1 is LCM. The result also has the intermediate sample.
        Raises ValueError if eta is not between 0 and 1.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, not {eta}")
        out, x = self._upcast(model_output, sample)
        t = int(self._number(timestep))
        s, bar_t = self._lower_timestep(t), self._alpha_bar(t)
        if s >= 0:
            bar_s, bar_way = self._alpha_bar(s), self._alpha_bar(math.floor((1 - eta) * s))
        else:
            bar_s = bar_way = self._alpha_bar(0 if self.config.final_level == "published" else -1)
        x0, eps = self._x0_and_eps(out, x, math.sqrt(bar_t), math.sqrt(1 - bar_t))
        x = way = math.sqrt(bar_way) * x0 + math.sqrt(1 - bar_way) * eps
        if eta > 0 and s >= 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = math.sqrt(bar_s / bar_way) * way + math.sqrt(max(1 - bar_s / bar_way, 0.0)) * noise
        return self._end(x, sample.dtype, return_dict, way)

    def _origin(self, steps: int, total: int, strength: float, overridden: bool) -> np.ndarray:
        # As in diffusers: if a number is passed, all training timesteps are used.
        return np.arange(int(total * strength)) if overridden else super()._origin(steps, total, strength, overridden)
