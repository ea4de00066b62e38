"""Context windows by section 2 of docs/long-videos.md, written from that text alone, plainly and in float64.

This is an oracle to test with, not an implementation to use. The letters are those of the document: F frames, L length,
O overlap, H hop, s spacing, o offset, n the number of the prediction in its run. The rules' numbers are its numbers.

Where the document left a choice, this is what the oracle took. It says (a), (b), (c), (f) and (g) itself since then.
(a) A video of F <= L frames: its only window has F weights, those of L = F.
(b) overlap_linear where the two ramps meet (2 O > L): the smaller of the two.
(c) Rule 3 keeps one of equal starts of one spacing. Windows of different spacings all count, even if they hold the same
    frames (which only L = 1 allows).
(d) Windows come spacing by spacing, and within a spacing in the order in which rule 3 lists their starts.
(e) Rule 4's words "without loop" hold for the two frames at the ends only: with loop every window has both ramps.
(f) Overlap is less than length: else the hop of rule 3 would be no step forward.
(g) Loops with "batched" and overlap_linear with 2 O > L have windows and weights here. The package refuses both.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor


def reversed_digits(n: int) -> Fraction:
    """h(n) of rule 1: the binary digits of n, last one first, behind the point."""
    value, place = Fraction(0), Fraction(1, 2)
    while n > 0:
        value += (n % 2) * place
        n //= 2
        place /= 2
    return value


def offset(frames: int, call: int, schedule: str) -> int:
    """Rule 1. Python rounds a half of a Fraction to the even number."""
    return round(frames * reversed_digits(call)) if schedule == "uniform" else 0


def spacings(frames: int, *, length: int, stride: int, loop: bool) -> list[int]:
    """Rule 2: 1, 2, 4, ... as long as a window fits."""
    kept = []
    for k in range(stride):
        s = 2**k
        if s * (length - 1) + 1 > frames or (loop and s * length > frames):
            break
        kept.append(s)
    return kept


def windows(
    frames: int, call: int, *, length: int, overlap: int, stride: int, loop: bool, schedule: str
) -> list[list[int]]:
    """Rules 1 to 3: the frames of every window of a video of `frames` frames in prediction number `call`."""
    o = offset(frames, call, schedule)
    if frames <= length:
        return [[(o + i) % frames if loop else i for i in range(frames)]]
    found = []
    for s in spacings(frames, length=length, stride=stride, loop=loop):
        hop = s * length if schedule == "batched" else s * length - overlap
        starts = []
        if loop:
            count = 0
            while count * hop < frames:  # ceil(F / H) of them
                starts.append(o + count * hop)
                count += 1
        else:
            last = frames - s * (length - 1) - 1  # where a window ends with the video
            start = o % hop - hop
            while start < last + hop:
                moved = min(max(start, 0), last)
                if moved not in starts:
                    starts.append(moved)
                start += hop
        for start in starts:
            found.append([(start + i * s) % frames for i in range(length)])
    return found


def weights(window: Sequence[int], frames: int, *, overlap: int, loop: bool, fuse: str) -> list[float]:
    """Rule 4: one weight for each frame of the window, in their order."""
    length = len(window)
    if fuse == "flat":
        return [1.0] * length
    if fuse == "pyramid":
        return [float(min(i + 1, length - i)) for i in range(length)]
    if fuse == "delayed_reverse_sawtooth":
        if length % 2 == 0:
            half = length // 2
            values = [0.01] * (half - 1) + [half] + list(range(half, 0, -1))
        else:
            values = [0.01] * ((length - 1) // 2) + list(range((length + 1) // 2, 0, -1))
        return [float(value) for value in values]
    if fuse == "overlap_linear":
        values = [1.0] * length
        for i in range(min(overlap, length)):
            ramp = (i + 1) / (overlap + 1)
            if loop or 0 not in window:
                values[i] = min(values[i], ramp)
            if loop or frames - 1 not in window:
                values[length - 1 - i] = min(values[length - 1 - i], ramp)
        return values
    raise ValueError(fuse)


def fuse(
    predict: Callable[[Tensor, list[int]], Tensor],
    x: Tensor,
    call: int,
    *,
    length: int,
    overlap: int,
    stride: int,
    loop: bool,
    fuse: str,
    schedule: str,
) -> Tensor:
    """The weighted mean over all windows: x (b, c, f, h, w) -> the same shape, in float64.

    `predict` gets a window's frames of x, (b, c, window, h, w), and their numbers.
    """
    frames = x.shape[2]
    total = torch.zeros(x.shape, dtype=torch.float64)
    weight = [0.0] * frames
    for window in windows(frames, call, length=length, overlap=overlap, stride=stride, loop=loop, schedule=schedule):
        seen = torch.stack([x[:, :, frame] for frame in window], dim=2)
        predicted = predict(seen, window).to(torch.float64)
        for i, a in enumerate(weights(window, frames, overlap=overlap, loop=loop, fuse=fuse)):
            total[:, :, window[i]] += a * predicted[:, :, i]
            weight[window[i]] += a
    for frame in range(frames):
        total[:, :, frame] /= weight[frame]
    return total
