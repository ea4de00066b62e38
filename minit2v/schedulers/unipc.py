"""UniPC."""

from torch import Tensor

from .base import SPACED, THRESHOLDED, SchedulerOutput, Timestep, declare
from .exponential import ExponentialScheduler


class UniPCMultistepScheduler(ExponentialScheduler):
    """Unified predictor-corrector (Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8).

    The prediction for the next step also corrects the last step. This raises the order without another call.
    solver_type: "bh1" is B(h) = h, "bh2" is B(h) = exp(h) - 1. It matters only for the lowest orders.
    """

    Fields = declare(
        solver_order=2, prediction_type="epsilon", **THRESHOLDED, predict_x0=True, solver_type="bh2",
        lower_order_final=True, disable_corrector=[], solver_p=None, **SPACED, use_flow_sigmas=False, flow_shift=1.0,
        timestep_spacing="linspace", steps_offset=0, final_sigmas_type="zero", rescale_betas_zero_snr=False,
        use_dynamic_shifting=False, time_shift_type="exponential", sigma_min=None, sigma_max=None, shift_terminal=None,
        noised_at="timestep", spaced_timesteps="exact",
    )  # fmt: skip

    choices = {
        "solver_type": ("bh1", "bh2"),
        "solver_p": (None,),  # another scheduler as the predictor
        "shift_terminal": (None,),  # a field of flow matching
    }
    aliases = {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}}

    def _reset(self) -> None:
        super()._reset()
        self._last: tuple[Tensor, int] | None = None  # (sample, order) of the last step

    def _rule(self, k: float, integrals: list[float]) -> None:
        """With two predictions, the paper's simpler weight is half of B(h)."""
        if len(integrals) == 2:
            integrals[1] = k / 2 if self.config.solver_type == "bh1" else integrals[0] / 2

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s: it corrects the last step with this prediction (UniC), then makes the next (UniP)."""
        c, (out, x) = self.config, self._upcast(model_output, sample)
        i = self._start(timestep)
        found = self._read(out, x, i, c.predict_x0)
        if self._last is not None and i - 1 not in c.disable_corrector:
            before, order = self._last
            known = [(i, found), *self._known(i - 1, order)]
            # UniC with one earlier prediction uses B(h) / 2, too. With more it uses the exact integrals.
            x = self._integrate(before, i - 1, i, known, c.predict_x0, self._rule if order == 1 else None)
        self.model_outputs = [*self.model_outputs, found][-c.solver_order :]
        left = len(self._grid) - i if c.lower_order_final else c.solver_order
        order = min(c.solver_order, left, len(self.model_outputs))
        self._last = x, order
        x = self._integrate(x, i, i + 1, self._known(i, order), c.predict_x0, self._rule)
        return self._end(x, sample.dtype, return_dict)
