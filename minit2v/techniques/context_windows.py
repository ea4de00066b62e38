"""Context windows: a long video is denoised in windows of frames, and their predictions are averaged at each step.

The UNet sees `length` frames at a time, as many as in its training. So its memory does not grow with the video.
Windows overlap, and a frame in several windows gets a weighted mean of their predictions. This is MultiDiffusion
(Bar-Tal et al. 2023, arXiv:2302.08113) along time, as in Gen-L-Video (Wang et al. 2023, arXiv:2305.18264).
The uniform schedule comes from AnimateDiff's first long videos (s9roll7's animatediff-cli-prompt-travel). It moves the
borders of the windows from one prediction to the next, so that no border becomes visible. Nothing is trained.

docs/long-videos.md explains every rule below with numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from minit2v_convert.rename import nearest

FUSIONS = ("flat", "pyramid", "overlap_linear", "delayed_reverse_sawtooth")
SCHEDULES = ("uniform", "static", "batched")
Predict = Callable[[Tensor, Any, Any], Tensor]  # (x, t, context) -> the prediction


@dataclass(frozen=True)
class ContextWindows:
    """The frames of each window and their weights. See `DiffusionPipeline.enable_context_windows`.

    Raises ValueError or TypeError if a field is wrong, or if fields contradict each other.
    """

    length: int = 16  # frames of a window
    stride: int = 1  # number of spacings: 1 for neighbouring frames; 2 adds every second frame; 3 adds every fourth
    overlap: int = 4  # frames that a window shares with the next
    loop: bool = False  # whether the first frame follows the last
    fuse: str = "pyramid"  # the weights of a window's frames, one of FUSIONS
    schedule: str = "uniform"  # the places of the windows, one of SCHEDULES
    per_call: int | None = None  # windows in one call of the UNet; None: one on a CPU, else as many as memory allows

    def __post_init__(self) -> None:
        check_whole("length", self.length, 1)
        check_whole("stride", self.stride, 1)
        check_whole("overlap", self.overlap, 0)
        if self.per_call is not None:
            check_whole("per_call", self.per_call, 1)
        check_choice("fuse", self.fuse, FUSIONS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if not isinstance(self.loop, bool):
            raise TypeError(f"loop must be True or False, not {self.loop!r}")
        if self.overlap >= self.length:
            raise ValueError(f"overlap {self.overlap} must be less than length {self.length}")
        if self.loop and self.schedule == "batched":
            raise ValueError('the schedule "batched" cannot make a loop, because no window joins the last frame to the '
                             'first: use "uniform" or "static"')
        if self.fuse == "overlap_linear" and 2 * self.overlap > self.length:
            raise ValueError(f"overlap_linear needs an overlap of at most half of the length {self.length}, not "
                             f"{self.overlap}")

    def windows(self, frames: int, call: int) -> list[list[int]]:
        """The windows of a video of `frames` frames, as lists of frames. call: number of the prediction, from 0."""
        offset = round(frames * halving(call)) if self.schedule == "uniform" else 0
        if frames <= self.length:
            return [[(offset * self.loop + i) % frames for i in range(frames)]]
        found = []
        for spacing in (2**k for k in range(self.stride)):
            span = spacing * (self.length - 1) + 1
            if span > frames or self.loop and spacing * self.length > frames:
                break
            hop = spacing * self.length - (self.overlap if self.schedule != "batched" else 0)
            if self.loop:
                starts = [offset + k * hop for k in range(math.ceil(frames / hop))]
            else:  # windows that begin too early or end too late are moved into the video
                starts = [min(max(s, 0), frames - span) for s in range(offset % hop - hop, frames - span + hop, hop)]
            found += [[(s + spacing * i) % frames for i in range(self.length)] for s in dict.fromkeys(starts)]
        return found

    def weights(self, window: list[int], frames: int) -> list[float]:
        """The weight of each frame of a window."""
        if self.fuse != "overlap_linear":
            return weights(len(window), self.fuse)
        n, last = len(window), self.overlap + 1
        rises, falls = self.loop or window[0] > 0, self.loop or window[-1] < frames - 1
        return [min(1.0, (i + 1) / last if rises else 1.0, (n - i) / last if falls else 1.0) for i in range(n)]


def check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}{nearest(str(value), known)}")


def halving(n: int) -> float:
    """The n-th number of 0, 1/2, 1/4, 3/4, 1/8, 5/8, ...: the bits of n in reverse order, after the binary point."""
    return int(f"{n:b}"[::-1], 2) / 2 ** n.bit_length() if n else 0.0


def weights(n: int, fuse: str) -> list[float]:
    """The weights of n frames: 1 1 1 1 1 (flat), 1 2 3 2 1 (pyramid), .01 .01 3 2 1 (delayed reverse sawtooth)."""
    half = (n + 1) // 2
    match fuse:
        case "flat":
            return [1.0] * n
        case "pyramid":
            return [float(min(i + 1, n - i)) for i in range(n)]
        case "delayed_reverse_sawtooth":
            falling = [float(half - i) for i in range(half)]
            return [0.01] * (n // 2) + falling if n % 2 else [0.01] * (half - 1) + [float(half)] + falling
    raise ValueError(f"fuse must be flat, pyramid or delayed_reverse_sawtooth, not {fuse!r}")


class Windowed:
    """A UNet's predictions for one video, computed window by window: (x, t, context) -> the prediction."""

    def __init__(self, settings: ContextWindows, predict: Predict):
        self.settings, self.predict = settings, predict
        self.calls = 0
        self.at_once = settings.per_call or 1
        self.measure = settings.per_call is None
        self.repeated: tuple[Any, dict[int, Any]] = (None, {})  # a context, and {n: n copies of it}

    def __call__(self, x: Tensor, t: Any, context: Any) -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d) or (b f l d) -> the prediction (b c f h w)."""
        frames = x.shape[2]
        windows = self.settings.windows(frames, self.calls)
        self.calls += 1
        if windows == [list(range(frames))]:
            return self.predict(x, t, context)
        total = mass = None
        while windows:
            some, windows = windows[: self.at_once], windows[self.at_once :]
            if self.measure and x.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(x.device)
                before = torch.cuda.memory_allocated(x.device)
            parts = self.predict(
                torch.cat([x[:, :, w] for w in some]),
                t.repeat(len(some)) if isinstance(t, Tensor) and t.ndim else t,
                self.texts(context, some, frames),
            ).chunk(len(some))
            if total is None:
                wide = torch.promote_types(parts[0].dtype, torch.float32)
                total = parts[0].new_zeros((*parts[0].shape[:2], frames, *parts[0].shape[3:]), dtype=wide)
                mass = total.new_zeros(frames)
            for window, part in zip(some, parts, strict=True):
                weight = torch.tensor(self.settings.weights(window, frames), dtype=wide).to(x.device)
                where = torch.tensor(window).to(x.device)
                total.index_add_(2, where, part * weight[:, None, None])
                mass.index_add_(0, where, weight)
            if self.measure and x.device.type == "cuda":
                self.measure = False
                peak = torch.cuda.max_memory_allocated(x.device) - before
                self.at_once = fitting(peak, free_bytes(x.device))
        assert total is not None and mass is not None  # there is at least one window
        return (total / mass[:, None, None]).to(parts[0].dtype)

    def texts(self, context: Any, windows: list[list[int]], frames: int) -> Any:
        """The context of these windows as one batch. The same context gives the same object, for the UNet's caches."""
        if not isinstance(context, Tensor):  # a text with pictures
            return context if len(windows) == 1 and not context.by_frame else context.in_windows(windows)
        if context.ndim == 4:
            return of_windows(context, True, windows)
        if len(windows) == 1:
            return context
        if self.repeated[0] is not context:
            self.repeated = (context, {})
        copies = self.repeated[1]
        if len(windows) not in copies:
            copies[len(windows)] = of_windows(context, False, windows)
        return copies[len(windows)]


def of_windows(x: Tensor, by_frame: bool, windows: list[list[int]]) -> Tensor:
    """x (b ...), or (b f ...) if by_frame -> the part for each window, all windows as one batch."""
    if by_frame:
        return torch.cat([x[:, window] for window in windows])
    return x.repeat(len(windows), *[1] * (x.ndim - 1))


def fitting(peak: int, free: int) -> int:
    """How many windows, 8 at most, fit into nine tenths of `free` bytes. One window needs `peak` bytes."""
    return max(1, min(8, int(0.9 * free) // max(peak, 1)))


def free_bytes(device: torch.device) -> int:
    """The bytes that PyTorch can still allocate: free memory of the device, and PyTorch's unused cache."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
