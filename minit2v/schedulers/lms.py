"""Linear multistep (Adams-Bashforth) in sigma."""


import numpy as np
from torch import Tensor

from .base import SchedulerOutput, Timestep, declare
from .sigma import ExplodingScheduler


class LMSDiscreteScheduler(ExplodingScheduler):
    """k-diffusion's lms: the last four predictions of eps = dx / dsigma, joined by a polynomial in sigma.

    history: the weights are those of the predictions that there are ("known"), or, as published, of as many as the
    place in the grid allows ("counted"): a run that begins in the middle then drops weights, and what they carry.
    """

    Fields = declare(
        use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False, prediction_type="epsilon",
        timestep_spacing="linspace", steps_offset=0, rescale_betas_zero_snr=False, zero_snr="honoured",
        noised_at="timestep", history="known",
    )  # fmt: skip

    choices = {"history": ("known", "counted")}

    def _reset(self) -> None:
        self.derivatives: list[Tensor] = []  # newest first

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, order: int = 4, return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) from one sigma to the next, through at most `order` predictions."""
        out, x = self._widen(model_output, sample)
        i = self._begin(timestep)
        x0 = self._x0(out, x, self._sigmas[i])
        self.derivatives = [(x - x0) / self._sigmas[i], *self.derivatives][:order]
        n = min(i + 1, order) if self.config.history == "counted" else len(self.derivatives)
        weights = adams([self._sigmas[i - k] for k in range(n)], self._sigmas[i + 1])
        for weight, derivative in zip(weights, self.derivatives, strict=False):
            x = x + weight * derivative
        return self._end(x, sample.dtype, return_dict, x0)


def adams(known: list[float], end: float) -> list[float]:
    """Weights of values at `known`, for the integral from known[0] to `end` of the polynomial through them."""
    step = end - known[0]
    if step == 0:
        return [0.0] * len(known)
    nodes = (np.array(known) - known[0]) / step
    powers = np.arange(len(known))
    return (step * np.linalg.solve(np.vander(nodes, increasing=True).T, 1 / (powers + 1))).tolist()
