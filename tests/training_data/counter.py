"""Videos of counted frames: what the tests of training data are made with."""

import subprocess
from pathlib import Path

import numpy as np
import torch

from minit2v.files.video import find_ffmpeg
from minit2v.training.clips import Media
from minit2v.training.data import Data

WIDE, HIGH = 64, 32  # of a counter


def counter(count, width=WIDE, height=HIGH):
    """Frames that say their numbers in 8 fields, black or white, uint8 (f h w c)."""
    bits = (np.arange(count)[:, None] >> np.arange(8)) & 1
    fields = bits.reshape(count, 2, 4) * 255
    frames = fields.repeat(height // 2, 1).repeat(width // 4, 2)
    return np.repeat(frames[..., None], 3, -1).astype(np.uint8)


def numbers(video):
    """Of frames (f 3 h w), uint8."""
    f, _, h, w = video.shape
    fields = video.float().mean(1).reshape(f, 2, h // 2, 4, w // 4).mean((2, 4)).reshape(f, 8) > 127
    return (fields * 2 ** torch.arange(8)).sum(1).tolist()


def write(path, frames, *options, rate=30):
    """A video of frames (f h w c)."""
    f, h, w, _ = frames.shape
    command = [find_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}",
               "-r", str(rate), "-i", "pipe:0", *(options or ("-crf", "12")), "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)
    return path


def media(path):
    return Media(Path(path), str(path))


def make(shapes, sources, **options):
    return Data.of(shapes, [sources] if isinstance(sources, str | Path | dict) else sources, **options)


B_FRAMES = ("-c:v", "libx264", "-g", "250", "-bf", "3", "-crf", "15")
UNEVEN = "settb=1/90000,setpts=(N+floor(N/5)*2+mod(N\\,3)*0.4)/30/TB"
FILES = {
    "24.mp4": (24, B_FRAMES),
    "30.mov": (30, B_FRAMES),
    "60.mkv": (60, B_FRAMES),
    "29.97.mp4": ("30000/1001", B_FRAMES),
    "uneven.mkv": (30, ("-vf", UNEVEN, "-fps_mode", "passthrough", "-enc_time_base", "1/1000", *B_FRAMES)),
    "uneven.mp4": (30, ("-vf", UNEVEN, "-fps_mode", "passthrough", "-enc_time_base", "1/90000", *B_FRAMES)),
    "open.mp4": (30, ("-c:v", "libx264", "-g", "12", "-bf", "3", "-x264-params", "open-gop=1")),
    "late.ts": (30, ("-c:v", "libx264", "-g", "50", "-bf", "2", "-output_ts_offset", "5")),
    "old.mpg": (25, ("-c:v", "mpeg2video", "-g", "15", "-bf", "2", "-b:v", "2M")),
    "phone.mp4": (30, ("-c:v", "libx265", "-x265-params", "log-level=error:open-gop=1:keyint=30")),
    "old.avi": (25, ("-c:v", "mpeg4", "-q:v", "2", "-g", "40", "-bf", "2")),
}
