"""The base of the exponential solvers. DPM-Solver, DEIS, UniPC and SA-Solver are one formula with different weights.

With lambda = log(alpha / sigma), the linear part of the equation has an exact solution. What remains is the integral
of a prediction f (of x_0 or of the noise) times an exponential. See Lu et al., arXiv:2206.00927, proposition
3.1, arXiv:2211.01095, equation 13, and Xue et al., arXiv:2309.05019, equation 9.
A polynomial through known values of f gives the weights.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import Device, SchedulerOutput
from .grids import OPEN_GRIDS
from .sigma import SPACINGS, SigmaScheduler

Rule = Callable[[float, list[float]], None]


def moments(k: float, n: int) -> list[float]:
    """I_j for j < n: the integral over r from 0 to 1 of k exp(-k (1 - r)) r**j. k > 0 for x_0, k = -h for the noise.

    I_0 = 1 - exp(-k), and by parts I_j = 1 - j / k I_(j-1). For small k this loses digits, so a series is used.
    """
    if abs(k) > 1:
        found = [-math.expm1(-k)]
        for j in range(1, n):
            found.append(1 - j / k * found[-1])
        return found
    found = []
    for j in range(n):
        term = total = k / (j + 1)
        for m in range(1, 20):
            term *= -k / (j + 1 + m)
            total += term
        found.append(total)
    return found


def weights(nodes: Sequence[float], integrals: Sequence[float]) -> list[float]:
    """The weights of f at the nodes in the polynomial's integral. The unit of the nodes is the step, from its start."""
    if len(nodes) == 1:
        return [integrals[0]]
    return np.linalg.solve(np.vander(nodes, increasing=True).T, np.array(integrals)).tolist()


class ExponentialScheduler(SigmaScheduler):
    """Base class of the solvers with this formula. Their x = alpha x_0 + sigma eps is the network's input."""

    def __init__(self, *args: Any, **values: Any):
        super().__init__(*args, **values)
        kind, end = self._own("algorithm_type"), self._own("final_sigmas_type")
        if kind in ("dpmsolver", "sde-dpmsolver") and end == "zero":
            raise ValueError(f"algorithm_type {kind!r} needs final_sigmas_type='sigma_min'")
        if kind == "sde-dpmsolver" and self.config.solver_order == 3:
            raise ValueError("algorithm_type 'sde-dpmsolver' does not support solver_order=3: use solver_order=2")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Device = None, *, timesteps: list[float] | None = None,
        sigmas: list[float] | None = None,
    ) -> None:  # fmt: skip
        """Sets the grid: `num_inference_steps` steps, or given timesteps, or given sigmas.

        sigmas: falling; the last one, usually 0, is the noise level after the last step.
        Raises ValueError unless exactly one of the three is given, or if the config does not allow it.
        """
        grid, levels = self._lay(num_inference_steps, timesteps, sigmas)
        self._set_grid(grid, levels, device, torch.int64 if (grid == grid.round()).all() else torch.float32)

    def _spread(self, n: int) -> np.ndarray:
        total, least = self.config.num_train_timesteps, self._own("lambda_min_clipped")
        if any(self._own(name) for name in SPACINGS):  # over the whole table
            return np.linspace(total - 1, 0, n)
        # Timesteps that are noisier than lambda_min_clipped are left out (for the cosine schedule).
        clipped = 0 if least is None else int(np.searchsorted(-self._table().log().numpy()[::-1], least))
        spacing = self._own("timestep_spacing") or "linspace"
        step = {"step": total / n} if spacing == "trailing" else {}
        grid = OPEN_GRIDS[spacing](total - clipped, n, self._own("steps_offset") or 0, **step).round()
        if len(np.unique(grid)) < len(grid):
            raise ValueError(f"{n} steps repeat timesteps with timestep_spacing={spacing!r}: use fewer steps")
        return grid

    def _reset(self) -> None:
        self.model_outputs: list[Tensor] = []  # newest last

    def _whole(self, grid: np.ndarray) -> np.ndarray:
        # As in diffusers, Karras timesteps are rounded, and others are truncated. A float32 table is needed, because
        # its last bit decides whether the first timestep is 999 or 998.
        rough = self._table(self._alphas_cumprod(self._betas(torch.float32))).numpy()
        grid = self._sigma_to_t(self._spaced(rough[-1].item(), rough[0].item(), len(grid)), rough)
        rounded = self.config.use_karras_sigmas or self._own("use_lu_lambdas")
        return grid.round() if rounded and self.config.beta_schedule != "squaredcos_cap_v2" else np.trunc(grid)

    def _scales(self, sigma: float) -> tuple[float, float]:
        alpha = 1 / math.hypot(sigma, 1)
        return alpha, sigma * alpha

    def _known(self, i: int, order: int) -> list[tuple[int, Tensor]]:
        """(place, prediction) of the last `order` calls, the newest (place i) first."""
        return [(i - k, self.model_outputs[-1 - k]) for k in range(order)]

    def _lambda(self, i: int) -> float:
        return -math.log(self._sigmas[i]) if self._sigmas[i] > 0 else math.inf

    def _read(self, out: Tensor, x: Tensor, i: int, data: bool) -> Tensor:
        """The prediction at place i: x_0 if `data`, else the noise."""
        alpha, sigma = self._scales(self._sigmas[i])
        x0, eps = self._x0_and_eps(out, x, alpha, sigma)
        if self.config.thresholding:
            x0 = self._threshold(x0)
            eps = (x - alpha * x0) / sigma
        return x0 if data else eps

    def _integrate(
        self, x: Tensor, start: int, end: int, known: Sequence[tuple[int, Tensor]], data: bool,
        rule: Rule | None = None, tau: float = 0.0, noise: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x from one place of the grid to another, with the predictions `known` at other places.

        data: whether the predictions are of x_0. rule: changes the integrals I_j in place, for solvers that simplify.
        tau: the stochasticity, 0 for the ODE, 1 for the SDE (arXiv:2309.05019). noise: standard normal, shape of x.
        """
        (alpha, sigma), (alpha_end, sigma_end) = (self._scales(self._sigmas[i]) for i in (start, end))
        h = self._lambda(end) - self._lambda(start)
        if h == 0:  # a repeated sigma
            return x
        if sigma_end == 0:  # in the limit only the newest prediction counts
            f = known[0][1]
            return alpha_end * f if data else alpha_end / alpha * (x - sigma * f)
        if data:
            k, linear, scale = (1 + tau**2) * h, sigma_end / sigma * math.exp(-(tau**2) * h), alpha_end
            std = sigma_end * math.sqrt(-math.expm1(-2 * tau**2 * h))
        else:
            k, linear, scale = -h, alpha_end / alpha, (1 + tau**2) * sigma_end
            std = tau * sigma_end * math.sqrt(math.expm1(2 * h))
        integrals = moments(k, len(known))
        if rule is not None:
            rule(k, integrals)
        nodes = [(self._lambda(i) - self._lambda(start)) / h for i, _ in known]
        x = linear * x
        for weight, (_, f) in zip(weights(nodes, integrals), known, strict=True):
            x = x + scale * weight * f
        return x if noise is None or std == 0 else x + std * noise


class MultistepScheduler(ExponentialScheduler):
    """Base class of multistep solvers: they combine the predictions of the last steps (Adams-Bashforth)."""

    def _order(self, i: int) -> int:
        """The order of step i. It is lower at the beginning, with few predictions, and at the end, for stability."""
        c, n = self.config, len(self._grid)
        order = min(c.solver_order, len(self.model_outputs))
        short = c.lower_order_final and n < 15
        if i == n - 1 and (self._own("euler_at_final") or short or self._sigmas[n] == 0):
            return 1
        return min(order, 2) if i == n - 2 and short else order

    def _multistep(
        self, out: Tensor, timestep: Any, sample: Tensor, return_dict: bool, data: bool, rule: Rule | None = None,
        tau: float = 0.0, noise: Tensor | None = None,
    ) -> SchedulerOutput:  # fmt: skip
        """A step with the last predictions. Their number is the order of the step."""
        out, x = self._upcast(out, sample)
        i = self._start(timestep)
        self.model_outputs = [*self.model_outputs, self._read(out, x, i, data)][-self.config.solver_order :]
        x = self._integrate(x, i, i + 1, self._known(i, self._order(i)), data, rule, tau, noise)
        return self._end(x, sample.dtype, return_dict)
