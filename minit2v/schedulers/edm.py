"""Solvers for EDM models (Karras et al. 2022, arXiv:2206.00364, table 1), which have sigmas instead of timesteps."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .base import THRESHOLDED, Device, Timestep, declare
from .dpm_multistep import ALIASES, DPMSolverMultistepScheduler
from .euler import EulerDiscreteScheduler
from .exponential import MultistepScheduler
from .grids import exponential_sigmas, karras_sigmas
from .sigma import ExplodingScheduler


class _EDM(ExplodingScheduler):
    """The base of both: sigmas from sigma_max to sigma_min, and the scaling of the network's input and output."""

    Fields = declare(
        object, sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
        prediction_type="epsilon", rho=7.0,
    )  # fmt: skip

    choices = {"prediction_type": ("epsilon", "v_prediction")}
    _continuous = property(lambda self: True)

    def _make_tables(self) -> None:
        c = self.config
        if c.num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, not {c.num_train_timesteps}")
        rising = torch.from_numpy(self._by_schedule(c.num_train_timesteps)[::-1].copy())
        self.alphas_cumprod = 1 / (1 + rising**2)
        self.final_alpha_cumprod = torch.ones((), dtype=torch.float64)

    def _by_schedule(self, n: int) -> np.ndarray:
        c = self.config
        if c.sigma_schedule == "karras":
            return karras_sigmas(c.sigma_max, c.sigma_min, n, c.rho)
        return exponential_sigmas(c.sigma_max, c.sigma_min, n)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, sigmas: Sequence[float] | None = None,
    ) -> None:  # fmt: skip
        """Sets the grid: `num_inference_steps` steps, or the given sigmas, with the last (usually 0) at the end.

        Raises ValueError if both or none are given, or if sigmas do not fall.
        """
        self._one_of(num_inference_steps, None, sigmas)
        if sigmas is None:
            last = self.config.sigma_min if self.config.final_sigmas_type == "sigma_min" else 0.0
            levels = np.append(self._by_schedule(self._count(num_inference_steps)), last)
        else:
            levels = self._custom(sigmas, "sigmas")
        self._set_grid(np.log(levels[:-1]) / 4, levels, device, torch.float32)

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial latents: sqrt(sigma_max**2 + 1), as in diffusers."""
        return math.hypot(self.config.sigma_max, 1)

    def scale_model_input(self, sample: Tensor, timestep: Timestep) -> Tensor:
        """The network's input c_in x, which has unit variance."""
        self._scaled = True
        return sample / math.hypot(self._sigmas[self._start(timestep)], self.config.sigma_data)

    def _x0(self, out: Tensor, x: Tensor, sigma: float) -> Tensor:
        """x_0 = c_skip x + c_out F, with the network's output F."""
        data = self.config.sigma_data
        c_out = sigma * data / math.hypot(sigma, data)
        sign = -1 if self.config.prediction_type == "v_prediction" else 1
        return self._clip(data**2 / (sigma**2 + data**2) * x + sign * c_out * out)

    def _read(self, out: Tensor, x: Tensor, i: int, data: bool) -> Tensor:
        return self._x0(out, x, self._sigmas[i])

    def _place(self, t: float) -> int | None:
        i = super()._place(t)
        if i is None:  # other timesteps do not exist for c_noise
            raise ValueError(f"{t:g} is not one of scheduler.timesteps: call set_timesteps first")
        return i


class EDMEulerScheduler(_EDM):
    """Euler's method for EDM models (arXiv:2206.00364, algorithm 2 without its second-order correction)."""

    Fields = declare(_EDM.Fields, final_sigmas_type="zero", noised_at="timestep")
    step = EulerDiscreteScheduler.step


class EDMDPMSolverMultistepScheduler(_EDM, MultistepScheduler):
    """DPM-Solver++ multistep, as DPMSolverMultistepScheduler."""

    Fields = declare(
        _EDM.Fields, solver_order=2, **THRESHOLDED, algorithm_type="dpmsolver++", solver_type="midpoint",
        lower_order_final=True, euler_at_final=False, final_sigmas_type="zero", third_order="corrected",
        noised_at="timestep",
    )  # fmt: skip

    choices = _EDM.choices | {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_type": ("midpoint", "heun"),
    }
    aliases = ALIASES
    step = DPMSolverMultistepScheduler.step
