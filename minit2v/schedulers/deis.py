"""DEIS."""

from torch import Tensor

from .base import SPACED, THRESHOLDED, SchedulerOutput, Timestep, declare
from .dpm_multistep import DPMSolverMultistepScheduler
from .exponential import MultistepScheduler


class DEISMultistepScheduler(MultistepScheduler):
    """Diffusion exponential integrator (Zhang and Chen 2022, arXiv:2204.13902): tAB-DEIS, polynomials in log rho.

    It is a multistep DPM-Solver for predictions of the noise, with the exact integrals of the polynomial.
    """

    Fields = declare(
        solver_order=2, prediction_type="epsilon", **THRESHOLDED, algorithm_type="deis", solver_type="logrho",
        lower_order_final=True, **SPACED, use_flow_sigmas=False, flow_shift=1.0, timestep_spacing="linspace",
        steps_offset=0, use_dynamic_shifting=False, time_shift_type="exponential", rescale_betas_zero_snr=False,
        zero_snr="honoured", noised_at="timestep", spaced_timesteps="exact", final_sigmas_type="zero",
    )  # fmt: skip

    choices = {"algorithm_type": ("deis",), "solver_type": ("logrho",)}
    aliases = {
        "algorithm_type": dict.fromkeys(
            (*DPMSolverMultistepScheduler.choices["algorithm_type"], "data_prediction", "noise_prediction"), "deis"
        ),
        "solver_type": {"midpoint": "logrho", "heun": "logrho", "bh1": "logrho", "bh2": "logrho"},
    }

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s."""
        return self._multistep(model_output, timestep, sample, return_dict, data=False)
