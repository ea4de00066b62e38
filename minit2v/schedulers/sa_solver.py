"""SA-Solver."""

from torch import Tensor

from .base import SPACED, THRESHOLDED, Generators, SchedulerOutput, Timestep, declare, randn
from .exponential import ExponentialScheduler


class SASolverScheduler(ExponentialScheduler):
    """Stochastic Adams method (Xue et al. 2023, arXiv:2309.05019, algorithm 1). A file cannot have a tau_func."""

    Fields = declare(
        predictor_order=2, corrector_order=2, prediction_type="epsilon", tau_func=None, **THRESHOLDED,
        algorithm_type="data_prediction", lower_order_final=True, **SPACED, use_flow_sigmas=False, flow_shift=1.0,
        lambda_min_clipped=-float("inf"), variance_type=None, timestep_spacing="linspace", steps_offset=0,
        rescale_betas_zero_snr=False, zero_snr="honoured", spaced_timesteps="exact", final_sigmas_type="zero",
    )  # fmt: skip

    choices = {"algorithm_type": ("data_prediction", "noise_prediction")}
    aliases = {
        "algorithm_type": dict.fromkeys(("deis", "dpmsolver", "sde-dpmsolver"), "noise_prediction")
        | dict.fromkeys(("dpmsolver++", "sde-dpmsolver++"), "data_prediction")
    }

    def _reset(self) -> None:
        super()._reset()
        self._last: tuple[Tensor, Tensor, float, int] | None = None  # of the last step: sample, noise, tau, order

    def _tau(self, t: float) -> float:
        own = self.config.tau_func
        return float(200 <= t <= 800) if own is None else float(own(t))

    def _rule(self, k: float, integrals: list[float]) -> None:
        """With two predictions of x_0, I_1 becomes the authors' first term of it."""
        if len(integrals) == 2 and self.config.algorithm_type == "data_prediction":
            integrals[1] = k / 2

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x_t (b, ...) -> x_s: it corrects the last step (Adams-Moulton), then makes the next (Adams-Bashforth)."""
        c, (out, x) = self.config, self._upcast(model_output, sample)
        i, data = self._start(timestep), c.algorithm_type == "data_prediction"
        found = self._read(out, x, i, data)
        left = len(self._grid) - i if c.lower_order_final else 4
        self.model_outputs = [*self.model_outputs, found]
        if self._last is not None:
            before, noise, tau, order = self._last
            x = self._integrate(before, i - 1, i, self._known(i, order), data, self._rule, tau, noise)
        self.model_outputs = self.model_outputs[-max(c.predictor_order, c.corrector_order - 1) :]
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype)
        tau, seen = self._tau(self._number(timestep)), len(self.model_outputs)
        self._last = x, noise, tau, min(c.corrector_order, left + 1, seen + 1)
        known = self._known(i, min(c.predictor_order, left, seen))
        x = self._integrate(x, i, i + 1, known, data, self._rule, tau, noise)
        return self._end(x, sample.dtype, return_dict)
