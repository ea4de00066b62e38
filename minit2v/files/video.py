"""Reads and writes videos: H.264 that browsers play, GIF, and metadata with the settings of a video."""

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
OLDEST_FFMPEG = 7  # the oldest major version; older ones ignore a full disk, or lack `fd:`
MAX_PIXELS = 2**28  # frames x width x height: 1 GiB as PIL holds them, 512 frames of 1024 x 512
LARGEST_METADATA = 2**26  # bytes
NANO = 10**9
# Tags for the range of the samples and for the matrix from RGB to YUV. Without them each player guesses.
TAGS = "setparams=colorspace=bt709:color_primaries=bt709:color_trc=bt709:range=tv"
TO_YUV = f"scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,{TAGS}"


# ---------------------------------------------------------------------------------------------------------- frames in


def _one_video(video: Any) -> Any:
    """The frames of one video, taken out of a batch of one. Raises ValueError on a batch of several or of none."""
    def is_video(x: Any) -> bool:
        return isinstance(x, list | tuple) or getattr(x, "ndim", 0) >= 4

    is_array = isinstance(video, np.ndarray | torch.Tensor)
    if not is_array and not isinstance(video, list | tuple):
        raise TypeError(f"frames must be a list of PIL images, an array (f h w c) or a tensor (f c h w), "
                        f"not {type(video).__name__}")
    if len(video.shape if is_array else video) == 0 or len(video) == 0:
        raise ValueError("no frames to write")
    if video.ndim == 5 if is_array else is_video(video[0]):
        if len(video) > 1:
            raise ValueError(f"a batch of {len(video)} videos: write them one by one (frames[0], frames[1], ...)")
        return _one_video(video[0])
    if is_array and video.ndim != 4:
        raise ValueError(f"a video must have 4 axes, (f h w c) as an array or (f c h w) as a tensor, not {video.ndim}")
    return video


def _frame(x: Any, n: int) -> np.ndarray:
    """Frame `n` as uint8 (h w 3), from a PIL image, array (h w c) or tensor (c h w). Floats must be in [0, 1]."""
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
        raise ValueError(f"frame {n} must be a {layout} image with 1 or 3 channels, but as (h w c) it is {x.shape}")
    if 0 in x.shape:
        raise ValueError(f"frame {n} has no pixels: {x.shape}")
    if np.issubdtype(x.dtype, np.floating):
        low, high = float(x.min()), float(x.max())  # NaN if there is one in the frame
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"frame {n} holds NaN or infinity")
        if low < -0.01 or high > 1.01:  # allow rounding errors, but not another range
            raise ValueError(f"frame {n} spans [{low:.3g}, {high:.3g}]: floats must be in [0, 1], uint8 in [0, 255]")
        x = np.rint(x.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    elif x.dtype != np.uint8:
        raise ValueError(f"frame {n} is {x.dtype}: frames must be uint8 in [0, 255] or floats in [0, 1]")
    return np.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def _frames(video: Any) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """The first frame, and an iterator over all frames. If `video` is not an iterator, all are checked first."""
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
        raise TypeError(f"fps must be a number, not {fps!r}")
    if not (math.isfinite(fps) and 0.01 <= fps <= 1000):
        raise ValueError(f"fps must be between 0.01 and 1000, not {fps}")
    rate = Fraction(float(fps))
    return rate.limit_denominator(1001) if fps >= 1 else 1 / (1 / rate).limit_denominator(1001)


# --------------------------------------------------------------------------------------------------------- files out


def _target(path: str | os.PathLike | None, default: str, suffixes: Sequence[str], hint: str) -> Path:
    if path is None:  # only a name: the file appears when it is complete
        path = Path(tempfile.gettempdir()) / f"minit2v-{secrets.token_hex(8)}{default}"
    path = Path(path)
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: the name must end in {', '.join(suffixes)}{hint}")
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`. It becomes `path` if the block succeeds, and is removed otherwise."""
    temp = None
    try:
        with beside(path) as temp:
            yield temp
    except OSError as e:
        if temp is not None and e.filename not in (None, str(temp)):
            raise  # the error is about another file, or names this one already
        raise type(e)(e.errno, f"cannot write here ({e.strerror or e})", str(path)) from e


def find_ffmpeg() -> str:
    """The path of ffmpeg. Raises ImportError if it is not installed, RuntimeError if it does not work or is too old."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as e:
        raise ImportError("video files need the package imageio-ffmpeg: pip install imageio-ffmpeg") from e
    return _checked(shutil.which(get_ffmpeg_exe()) or get_ffmpeg_exe())


@cache
def _checked(program: str) -> str:
    """The absolute path of the program. Raises RuntimeError if it is not ffmpeg, or too old."""
    try:
        said = subprocess.run([program, "-version"], stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    except OSError as e:
        raise RuntimeError(f"{program} cannot be started ({e.strerror})") from e
    if not said.startswith("ffmpeg version"):
        raise RuntimeError(f"{program} is not ffmpeg: unset IMAGEIO_FFMPEG_EXE, or pip install -U imageio-ffmpeg")
    version = re.match(r"ffmpeg version n?(\d+)\.", said)  # a build from its repository has no number
    if version and int(version[1]) < OLDEST_FFMPEG:
        raise RuntimeError(f"{program} is {shown(said.splitlines()[0][:60])}, but version {OLDEST_FFMPEG}.0 or newer "
                           "is needed: pip install -U imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE to another ffmpeg")
    return os.path.abspath(program)


def _escape(text: str) -> str:
    """Escape a text for ffmpeg's metadata files."""
    return re.sub(r"([=;#\\\n])", r"\\\1", text)


def _json(metadata: Mapping[str, Any]) -> str:
    def plain(x: Any) -> Any:
        if isinstance(x, np.generic):
            return x.item()
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        raise TypeError(f"metadata: JSON cannot store a {type(x).__name__}")

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
    """Write one video as H.264 (yuv420p) and return its path.

    video_frames: an array (f h w c), a tensor (f c h w), or a list of frames. A frame is a PIL image, an array (h w c)
        or a tensor (c h w). A batch of one video is accepted, too. Values are uint8, or floats in [0, 1]. An iterator
        of frames is written frame by frame, and never held in memory as a whole.
    output_video_path: a name that ends in .mp4, .m4v, .mov or .mkv. None makes a temporary file.
    fps: frames per second, from 0.01 to 1000. Fractions are kept.
    quality: from 0 (small file) to 10 (nearly lossless). None takes the encoder's default.
    bitrate: bits per second. If it is given, `quality` is not used.
    macro_block_size: width and height are padded to a multiple of it, and of 2, which yuv420p needs. The last column
        and row are repeated. The reference implementation scales to multiples of 16 instead.
    metadata: a dictionary that JSON can store. `read_metadata` returns it.
    sound: a file whose sound is added, from `sound_from` seconds on, until the frames end.

    Raises TypeError or ValueError on bad frames or arguments, OSError if the file cannot be written, RuntimeError if
    the encoder fails. After an error, SIGTERM or SIGHUP no unfinished file is left, and an older file stays.
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
        warnings.warn(f"the video of {w}x{h} is padded to {w + right}x{h + down} (multiples of {block}) by repeating "
                      "its last row and column", stacklevel=2)
        frames = (np.pad(f, ((0, down), (0, right), (0, 0)), mode="edge") for f in frames)

    # crf 18 looks clean. crf 0 is lossless, but browsers do not play its profile. So quality 10 is crf 1.
    rate_control = (["-b:v", str(int(bitrate))] if bitrate is not None
                    else [] if quality is None else ["-crf", f"{35 - 3.4 * quality:.1f}"])
    # QuickTime's own comments are limited to 64 KiB. These tags are not.
    flags = "+faststart+use_metadata_tags" if path.suffix.lower() == ".mov" else "+faststart"
    with ended_cleanly(), tempfile.TemporaryDirectory(prefix="minit2v-") as scratch, _replacing(path) as temp:
        command = [program, "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                   "-s", f"{w + right}x{h + down}", "-r", str(rate), "-i", "pipe:0"]
        output: list[str] = []
        if tags:  # passed as a file, because an argument of a command has a limited length
            (Path(scratch) / "tags").write_text(tags, encoding="utf-8")
            command += ["-f", "ffmetadata", "-i", str(Path(scratch) / "tags")]
            output += ["-map_metadata", "1"]
        if sound is not None:
            (Path(scratch) / "sound").mkdir()
            track = _sound_of(Path(sound), Path(scratch) / "sound", sound_from)
            if track is not None:  # `apad` adds silence until the frames end
                command += ["-i", str(track)]
                output += ["-map", f"{1 + bool(tags)}:a", "-af", "apad", "-c:a", "aac", "-shortest"]
        command += [*output, "-map", "0:v", "-vf", TO_YUV, "-c:v", "libx264", *rate_control, "-movflags", flags,
                    "-f", MUXERS[path.suffix.lower()], str(temp.absolute())]
        _encode(command, frames, path, Path(scratch) / "errors")
    return str(path)


def _sound_of(path: Path, scratch: Path, start: float) -> Path | None:
    """Copy the first sound track of a file, from `start` seconds on, to a file. None if there is no sound."""
    track = scratch / "track.flac"
    with ffmpeg_reads(path, scratch, "-map", "0:a:0", "-ss", f"{start:.6f}", str(track), strict=False) as nothing:
        nothing.read()
    return track if track.is_file() and track.stat().st_size else None


def has_sound(path: str | os.PathLike) -> bool:
    """Whether a file has a sound track for `export_to_video(..., sound=path)`."""
    if not Path(path).is_file() or is_animation(Path(path)):
        return False
    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
        with ffmpeg_reads(Path(path), Path(folder), "-map", "0:a:0", "-c", "copy", "-f", "framecrc", "pipe:1",
                           strict=False) as lines:  # fmt: skip
            return any(not line.startswith(b"#") for line in lines)


def _encode(command: list[str], frames: Iterator[np.ndarray], path: Path, log: Path) -> None:
    """Write raw frames to ffmpeg. Its messages go to a file, because a second full pipe could block both programs."""
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
                pass  # ffmpeg ended early; its exit code and messages say why
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
    """The lines of ffmpeg's messages, without the memory addresses at their beginning."""
    lines = log.read_bytes()[: 2**16].decode(errors="replace").splitlines()
    return [shown(re.sub(r"^(\[[^]]* @ \w+\] )+", "", line).strip()) for line in lines if line.strip()]


def export_to_gif(
    image: Any, output_gif_path: str | os.PathLike | None = None, fps: float = 10, *,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write one video as a GIF that repeats forever, and return its path.

    image: frames, as `video_frames` of `export_to_video`. output_gif_path: a name that ends in .gif; None makes a
    temporary file. fps: frames per second, at most 100. metadata: as in `export_to_video`.

    Every frame is kept, also one that equals the frame before. A frame with at most 256 colours is stored exactly. GIFs
    measure time in hundredths of a second. The rounding is spread over the frames, so the whole GIF lasts frames / fps
    seconds. Raises TypeError or ValueError on bad frames or arguments, OSError if the file cannot be written.
    """
    from PIL import Image
    from PIL.GifImagePlugin import getdata

    rate = _rate(fps)
    if rate > 50:
        warnings.warn(f"{float(rate):g} fps: most players slow down a GIF with more than 50 fps", stacklevel=2)
    if rate > 100:
        raise ValueError(f"a GIF has at most 100 frames per second, not {fps}")
    first, frames = _frames(image)
    path = _target(output_gif_path, ".gif", [".gif"], "; export_to_video writes videos")
    h, w = first.shape[:2]
    # Pillow's own writer merges equal frames. So the file is put together here, and Pillow only compresses the frames.
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
        else:  # no dithering, because its pattern would move in areas that do not
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
    """The frames of a video, a GIF or a folder of images, as a list of PIL images in RGB.

    video: a path, or an http(s) URL. The images of a folder are sorted by the numbers in their names.
    return_fps: return a pair (frames, frames per second). The rate is None if there is none, as in a folder.
    max_pixels: the most frames x width x height, checked before decoding. `math.inf` accepts any number.
    start, end: seconds. Only frames with start <= time < end are read.
    every: keep only every n-th of these frames. The returned rate is lower by the same factor.

    If the frames of a file are shown for unequal times, they are put on an even grid, where longer ones are repeated.
    A warning says if that is not exact. Raises FileNotFoundError, ValueError if the file is not a video, is damaged or
    has too many pixels, and OSError if it cannot be read or downloaded.
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
    """The frames that `load_video` would return. Each loop over them reads the file again, and keeps none in memory.

    The constructor reads the file once, to find damage and the times of the frames. size: (width, height) in pixels.
    fps: frames per second, or None. max_pixels: the limit for one frame. Raises the same errors as `load_video`.
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
            raise ValueError(f"{shown(self._arguments[0])}: the file has changed, and now has fewer frames")


def _check_part(start: float, end: float | None, every: int, max_pixels: float) -> tuple[float, float] | None:
    """(start, end) in seconds, or None for the whole video. ValueError on arguments that are not valid."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every must be a whole number of at least 1, not {every!r}")
    if not 0 <= start < (math.inf if end is None else end):
        raise ValueError(f"start and end must be seconds with 0 <= start < end, not {start!r} and {end!r}")
    if isinstance(max_pixels, bool) or not isinstance(max_pixels, int | float | np.number) or not max_pixels > 0:
        raise ValueError(f"max_pixels must be a number above 0, not {max_pixels!r}")
    return None if start == 0 and end is None else (start, math.inf if end is None else end)


def load_image(image: Any, *, max_pixels: float = MAX_PIXELS) -> Any:
    """An image as a PIL image in RGB, rotated as its EXIF data say.

    image: a path, an http(s) URL, or a PIL image. max_pixels: the most width x height. Raises FileNotFoundError,
    ValueError if it is not an image, is damaged or too large, and OSError if it cannot be read or downloaded.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return _rgb(image)
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"a picture must be a path, a URL or a PIL image, not a {type(image).__name__}")
    with tempfile.TemporaryDirectory(prefix="minit2v-") as folder:
        path = _local(image, Path(folder), max_pixels)
        if path.is_dir():
            raise ValueError(f"{shown(path)}: it is a folder, not a picture")
        with _opened(path, "not a picture, or damaged") as opened:
            _check_pixels(path, 1, *opened.size, max_pixels)
            return _rgb(opened)


def _local(path: str | os.PathLike, scratch: Path, max_pixels: float) -> Path:
    """The path itself, or the path of the file downloaded from a URL."""
    if re.match(r"[a-z][a-z0-9+.-]+://", str(path), re.I):
        if not str(path).lower().startswith(("http://", "https://")):
            raise ValueError(f"{shown(path)}: only http and https URLs can be downloaded")
        import urllib.request

        local, most = scratch / "video", 3 * max_pixels  # the bytes of that many uncompressed pixels
        try:
            with urllib.request.urlopen(str(path), timeout=60) as source, open(local, "wb") as target:
                while piece := source.read(2**20):
                    if (most := most - len(piece)) < 0:
                        break
                    target.write(piece)
        except OSError as e:
            raise OSError(f"{shown(path)}: cannot be downloaded ({first_line(e)})") from e
        if most < 0:
            raise ValueError(f"{shown(path)}: more than {3 * max_pixels:,} bytes, which max_pixels allows; raise it")
        return local
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{shown(path)}: it is a pipe or a device, not a file")
    return path


def _check_pixels(path: Path, frames: int, width: int, height: int, max_pixels: float) -> None:
    if frames * width * height > max_pixels:
        raise ValueError(f"{shown(path)}: {frames:,} frames of {width}x{height} are {frames * width * height:,} pixels,"
                         f" and max_pixels is {max_pixels:,}: read a shorter part, or raise max_pixels")


# Folders of images, and animations in image formats.


def _head(path: Path) -> bytes:
    with open(path, "rb") as f:
        return f.read(12)


def is_animation(path: Path) -> bool:
    """Whether the content of a file is a GIF, PNG or WebP."""
    head = _head(path)
    return head.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n")) or head[:4] + head[8:] == b"RIFFWEBP"


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """The image in a file. Every error in the block becomes a ValueError that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as e:  # a damaged file can raise any exception
        if isinstance(e, ValueError) and str(e).startswith(f"{shown(path)}: "):
            raise
        if isinstance(e, Image.DecompressionBombError):  # Pillow has its own limit for the whole process
            raise ValueError(f"{shown(path)}: {shown(first_line(e))} To read it, raise PIL.Image.MAX_IMAGE_PIXELS and "
                             "max_pixels") from e  # fmt: skip
        raise ValueError(f"{shown(path)}: {what} ({shown(first_line(e))})") from e


def _rgb(image: Any) -> Any:
    """The image as 8-bit RGB. It is rotated as its EXIF data say, because cameras store the rotation there."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which PIL would clip to 8 bits
        grey = np.rint(np.asarray(image).astype(np.float32).clip(0, 65535) / 257)
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")


class _Reading:
    """An iterator over the frames of a file, each once. Afterwards `grid` tells when each frame is shown.

    path: a local file or folder. held: True if the caller keeps all frames; then `max_pixels` is the limit for all
    together, and not for each. cut: (start, end) in seconds.
    """

    def __init__(
        self, path: Path, scratch: Path, max_pixels: float, cut: tuple[float, float] | None = None, held: bool = True
    ):
        self.path, self.scratch, self.max_pixels, self.cut, self.held = path, scratch, max_pixels, cut, held
        self.count = 0
        self.times: list[float] | None = None  # seconds when each frame begins, from 0, and when the last one ends
        self.tick, self.declared = 0.01, None  # times are rounded to this many seconds; the rate stated in the file

    def __iter__(self) -> Iterator[Any]:
        if self.path.is_dir():
            return self.folder()
        return self.animation() if is_animation(self.path) else self.video()

    def grid(self) -> tuple[list[int], float | None]:
        """The index of the frame at each point of an even grid, and the points per second, or None without a rate."""
        chosen, rate = [*range(self.count)], self.declared
        if self.times is not None:
            chosen, rate = _on_grid(self.path, self.times, self.tick, self.declared)
        if self.cut is None or not (self.path.is_dir() or is_animation(self.path)):
            return chosen, rate
        if rate is None:
            raise ValueError(f"{shown(self.path)}: images have no times; start and end are only for videos")
        chosen = [i for n, i in enumerate(chosen) if self.cut[0] <= round(n / rate, 6) < self.cut[1]]
        if not chosen:
            raise ValueError(f"{shown(self.path)}: {_between(self.cut)}")
        return chosen, rate

    def check(self, frames: int, width: int, height: int) -> None:
        _check_pixels(self.path, frames if self.held else 1, width, height, self.max_pixels)

    def folder(self) -> Iterator[Any]:
        path = self.path
        files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES]
        if others := [f for f in files if f.exists() and not f.is_file()]:  # opening a pipe would wait forever
            raise ValueError(f"{shown(others[0])}: it is a folder, a pipe or a device, not a file")
        if not files:
            raise ValueError(f"{shown(path)}: this folder has no images ({', '.join(IMAGES)})")
        files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)])
        pixels = 0
        for file in files:
            with _opened(file, "a damaged image") as image:
                pixels = image.width * image.height + pixels * self.held
            if not self.held and pixels > self.max_pixels:
                self.check(1, image.width, image.height)
        if pixels > self.max_pixels:
            raise ValueError(f"{shown(path)}: {len(files):,} images have {pixels:,} pixels, and max_pixels is "
                             f"{self.max_pixels:,}: use fewer images, or raise max_pixels")
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
                pixels = _rgb(frame)  # before the next line, because WebP reads its duration here
                times.append(times[-1] + (frame.info.get("duration", 0) or 100))  # browsers also use 100 ms
                self.count += 1
                yield pixels
                del pixels
        self.times = None if still else [t / 1000 for t in times]

    def video(self) -> Iterator[Any]:
        """Every frame once, in the stream's own size. ffmpeg sends PPM images, which have the size in their headers.

        ffmpeg also writes two files: one with the time of each frame, one with the frame rate of the video. After its
        time is noted, every frame gets a new one, because two frames with equal times could not be sent.
        """
        from PIL import Image

        path, scratch, cut = self.path, self.scratch, self.cut
        packets = _packets(path, scratch, self.max_pixels)
        self.check(packets.count if cut is None else 1, packets.width, packets.height)
        # Times count from the first frame. They are rounded to a microsecond.
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
                if self.held and pixels > self.max_pixels:  # there are more frames than packets
                    _check_pixels(path, self.count + 1, w, h, min(self.max_pixels, w * h))
                image, rows = Image.new("RGB", (w, h)), max(1, 2**20 // w)  # a few rows at a time, to save memory
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
            warnings.warn(f"{shown(path)}: the file has no times for its frames; {self.declared:g} fps is assumed",
                          stacklevel=4)  # fmt: skip
            return
        times = [(int(t) - int(said[0])) / NANO for t in said]
        usual = sorted(b - a for a, b in itertools.pairwise(times))[(len(times) - 1) // 2] if len(times) > 1 else 0
        self.times = [*times, times[-1] + (packets.last or usual or 1 / (self.declared or 25))]


def _between(cut: tuple[float, float]) -> str:
    return f"no frame begins between {cut[0]:g} and {cut[1]:g} seconds"


# Videos: ffmpeg gets the open file as its standard input. So it never sees the file's name, which could be an option.
# It also cannot open other files or URLs that a playlist may name.


@contextmanager
def ffmpeg_reads(
    path: Path, scratch: Path, *output: str, max_pixels: float = math.inf, strict: bool = True,
    before: Sequence[str] = (),
) -> Iterator[IO[bytes]]:
    """A stream of what ffmpeg writes to "pipe:1". strict: ValueError if ffmpeg reports an error in the file.

    max_pixels: the limit for one frame, checked before it is allocated. before: options for the input.
    """
    log, largest = scratch / "messages", str(int(min(max_pixels, 2**31 - 1)))
    with open(path, "rb") as file, open(log, "wb") as messages:
        # Only errors are logged. Other messages repeat texts of the file, which may look like errors.
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
    """Facts about a video, read without decoding it. For a damaged file they are about its readable part.

    tick: the unit of its times in seconds. last: the seconds that its last frame is shown, or 0 if that is unknown.
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
            latest = max(latest, (at, duration) if at > -(2**63) else (-math.inf, 0))  # -2^63 means "no time"
    return _Packets(count, *size, tick, max(0, latest[1]) * tick)


# Times. A model needs frames at one rate, but a file can show each frame for another time.


def _on_grid(path: Path, times: list[float], tick: float, declared: float | None) -> tuple[list[int], float]:
    """The index of the frame at each point of an even grid, and the points per second. Warns if that is not exact.

    times: seconds when each frame begins, from 0, and when the last one ends. tick, declared: as in `_Reading`.
    """
    chosen, rate, exact = _even(times, tick, declared)
    if not exact:
        count = len(times) - 1
        warnings.warn(f"{shown(path)}: its frames are shown for unequal times, which fit no constant rate: at "
                      f"{rate:.5g} fps {count - len(set(chosen))} of its {count} frames are left out, and "
                      f"{len(chosen) - len(set(chosen))} are repeated", stacklevel=4)  # fmt: skip
    return chosen, rate


def _even(times: list[float], tick: float, declared: float | None) -> tuple[list[int], float, bool]:
    """(index of the frame at each point of an even grid, the points per second, whether this is exact).

    It still counts as exact if a time is off by half a tick (rounded) or by a whole tick (cut off). So does an error
    of a tenth of a frame and at most 10 ms, which nobody sees.
    """
    times = list(itertools.accumulate(times, max))
    n, total = len(times) - 1, max(times[-1], tick)
    # First try: each frame once. Every time gives bounds for the length of a frame. The last end is often a guess.
    end = max(tick / 2, 0.1 * total, 0.25 * total / n) if n > 1 else tick / 2
    for before, after in ((tick / 2, tick / 2), (0, 0.999 * tick)):
        inner = list(enumerate(times[:-1]))[1:]
        low = max([(total - end) / n, *(min((t - before) / i, max(t / (i + 0.1), (t - 0.01) / i)) for i, t in inner)])
        high = min([(total + end) / n, *(max((t + after) / i, min(t / (i - 0.1), (t + 0.01) / i)) for i, t in inner)])
        if 0 < low <= high:
            usual = inner[-1][0] / inner[-1][1] if inner and declared else n / total
            return list(range(n)), _plain(1 / high, 1 / low, usual, declared), True
    # Second try: repeat some frames. More than twice as many are too many, except at low rates.
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
    # Otherwise as near as possible: the frame that is shown in the middle between two points.
    mean = declared if declared and abs(declared * total / n - 1) < 0.03 else n / total
    for rate in (mean, max(mean, min(30, 1 / min(lengths)))):
        found = [min(bisect.bisect(times, (k + 0.5) / rate) - 1, n - 1) for k in range(max(1, round(total * rate)))]
        if len(set(found)) == n:
            break
    return found, rate, False


def _plain(low: float, high: float, near: float, declared: float | None) -> float:
    """The declared rate if it is in the range, else the simplest fraction in the range."""
    low, high = low * (1 - 1e-7), high * (1 + 1e-7)
    near = min(max(near, low), high)
    fractions = (Fraction(round(near * d), d) for d in range(1, 1002))
    return next((float(r) for r in ([declared] if declared else []) if low <= r <= high),
                float(next((r for r in fractions if low <= r <= high), near)))


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """The `metadata` that `export_to_video` or `export_to_gif` stored in a file. Empty if there are none.

    Raises FileNotFoundError, or ValueError if the file is not a video or is damaged. Do not trust the result: the
    author of the file could write anything into it.
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
    """The tags of the file (not of its streams) in ffmpeg's metadata format. Names are lower case, the first counts."""
    tags: dict[str, str] = {}
    for line in re.findall(r"(?s)((?:\\.|[^\\\n])*)\n", text):  # a line continues after a "\"
        if line.startswith("["):  # here the tags of streams and chapters begin
            break
        found = re.match(r"(?s)((?:\\.|[^\\=])*)=(.*)", line)
        if found and not line.startswith(";"):
            name, value = (re.sub(r"(?s)\\(.)", r"\1", part) for part in found.groups())
            tags.setdefault(name.lower(), value)
    return tags
