"""Euler's method in sigma, plain and ancestral."""

import math

from torch import Tensor

from .base import SPACED, Generators, SchedulerOutput, Timestep, declare, randn
from .sigma import ExplodingScheduler


def ancestral(sigma: float, target: float) -> tuple[float, float]:
    """(down, up): where to go without noise, and how much noise leads from there to the target, as in DDPM."""
    up = math.sqrt(target**2 * (sigma**2 - target**2)) / sigma
    return math.sqrt(max(target**2 - up**2, 0.0)), up


class EulerDiscreteScheduler(ExplodingScheduler):
    """Karras et al., arXiv:2206.00364, algorithm 2 without its second-order correction."""

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
        """x (b, ...) from one sigma to the next. s_churn > 0 first adds noise where s_tmin <= sigma <= s_tmax.

        As in diffusers, noise is added after the network has seen x, and only epsilon is then read at the new level.
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
    """Euler's method to a sigma below the one asked for, then fresh noise up to it (k-diffusion's euler_ancestral)."""

    Fields = declare(
        prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False,
        noised_at="timestep",
    )  # fmt: skip

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) from one sigma to the next: up**2 + down**2 = target**2, with up as in DDPM's posterior."""
        out, x = self._upcast(model_output, sample)
        i = self._begin(timestep)
        sigma, target = self._sigmas[i], self._sigmas[i + 1]
        down, up = ancestral(sigma, target)
        x0 = self._x0(out, x, sigma)
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        x = x0 + down / sigma * (x - x0) + up * noise
        return self._end(x, sample.dtype, return_dict, x0)
