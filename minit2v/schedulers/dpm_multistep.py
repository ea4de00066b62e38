"""DPM-Solver and DPM-Solver++, multistep."""

from functools import partial

import torch
from torch import Tensor

from .base import SPACED, THRESHOLDED, Generators, SchedulerOutput, Timestep, declare, randn
from .exponential import MultistepScheduler

# Values of the same fields in DEIS, UniPC and SA-Solver -> values here.
ALIASES = {
    "algorithm_type": dict.fromkeys(("deis", "data_prediction", "noise_prediction"), "dpmsolver++"),
    "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
}


def dpm_rule(k: float, integrals: list[float], midpoint: bool, share: float = 1.0, shift: float = 0.0) -> None:
    """Changes the integrals. midpoint: I_1 becomes half of I_0. share, shift: diffusers' third order changes I_2."""
    if len(integrals) == 2 and midpoint:
        integrals[1] = integrals[0] / 2
    if len(integrals) == 3:
        integrals[2] = share * integrals[2] - shift


class DPMSolverMultistepScheduler(MultistepScheduler):
    """Multistep DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095) and DPM-Solver (arXiv:2206.00927), orders 1 to 3."""

    Fields = declare(
        solver_order=2, prediction_type="epsilon", **THRESHOLDED, algorithm_type="dpmsolver++", solver_type="midpoint",
        lower_order_final=True, euler_at_final=False, **SPACED, use_lu_lambdas=False, use_flow_sigmas=False,
        flow_shift=1.0, final_sigmas_type="zero", lambda_min_clipped=-float("inf"), variance_type=None,
        timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False, use_dynamic_shifting=False,
        time_shift_type="exponential", third_order="corrected", noised_at="timestep", spaced_timesteps="exact",
    )  # fmt: skip

    choices = {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        "solver_type": ("midpoint", "heun"),
    }
    aliases = ALIASES

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        variance_noise: Tensor | None = None, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s: algorithm 2 of arXiv:2211.01095, also with first and third order, and stochastic.

        variance_noise: the noise of a stochastic solver, instead of drawing it with `generator`.
        """
        c = self.config
        data, sde = c.algorithm_type.endswith("++"), c.algorithm_type.startswith("sde-")
        if sde and variance_noise is None:  # float32 as in diffusers: the drawn numbers depend on the dtype
            variance_noise = randn(model_output.shape, generator, model_output.device, torch.float32)
        third = {"share": 0.5, "shift": float(sde)} if c.third_order == "published" else {}
        rule = partial(dpm_rule, midpoint=c.solver_type == "midpoint", **third)
        return self._multistep(model_output, timestep, sample, return_dict, data, rule,
                               float(sde), variance_noise if sde else None)  # fmt: skip
