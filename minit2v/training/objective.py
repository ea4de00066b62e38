"""What is learned from a clip: its noise, its timestep, the target, the loss and its weights.

Everything random about sample n comes from generators seeded by (seed, name of the stream, n), on the CPU. So a batch
does not depend on the number of processes, workers or pieces. No random state needs to be saved.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from minit2v_convert.rename import nearest

from ..schedulers.base import Scheduler
from ..schedulers.ddpm import DDPMScheduler
from ..schedulers.grids import BETA_SCHEDULES

# What the network predicts -> the scheduler's word for it.
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
TIMESTEPS = ("uniform", "high", "logit-normal")
OFFSETS = ("frame", "clip")


# ------------------------------------------------------------------------------------------------------- randomness


def generators(seed: int, stream: str, number: int) -> tuple[random.Random, torch.Generator]:
    """Random generators of Python and torch for one sample or one step, both on the CPU."""
    rng = random.Random(f"{seed} {stream} {number}")
    return rng, torch.Generator().manual_seed(rng.getrandbits(60))


def happens(seed: int, stream: str, number: int, share: float) -> bool:
    """True for this share of all numbers. One number always gets the same answer."""
    return generators(seed, stream, number)[0].random() < share


def drop_text(seed: int, number: int, share: float) -> bool:
    """Whether sample `number` gets the empty caption. Classifier-free guidance needs some of them.

    Ho and Salimans 2022, arXiv:2207.12598. share: of samples without caption, 0 to 1.
    """
    return happens(seed, "text dropout", number, share)


def choose_frames(seed: int, stream: str, numbers: Sequence[int], frames: int) -> Tensor:
    """One frame of each clip, (b,) whole numbers below `frames`."""
    return torch.tensor([generators(seed, stream, n)[0].randrange(frames) for n in numbers])


# --------------------------------------------------------------------------------------------------- noise and loss


class Noised(NamedTuple):
    """noisy (b c f h w): what the network sees. t (b,). target: what it should predict. eps: the noise in `noisy`."""

    noisy: Tensor
    t: Tensor
    target: Tensor
    eps: Tensor


class Objective:
    """The training objective of a denoising network: x_t = alpha_t x_0 + sigma_t eps, and what to predict from it.

    scheduler: the scheduler of the pipeline, or its config. It gives the noise levels and the prediction type.
    objective: "epsilon" (Ho et al. 2020, arXiv:2006.11239), "v" = alpha eps - sigma x_0 (Salimans and Ho 2022,
        arXiv:2202.00512), or "x0". None: what the network predicts already.
    betas: "linear", "scaled_linear" or "squaredcos_cap_v2", between the scheduler's first and last beta. None: those of
        the scheduler. Motion modules behind a Stable Diffusion get "linear", as AnimateDiff's authors do (Guo et al.
        2023, arXiv:2307.04725).
    motion: whether motion modules, or a LoRA of them, are trained.
    zero_snr: rescale the betas so that the last timestep is pure noise (Lin et al. 2023, arXiv:2305.08891). None: as
        the scheduler does.
    noise_offset: the strength of one more random number, which is added to the noise of each channel. So the mean
        brightness is learned, too. offset_per: whether each "frame" or each "clip" draws this number.
    min_snr: gamma of min-SNR weights (Hang et al. 2023, arXiv:2303.09556), usually 5. None: all weights are 1.
    timesteps: "uniform". "logit-normal" (Esser et al. 2024, arXiv:2403.03206). (low, high): both included. "high": a
        share of the samples, `high_share`, has timesteps of the noisy end.
    high_from: where the noisy end begins, as a share of all timesteps. 0.7 means timesteps 700 to 999 of 1,000.

    ValueError, one line, on options that do not exist or do not go together.
    """

    def __init__(
        self,
        scheduler: Scheduler | Mapping[str, Any],
        *,
        objective: str | None = None,
        betas: str | None = None,
        motion: bool = False,
        zero_snr: bool | None = None,
        noise_offset: float = 0.0,
        offset_per: str = "frame",
        min_snr: float | None = None,
        timesteps: str | Sequence[int] = "uniform",
        high_share: float = 0.5,
        high_from: float = 0.7,
    ):
        config = scheduler.config if isinstance(scheduler, Scheduler) else scheduler
        _check_choice("objective", objective, (*PREDICTIONS, None))
        _check_choice("betas", betas, (*BETA_SCHEDULES, None))
        _check_choice("offset_per", offset_per, OFFSETS)
        _check_number("noise_offset", noise_offset, 0)
        _check_number("high_share", high_share, 0, 1)
        _check_number("high_from", high_from, 0, 0.99)
        if min_snr is not None:
            _check_number("min_snr", min_snr, 0.01)
        if "beta_start" not in config:
            raise ValueError("the scheduler has no betas: training needs those that the network was trained with")
        known = DDPMScheduler.from_config(config)
        if betas is None and motion and _is_stable_diffusions(known):
            betas = "linear"
        changes: dict[str, Any] = {}
        if objective is not None:
            changes["prediction_type"] = PREDICTIONS[objective]
        if betas is not None:
            changes |= {"beta_schedule": betas, "trained_betas": None}
        if zero_snr is not None:
            changes["rescale_betas_zero_snr"] = zero_snr
        self.scheduler = DDPMScheduler.from_config(config, **changes)
        fields = self.scheduler.config
        self.prediction = next(ours for ours, theirs in PREDICTIONS.items() if theirs == fields.prediction_type)
        if fields.rescale_betas_zero_snr and self.prediction == "epsilon":
            raise ValueError("zero_snr does not go with the objective epsilon: the last timestep is pure noise, "
                             "which teaches nothing. Use the objective v")  # fmt: skip
        self.noise_offset, self.offset_per = noise_offset, offset_per
        self.timesteps, self.high_share, self.high_from = timesteps, high_share, high_from
        self._check_timesteps(fields.num_train_timesteps)
        bar = self.scheduler.alphas_cumprod
        self.weights = _weights(self.prediction, bar / (1 - bar), min_snr)

    def _check_timesteps(self, total: int) -> None:
        if isinstance(self.timesteps, str):
            return _check_choice("timesteps", self.timesteps, TIMESTEPS)
        ends = [*self.timesteps]
        whole = len(ends) == 2 and all(isinstance(t, int) and not isinstance(t, bool) for t in ends)
        if not whole or not 0 <= ends[0] <= ends[1] < total:
            raise ValueError(f"timesteps must be {', '.join(TIMESTEPS)} or two whole numbers, the lowest and the "
                             f"highest, from 0 to {total - 1}, not {self.timesteps!r}")  # fmt: skip

    def scheduler_for(self, scheduler: Scheduler) -> Scheduler:
        """A scheduler of the same class for sampling what was trained. ValueError where the class cannot do it."""
        names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "trained_betas", "prediction_type",
                 "rescale_betas_zero_snr")  # fmt: skip
        fields = {name: self.scheduler.config[name] for name in names}
        own = scheduler.field_defaults()
        if lacking := [name for name in names if name not in own and fields[name]]:
            raise ValueError(f"{type(scheduler).__name__} has no {lacking[0]}: this model needs another scheduler")
        return scheduler.from_config(scheduler.config, **{n: v for n, v in fields.items() if n in own})

    def draw_timestep(self, seed: int, number: int) -> int:
        """The timestep of one sample, from 0 (nearly clean) to the last (nearly noise)."""
        _, noise = generators(seed, "timestep", number)
        total = self.scheduler.config.num_train_timesteps
        u = torch.rand((), generator=noise, dtype=torch.float64).item()
        if not isinstance(self.timesteps, str):
            low, high = self.timesteps
            return low + int(u * (high - low + 1))
        if self.timesteps == "logit-normal":
            u = torch.randn((), generator=noise, dtype=torch.float64).sigmoid().item()
        elif self.timesteps == "high":
            high = torch.rand((), generator=noise, dtype=torch.float64).item() < self.high_share
            u = 1 - (1 - u) * (1 - self.high_from if high else 1)
        return min(int(u * total), total - 1)

    def draw_noise(self, seed: int, number: int, shape: Sequence[int]) -> Tensor:
        """The noise of one sample, (c f h w) in float32, with its offset."""
        _, noise = generators(seed, "noise", number)
        eps = torch.randn(tuple(shape), generator=noise)
        if self.noise_offset:
            _, noise = generators(seed, "noise offset", number)
            frames = shape[1] if self.offset_per == "frame" else 1
            eps = eps + self.noise_offset * torch.randn(shape[0], frames, 1, 1, generator=noise)
        return eps

    def noised(self, latents: Tensor, seed: int, numbers: Sequence[int]) -> Noised:
        """Add noise to latents (b c f h w), float32 or float64. numbers: the global numbers of the samples, (b,)."""
        if latents.ndim != 5 or len(numbers) != len(latents):
            raise ValueError(f"latents must be (batch, channels, frames, height, width) with a number for each of the "
                             f"batch, not {tuple(latents.shape)} with {len(numbers)}")  # fmt: skip
        t = torch.tensor([self.draw_timestep(seed, n) for n in numbers], device=latents.device)
        eps = torch.stack([self.draw_noise(seed, n, latents.shape[1:]) for n in numbers]).to(latents)
        return Noised(self.scheduler.add_noise(latents, eps, t), t, self.target(latents, eps, t), eps)

    def target(self, latents: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict: (b c f h w)."""
        if self.prediction == "v":
            return self.scheduler.get_velocity(latents, eps, t)
        return eps if self.prediction == "epsilon" else latents

    def loss(self, prediction: Tensor, target: Tensor, t: Tensor) -> Tensor:
        """The mean squared error of each sample times the weight of its timestep: (b,), float32 or wider."""
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        error = (prediction.to(wide) - target.to(wide)).square().flatten(1).mean(1)
        return error * self.weights.to(error)[t]

    def motion_loss(self, prediction: Tensor, target: Tensor, t: Tensor, anchor: Tensor) -> Tensor:
        """MotionDirector's loss of its temporal path, (b,): of the clip, and of the clip without its look.

        Zhao et al. 2023, arXiv:2310.08465. anchor (b,): a frame of each clip, drawn at random.
        """
        plain = self.loss(prediction, target, t)
        return plain + self.loss(debiased(prediction, anchor), debiased(target, anchor), t)

    def convert(self, prediction: Tensor, noisy: Tensor, t: Tensor, to: str) -> Tensor:
        """What the network said about `noisy`, as "epsilon", "v" or "x0": (b c f h w)."""
        _check_choice("to", to, tuple(PREDICTIONS))
        alpha, sigma = self.scheduler._levels(noisy, t)
        match self.prediction:
            case "epsilon":
                x0, eps = (noisy - sigma * prediction) / alpha, prediction
            case "v":
                x0, eps = alpha * noisy - sigma * prediction, alpha * prediction + sigma * noisy
            case _:
                x0, eps = prediction, (noisy - alpha * prediction) / sigma
        return {"epsilon": eps, "x0": x0}[to] if to != "v" else alpha * eps - sigma * x0


def debiased(x: Tensor, anchor: Tensor, beta: float = 1.0) -> Tensor:
    """sqrt(beta^2 + 1) x_i - beta x_a for every frame i. What the frames share counts less, so motion counts more.

    x (b c f h w), anchor (b,): frame a of each clip. MotionDirector's phi (Zhao et al. 2023, arXiv:2310.08465).
    """
    of_anchor = x[torch.arange(len(x), device=x.device), :, anchor.to(x.device)]
    return math.sqrt(beta**2 + 1) * x - beta * rearrange(of_anchor, "b c h w -> b c 1 h w")


def _weights(prediction: str, snr: Tensor, gamma: float | None) -> Tensor:
    """The loss weight of each timestep, (T,) float64. snr: alpha^2 / sigma^2, from large to small. The last may be 0.

    The weight of an error in x0 is min(snr, gamma). For epsilon it is divided by snr, and for v by snr + 1.
    """
    if gamma is None:
        return torch.ones_like(snr)
    return snr.clamp(max=gamma) / {"epsilon": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[prediction]


def _is_stable_diffusions(scheduler: Scheduler) -> bool:
    c = scheduler.config
    return (c.beta_schedule, c.prediction_type, c.trained_betas) == ("scaled_linear", "epsilon", None)


def _check_choice(name: str, value: Any, known: Sequence[Any]) -> None:
    if value not in known:
        listed = [str(k) for k in known if k is not None]
        raise ValueError(f"{name} must be one of {', '.join(listed)}, not {value!r}{nearest(value, listed)}")


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        limit = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
        raise ValueError(f"{name} must be a number {limit}, not {value!r}")
