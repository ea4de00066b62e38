"""Frames to and from files: H.264 video that browsers play, GIF, and the settings a video was made with, inside it."""

import errno
import itertools
import json
import math
import os
import re
import secrets
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minit2v_convert.rename import nearest

MUXERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
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


def _frames(video: Any) -> list[np.ndarray]:
    frames = [_frame(x, n) for n, x in enumerate(_one_video(video))]
    for n, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            raise ValueError("frames differ in size: the first is {1}x{0}, frame {n} {3}x{2} (width x height)".format(
                *frames[0].shape[:2], *frame.shape[:2], n=n))
    return frames


def _rate(fps: Any) -> Fraction:
    if isinstance(fps, bool) or not isinstance(fps, int | float | Fraction | np.number):
        raise TypeError(f"fps is a number, not {fps!r}")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"fps must be above 0 and at most 1000, not {fps}")
    return Fraction(float(fps)).limit_denominator(1001)


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
    temp = path.with_name(f".{path.stem[:40]}-{secrets.token_hex(4)}{path.suffix}")
    try:
        with open(temp, "xb"):
            pass
    except OSError as e:
        raise type(e)(e.errno, f"cannot write here ({e.strerror})", str(path)) from e
    try:
        yield temp
        os.replace(temp, path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def _ffmpeg() -> str:
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ImportError as e:
        raise ImportError("video files need the package imageio-ffmpeg: pip install imageio-ffmpeg") from e
    return get_ffmpeg_exe()


def _escape(text: str) -> str:
    """For ffmpeg's metadata files."""
    return re.sub(r"([=;#\\\n])", r"\\\1", text)


def export_to_video(
    video_frames: Any,
    output_video_path: str | os.PathLike | None = None,
    fps: float = 10,
    quality: float | None = 5.0,
    bitrate: int | None = None,
    macro_block_size: int | None = 2,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """Write one video as H.264, yuv420p, and return its path (a temporary file if none is given).

    video_frames: a list of PIL images, of arrays (h w c) or tensors (c h w), an array (f h w c), a tensor (f c h w), or
        a batch of one of these; uint8, or floats in [0, 1].
    fps: frames per second; fractions are kept.
    quality: 0 (small) to 10 (near lossless); None leaves the encoder's default. `bitrate`, in bits per second, instead.
    macro_block_size: width and height are completed to a multiple of it (and of 2, which yuv420p asks for) by repeating
        the last column and row; the reference scales to multiples of 16.
    metadata: what `read_metadata` gives back; anything JSON can say.

    Raises TypeError or ValueError on bad frames or arguments, OSError where the file cannot be written (nothing is left
    behind then, and a file that was there stays), RuntimeError if the encoder fails.
    """
    if quality is not None and not 0 <= quality <= 10:
        raise ValueError(f"quality must be between 0 and 10, not {quality}")
    if bitrate is not None and bitrate <= 0:
        raise ValueError(f"bitrate must be above 0, not {bitrate}")
    if macro_block_size is not None and macro_block_size < 1:
        raise ValueError(f"macro_block_size must be at least 1, not {macro_block_size}")
    rate = _rate(fps)
    frames = _frames(video_frames)
    suffix = Path(output_video_path).suffix.lower() if output_video_path is not None else ".mp4"
    hint = "; export_to_gif writes GIFs" if suffix == ".gif" else nearest(suffix, list(MUXERS))
    path = _target(output_video_path, ".mp4", list(MUXERS), hint)

    block = math.lcm(2, macro_block_size or 1)
    h, w = frames[0].shape[:2]
    down, right = -h % block, -w % block
    if down or right:
        warnings.warn(f"video of {w}x{h} completed to {w + right}x{h + down} (multiples of {block}) by repeating its "
                      "last row and column", stacklevel=2)
        frames = [np.pad(f, ((0, down), (0, right), (0, 0)), mode="edge") for f in frames]

    # crf 18 is visually clean and 0 lossless, in a profile that browsers do not play: 10 is crf 1.
    rate_control = (["-b:v", str(int(bitrate))] if bitrate is not None
                    else [] if quality is None else ["-crf", f"{35 - 3.4 * quality:.1f}"])
    tags = f";FFMETADATA1\ncomment={_escape(json.dumps(dict(metadata), ensure_ascii=False))}\n" if metadata else None
    with tempfile.TemporaryDirectory(prefix="minit2v-") as scratch, _replacing(path) as temp:
        command = [_ffmpeg(), "-y", "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24",
                   "-s", f"{w + right}x{h + down}", "-r", str(rate), "-i", "pipe:0"]
        if tags:  # in a file, as one argument of a command may not be long; a prompt may
            (Path(scratch) / "tags").write_text(tags, encoding="utf-8")
            command += ["-f", "ffmetadata", "-i", str(Path(scratch) / "tags"), "-map_metadata", "1"]
        command += ["-map", "0:v", "-vf", TO_YUV, "-c:v", "libx264", *rate_control, "-movflags", "+faststart",
                    "-f", MUXERS[path.suffix.lower()], str(temp.absolute())]
        _encode(command, frames, path, Path(scratch) / "errors")
    return str(path)


def _encode(command: list[str], frames: list[np.ndarray], path: Path, log: Path) -> None:
    """Feed raw frames to ffmpeg. Its messages go to a file: a second pipe could fill up and block both sides."""
    with open(log, "wb") as stderr:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
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
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if any("No space left" in line for line in said):
            raise OSError(errno.ENOSPC, "no space left on the disk", str(path))
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        reason = said[0].strip() if said else ended
        raise RuntimeError(f"{path}: the video encoder failed: {reason}")


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
    frames = _frames(image)
    path = _target(output_gif_path, ".gif", [".gif"], "; export_to_video writes videos")
    ticks = [round(100 * n / rate) for n in range(len(frames) + 1)]
    h, w = frames[0].shape[:2]
    # Pillow's own writer merges equal frames, so the container is put together here and Pillow compresses the frames.
    parts = [b"GIF89a", w.to_bytes(2, "little"), h.to_bytes(2, "little"), b"\x70\0\0",  # no palette for all frames
             b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"]  # loop for ever
    if metadata:
        comment = json.dumps(dict(metadata), ensure_ascii=False).encode()
        chunks = [comment[i : i + 255] for i in range(0, len(comment), 255)]
        parts += [b"\x21\xfe", *(bytes([len(c)]) + c for c in chunks), b"\0"]
    for frame, (start, end) in zip(frames, itertools.pairwise(ticks), strict=True):
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


def _local(path: str | os.PathLike, scratch: str) -> Path:
    """The path itself, or what was downloaded from an address."""
    if str(path).startswith(("http://", "https://")):
        import shutil
        import urllib.request

        local = Path(scratch) / "video"
        try:
            with urllib.request.urlopen(str(path), timeout=60) as source, open(local, "wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as e:
            raise OSError(f"{path}: cannot be fetched ({e})") from e
        return local
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    return path


def load_video(video: str | os.PathLike, *, return_fps: bool = False) -> Any:
    """The frames of a video, GIF or folder of images (in the order of the numbers in their names), a list of PIL RGB.

    video: a path, or an http(s) address. With `return_fps` a pair (frames, frames per second), the latter None where
    there is no rate, as in a folder. Raises FileNotFoundError, or ValueError where the file is no video or damaged.
    """
    with tempfile.TemporaryDirectory(prefix="minit2v-") as scratch:
        path = _local(video, scratch)
        if path.is_dir():
            frames, fps = _load_folder(path), None
        elif _is_gif(path):
            frames, fps = _load_gif(path)
        else:
            frames, fps = _decode(path)
    return (frames, fps) if return_fps else frames


def _is_gif(path: Path) -> bool:
    with open(path, "rb") as f:
        return f.read(4) == b"GIF8"


def _load_folder(path: Path) -> list:
    from PIL import Image

    files = [f for f in path.iterdir() if f.suffix.lower() in IMAGES]
    if not files:
        raise ValueError(f"{path}: no images ({', '.join(IMAGES)}) in this folder")
    files.sort(key=lambda f: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", f.name)])
    frames = []
    for file in files:
        try:
            frames.append(Image.open(file).convert("RGB"))
        except (OSError, SyntaxError, EOFError) as e:
            raise ValueError(f"{file}: a damaged image ({e})") from e
    return frames


def _load_gif(path: Path) -> tuple[list, float]:
    from PIL import Image, ImageSequence

    frames, duration = [], 0.0
    try:
        with Image.open(path) as gif:
            for frame in ImageSequence.Iterator(gif):
                frames.append(frame.convert("RGB"))
                duration += frame.info.get("duration", 0) or 100  # what browsers do where the file says nothing
    except (OSError, SyntaxError, EOFError) as e:
        raise ValueError(f"{path}: a damaged GIF ({e})") from e
    return frames, 1000 * len(frames) / duration


def _decode(path: Path) -> tuple[list, float | None]:
    """Every frame once, in the stream's own size: as PPM images, whose headers say that size."""
    from PIL import Image

    run = subprocess.run([_ffmpeg(), "-hide_banner", "-nostats", "-v", "level+info", "-xerror",
                          "-i", str(path.absolute()), "-map", "0:v:0",
                          "-fps_mode", "passthrough", "-f", "image2pipe", "-c:v", "ppm",
                          "-pix_fmt", "rgb24", "pipe:1"],
                         stdin=subprocess.DEVNULL, capture_output=True)
    log = run.stderr.decode(errors="replace")
    errors = re.findall(r"\[(?:error|fatal)\] (.*)", log)
    if run.returncode or errors:
        raise ValueError(f"{path}: not a video, or damaged ({errors[0].strip() if errors else 'the decoder failed'})")
    frames, at = [], 0
    while header := re.compile(rb"P6\s(\d+) (\d+)\s255\s").match(run.stdout, at):
        size = int(header[1]), int(header[2])
        at = header.end() + 3 * size[0] * size[1]
        frames.append(Image.frombytes("RGB", size, run.stdout[header.end() : at]))
    if not frames or at != len(run.stdout):
        raise ValueError(f"{path}: no frames could be read")
    rate = re.search(r"Video:.*?([\d.]+)(k?) fps", log)
    return frames, float(rate[1]) * (1000 if rate[2] else 1) if rate else None


def read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    """What `metadata=` of `export_to_video` or `export_to_gif` stored in the file; empty where there is nothing."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(path))
    if _is_gif(path):
        from PIL import Image

        with Image.open(path) as gif:
            text = gif.info.get("comment", b"").decode(errors="replace")
    else:
        run = subprocess.run([_ffmpeg(), "-v", "error", "-i", str(path.absolute()), "-f", "ffmetadata", "pipe:1"],
                             stdin=subprocess.DEVNULL, capture_output=True)
        if run.returncode:
            raise ValueError(f"{path}: not a video, or damaged")
        found = re.search(r"(?ims)^comment=((?:\\.|[^\\\n])*)$", run.stdout.decode(errors="replace"))
        text = re.sub(r"(?s)\\(.)", r"\1", found[1]) if found else ""
    try:
        stored = json.loads(text)
    except ValueError:
        return {}
    return stored if isinstance(stored, dict) else {}
