"""Singlestep DPM-Solver and DPM-Solver++: a step of order n calls the network n times, and uses no earlier calls."""

from functools import partial

from torch import Tensor

from .base import SPACED, THRESHOLDED, Generators, SchedulerOutput, Timestep, declare, randn
from .dpm_multistep import ALIASES, dpm_rule
from .exponential import ExponentialScheduler


class DPMSolverSinglestepScheduler(ExponentialScheduler):
    """DPM-Solver-2S and 3S (Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2), DPM-Solver++(2S) (arXiv:2211.01095).

    num_inference_steps is the number of calls. A step has `solver_order` calls. The last steps have fewer calls if the
    number is not a multiple, or with lower_order_final. algorithm_type "sde-dpmsolver++" adds noise at every call.
    """

    Fields = declare(
        solver_order=2, prediction_type="epsilon", **THRESHOLDED, algorithm_type="dpmsolver++", solver_type="midpoint",
        lower_order_final=False, **SPACED, use_flow_sigmas=False, flow_shift=1.0, final_sigmas_type="zero",
        lambda_min_clipped=-float("inf"), variance_type=None, use_dynamic_shifting=False, time_shift_type="exponential",
        rescale_betas_zero_snr=False, zero_snr="honoured", noised_at="timestep", spaced_timesteps="exact",
        third_order="corrected",
    )  # fmt: skip

    choices = {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "dpmsolver"),
        "solver_type": ("midpoint", "heun"),
    }
    aliases = ALIASES

    def _reset(self) -> None:
        """Divides the calls among steps."""
        super()._reset()
        c, n = self.config, len(self._grid)
        full, rest = divmod(n, c.solver_order)
        if c.solver_order > 1 and rest == 0 and (c.lower_order_final or self._sigmas[-1] == 0):
            # The last step has first order, so fewer calls remain for the step before it.
            full, tail = full - 1, {2: [1, 1], 3: [1, 2, 1]}[c.solver_order]
        else:
            tail = list(range(1, rest + 1))
        self._orders = [*range(1, c.solver_order + 1)] * full + tail
        if self._sigmas[-1] == 0:
            self._orders[-1] = 1
        self._from: tuple[int, Tensor] | None = None  # (place, sample) at the start of this step

    def step(
        self, model_output: Tensor, timestep: Timestep, sample: Tensor, generator: Generators = None,
        return_dict: bool = True,
    ) -> SchedulerOutput:  # fmt: skip
        """x (b, ...) -> x for the next call of the network. Every call of a step goes on from the start of the step."""
        c, (out, x) = self.config, self._upcast(model_output, sample)
        i = self._start(timestep)
        data, sde = c.algorithm_type.endswith("++"), c.algorithm_type.startswith("sde-")
        noise = randn(model_output.shape, generator, model_output.device, model_output.dtype) if sde else None
        found = self._read(out, x, i, data)
        if self._orders[i] == 1 or self._from is None:  # None: the run began within this step
            self._from, self.model_outputs = (i, x), []
        self.model_outputs = [*self.model_outputs, found]
        start, x = self._from
        known = [(start + k, f) for k, f in enumerate(self.model_outputs)]
        midpoint = c.solver_type == "midpoint"
        if midpoint and len(known) == 3:  # third order: only the first and the last prediction, with exact integrals
            known, midpoint = known[::2], False
        rule = partial(dpm_rule, midpoint=midpoint, shift=2.0 * (sde and c.third_order == "published"))
        x = self._integrate(x, start, i + 1, known[: 1 if self._sigmas[i + 1] == 0 else None], data, rule,
                            float(sde), noise)  # fmt: skip
        return self._end(x, sample.dtype, return_dict)
