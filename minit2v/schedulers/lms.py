"""The linear multistep method (Adams-Bashforth) in sigma."""

from torch import Tensor

from .base import SPACED, SchedulerOutput, Timestep, declare
from .exponential import weights
from .sigma import ExplodingScheduler


class LMSDiscreteScheduler(ExplodingScheduler):
    """k-diffusion's lms: a polynomial in sigma through the last four predictions of eps = dx / dsigma."""

    Fields = declare(
        **SPACED, prediction_type="epsilon", timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False,
        zero_snr="honoured", noised_at="timestep", history="known",
    )  # fmt: skip

    def _reset(self) -> None:
        self.derivatives: list[Tensor] = []  # newest first

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x at the next sigma, with at most `order` predictions."""
        out, x = self._upcast(model_output, sample)
        i = self._begin(timestep)
        x0 = self._x0(out, x, self._sigmas[i])
        self.derivatives = [(x - x0) / self._sigmas[i], *self.derivatives][:order]
        n = min(i + 1, order) if self.config.history == "counted" else len(self.derivatives)
        step = self._sigmas[i + 1] - self._sigmas[i]
        nodes = [(self._sigmas[i - k] - self._sigmas[i]) / (step or 1) for k in range(n)]
        powers = [1 / (j + 1) for j in range(n)]  # the integrals of r**j over the step
        for weight, derivative in zip(weights(nodes, powers), self.derivatives, strict=False):
            x = x + step * weight * derivative
        return self._end(x, sample.dtype, return_dict, x0)
