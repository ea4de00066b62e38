"""Exact frames of videos and pictures for training.

`examine` decodes a whole file once. It finds damage before training, and the time of each frame. `decode` then reads
only the chosen frames, by their times. It gives exactly these, whatever rate, key frames and B-frames the file has.
"""

import bisect
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minit2v_convert.rename import shown

from ..files.video import IMAGES, MAX_PIXELS, NANO, ffmpeg_reads, is_animation, load_image, load_video

VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".gif")
MAX_FRAME = 2**26  # pixels of one frame: 8192 x 8192


class Media(NamedTuple):
    """A file, or a member of a tar: `size` bytes from `offset` on. name: for messages."""

    path: Path
    name: str
    offset: int = 0
    size: int | None = None

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix.lower()


@dataclass(frozen=True)
class Facts:
    """What `examine` found in a file.

    width, height: in pixels, as shown. A video that was taken with a turned phone is turned first.
    times: when each frame is shown, in rising whole nanoseconds of the file's own clock. A picture has one, 0.
    end: when the last frame ends.
    still: whether it is a picture.
    even: the times are invented, because a folder of pictures has none.
    pixel: the width of a shown pixel divided by its height. Files of old cameras and discs have values beside 1.
    """

    sha256: str
    width: int
    height: int
    times: tuple[int, ...]
    end: int
    still: bool
    even: bool = False
    pixel: float = 1.0

    @property
    def shown_width(self) -> float:
        return self.width * self.pixel

    @property
    def frames(self) -> int:
        return len(self.times)

    @property
    def rate(self) -> float:
        """Frames per second, on the average."""
        return NANO * self.frames / max(1, self.end - self.times[0])


@contextmanager
def opened(media: Media, scratch: Path) -> Iterator[Path]:
    """A file with the bytes of `media`: the file itself, or a copy of a member of a tar in `scratch`."""
    if media.size is None:
        yield media.path
        return
    copy = scratch / f"member{media.suffix}"
    with media.path.open("rb") as source, copy.open("wb") as target:
        source.seek(media.offset)
        left = media.size
        while left and (piece := source.read(min(left, 2**20))):
            target.write(piece)
            left -= len(piece)
    if left:
        raise ValueError(f"{shown(media.name)}: the archive ends before it does")
    yield copy


def sha256(media: Media) -> str:
    """The hash of the content. For a folder of pictures, of their names and contents in order."""
    if media.path.is_dir():
        files = sorted(f for f in media.path.iterdir() if f.suffix.lower() in IMAGES)
        return hashlib.sha256("".join(f"{f.name}\0{sha256(Media(f, f.name))}\0" for f in files).encode()).hexdigest()
    total, left = hashlib.sha256(), media.size
    with media.path.open("rb") as file:
        file.seek(media.offset)
        while piece := file.read(2**20 if left is None else min(left, 2**20)):
            total.update(piece)
            left = None if left is None else left - len(piece)
    return total.hexdigest()


def examine(media: Media) -> Facts:
    """Decode the whole file once. ValueError says what is wrong with it, in one line without its name."""
    try:
        return _examine(media)
    except (ValueError, OSError) as error:
        text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        for name in (media.name, str(media.path)):
            text = text.removeprefix(f"{shown(name)}: ")
        raise ValueError(" ".join(text.split())) from error


def _examine(media: Media) -> Facts:
    if media.size is None and not media.path.is_dir() and media.path.exists() and not media.path.is_file():
        raise ValueError("a pipe or a device, not a file")
    digest = sha256(media)
    if not media.path.is_dir() and (media.path.stat().st_size if media.size is None else media.size) == 0:
        raise ValueError("an empty file")
    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder, opened(media, Path(folder)) as path:
        if path.is_dir() or _is_picture(media):
            images, fps = _pictures(path)
            sizes = {image.size for image in images}
            if len(sizes) > 1:
                raise ValueError(f"its pictures differ in size: {sorted(sizes)[:3]}")
            (width, height), = sizes
            still, even = len(images) == 1 and not path.is_dir(), not fps
            times = tuple(round(n * NANO / (fps or 1)) for n in range(len(images) + 1))
            return Facts(digest, width, height, times[:-1], times[-1], still, even)
        return _examine_video(path, Path(folder), digest)


def _is_picture(media: Media) -> bool:
    return media.suffix in IMAGES or media.suffix == ".gif"


def _pictures(path: Path) -> tuple[list[Any], float | None]:
    """The frames of a picture, an animation or a folder of pictures, and their rate. A picture has none: None."""
    if path.is_dir() or is_animation(path):
        return load_video(path, return_fps=True)
    return [load_image(path, max_pixels=MAX_PIXELS)], None


def _examine_video(path: Path, scratch: Path, digest: str) -> Facts:
    size, pixel, bytes_each, times, last = (0, 0), 1.0, set(), [], 0
    with ffmpeg_reads(
        path, scratch, "-copyts", "-map", "0:V:0", "-fps_mode", "passthrough", "-vf", f"settb=1/{NANO}",
        "-enc_time_base", "filter", "-c:v", "rawvideo", "-f", "framecrc", "pipe:1", max_pixels=MAX_FRAME,
        before=("-threads", "1"),
    ) as lines:  # fmt: skip
        for line in lines:  # "0, when decoded, when shown, for how long, bytes, checksum"
            if line.startswith(b"#"):
                if line.startswith(b"#dimensions 0: "):
                    w, h = line.split()[-1].split(b"x")
                    size = int(w), int(h)
                if line.startswith(b"#sar 0: "):
                    a, b = map(int, line.split()[-1].split(b"/"))
                    pixel = a / b if a and b else 1.0
                continue
            _, _, at, last, count = map(int, line.split(b",")[:5])
            times.append(at)
            bytes_each.add(count)
    if not times:
        raise ValueError("no frames could be read")
    if len(bytes_each) > 1:
        raise ValueError("its frames differ in size")
    if any(a >= b for a, b in zip(times, times[1:], strict=False)) or times[0] < -(2**62):
        raise ValueError("its frames have no times, or times that do not rise")
    usual = sorted(b - a for a, b in zip(times, times[1:], strict=False))[(len(times) - 2) // 2] if times[1:] else last
    return Facts(digest, *size, tuple(times), times[-1] + (last or usual or NANO // 25), still=False, pixel=pixel)


# ------------------------------------------------------------------------------------------------- which frames


def nearest_frames(facts: Facts, start: int, frames: int, fps: float) -> list[int]:
    """For `frames` moments, 1 / fps seconds apart from frame `start` on: the number of the frame nearest in time.

    Of two equally near frames the earlier one is taken. A moment behind the end gives `facts.frames`.
    """
    times, found = facts.times, []
    for k in range(frames):
        moment = times[start] + round(k * NANO / fps)
        if moment >= facts.end - (facts.end - times[-1]) // 2 and moment > times[-1]:
            found.append(facts.frames)
            continue
        i = min(max(1, bisect.bisect_left(times, moment)), facts.frames - 1) if facts.frames > 1 else 0
        # Times in files are rounded. Frames are equally near if their distances differ by less than a microsecond.
        found.append(i - 1 if i and moment - times[i - 1] <= times[i] - moment + 1000 else i)
    return found


# ------------------------------------------------------------------------------------------------- decoding


def covered(width: float, height: float, to: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box in the middle of a picture with the shape of `to` (height, width): left, top, right, bottom.

    What lies outside is cut off equally on both sides. The box is scaled by the same factor in both directions.
    """
    h, w = to
    scale = min(width / w, height / h)
    left, top = (width - w * scale) / 2, (height - h * scale) / 2
    return max(0.0, left), max(0.0, top), min(width, left + w * scale), min(height, top + h * scale)


def decode(
    media: Media, facts: Facts, chosen: Sequence[int], size: tuple[int, int], flip: bool = False,
    decoder: str | None = None,
) -> Tensor:
    """Frames of a file, scaled to cover `size` = (height, width) and cut: uint8 (f 3 h w).

    chosen: their numbers from 0, in any order, also repeated. flip: mirror them, left to right.
    decoder: "ffmpeg" does not use PyAV. Where PyAV is installed, it gives the same frames in less time.
    ValueError where the file has changed since `examine`.
    """
    from PIL import Image

    if not chosen or min(chosen) < 0 or max(chosen) >= facts.frames:
        raise ValueError(f"{shown(media.name)}: has {facts.frames} frames, and {list(chosen)} are asked for")
    left, top, right, bottom = covered(facts.shown_width, facts.height, size)
    box, numbers = (left / facts.pixel, top, min(facts.width, right / facts.pixel), bottom), sorted(set(chosen))

    def made(image: Any) -> Tensor:
        if image.size != (facts.width, facts.height):
            raise ValueError(f"{shown(media.name)}: has changed since it was examined")
        small = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)

    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder, opened(media, Path(folder)) as path:
        if path.is_dir() or _is_picture(media):
            images = _pictures(path)[0]
            frames = [made(images[n]) for n in numbers] if len(images) == facts.frames else []
        else:
            frames = [] if decoder == "ffmpeg" else _by_pyav(path, facts, numbers, made)
            frames = frames or _by_ffmpeg(path, Path(folder), facts, numbers, made)
    if len(frames) < len(numbers):
        raise ValueError(f"{shown(media.name)}: {len(numbers) - len(frames)} of its frames could not be read again")
    done = dict(zip(numbers, frames, strict=True))
    clip = torch.stack([done[n] for n in chosen])
    return clip.flip(-1).contiguous() if flip else clip


def _by_ffmpeg(
    path: Path, scratch: Path, facts: Facts, numbers: list[int], made: Callable[[Any], Tensor]
) -> list[Tensor]:
    """These frames, scaled as they come. ffmpeg selects them by their exact times, so no other frame comes out."""
    from PIL import Image

    times = [facts.times[n] for n in numbers]
    shape = facts.width, facts.height
    output = ["-copyts", "-map", "0:V:0", "-fps_mode", "passthrough", "-frames:v", str(len(times)),
              "-vf", f"settb=1/{NANO},select='{_any_of(times)}'", "-enc_time_base", "filter", "-pix_fmt", "rgb24",
              "-f", "rawvideo", "pipe:1"]  # fmt: skip
    # Seeking goes to a key frame at or before the time. If the index of the file is wrong, frames are missing or
    # damaged. Then the file is read from its beginning.
    seek = ("-noaccurate_seek", "-seek_timestamp", "1", "-ss", f"{times[0] / NANO:.6f}")
    for before in (seek, ()) if _sought(path, facts, times[0]) else ((),):
        frames: list[Tensor] = []
        try:
            with ffmpeg_reads(path, scratch, *output, max_pixels=MAX_FRAME, before=("-threads", "1", *before)) as out:
                while frame := _read(out, 3 * shape[0] * shape[1]):
                    frames.append(made(Image.frombytes("RGB", shape, frame)))
        except ValueError:
            if not before:
                raise
            continue
        if len(frames) == len(times):
            break
    return frames


def _sought(path: Path, facts: Facts, time: int) -> bool:
    """Whether to seek to a time: later than a second, in files whose index has the time of each frame.

    In the middle of other files (MPEG streams) frames can get the times of their neighbours.
    """
    with path.open("rb") as file:
        head = file.read(12)
    mp4 = head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
    indexed = mp4 or head[:4] == b"\x1aE\xdf\xa3" or head[:4] + head[8:] == b"RIFFAVI "
    return indexed and time > 0 and time - facts.times[0] > NANO


def _any_of(times: Sequence[int]) -> str:
    """ffmpeg's expression for one of these times. It is a tree, because ffmpeg reads no sum of over a hundred terms."""
    if len(times) == 1:
        return f"eq(pts,{times[0]})"
    half = len(times) // 2
    return f"({_any_of(times[:half])}+{_any_of(times[half:])})"


def _read(stream: IO[bytes], size: int) -> bytes:
    """Exactly so many bytes. If the stream ends before, none."""
    data = stream.read(size)
    return data if len(data) == size else b""


def _by_pyav(path: Path, facts: Facts, numbers: list[int], made: Callable[[Any], Tensor]) -> list[Tensor]:
    """All of these frames. None of them where PyAV is not installed, or where the file needs ffmpeg."""
    try:
        from av import FFmpegError
        from av import open as av_open
    except ImportError:
        return []
    wanted, frames = [facts.times[n] for n in numbers], []
    try:
        with av_open(str(path)) as container:
            stream = container.streams.video[0]
            if _sought(path, facts, wanted[0]):
                container.seek(int(Fraction(wanted[0], NANO) / stream.time_base), stream=stream)
            whole = False  # after a key frame; frames before it may lack data
            for frame in container.decode(stream):
                at = round(frame.pts * stream.time_base * NANO)
                whole = whole or frame.key_frame
                if at in wanted:
                    if not whole or frame.is_corrupt or frame.side_data.get("DISPLAYMATRIX") is not None:
                        return []
                    frames.append(made(frame.to_image()))
                if at >= wanted[-1]:
                    break
    except (FFmpegError, ValueError, TypeError):  # TypeError: a frame without a time
        return []
    return frames if len(frames) == len(wanted) else []


