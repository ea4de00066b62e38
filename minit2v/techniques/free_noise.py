"""FreeNoise: long videos from the noise of one window, and attention across frames in windows (arXiv:2310.15169).

Qiu et al. 2023, "FreeNoise: Tuning-Free Longer Video Diffusion via Noise Rescheduling". Frames far apart are alike only
where their noise is: so all noise comes from that of the first `length` frames, a part of them shuffled at a time. And
attention sees as many frames as it was trained on: windows that overlap, whose results are averaged with weights
(section 3.3). The rest of the network sees each frame by itself, so that only the motion modules need windows.
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
    """Settings of `enable_free_noise`, whose arguments have these names with `context_` before the first two."""

    length: int = 16  # frames of a window
    stride: int = 4  # frames from the beginning of one window to that of the next
    weighting_scheme: str = "pyramid"
    noise_type: str = "shuffle_context"
    interpolate: Interpolate | None = None  # between the texts of a prompt for single frames
    tail: str = "whole"  # what counts of the last window, where the others do not end with the video
    repeat: str = "context"  # what `repeat_context` repeats

    def __post_init__(self) -> None:
        check_whole("context_length", self.length, 1)
        check_whole("context_stride", self.stride, 1)
        check_choice("weighting_scheme", self.weighting_scheme, WEIGHTS)
        check_choice("noise_type", self.noise_type, NOISES)
        check_choice("tail", self.tail, TAILS)
        check_choice("repeat", self.repeat, REPEATS)
        if self.stride > self.length:
            raise ValueError(f"context_stride {self.stride} leaves frames out: a window has {self.length}")
        if not (self.interpolate is None or callable(self.interpolate)):
            raise TypeError(f"prompt_interpolation_callback must be a function, not {self.interpolate!r}")

    def stretch(self, noise: Tensor, frames: int, generator: Generator | Sequence[Generator] | None) -> Tensor:
        """noise (b c n h w), of all frames or of a window's -> (b c frames h w), made of its first window.

        What is shuffled is drawn from the generator: with one for each video, as if the video were alone.
        """
        noise = noise[:, :, :frames]
        published = self.noise_type == "repeat_context" and self.repeat == "published"
        if self.noise_type == "random" or published or frames <= self.length:
            if noise.shape[2] < frames:
                raise ValueError(f"latents for {frames} frames are needed, not for {noise.shape[2]}")
            return noise
        generators = list(generator) if isinstance(generator, list | tuple) else [generator]
        videos = noise.split(1) if len(generators) > 1 else [noise]
        stretched = [v[:, :, self.sources(frames, g)] for v, g in zip(videos, generators, strict=True)]
        return torch.cat(stretched)

    def sources(self, frames: int, generator: Generator | None) -> list[int]:
        """For each frame the frame whose noise it gets."""
        if self.noise_type == "repeat_context":
            return [i % self.length for i in range(frames)]
        found = list(range(self.length))
        device = "cpu" if generator is None else generator.device
        while len(found) < frames:  # the noise of `stride` frames, a window ago, in another order
            begin = len(found) - self.length
            order = torch.randperm(self.stride, generator=generator, device=device).tolist()
            found += [found[begin + i] for i in order]
        return found[:frames]

    def windows(self, frames: int) -> list[tuple[int, int]]:
        """The first frame of each window, and the first behind it."""
        starts = [*range(0, frames - self.length + 1, self.stride)]
        if starts[-1] + self.length < frames:
            starts.append(frames - self.length)
        return [(s, s + self.length) for s in starts]

    def average(self, attend: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """x (b f p d) -> attend(x) (b f p d), of one window at a time, averaged where windows overlap."""
        frames = x.shape[1]
        if frames <= self.length:
            return attend(x)
        windows = self.windows(frames)
        whole = (frames - self.length) % self.stride == 0 or self.tail == "whole"
        weight = torch.tensor(weights(self.length, self.weighting_scheme)).to(x)[:, None, None]
        total, mass = torch.zeros_like(x), x.new_zeros((frames, 1, 1))
        for begin, end in windows:
            y = attend(x[:, begin:end].contiguous())
            if end == frames and not whole:  # only frames that no other window has, all with the weight of the first
                rest = frames - windows[-2][1]
                total[:, -rest:] += y[:, -rest:] * weight[-rest:]
                mass[-rest:] += weight[-rest]
            else:
                total[:, begin:end] += y * weight
                mass[begin:end] += weight
        return total / mass
