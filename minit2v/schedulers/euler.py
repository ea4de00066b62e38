"""Euler's method in sigma, plain and ancestral."""

import math

from torch import Tensor

from .base import SPACED, Generators, SchedulerOutput, Timestep, declare, randn
from .sigma import ExplodingScheduler


def ancestral(sigma: float, target: float) -> tuple[float, float]:
    """(down, up): the sigma to go to without noise, and the noise to add there to reach the target, as in DDPM."""
    up = math.sqrt(target**2 * (sigma**2 - target**2)) / sigma
    return math.sqrt(max(target**2 - up**2, 0.0)), up


class EulerDiscreteScheduler(ExplodingScheduler):
    """Euler's method in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 2 without its correction)."""

    Fields = declare(
        prediction_type="epsilon", interpolation_type="linear", **SPACED, sigma_min=None, sigma_max=None,
        timestep_spacing="linspace", timestep_type="discrete", steps_offset=0, rescale_betas_zero_snr=False,
        final_sigmas_type="zero", noised_at="timestep",
    )  # fmt: skip

    aliases = {"prediction_type": {"original_sample": "sample"}}

    @property
    def _continuous(self) -> bool:
        return self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, s_churn: float = 0.0, s_tmin: float = 0.0,
        s_tmax: float = float("inf"), s_noise: float = 1.0, generator: Generators = None, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x at the next sigma.

        s_churn: above 0, noise is added first if s_tmin <= sigma <= s_tmax. s_noise: a factor of that noise. As in
        diffusers, it is added after the network has seen x. Only an epsilon prediction is read at the new sigma.
        """
        out, x = self._upcast(model_output, sample)
        i = self._begin(timestep)
        sigma, target = self._sigmas[i], self._sigmas[i + 1]
        churn = min(s_churn / (len(self._sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (1 + churn)
        if churn > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + s_noise * math.sqrt(raised**2 - sigma**2) * noise
        x0 = self._x0(out, x, raised if self.config.prediction_type == "epsilon" else sigma)
        x = x0 + target / raised * (x - x0)
        return self._end(x, sample.dtype, return_dict, x0)


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """k-diffusion's euler_ancestral: Euler's method goes below the next sigma, and then new noise is added."""

    Fields = declare(
        prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False,
        noised_at="timestep",
    )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x at the next sigma (target): up**2 + down**2 = target**2, with up as in DDPM's posterior."""
        out, x = self._upcast(model_output, sample)
        i = self._begin(timestep)
        sigma, target = self._sigmas[i], self._sigmas[i + 1]
        down, up = ancestral(sigma, target)
        x0 = self._x0(out, x, sigma)
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        x = x0 + down / sigma * (x - x0) + up * noise
        return self._end(x, sample.dtype, return_dict, x0)
