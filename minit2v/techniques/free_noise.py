"""FreeNoise: long videos with reused noise, and with attention across frames in windows.

Qiu et al. 2023, "FreeNoise: Tuning-Free Longer Video Diffusion via Noise Rescheduling", arXiv:2310.15169. Frames that
are far apart look alike only if their noise is alike. So the noise of the first `length` frames is repeated, with
groups of frames shuffled. Temporal attention sees as many frames as in its training. Its windows overlap, and their
results are averaged with weights (section 3.3). The rest of the network treats each frame by itself and needs no
windows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .context_windows import check_choice, check_whole, weights
from .frame_prompts import Interpolate

WEIGHTS = ("flat", "pyramid", "delayed_reverse_sawtooth")
NOISES = ("shuffle_context", "repeat_context", "random")
TAILS = ("whole", "published")
REPEATS = ("context", "published")


@dataclass(frozen=True)
class FreeNoise:
    """The settings of `enable_free_noise`. There the first two are called context_length and context_stride."""

    length: int = 16  # frames of a window
    stride: int = 4  # frames from the beginning of one window to that of the next
    weighting_scheme: str = "pyramid"
    noise_type: str = "shuffle_context"
    interpolate: Interpolate | None = None  # the function that interpolates between texts at frames
    tail: str = "whole"  # how the last window counts if the windows do not end with the video; see compat.py
    repeat: str = "context"  # what `repeat_context` repeats; see compat.py

    def __post_init__(self) -> None:
        check_whole("context_length", self.length, 1)
        check_whole("context_stride", self.stride, 1)
        check_choice("weighting_scheme", self.weighting_scheme, WEIGHTS)
        check_choice("noise_type", self.noise_type, NOISES)
        check_choice("tail", self.tail, TAILS)
        check_choice("repeat", self.repeat, REPEATS)
        if self.stride > self.length:
            raise ValueError(f"context_stride must be at most context_length {self.length}, not {self.stride}")
        if not (self.interpolate is None or callable(self.interpolate)):
            raise TypeError(f"prompt_interpolation_callback must be a function, not {self.interpolate!r}")

    def stretch(self, noise: Tensor, frames: int, generator: Generator | Sequence[Generator] | None) -> Tensor:
        """noise (b c n h w) -> (b c frames h w), made from the noise of the first window of frames.

        n is the number of all frames, or of the frames of a window. The generator draws the order of shuffled frames.
        A list has one generator for each video. Raises ValueError if n is too small.
        """
        noise = noise[:, :, :frames]
        published = self.noise_type == "repeat_context" and self.repeat == "published"
        if self.noise_type == "random" or published or frames <= self.length:
            if noise.shape[2] < frames:
                raise ValueError(f"latents must have {frames} frames, not {noise.shape[2]}")
            return noise
        generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        videos = noise.split(1) if len(generators) > 1 else [noise]
        stretched = [v[:, :, self.sources(frames, g)] for v, g in zip(videos, generators, strict=True)]
        return torch.cat(stretched)

    def sources(self, frames: int, generator: Generator | None) -> list[int]:
        """For each frame the index of the frame whose noise it gets."""
        if self.noise_type == "repeat_context":
            return [i % self.length for i in range(frames)]
        found = list(range(self.length))
        device = "cpu" if generator is None else generator.device
        while len(found) < frames:  # the noise of `stride` frames one window earlier, in another order
            begin = len(found) - self.length
            order = torch.randperm(self.stride, generator=generator, device=device).tolist()
            found += [found[begin + i] for i in order]
        return found[:frames]

    def windows(self, frames: int) -> list[tuple[int, int]]:
        """(first frame, last frame + 1) of each window."""
        starts = [*range(0, frames - self.length + 1, self.stride)]
        if starts[-1] + self.length < frames:
            starts.append(frames - self.length)
        return [(s, s + self.length) for s in starts]

    def average(self, attend: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x (b f p d) -> attend(x) (b f p d), one window at a time. Overlapping windows are averaged."""
        frames = x.shape[1]
        if frames <= self.length:
            return attend(x)
        windows = self.windows(frames)
        whole = (frames - self.length) % self.stride == 0 or self.tail == "whole"
        weight = torch.tensor(weights(self.length, self.weighting_scheme)).to(x)[:, None, None]
        total, mass = torch.zeros_like(x), x.new_zeros((frames, 1, 1))
        for begin, end in windows:
            y = attend(x[:, begin:end].contiguous())
            if end == frames and not whole:  # only frames of no other window, all with the weight of the first one
                rest = frames - windows[-2][1]
                total[:, -rest:] += y[:, -rest:] * weight[-rest:]
                mass[-rest:] += weight[-rest]
            else:
                total[:, begin:end] += y * weight
                mass[begin:end] += weight
        return total / mass
