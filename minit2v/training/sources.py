"""Sets of files for training, and how clips are cut from a file: the size of a clip, where it begins, which frames.

    source = Source("clips", frames=16, fps=8)
    chosen_frames(facts, source, start=0)          # the numbers of the 16 frames
"""

import bisect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from minit2v_convert.rename import nearest, shown

from ..files.video import NANO
from .clips import Facts, Media, nearest_frames
from .layouts import read_sets

CLIPS = ("random", "head", "chunk", "uniform", "all")
SHORT = ("skip", "loop", "hold", "stretch")
LARGEST_ASPECT = 3  # the longer side of a bucket divided by the shorter one, at most
AREA = 0.15  # how far the area of a bucket may be from the wanted one, as a share of it


@dataclass(frozen=True)
class Source:
    """One set of files, and how clips are cut from them.

    path: a folder, a list, an archive, a video or a picture. `layouts` lists the layouts that are read.
    folder: where the files of a list are, if they are not beside the list.
    prompt: the caption of files that have none. Without it these files are skipped.
    prefix: a text that is put before every caption.
    weight: the share of this set among the samples of all sets. Without it every file is seen equally often.
    repeats: how often each file is seen in a round.
    frames: of a clip.
    height, width: of a clip, in pixels. Files of another shape get another size of nearly the same area.
    fps: frames per second of the clips. The frames are chosen by their times.
    stride: take every n-th frame of the file. Without `fps` and `stride` every frame is taken.
    clips: where a clip begins. "random": anywhere, and at each visit somewhere else. "head": at the beginning of the
        file. "chunk": the file is cut into clips. "uniform": at `places` places, at equal distances. "all": the frames
        are spread over the whole file.
    short: what is done with files that have too few frames. "skip": they are not used. "loop": the file begins again.
        "hold": the last frame is repeated. "stretch": the frames are spread over the file, and some are used twice.
    flip: mirror half of the clips. Then captions must not speak of left and right.

    Raises ValueError, one line, on wrong values.
    """

    path: str | Path
    folder: str | Path | None = None
    prompt: str | None = None
    prefix: str = ""
    weight: float | None = None
    repeats: int = 1
    frames: int = 16
    height: int = 256
    width: int = 256
    fps: float | None = None
    stride: int | None = None
    clips: str = "random"
    places: int = 4
    short: str = "skip"
    flip: bool = False

    def __post_init__(self) -> None:
        def wrong(name: str, what: str) -> ValueError:
            return ValueError(f"{shown(self.path)}: {name} must be {what}, not {getattr(self, name)!r}")

        for name in ("repeats", "frames", "height", "width", "places", "stride"):
            value = getattr(self, name)
            if (value is not None or name != "stride") and (type(value) is not int or value < 1):
                raise wrong(name, "a whole number of at least 1")
        for name, kind in (("prompt", str), ("prefix", str), ("flip", bool)):
            value = getattr(self, name)
            if not (isinstance(value, kind) or value is None and name == "prompt"):
                raise wrong(name, "a text" if kind is str else "true or false")
        for name in ("weight", "fps"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
                raise wrong(name, "a number above 0")
        for name, known in (("clips", CLIPS), ("short", SHORT)):
            if (value := getattr(self, name)) not in known:
                raise wrong(name, ", ".join(known[:-1]) + f" or {known[-1]}{nearest(value, known)}")
        if self.fps is not None and self.stride is not None:
            raise ValueError(f"{shown(self.path)}: give fps or stride, not both")
        if self.clips == "all" and (self.fps is not None or self.stride is not None):
            raise ValueError(f'{shown(self.path)}: clips = "all" spreads the frames over the file, and leaves no room '
                             "for fps or stride")  # fmt: skip


class Bucket(NamedTuple):
    """What the clips of a batch have in common: frames, and height and width in pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Clip:
    """What is trained on: a file, or a place in it.

    start: the number of the first frame. None: a random number from 0 to `last`, another one at each visit.
    last: the largest number that the first frame can have.
    """

    media: Media
    facts: Facts
    captions: tuple[str, ...]
    source: int
    bucket: Bucket
    start: int | None
    last: int


def as_sources(given: Sequence[str | Path | Source | Mapping[str, Any]], defaults: Mapping[str, Any]) -> list[Source]:
    """Every given set as a `Source`. A TOML file gives the sets that it describes.

    ValueError on a setting that `Source` does not have.
    """
    known = [f.name for f in fields(Source)]
    found: list[Source] = []
    for one in given:
        if isinstance(one, Source):
            found.append(one)
            continue
        own = dict(one) if isinstance(one, Mapping) else {"path": one}
        if not isinstance(own.get("path"), str | os.PathLike):
            raise ValueError(f"a set of files has a path, a text; its settings are {shown(own)}")
        path = Path(own["path"])
        if path.suffix.lower() == ".toml":
            del own["path"]
            found += as_sources(read_sets(path), {**defaults, **own})
            continue
        for name in (values := {**defaults, **own}):
            if name not in known:
                raise ValueError(f"{shown(path)}: {name!r} is not a setting of a set of files{nearest(name, known)}")
        found.append(Source(**values))
    if not found:
        raise ValueError("no data: name a folder, a list or a file")
    return found


def buckets(height: int, width: int, unit: int) -> list[tuple[int, int]]:
    """All sizes (height, width) in steps of `unit` pixels whose area is nearly height x width.

    ValueError where height or width is not a multiple of `unit`.
    """
    for name, value in (("height", height), ("width", width)):
        if value % unit or value < unit:
            raise ValueError(f"{name} must be a multiple of {unit} pixels for this model, not {value}"
                             f" (nearest: {max(unit, round(value / unit) * unit)})")  # fmt: skip
    area, found = height * width, {(height, width), (width, height)}
    for w in range(unit, area // unit + 1, unit):
        h = max(unit, round(area / w / unit) * unit)
        if abs(h * w / area - 1) <= AREA and max(h / w, w / h) <= LARGEST_ASPECT:
            found |= {(h, w), (w, h)}
    return sorted(found)


def cut_off(width: float, height: float, size: tuple[int, int]) -> float:
    """The share of a picture, 0 to 1, that is cut off to give it the shape of `size` (height, width)."""
    a, b = width / height, size[1] / size[0]
    return 1 - min(a, b) / max(a, b)


# --------------------------------------------------------------------------------------------------- which frames


def last_start(facts: Facts, source: Source) -> int:
    """The largest frame number that a clip can begin with. It is below 0 where the file is too short."""
    if facts.still or source.frames == 1:
        return facts.frames - 1
    if source.clips == "all":
        return 0 if facts.frames >= source.frames else -1
    if source.fps is None or facts.even:  # pictures in a folder have no times: each is one frame
        return facts.frames - 1 - (source.frames - 1) * (source.stride or 1)
    span, times = round((source.frames - 1) * NANO / source.fps), facts.times
    middle = facts.end - (facts.end - times[-1]) // 2
    return max(bisect.bisect_left(times, middle - span), bisect.bisect_right(times, times[-1] - span)) - 1


def chosen_frames(facts: Facts, source: Source, start: int) -> tuple[int, ...]:
    """The numbers of the frames of a clip that begins at frame `start`.

    Where the file ends too early, `source.short` says which frames are taken.
    """
    n, count = facts.frames, source.frames
    if facts.still or count == 1:
        return (start,)
    timed, stride = source.fps is not None and not facts.even, source.stride or 1
    if source.clips != "all" and start <= last_start(facts, source):
        return tuple(nearest_frames(facts, start, count, source.fps) if timed else
                     range(start, start + count * stride, stride))  # fmt: skip
    if source.short == "stretch" or source.clips == "all" and n >= count:
        return tuple(start + math.floor(k * (n - 1 - start) / (count - 1) + 0.5) for k in range(count))
    step = facts.rate / source.fps if timed else stride  # frames behind the end have no times
    wanted = (start + round(k * step) for k in range(count))
    return tuple(k % n if source.short == "loop" else min(k, n - 1) for k in wanted)


def starts(facts: Facts, source: Source, at: int | None) -> list[int | None]:
    """The first frame of each clip of a file. None stands for a random one.

    at: the frame where the clip must begin. ValueError says why the file has no clip.
    """
    last = last_start(facts, source)
    if facts.still or source.frames == 1 and source.clips == "all":
        return [0]
    if source.short == "skip":
        if source.fps is not None and source.frames > 1 and not facts.even and source.fps > 1.1 * facts.rate:
            raise ValueError(f"has {facts.rate:.3g} frames per second, fewer than fps = {source.fps:g}")
        if last < (at or 0):
            left, seconds = facts.frames - (at or 0), (facts.end - facts.times[min(at or 0, facts.frames - 1)]) / NANO
            rate = f" at {source.fps:g} fps" if source.fps else f", every {source.stride}th" if source.stride else ""
            where = f" from frame {at} on" if at else ""
            raise ValueError(f"too short: {max(0, left)} frames in {seconds:.2f} s{where}, and a clip has "
                             f"{source.frames}{rate}")  # fmt: skip
    if at is not None:
        if at >= facts.frames:
            raise ValueError(f"has {facts.frames} frames, and a clip should begin at frame {at}")
        return [at]
    last = max(0, last)
    if source.clips == "random":
        return [None]
    if source.clips == "uniform" and source.places > 1:
        return sorted({round(k * last / (source.places - 1)) for k in range(source.places)})
    if source.clips != "chunk":
        return [0]
    found, start = [], 0
    while start <= last:
        found.append(start)
        if source.fps is None or facts.even:
            start += source.frames * (source.stride or 1)
        else:
            behind = facts.times[start] + round(source.frames * NANO / source.fps)
            start = max(start + 1, bisect.bisect_left(facts.times, behind - 1000))
    return found
