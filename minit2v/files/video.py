"""Frames to and from files: H.264 video that browsers play, GIF, and the settings a video was made with, inside it."""

import bisect
import errno
import itertools
import json
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from minit2v_convert.rename import nearest, shown
from minit2v_convert.stream import beside, ended_cleanly, first_line

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
OLDEST_FFMPEG = 7  # its main version; what is older encodes on when the disk is full, or lacks `fd:`
MAX_PIXELS = 2**28  # frames x width x height: 1 GiB as PIL holds them, 512 frames of 1024 x 512
LARGEST_METADATA = 2**26  # bytes
NANO = 10**9
# The range of the samples and the matrix that made YUV of RGB are written into the file: untagged, each player guesses.
TAGS = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
TO_YUV = f"scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,{TAGS}"


# ---------------------------------------------------------------------------------------------------------- frames in


def _one_video(video: Any) -> Any:
    """The frames of a batch of one; anything else as it came. Raises ValueError on a batch of several or of none."""
    def is_video(x: Any) -> bool:
        return isinstance(x, list | tuple) or getattr(x, "ndim", 0) >= 4

    is_array = isinstance(video, np.ndarray | torch.Tensor)
    if not is_array and not isinstance(video, list | tuple):
        raise TypeError(f"frames are a list of PIL images, an array (f h w c) or a tensor (f c h w), "
                        f"not {type(video).__name__}")
    if len(video.shape if is_array else video) == 0 or len(video) == 0:
        raise ValueError("no frames to write")
    if video.ndim == 5 if is_array else is_video(video[0]):
        if len(video) > 1:
            raise ValueError(f"a batch of {len(video)} videos: write them one by one (frames[0], frames[1], ...)")
        return _one_video(video[0])
    if is_array and video.ndim != 4:
        raise ValueError(f"a video has 4 axes, (f h w c) as an array or (f c h w) as a tensor, not {video.ndim}")
    return video


def _frame(x: Any, n: int) -> np.ndarray:
    """Frame `n`, a PIL image, array (h w c) or tensor (c h w), as uint8 (h w 3). Floats are in [0, 1], and rounded."""
    from PIL import Image

    if isinstance(x, Image.Image):
        return np.asarray(x.convert("RGB"))
    if isinstance(x, torch.Tensor):
        layout, x = "(c h w)", x.detach().cpu()
        x = (x.float() if x.dtype.is_floating_point else x).numpy()
        x = np.moveaxis(x, 0, -1) if x.ndim == 3 else x
    elif isinstance(x, np.ndarray):
        layout = "(h w c)"
    else:
        raise TypeError(f"frame {n} is a {type(x).__name__}, not a PIL image, an array or a tensor")
    if x.ndim != 3 or x.shape[-1] not in (1, 3):
        raise ValueError(f"frame {n} is no {layout} image with 1 or 3 channels: with its channels last it is {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"frame {n} has no pixels: {x.shape}")
    if np.issubdtype(x.dtype, np.floating):
        low, high = float(x.min()), float(x.max())  # NaN in, NaN out
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"frame {n} holds NaN or infinity")
        if low < -0.01 or high > 1.01:  # rounding may overstep a little; another range is another meaning
            raise ValueError(f"frame {n} spans [{low:.3g}, {high:.3g}]: float frames are in [0, 1], uint8 in [0, 255]")
        x = np.rint(x.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif x.dtype != np.uint8:
        raise ValueError(f"frame {n} is {x.dtype}: frames are uint8 in [0, 255] or floats in [0, 1]")
    return np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def _frames(video: Any) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """The first frame, and all of them, one after the other. What is not an iterator is checked as a whole first."""
    frames = (_frame(x, n) for n, x in enumerate(video if isinstance(video, Iterator) else _one_video(video)))
    if not isinstance(video, Iterator):
        frames = iter(list(_same_size(frames)))
    first = next(frames, None)
    if first is None:
        raise ValueError("no frames to write")
    return first, _same_size(itertools.chain([first], frames))


def _same_size(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    first = None
    for n, frame in enumerate(frames):
        first = frame.shape if first is None else first
        if frame.shape != first:
            raise ValueError("frames differ in size: the first is {1}x{0}, frame {n} {3}x{2} (width x height)".format(
                *first[:2], *frame.shape[:2], n=n))
        yield frame


def _rate(fps: Any) -> Fraction:
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction | np.number):
        raise TypeError(f"fps is a number, not {fps!r}")
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise ValueError(f"fps must be between 0.01 and 1000, not {fps}")
    rate = Fraction(float(fps))
    return rate.limit_denominator(1001) if fps >= 1 else 1 / (1 / rate).limit_denominator(1001)


# --------------------------------------------------------------------------------------------------------- files out


def _target(path: str | os.PathLike | None, default: str, suffixes: Sequence[str], hint: str) -> Path:
    if path is None:  # a name alone: the file appears when it is complete
        path = Path(tempfile.gettempdir()) / f"minit2v-{secrets.token_hex(8)}{default}"
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: the name must end in {', '.join(suffixes)}{hint}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that becomes `path` if all goes well, and vanishes otherwise."""
    temp = None
    try:
        with beside(path) as temp:
            yield temp
    except OSError as e:
        if temp is not None and e.filename not in (None, str(temp)):
            raise  # another file's, or it names this one already
        raise type(e)(e.errno, f"cannot write here ({e.strerror or e})", str(path)) from e


def find_ffmpeg() -> str:
    """The program's path. Raises ImportError where there is none, RuntimeError where it cannot do the work."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as e:
        raise ImportError("video files need the package imageio-ffmpeg: pip install imageio-ffmpeg") from e
    return _checked(shutil.which(get_ffmpeg_exe()) or get_ffmpeg_exe())


@cache
def _checked(program: str) -> str:
    """The program's whole path. Raises RuntimeError where it is too old."""
    try:
        said = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    except OSError as e:
        raise RuntimeError(f"{program} cannot be started ({e.strerror})") from e
    if not said.startswith("ffmpeg version"):
        raise RuntimeError(f"{program} is not ffmpeg: unset IMAGEIO_FFMPEG_EXE, or pip install -U imageio-ffmpeg")
    version = re.match(r"ffmpeg version n?(\d+)\.", said)  # those built from its repository have no number
    if version and int(version[1]) < OLDEST_FFMPEG:
        raise RuntimeError(f"{program} is {shown(said.splitlines()[0][:60])}, and {OLDEST_FFMPEG}.0 is the oldest that "
                           "works: pip install -U imageio-ffmpeg, or name another as IMAGEIO_FFMPEG_EXE")
    return os.path.abspath(program)


def _escape(text: str) -> str:
    """For ffmpeg's metadata files."""
    return re.sub(r"([=;#\\\n])", r"\\\1", text)


def _json(metadata: Mapping[str, Any]) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        raise TypeError(f"metadata: {type(x).__name__} is nothing that JSON can say")

    text = json.dumps(dict(metadata), ensure_ascii=False, default=plain)
    try:
        text.encode()
    except UnicodeEncodeError:  # paths that are not UTF-8
        text = json.dumps(dict(metadata), default=plain)
    return text


def export_to_video(
    video_frames: Any,
    output_video_path: str | os.PathLike | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 2,
    *,
    metadata: Mapping[str, Any] | None = None,
    sound: str | os.PathLike | None = None,
    sound_from: float = 0.0,
) -> str:
    """Write one video as H.264, yuv420p, and return its path (a temporary file if none is given).

    video_frames: a list of PIL images, of arrays (h w c) or tensors (c h w), an array (f h w c), a tensor (f c h w), or
        a batch of one of these; uint8, or floats in [0, 1]. An iterator of frames is written as it goes, and never
        held as a whole.
    fps: frames per second; fractions are kept.
    quality: 0 (small) to 10 (near lossless); None leaves the encoder's default. `bitrate`, in bits per second, instead.
    macro_block_size: width and height are completed to a multiple of it (and of 2, which yuv420p asks for) by repeating
        the last column and row; the reference scales to multiples of 16.
    metadata: what `read_metadata` gives back; anything JSON can say.
    sound: a file whose sound is put beside the frames, from `sound_from` seconds on, as long as they last.

    Raises TypeError or ValueError on bad frames or arguments, OSError where the file cannot be written, RuntimeError if
    the encoder fails. Nothing is left behind then, also after SIGTERM and SIGHUP, and a file that was there stays.
    """
    if quality is not None and not 0 <= quality <= 10:
        raise ValueError(f"quality must be between 0 and 10, not {quality}")
    if bitrate is not None and bitrate <= 0:
        raise ValueError(f"bitrate must be above 0, not {bitrate}")
    if macro_block_size is not None and macro_block_size < 1:
        raise ValueError(f"macro_block_size must be at least 1, not {macro_block_size}")
    rate = _rate(fps)
    first, frames = _frames(video_frames)
    suffix = Path(output_video_path).suffix.lower() if output_video_path is not None else ".mp4"
    hint = "; export_to_gif writes GIFs" if suffix == ".gif" else nearest(suffix, list(MUXERS))
    path = _target(output_video_path, ".mp4", list(MUXERS), hint)
    tags = f";FFMETADATA1\ncomment={_escape(_json(metadata))}\n" if metadata else None
    program = find_ffmpeg()

    block = math.lcm(2, macro_block_size or 1)
    h, w = first.shape[:2]
    down, right = -h % block, -w % block
    if down or right:
        warnings.warn(f"video of {w}x{h} completed to {w + right}x{h + down} (multiples of {block}) by repeating its "
                      "last row and column", stacklevel=2)
        frames = (np.pad(f, ((0, down), (0, right), (0, 0)), mode="edge") for f in frames)

    # crf 18 is visually clean and 0 lossless, in a profile that browsers do not play: 10 is crf 1.
    rate_control = (["-b:v", str(int(bitrate))] if bitrate is not None
                    else [] if quality is None else ["-crf", f"{35 - 3.4 * quality:.1f}"])
    # QuickTime's own comments end at 64 KiB: with these tags they do not.
    flags = "+faststart+use_metadata_tags" if path.suffix.lower() == ".mov" else "+faststart"
    with ended_cleanly(), tempfile.TemporaryDirectory(prefix="minit2v-") as scratch, _replacing(path) as temp:
        command = [program, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                   "-s", f"{w + right}x{h + down}", "-r", str(rate), "-i", "pipe:0"]
        output: list[str] = []
        if tags:  # in a file, as one argument of a command may not be long; a prompt may
            (Path(scratch) / "tags").write_text(tags, encoding="utf-8")
            command += ["-f", "ffmetadata", "-i", str(Path(scratch) / "tags")]
            output += ["-map_metadata", "1"]
        if sound is not None:
            (Path(scratch) / "sound").mkdir()
            track = _sound_of(Path(sound), Path(scratch) / "sound", sound_from)
            if track is not None:  # silence behind it, as long as there are frames
                command += ["-i", str(track)]
                output += ["-map", f"{1 + bool(tags)}:a", "-af", "apad", "-c:a", "aac", "-shortest"]
        command += [*output, "-map", "0:v", "-vf", TO_YUV, "-c:v", "libx264", *rate_control, "-movflags", flags,
                    "-f", MUXERS[path.suffix.lower()], str(temp.absolute())]
        _encode(command, frames, path, Path(scratch) / "errors")
    return str(path)


def _sound_of(path: Path, scratch: Path, start: float) -> Path | None:
    """The first track of sound of a file, from so many seconds on, in a file; None where there is no sound."""
    track = scratch / "track.flac"
    with ffmpeg_reads(path, scratch, "-map", "0:a:0", "-ss", f"{start:.6f}", str(track), strict=False) as nothing:
        nothing.read()
    return track if track.is_file() and track.stat().st_size else None


def has_sound(path: str | os.PathLike) -> bool:
    """Whether a file has a track of sound, for `export_to_video(..., sound=path)`."""
    if not Path(path).is_file() or is_animation(Path(path)):
        return False
    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
        with ffmpeg_reads(Path(path), Path(folder), "-map", "0:a:0", "-c", "copy", "-f", "framecrc", "pipe:1",
                           strict=False) as lines:  # fmt: skip
            return any(not line.startswith(b"#") for line in lines)


def _encode(command: list[str], frames: Iterator[np.ndarray], path: Path, log: Path) -> None:
    """Feed raw frames to ffmpeg. Its messages go to a file: a second pipe could fill up and block both sides."""
    with open(log, "wb") as stderr:
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
        except OSError as e:
            raise RuntimeError(f"{command[0]} cannot be started ({e.strerror})") from e
        try:
            try:
                for frame in frames:
                    process.stdin.write(np.ascontiguousarray(frame).data)
                process.stdin.close()
            except BrokenPipeError:
                pass  # it ended before its time; its exit code and messages say why
            code = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if code:
        said = _said(log)
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, "no space left on the disk", str(path))
        raise RuntimeError(f"{shown(path)}: the video encoder failed: {said[0] if said else _ended(code)}")


def _ended(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _said(log: Path) -> list[str]:
    """The lines of ffmpeg's messages, without the address in memory of the part that speaks."""
    lines = log.read_bytes()[: 2**16].decode(errors="replace").splitlines()
    return [shown(re.sub(r"^(\[[^]]* @ \w+\] )+", "", line).strip()) for line in lines if line.strip()]


def export_to_gif(
    image: Any, output_gif_path: str | os.PathLike | None = None, fps: float = 10, *,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write one video (as for `export_to_video`) as a GIF that loops for ever, and return its path.

    Every frame is kept, also one equal to its neighbour. A frame of at most 256 colours is exact. GIFs count time in
    hundredths of a second: the rounding is spread over the frames, so that the whole lasts frames / fps.
    """
    from PIL import Image
    from PIL.GifImagePlugin import getdata

    rate = _rate(fps)
    if rate > 50:
        warnings.warn(f"{float(rate):g} fps: most players slow down a GIF of more than 50 fps", stacklevel=2)
    if rate > 100:
        raise ValueError(f"a GIF has at most 100 frames per second, not {fps}")
    first, frames = _frames(image)
    path = _target(output_gif_path, ".gif", [".gif"], "; export_to_video writes videos")
    h, w = first.shape[:2]
    # Pillow's own writer merges equal frames, so the container is put together here and Pillow compresses the frames.
    parts = [b"GIF89a", w.to_bytes(2, "little"), h.to_bytes(2, "little"), b"\x70\0\0",  # no palette for all frames
             b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"]  # loop for ever
    if metadata:
        comment = _json(metadata).encode()
        chunks = [comment[i : i + 255] for i in range(0, len(comment), 255)]
        parts += [b"\x21\xfe", *(bytes([len(c)]) + c for c in chunks), b"\0"]
    for n, frame in enumerate(frames):
        start, end = round(100 * n / rate), round(100 * (n + 1) / rate)
        packed = frame.astype(np.uint32) @ np.array([65536, 256, 1], np.uint32)
        colours, index = np.unique(packed, return_inverse=True)
        if len(colours) <= 256:
            indexed = Image.fromarray(index.reshape(h, w).astype(np.uint8), "L")
            indexed.putpalette(b"".join(int(c).to_bytes(3, "big") for c in colours))
        else:  # no dithering: it would crawl over areas that stand still
            indexed = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
        parts += getdata(indexed, (0, 0), duration=10 * (end - start), include_color_table=True)
    with _replacing(path) as temp:
        temp.write_bytes(b"".join([*parts, b";"]))
    return str(path)


# ---------------------------------------------------------------------------------------------------------- files in


def load_video(
    video: str | os.PathLike, *, return_fps: bool = False, max_pixels: float = MAX_PIXELS, start: float = 0.0,
    end: float | None = None, every: int = 1,
) -> Any:
    """The frames of a video, GIF or folder of images (in the order of the numbers in their names), a list of PIL RGB.

    video: a path, or an http(s) address. With `return_fps` a pair (frames, frames per second), the latter None where
    there is no rate, as in a folder. Frames that are shown for unequal times are put on an even grid: the longer ones
    are there several times. A warning says where that cannot be exact.
    max_pixels: frames x width x height that are accepted, before they are decoded; `math.inf` for any.
    start, end: seconds; only frames that begin in between, and at `start`, are read. every: of these every n-th one,
    and the rate that belongs to that.

    Raises FileNotFoundError, ValueError where the file is not a video, damaged or larger than that, OSError where it
    cannot be read or fetched.
    """
    cut = _check_part(start, end, every, max_pixels)
    with ended_cleanly(), tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
        read = _Reading(_local(video, Path(folder), max_pixels), Path(folder), max_pixels, cut)
        frames = list(read)
    chosen, fps = read.grid()
    if len(chosen) > len(frames):
        _check_pixels(read.path, len(chosen), *frames[0].size, max_pixels)
    frames = [frames[i] if n == 0 or chosen[n - 1] != i else frames[i].copy() for n, i in enumerate(chosen)]
    frames, fps = frames[::every], fps and fps / every
    return (frames, fps) if return_fps else frames


class VideoFrames:
    """The frames that `load_video` would return, read anew whenever they are gone through: none is kept.

    The file is read once at the beginning, to find damage and the times of frames. size: (width, height) in pixels.
    fps: frames per second, None where there is no rate. max_pixels: of one frame. Raises what `load_video` raises.
    """

    def __init__(
        self, video: str | os.PathLike, *, start: float = 0.0, end: float | None = None, every: int = 1,
        max_pixels: float = MAX_PIXELS,
    ):
        cut = _check_part(start, end, every, max_pixels)
        self._folder = tempfile.TemporaryDirectory(prefix="minit2v-")
        path = _local(video, Path(self._folder.name), max_pixels)
        self._arguments = path, Path(self._folder.name), max_pixels, cut, False
        with ended_cleanly():
            read = _Reading(*self._arguments)
            sizes = {frame.size for frame in read}
        if len(sizes) > 1:
            raise ValueError(f"{shown(video)}: its frames differ in size: {sorted(sizes)[:3]}")
        (self.size,) = sizes
        chosen, fps = read.grid()
        self._chosen, self.fps = chosen[::every], fps and fps / every

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Any]:
        left = iter(self._chosen)
        wanted = next(left, None)
        for n, frame in enumerate(_Reading(*self._arguments)):
            while n == wanted:
                yield frame
                wanted = next(left, None)
            if wanted is None:
                return
        if wanted is not None:
            raise ValueError(f"{shown(self._arguments[0])}: has fewer frames than before")


def _check_part(start: float, end: float | None, every: int, max_pixels: float) -> tuple[float, float] | None:
    """The seconds between which frames are taken, None: all. ValueError on what cannot be."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, not {every!r}")
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start and end must be seconds from 0 in rising order, not {start!r} and {end!r}")
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float | np.number) or not max_pixels > 0:
        raise ValueError(f"max_pixels is a number above 0, not {max_pixels!r}")
    return None if start == 0 and end is None else (start, math.inf if end is None else end)


def load_image(image: Any, *, max_pixels: float = MAX_PIXELS) -> Any:
    """A picture as a PIL image, RGB, upright: of a file, an http(s) address, or a PIL image.

    Raises FileNotFoundError, ValueError where it is no picture, damaged or of more than `max_pixels`, OSError where it
    cannot be read or fetched.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _rgb(image)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"a picture is a path, an address or a PIL image, not a {type(image).__name__}")
    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
        path = _local(image, Path(folder), max_pixels)
        if path.is_dir():
            raise ValueError(f"{shown(path)}: a folder, not a picture")
        with _opened(path, "no picture, or a damaged one") as opened:
            _check_pixels(path, 1, *opened.size, max_pixels)
            return _rgb(opened)


def _local(path: str | os.PathLike, scratch: Path, max_pixels: float) -> Path:
    """The path itself, or what was downloaded from an address."""
    if re.match(r"[a-z][a-z0-9+.-]+://", str(path), re.I):
        if not str(path).lower().startswith(("http://", "https://")):
            raise ValueError(f"{shown(path)}: of addresses only http and https are fetched")
        import urllib.request

        local, most = scratch / "video", 3 * max_pixels  # bytes: what that many pixels take uncompressed
        try:
            with urllib.request.urlopen(str(path), timeout=60) as source, open(local, "wb") as target:
                while piece := source.read(2**20):
                    if (most := most - len(piece)) < 0:
                        break
                    target.write(piece)
        except OSError as e:
            raise OSError(f"{shown(path)}: cannot be fetched ({first_line(e)})") from e
        if most < 0:
            raise ValueError(f"{shown(path)}: longer than the {3 * max_pixels:,} bytes that max_pixels admits")
        return local
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{shown(path)}: a pipe or a device, not a file")
    return path


def _check_pixels(path: Path, frames: int, width: int, height: int, max_pixels: float) -> None:
    if frames * width * height > max_pixels:
        raise ValueError(f"{shown(path)}: {frames:,} frames of {width}x{height} are {frames * width * height:,} pixels,"
                         f" and max_pixels is {max_pixels:,}: cut it, or raise that")


# Images: the folder, and what moves in formats of images.


def _head(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(12)


def is_animation(path: Path) -> bool:
    """A GIF, PNG or WebP: by its content."""
    head = _head(path)
    return head.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n")) or head[:4] + head[8:] == b"RIFFWEBP"


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """The image in a file. Whatever goes wrong in the block is a ValueError that says so."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as e:  # a broken file breaks its reader anywhere
        if isinstance(e, ValueError) and str(e).startswith(f"{shown(path)}: "):
            raise
        if isinstance(e, Image.DecompressionBombError):  # Pillow's own limit, which holds for all of the process
            raise ValueError(f"{shown(path)}: {shown(first_line(e))} Raise PIL.Image.MAX_IMAGE_PIXELS, and "
                             "max_pixels, for it") from e  # fmt: skip
        raise ValueError(f"{shown(path)}: {what} ({shown(first_line(e))})") from e


def _rgb(image: Any) -> Any:
    """8-bit RGB, upright: cameras turn a picture by a note in its EXIF data."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which PIL would clip to 8
        grey = np.rint(np.asarray(image).astype(np.float32).clip(0, 65535) / 257)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


class _Reading:
    """The frames of a file, one after the other, each once; when they are through, the grid that they are put on.

    path: a local file or folder. held: whether all frames are kept, so that `max_pixels` is for all together and not
    for each. cut: seconds between which frames are taken.
    """

    def __init__(
        self, path: Path, scratch: Path, max_pixels: float, cut: tuple[float, float] | None = None, held: bool = True
    ):
        self.path, self.scratch, self.max_pixels, self.cut, self.held = path, scratch, max_pixels, cut, held
        self.count = 0
        self.times: list[float] | None = None  # when each is shown, from 0, and the end of the last, in seconds
        self.tick, self.declared = 0.01, None  # what times were rounded to; the rate that the file seems to have

    def __iter__(self) -> Iterator[Any]:
        if self.path.is_dir():
            return self.folder()
        return self.animation() if is_animation(self.path) else self.video()

    def grid(self) -> tuple[list[int], float | None]:
        """Which frame is shown at each point of an even grid, and the points per second; None where there is none."""
        chosen, rate = [*range(self.count)], self.declared
        if self.times is not None:
            chosen, rate = _on_grid(self.path, self.times, self.tick, self.declared)
        if self.cut is None or not (self.path.is_dir() or is_animation(self.path)):
            return chosen, rate
        if rate is None:
            raise ValueError(f"{shown(self.path)}: images have no times: start and end are for videos")
        chosen = [i for n, i in enumerate(chosen) if self.cut[0] <= round(n / rate, 6) < self.cut[1]]
        if not chosen:
            raise ValueError(f"{shown(self.path)}: {_between(self.cut)}")
        return chosen, rate

    def check(self, frames: int, width: int, height: int) -> None:
        _check_pixels(self.path, frames if self.held else 1, width, height, self.max_pixels)

    def folder(self) -> Iterator[Any]:
        path = self.path
        files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES]
        if others := [f for f in files if f.exists() and not f.is_file()]:  # to open a pipe would wait for ever
            raise ValueError(f"{shown(others[0])}: a folder, a pipe or a device, not a file")
        if not files:
            raise ValueError(f"{shown(path)}: no images ({', '.join(IMAGES)}) in this folder")
        files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)])
        pixels = 0
        for file in files:
            with _opened(file, "a damaged image") as image:
                pixels = image.width * image.height + pixels * self.held
            if not self.held and pixels > self.max_pixels:
                self.check(1, image.width, image.height)
        if pixels > self.max_pixels:
            raise ValueError(f"{shown(path)}: {len(files):,} images of {pixels:,} pixels, and max_pixels is "
                             f"{self.max_pixels:,}: take some of them, or raise that")
        for file in files:
            with _opened(file, "a damaged image") as image:
                frame = _rgb(image)
            self.count += 1
            yield frame

    def animation(self) -> Iterator[Any]:
        from PIL import ImageSequence

        times = [0.0]  # milliseconds
        with _opened(self.path, "a damaged image") as image:
            count, self.tick = getattr(image, "n_frames", 1), 0.01 if image.format == "GIF" else 0.001
            self.check(count, *image.size)
            still = count == 1 and image.format != "GIF"
            for frame in ImageSequence.Iterator(image):
                pixels = _rgb(frame)  # which is when WebP reads its duration
                times.append(times[-1] + (frame.info.get("duration", 0) or 100))  # 100: as browsers do
                self.count += 1
                yield pixels
                del pixels
        self.times = None if still else [t / 1000 for t in times]

    def video(self) -> Iterator[Any]:
        """Every frame once, in the stream's own size: as PPM images, whose headers say that size.

        Two files tell the rest: the time of each frame, and the rate that ffmpeg takes the video to have. Once a
        frame's time is noted it gets another, since images may not come out at the same time.
        """
        from PIL import Image

        path, scratch, cut = self.path, self.scratch, self.cut
        packets = _packets(path, scratch, self.max_pixels)
        self.check(packets.count if cut is None else 1, packets.width, packets.height)
        # A frame's time counts from that of the first. A microsecond is what the times of a file are rounded by.
        begin, behind = (0.0, math.inf) if cut is None else cut
        between = f"gte(t,{begin - 1e-6:.9f})*lt(t,{min(behind, 1e9) - 1e-6:.9f})"
        chosen = f"setpts=PTS-STARTPTS,select='{between}'," if cut else ""
        noted = f"settb=1/{NANO},{chosen}metadata=add:key=t:value=0,metadata=print:key=t:file=times,setpts=100*N/TB"
        pixels, whole = 0, True
        with ffmpeg_reads(
            path, scratch, "-map", "0:V:0", "-fps_mode", "passthrough", "-vf", noted,
            "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "pipe:1",
            "-map", "0:V:0", "-frames:v", "1", "-pix_fmt", "gray", "-strict", "-1", "-f", "yuv4mpegpipe", "rate",
            max_pixels=self.max_pixels) as stream:  # fmt: skip
            while whole and stream.readline(8):
                header = stream.readline(32).split()
                if not (whole := len(header) == 2 and bool(stream.readline(8))):
                    break
                w, h = map(int, header)
                pixels += w * h
                if self.held and pixels > self.max_pixels:  # though there were fewer packets
                    _check_pixels(path, self.count + 1, w, h, min(self.max_pixels, w * h))
                image, rows = Image.new("RGB", (w, h)), max(1, 2**20 // w)  # some rows at a time: no second copy
                for y in range(0, h, rows):
                    size = w, min(rows, h - y)
                    piece = stream.read(3 * size[0] * size[1])
                    if whole := len(piece) == 3 * size[0] * size[1]:
                        image.paste(Image.frombytes("RGB", size, piece), (0, y))
                self.count += 1
                yield image
                del image
        if cut is not None and not self.count:
            raise ValueError(f"{shown(path)}: {_between(cut)}")
        if not self.count or not whole:
            raise ValueError(f"{shown(path)}: no frames could be read")
        self.tick = packets.tick
        rate = re.search(rb" F(\d+):(\d+)", (scratch / "rate").read_bytes()[:200])
        self.declared = int(rate[1]) / int(rate[2]) if rate and int(rate[1]) and int(rate[2]) else None
        said = re.findall(r"^frame:\d+ +pts:(-?\d+|NOPTS)", (scratch / "times").read_text(), re.M)
        if len(said) != self.count or "NOPTS" in said:
            self.declared = self.declared or 25
            warnings.warn(f"{shown(path)}: it does not say when its frames are shown: they are taken as "
                          f"{self.declared:g} fps", stacklevel=4)  # fmt: skip
            return
        times = [(int(t) - int(said[0])) / NANO for t in said]
        usual = sorted(b - a for a, b in itertools.pairwise(times))[(len(times) - 1) // 2] if len(times) > 1 else 0
        self.times = [*times, times[-1] + (packets.last or usual or 1 / (self.declared or 25))]


def _between(cut: tuple[float, float]) -> str:
    return f"no frame begins between {cut[0]:g} and {cut[1]:g} seconds"


# Videos: ffmpeg gets the open file as its standard input. So it never sees the file's name, which could say anything,
# and what the file tells it to open (a playlist may name other files, and addresses) is not opened.


@contextmanager
def ffmpeg_reads(
    path: Path, scratch: Path, *output: str, max_pixels: float = math.inf, strict: bool = True,
    before: Sequence[str] = (),
) -> Iterator[IO[bytes]]:
    """What ffmpeg writes to "pipe:1". `strict`: ValueError where it says that anything is wrong with the file.

    max_pixels: of one frame, before there is memory for it. before: options of the input.
    """
    log, largest = scratch / "messages", str(int(min(max_pixels, 2**31 - 1)))
    with open(path, "rb") as file, open(log, "wb") as messages:
        # Only errors are logged: what ffmpeg else says repeats what the file says, and that may look like an error.
        options = ["-nostdin", "-y", "-v", "error", *["-xerror"] * strict, "-max_pixels", largest]
        command = [find_ffmpeg(), *options, *before, "-protocol_whitelist", "fd", "-fd", "0", "-i", "fd:", *output]
        process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=messages, cwd=scratch)
        try:
            yield process.stdout
            code = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    said = _said(log)
    if strict and (code or said):
        raise ValueError(f"{shown(path)}: not a video, or damaged ({said[0] if said else _ended(code)})")


@dataclass(frozen=True)
class _Packets:
    """Of a video, without decoding it; of a damaged one as far as it goes.

    tick: the unit of its times, last: how long its last frame is shown, in seconds; 0 where it does not say.
    """

    count: int
    width: int
    height: int
    tick: float
    last: float


def _packets(path: Path, scratch: Path, max_pixels: float) -> _Packets:
    count, size, tick, latest = 0, (0, 0), 0.001, (-math.inf, 0)
    with ffmpeg_reads(path, scratch, "-map", "0:V:0", "-c", "copy", "-f", "framecrc", "pipe:1",
                       max_pixels=max_pixels, strict=False) as lines:  # fmt: skip
        for line in lines:  # "0, when decoded, when shown, for how long, bytes, checksum"
            if line.startswith(b"#"):
                if found := re.match(rb"#(dimensions|tb) 0: (\d+)[x/](\d+)", line):
                    pair = int(found[2]), int(found[3])
                    size, tick = (pair, tick) if found[1] == b"dimensions" else (size, pair[0] / max(1, pair[1]))
                continue
            count += 1
            _, _, at, duration = map(int, line.split(b",")[:4])
            latest = max(latest, (at, duration) if at > -(2**63) else (-math.inf, 0))  # which stands for no time
    return _Packets(count, *size, tick, max(0, latest[1]) * tick)


# Times. A model takes frames of one rate; a file may say for each frame how long it is shown.


def _on_grid(path: Path, times: list[float], tick: float, declared: float | None) -> tuple[list[int], float]:
    """Which frame is shown at each point of an even grid, and the points per second; a warning where that is not exact.

    times: when each frame is shown, from 0, and the end of the last, in seconds. tick, declared: as of `_Reading`.
    """
    chosen, rate, exact = _even(times, tick, declared)
    if not exact:
        count = len(times) - 1
        warnings.warn(f"{shown(path)}: its frames are shown for unequal times that fit no even rate: at {rate:.5g} fps "
                      f"{count - len(set(chosen))} of its {count} frames are left out, and "
                      f"{len(chosen) - len(set(chosen))} repeated", stacklevel=4)  # fmt: skip
    return chosen, rate


def _even(times: list[float], tick: float, declared: float | None) -> tuple[list[int], float, bool]:
    """(which frame is shown at each point of an even grid, the points per second, whether all is as the file says).

    A time may be off by half a tick (rounded) or a whole one (cut off), or by what nobody sees: a tenth of a frame and
    at most 10 ms.
    """
    times = list(itertools.accumulate(times, max))
    n, total = len(times) - 1, max(times[-1], tick)
    # Each frame once: every time says between which lengths the frames' own must be. The end is often only guessed.
    end = max(tick / 2, 0.1 * total, 0.25 * total / n) if n > 1 else tick / 2
    for before, after in ((tick / 2, tick / 2), (0, 0.999 * tick)):
        inner = list(enumerate(times[:-1]))[1:]
        low = max([(total - end) / n, *(min((t - before) / i, max(t / (i + 0.1), (t - 0.01) / i)) for i, t in inner)])
        high = min([(total + end) / n, *(max((t + after) / i, min(t / (i - 0.1), (t + 0.01) / i)) for i, t in inner)])
        if 0 < low <= high:
            usual = inner[-1][0] / inner[-1][1] if inner and declared else n / total
            return list(range(n)), _plain(1 / high, 1 / low, usual, declared), True
    # Some several times. More than twice as many frames are too many, unless there are few a second.
    lengths = [b - a for a, b in itertools.pairwise(times) if b > a] or [total]
    ticks = math.gcd(*(round(x / tick) for x in lengths))
    rates = [24, 25, 30, 50, 60, declared or 30, 1 / (max(1, ticks) * tick), *(m / min(lengths) for m in (1, 2, 3, 4))]
    rates = sorted(r for r in rates if total * r <= max(2 * n, 30.5 * total) + 1)
    for rate, exactly in [(r, True) for r in rates] + [(r, False) for r in rates]:
        for shift in (0,) if exactly else (0, tick / 2):
            points = [round((t + shift) * rate) for t in times[:-1]]
            near = min(max((0.499 if shift else 0.6) * tick, min(0.1 / rate, 0.01)), 0.25 / rate)
            near = 1e-6 * tick if exactly else near
            last = max(round(total * rate), points[-1] + 1)
            if (all(a < b for a, b in itertools.pairwise(points))
                    and all(abs(t + shift - p / rate) <= near for t, p in zip(times[:-1], points, strict=True))
                    and abs(last / rate - total) <= (near if exactly else max(0.25 / rate, 0.1 * total))):  # fmt: skip
                pairs = zip(points, [*points[1:], last], strict=True)
                error = 1 + tick / total / 2
                return ([i for i, (a, b) in enumerate(pairs) for _ in range(b - a)],
                        _plain(rate / error, rate * error, rate, declared), True)  # fmt: skip
    # As near as it can be: the frame that is shown in the middle between two points.
    mean = declared if declared and abs(declared * total / n - 1) < 0.03 else n / total
    for rate in (mean, max(mean, min(30, 1 / min(lengths)))):
        found = [min(bisect.bisect(times, (k + 0.5) / rate) - 1, n - 1) for k in range(max(1, round(total * rate)))]
        if len(set(found)) == n:
            break
    return found, rate, False


def _plain(low: float, high: float, near: float, declared: float | None) -> float:
    """The declared rate where it may be that, else the simplest fraction."""
    low, high = low * (1 - 1e-7), high * (1 + 1e-7)
    near = min(max(near, low), high)
    fractions = (Fraction(round(near * d), d) for d in range(1, 1002))
    return next((float(r) for r in ([declared] if declared else []) if low <= r <= high),
                float(next((r for r in fractions if low <= r <= high), near)))


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `metadata=` of `export_to_video` or `export_to_gif` stored in the file; empty where there is nothing.

    Raises FileNotFoundError, ValueError where the file is not a video or damaged. What comes back is somebody's text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    if _head(path).startswith(b"GIF8"):
        with _opened(path, "a damaged image") as gif:
            text = gif.info.get("comment", b"").decode(errors="replace")
    else:
        with ended_cleanly(), tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
            with ffmpeg_reads(path, Path(folder), "-f", "ffmetadata", "pipe:1") as stream:
                said = stream.read(LARGEST_METADATA)
                if stream.read(1):
                    raise ValueError(f"{shown(path)}: more than {LARGEST_METADATA:,} bytes of metadata")
        text = _tags(said.decode(errors="replace")).get("comment", "")
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _tags(text: str) -> dict[str, str]:
    """The tags of a whole file in ffmpeg's format for metadata; names in small letters, the first of each."""
    tags: dict[str, str] = {}
    for line in re.findall(r"(?s)((?:\\.|[^\\\n])*)\n", text):  # a line may go on behind a "\"
        if line.startswith("["):  # from here on they are those of streams and chapters
            break
        found = re.match(r"(?s)((?:\\.|[^\\=])*)=(.*)", line)
        if found and not line.startswith(";"):
            name, value = (re.sub(r"(?s)\\(.)", r"\1", part) for part in found.groups())
            tags.setdefault(name.lower(), value)
    return tags
