"""Euler's method in sigma, plain and ancestral."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from .base import NoiseSchedule, SchedulerOutput, SigmaScheduler, randn
from .grids import BETA_SCHEDULES, leading, linspace, trailing

GRIDS = {"linspace": linspace, "leading": leading, "trailing": trailing}


class _Euler(SigmaScheduler):
    """What both share: x = x_0 + sigma eps, which grows with sigma, and of which the network sees a scaled copy."""

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        self._scaled = False

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma; with `leading`, which stops short of pure noise, that of data and noise together."""
        top = self.sigmas.max().item()
        return math.sqrt(top**2 + 1) if self.config.timestep_spacing == "leading" else top

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma**2 + 1), of about unit variance."""
        sigma = self.sigmas[self._start(timestep)].item()
        self._scaled = True
        return sample / math.sqrt(sigma**2 + 1)

    def _scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(sigma), sigma

    def _x0(self, out: Tensor, x: Tensor, sigma: float) -> Tensor:
        alpha = 1 / math.sqrt(sigma**2 + 1)
        return self._x0_and_eps(out, alpha * x, alpha, alpha * sigma)[0]

    def _begin(self, timestep: float | Tensor) -> tuple[float, float]:
        """The sigmas between which this step goes."""
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"{type(self).__name__}.step wants one of scheduler.timesteps, not an index ({timestep})")
        if not self._scaled:
            warnings.warn("call scale_model_input before the network, or its input is of the wrong size", stacklevel=3)
            self._scaled = True
        i = self._start(timestep)
        return self.sigmas[i].item(), self.sigmas[i + 1].item()


class EulerDiscreteScheduler(_Euler):
    """Karras et al., arXiv:2206.00364, algorithm 2 without its second-order correction."""

    @dataclass(frozen=True)
    class Fields(NoiseSchedule):
        prediction_type: str = "epsilon"
        interpolation_type: str = "linear"
        use_karras_sigmas: bool = False
        use_exponential_sigmas: bool = False
        use_beta_sigmas: bool = False
        sigma_min: float | None = None
        sigma_max: float | None = None
        timestep_spacing: str = "linspace"
        timestep_type: str = "discrete"
        steps_offset: int = 0
        rescale_betas_zero_snr: bool = False
        final_sigmas_type: str = "zero"

    choices = {
        "beta_schedule": tuple(BETA_SCHEDULES),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "interpolation_type": ("linear", "log_linear"),
        "timestep_spacing": tuple(GRIDS),
        "timestep_type": ("discrete", "continuous"),
        "final_sigmas_type": ("zero", "sigma_min"),
    }
    aliases = {"prediction_type": {"original_sample": "sample"}}

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        # What the network is told: the timestep, or, for models trained so, log(sigma) / 4.
        self._continuous = self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction"
        if self._continuous:
            self.timesteps = (self.sigmas[:-1].log() / 4).float()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:
        """Lay the grid: so many steps, or these timesteps, or these sigmas (with the last, usually 0, at the end)."""
        c = self.config
        if sum(v is not None for v in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ValueError("give num_inference_steps, timesteps or sigmas, one of them")
        table = self._table().numpy()
        if sigmas is not None:
            levels = self._custom(sigmas, "sigmas")
            grid = self._sigma_to_t(levels[:-1], table)
        else:
            if timesteps is None:
                n = self._count(num_inference_steps)
                grid = GRIDS[c.timestep_spacing](c.num_train_timesteps, n, c.steps_offset)
            else:
                if c.use_karras_sigmas or c.use_exponential_sigmas or c.use_beta_sigmas or self._continuous:
                    raise ValueError("timesteps exclude a spacing of sigmas (use_..._sigmas) and continuous timesteps")
                grid, n = self._custom(timesteps, "timesteps"), len(timesteps)
            levels = np.interp(self._in_range(grid), np.arange(len(table)), table)
            if c.interpolation_type == "log_linear":
                levels = np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), n + 1))
            spaced = self._spaced(levels[0].item(), levels[-1].item(), n)
            if spaced is not None:
                levels, grid = spaced, self._sigma_to_t(spaced, table)
            levels = np.append(levels, self._last_sigma())
        if self._continuous:
            grid = np.log(levels[: len(grid)]) / 4
        self._set_grid(grid, levels, device, torch.float32)

    @staticmethod
    def _sigma_to_t(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
        """Fractional timesteps at which the training schedule has these sigmas."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), np.log(table), np.arange(len(table)))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """x (b, ...) from one sigma to the next. s_churn > 0 first adds noise where s_tmin <= sigma <= s_tmax.

        As published, the noise is added after the network has seen x, and only epsilon is then read at the new level.
        """
        out, x = self._widen(model_output, sample)
        sigma, target = self._begin(timestep)
        churn = min(s_churn / (len(self.sigmas) - 1), math.sqrt(2) - 1) if s_tmin <= sigma <= s_tmax else 0.0
        raised = sigma * (1 + churn)
        if churn > 0:
            noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
            x = x + s_noise * math.sqrt(raised**2 - sigma**2) * noise
        x0 = self._x0(out, x, raised if self.config.prediction_type == "epsilon" else sigma)
        x = x0 + target / raised * (x - x0)
        self.step_index += 1
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return SchedulerOutput(x, x0) if return_dict else (x, x0)


class EulerAncestralDiscreteScheduler(_Euler):
    """Euler's method to a sigma below the one asked for, then fresh noise up to it (k-diffusion's euler_ancestral)."""

    @dataclass(frozen=True)
    class Fields(NoiseSchedule):
        prediction_type: str = "epsilon"
        timestep_spacing: str = "linspace"
        steps_offset: int = 0
        rescale_betas_zero_snr: bool = False

    choices = {
        "beta_schedule": tuple(BETA_SCHEDULES),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": tuple(GRIDS),
    }

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Lay the grid. Raises ValueError where it does not fit the training timesteps."""
        c, n = self.config, self._count(num_inference_steps)
        grid = self._in_range(GRIDS[c.timestep_spacing](c.num_train_timesteps, n, c.steps_offset))
        levels = np.interp(grid, np.arange(c.num_train_timesteps), self._table().numpy())
        self._set_grid(grid, np.append(levels, 0.0), device, torch.float32)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """x (b, ...) from one sigma to the next: up**2 + down**2 = target**2, with up as in DDPM's posterior."""
        out, x = self._widen(model_output, sample)
        sigma, target = self._begin(timestep)
        up = math.sqrt(target**2 * (sigma**2 - target**2)) / sigma
        down = math.sqrt(target**2 - up**2)
        x0 = self._x0(out, x, sigma)
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        x = x0 + down / sigma * (x - x0) + up * noise
        self.step_index += 1
        x, x0 = x.to(sample.dtype), x0.to(sample.dtype)
        return SchedulerOutput(x, x0) if return_dict else (x, x0)
