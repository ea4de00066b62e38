"""Solvers that call the network twice in a step: Heun's method, the midpoint rule, and its stochastic variant."""

import numpy as np
from torch import Tensor

from .base import SPACED, Generators, SchedulerOutput, Timestep, declare, randn
from .euler import ancestral
from .sigma import Stage, TwoStageScheduler


class HeunDiscreteScheduler(TwoStageScheduler):
    """Heun's method (Karras et al. 2022, arXiv:2206.00364, algorithm 1): Euler's step, then the mean of two slopes."""

    Fields = declare(
        beta_start=0.00085, beta_end=0.012, prediction_type="epsilon", **SPACED, clip_sample=False,
        clip_sample_range=1.0, timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False,
        zero_snr="honoured", noised_at="timestep",
    )  # fmt: skip

    def _second_levels(self, levels: np.ndarray) -> np.ndarray:
        return levels[1:]

    def _second_timesteps(self, grid: np.ndarray, second: np.ndarray) -> np.ndarray:
        return grid[1:]

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x for the next call of the network."""
        return self._two_stages(model_output, timestep, sample, return_dict)

    def _advance(self, first: Stage, second: Stage, levels: list[float]) -> Tensor:
        (x, x0), (x_end, x0_end), (sigma, target, _) = first, second, levels
        if self._is_noise(sigma):
            return x_end
        return x + (target - sigma) / 2 * ((x - x0) / sigma + (x_end - x0_end) / target)


class KDPM2DiscreteScheduler(TwoStageScheduler):
    """k-diffusion's dpm_2: the slope at the middle of the step in log sigma (DPM-Solver-2, arXiv:2206.00927)."""

    Fields = declare(
        beta_start=0.00085, beta_end=0.012, **SPACED, prediction_type="epsilon", timestep_spacing="linspace",
        steps_offset=0, rescale_betas_zero_snr=False, zero_snr="honoured", noised_at="timestep",
        spaced_timesteps="exact",
    )  # fmt: skip

    step = HeunDiscreteScheduler.step


class KDPM2AncestralDiscreteScheduler(TwoStageScheduler):
    """k-diffusion's dpm_2_ancestral: the midpoint rule goes below the next sigma, and then new noise is added."""

    Fields = KDPM2DiscreteScheduler.Fields

    def _second_levels(self, levels: np.ndarray) -> np.ndarray:
        down = [ancestral(*pair)[0] for pair in zip(levels[:-1], levels[1:], strict=True)]
        return np.sqrt(levels[:-1] * down)

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x for the next call of the network. Noise is added after the second call of a step."""
        return self._two_stages(model_output, timestep, sample, return_dict, like=model_output, generator=generator)

    def _advance(
        self, first: Stage, second: Stage, levels: list[float], like: Tensor, generator: Generators,
    ) -> Tensor:  # fmt: skip
        sigma, middle, target = levels
        down, up = ancestral(sigma, target)
        noise = randn(like.shape, generator, like.device, like.dtype)
        return super()._advance(first, second, [sigma, middle, down]) + up * noise
