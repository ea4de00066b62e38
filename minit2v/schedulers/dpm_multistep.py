"""DPM-Solver and DPM-Solver++, multistep."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from .base import NoiseSchedule, SchedulerOutput, SigmaScheduler, randn
from .grids import BETA_SCHEDULES, leading_open, linspace_open, trailing


class DPMSolverMultistepScheduler(SigmaScheduler):
    """DPM-Solver++ (Lu et al., arXiv:2211.01095) and DPM-Solver (arXiv:2206.00927), multistep, orders 1 to 3.

    algorithm_type: "dpmsolver++" integrates the prediction of x_0, "dpmsolver" that of the noise; "sde-" in front adds
    noise at every step. solver_type "midpoint" or "heun": two second-order rules.

    sde_third_order: the published third-order rule of "sde-dpmsolver++" has the sign of one constant turned, so that
    its error falls only linearly; "published" keeps it, "corrected" does not.
    """

    @dataclass(frozen=True)
    class Fields(NoiseSchedule):
        solver_order: int = 2
        prediction_type: str = "epsilon"
        thresholding: bool = False
        dynamic_thresholding_ratio: float = 0.995
        sample_max_value: float = 1.0
        algorithm_type: str = "dpmsolver++"
        solver_type: str = "midpoint"
        lower_order_final: bool = True
        euler_at_final: bool = False
        use_karras_sigmas: bool = False
        use_exponential_sigmas: bool = False
        use_beta_sigmas: bool = False
        use_lu_lambdas: bool = False
        use_flow_sigmas: bool = False
        flow_shift: float = 1.0
        final_sigmas_type: str = "zero"
        lambda_min_clipped: float = -float("inf")
        variance_type: str | None = None
        timestep_spacing: str = "linspace"
        steps_offset: int = 0
        rescale_betas_zero_snr: bool = False
        use_dynamic_shifting: bool = False
        time_shift_type: str = "exponential"
        sde_third_order: str = "corrected"

    choices = {
        "beta_schedule": tuple(BETA_SCHEDULES),
        "solver_order": (1, 2, 3),
        "prediction_type": ("epsilon", "sample", "v_prediction"),
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "solver_type": ("midpoint", "heun"),
        "final_sigmas_type": ("zero", "sigma_min"),
        "timestep_spacing": ("linspace", "leading", "trailing"),
        # Flow matching and learned variances: no text-to-video UNet was trained with either.
        "use_flow_sigmas": (False,),
        "use_dynamic_shifting": (False,),
        "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
        "sde_third_order": ("corrected", "published"),
    }
    # DEIS and UniPC have fields of the same names.
    aliases = {
        "algorithm_type": {"deis": "dpmsolver++"},
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
    }

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        c = self.config
        if not c.algorithm_type.endswith("++") and c.final_sigmas_type == "zero":
            raise ValueError(f"algorithm_type {c.algorithm_type!r} needs final_sigmas_type='sigma_min'")
        if c.algorithm_type == "sde-dpmsolver" and c.solver_order == 3:
            raise ValueError("algorithm_type 'sde-dpmsolver' has no third order: use solver_order=2")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: list[int] | None = None,
    ) -> None:
        """Lay the grid: so many steps, or these timesteps. Raises ValueError where the config forbids it."""
        c = self.config
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("give num_inference_steps or timesteps, one of them")
        table = self._table().numpy()
        # The published grids cut fractional timesteps off, and whether the first is 999 or 998 then hangs on the last
        # bit of a float32 table: for the timesteps, and for nothing else, that table is used.
        rough = self._table(self._alphas_cumprod(self._betas(torch.float32))).numpy()
        spacing = c.use_karras_sigmas or c.use_lu_lambdas or c.use_exponential_sigmas or c.use_beta_sigmas
        if timesteps is not None:
            if spacing:
                raise ValueError("timesteps and a spacing of sigmas (use_..._sigmas) exclude each other")
            grid = self._in_range(self._custom(timesteps, "timesteps").astype(np.int64))
        elif spacing:
            n = self._count(num_inference_steps)
            sigmas = self._spaced(table[-1].item(), table[0].item(), n)
            grid = np.interp(
                np.log(self._spaced(rough[-1].item(), rough[0].item(), n)), np.log(rough), np.arange(len(rough))
            )
            if (c.use_karras_sigmas or c.use_lu_lambdas) and c.beta_schedule != "squaredcos_cap_v2":
                grid = grid.round()
        else:
            n = self._count(num_inference_steps)
            # Timesteps that are noisier than lambda_min_clipped are left out (for the cosine schedule).
            lambdas = -np.log(table)
            total = c.num_train_timesteps - int(np.searchsorted(lambdas[::-1], c.lambda_min_clipped))
            rule = {"linspace": linspace_open, "leading": leading_open, "trailing": trailing}[c.timestep_spacing]
            step = {"step": c.num_train_timesteps / n} if c.timestep_spacing == "trailing" else {}
            grid = self._in_range(rule(total, n, c.steps_offset, **step).round())
            if len(np.unique(grid)) < len(grid):
                raise ValueError(f"{n} steps repeat timesteps with timestep_spacing={c.timestep_spacing!r}; use fewer")
        if not spacing:
            sigmas = np.interp(grid, np.arange(len(table)), table)
        self._set_grid(grid, [*sigmas, self._last_sigma()], device, torch.int64)
        self.model_outputs: list[Tensor] = []

    def _scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        alpha = 1 / (sigma**2 + 1).sqrt()
        return alpha, sigma * alpha

    def _order(self, i: int) -> int:
        """The order of step i: as many predictions as there are, and fewer at the end, where high orders are rough."""
        c, n = self.config, len(self.timesteps)
        order = min(c.solver_order, len(self.model_outputs))
        short = c.lower_order_final and n < 15
        if i == n - 1 and (c.euler_at_final or short or c.final_sigmas_type == "zero"):
            return 1
        return min(order, 2) if i == n - 2 and short else order

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:
        """x_t (b, ...) -> x_s: algorithm 2 of arXiv:2211.01095, its first and third orders, its stochastic form.

        With h the step in lambda = log(alpha / sigma), the solution is a linear part plus an exponentially weighted
        integral of the prediction, which is extrapolated through the last predictions: d0 is its value, d1 and d2
        are its first and second differences in units of h.
        """
        out, x = self._widen(model_output, sample)
        c, i = self.config, self._start(timestep)
        places = self.sigmas[[i + 1, i, max(i - 1, 0), max(i - 2, 0)]]
        alphas, sigmas = self._scales(places)
        lambdas = -places.log()  # +inf where sigma is 0
        (alpha_s, alpha_t), (sigma_s, sigma_t) = alphas[:2], sigmas[:2]  # s: where the step ends
        h = lambdas[0] - lambdas[1]
        data, sde = c.algorithm_type.endswith("++"), c.algorithm_type.startswith("sde-")

        x0, eps = self._x0_and_eps(out, x, alpha_t, sigma_t)
        if c.thresholding:
            x0 = self._threshold(x0)
            eps = (x - alpha_t * x0) / sigma_t
        self.model_outputs = [*self.model_outputs, x0 if data else eps][-c.solver_order :]
        order = self._order(i) if h > 0 else 1  # a repeated sigma: nothing to do, and no h to divide by

        # x_s = linear * x + scale * (w0 d0 + w1 d1 + w2 d2): w0 = phi_1, w1 and w2 as the rule says.
        if data:
            k = 2 * h if sde else h
            linear, scale, phi = sigma_s / sigma_t * (torch.exp(-h) if sde else 1), alpha_s, -torch.expm1(-k)
            w1, w2 = 1 - phi / k, (phi - k) / k**2 + 0.5
            if sde and c.sde_third_order == "published":
                w2 = w2 - 1
        else:
            linear, scale, phi = alpha_s / alpha_t, (-2 if sde else -1) * sigma_s, torch.expm1(h)
            w1, w2 = phi / h - 1, (phi - h) / h**2 - 0.5
        past = self.model_outputs[::-1]
        x = linear * x + scale * phi * past[0]
        if order > 1:
            r0 = (lambdas[1] - lambdas[2]) / h
            d1 = (past[0] - past[1]) / r0
            if order == 3:
                r1 = (lambdas[2] - lambdas[3]) / h
                d2 = (d1 - (past[1] - past[2]) / r1) / (r0 + r1)
                x = x + scale * (w1 * (d1 + r0 * d2) + w2 * d2)
            else:
                x = x + scale * (0.5 * phi if c.solver_type == "midpoint" else w1) * d1
        if sde:
            if variance_noise is None:  # drawn in float32, as published: the dtype decides which numbers are drawn
                variance_noise = randn(model_output.shape, generator, model_output.device, torch.float32)
            x = x + sigma_s * (-torch.expm1(-2 * h) if data else torch.expm1(2 * h)).sqrt() * variance_noise
        self.step_index = i + 1
        x = x.to(sample.dtype)
        return SchedulerOutput(x) if return_dict else (x,)
