"""DDPM."""

import math

from torch import Tensor

from .base import Generators, Scheduler, SchedulerOutput, Timestep, declare, randn


class DDPMScheduler(Scheduler):
    """Denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, arXiv:2006.11239, algorithm 2).

    variance_type: "fixed_small" and "fixed_small_log" are the variance of the posterior given x_0. "fixed_large" and
    "fixed_large_log" are the variance of the forward step. Learned variances are not supported, because no
    text-to-video UNet has them.
    """

    Fields = declare(
        variance_type="fixed_small", clip_sample=True, prediction_type="epsilon", thresholding=False,
        dynamic_thresholding_ratio=0.995, clip_sample_range=1.0, sample_max_value=1.0, timestep_spacing="leading",
        steps_offset=0, rescale_betas_zero_snr=False, last_noise="none",
    )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s, drawn from equation (6) of the paper, with the x_0 of equation (15)."""
        out, x = self._upcast(model_output, sample)
        t = int(self._number(timestep))
        s = self._lower_timestep(t)
        bar_t, bar_s = self._alpha_bar(t), self._alpha_bar(s)
        alpha_step = bar_t / bar_s  # the share of the signal that the step from s to t keeps
        x0 = self._clip(self._x0_and_eps(out, x, math.sqrt(bar_t), math.sqrt(1 - bar_t))[0])
        of_x0, of_x = math.sqrt(bar_s) * (1 - alpha_step), math.sqrt(alpha_step) * (1 - bar_s)
        x = of_x0 / (1 - bar_t) * x0 + of_x / (1 - bar_t) * x
        if s >= 0 or (self.config.last_noise == "published" and t > 0):
            variance = 1 - alpha_step
            if "large" not in (self.config.variance_type or "fixed_small"):
                variance *= (1 - bar_s) / (1 - bar_t)
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + math.sqrt(max(variance, 0.0)) * noise
        return self._end(x, sample.dtype, return_dict, x0)
