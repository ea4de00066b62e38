"""Conversion of frames: from PIL images, NumPy arrays and tensors to the networks' format, and back.

The networks' format is one tensor (b c f h w): pixels in [-1, 1], or latents.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

logger = logging.getLogger(__name__)

OUTPUT_TYPES = ("np", "pt", "pil", "latent")
RESIZES = ("bicubic", "nearest")
FORMS = "a list of PIL images, NumPy (f h w 3) or (b f h w 3), torch (f c h w) or (b f c h w), or a list of those"


def to_tensor(
    video: Any, height: int | None = None, width: int | None = None, latent_channels: int = 4, resize: str = "bicubic"
) -> Tensor:
    """One or several videos in any of `FORMS` -> (b 3 f h w) in [-1, 1], resized to height and width if given.

    Integers must be bytes. Floats must be in [0, 1], or in [-1, 1] if one is negative. A float tensor with
    `latent_channels` channels is latents, which are returned unchanged as (b c f h w).
    resize: "bicubic" or "nearest", for arrays and tensors. PIL images are resized by Lanczos.
    Raises ValueError on anything else.
    """
    videos = [_frames(v, height, width, latent_channels, resize) for v in _videos(video)]
    if len({v.shape for v in videos}) > 1:
        raise ValueError(f"the videos of a batch must have the same shape, not {[tuple(v.shape) for v in videos]}")
    return rearrange(torch.stack(videos), "b f c h w -> b c f h w")


def from_tensor(x: Tensor, output_type: str) -> np.ndarray | Tensor | list[list[Image.Image]]:
    """x (b 3 f h w) in [-1, 1] -> "np" (b f h w 3) or "pt" (b f 3 h w), float32 in [0, 1], or "pil" (lists)."""
    x = (x.float() * 0.5 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return rearrange(x, "b c f h w -> b f c h w").contiguous()
    pixels = np.ascontiguousarray(rearrange(x, "b c f h w -> b f h w c").cpu().numpy())
    if output_type == "np":
        return pixels
    return [[Image.fromarray(frame) for frame in video] for video in (pixels * 255).round().astype(np.uint8)]


def _videos(video: Any) -> list[Any]:
    """The videos of a batch. Each is an array of frames or a list of frames."""
    ndim = getattr(video, "ndim", None)
    if ndim in (4, 5):
        return list(video) if ndim == 5 else [video]
    if not isinstance(video, list | tuple) or len(video) == 0:
        what = f"{type(video).__name__} of {ndim} axes" if ndim else "an empty list" if video == [] else repr(video)
        raise ValueError(f"video must be {FORMS}; got {what[:80]}")
    several = isinstance(video[0], list | tuple) or getattr(video[0], "ndim", 3) == 4
    return list(video) if several else [video]


def _frames(video: Any, height: int | None, width: int | None, latent_channels: int, resize: str) -> Tensor:
    """One video -> (f c h w): pixels in [-1, 1], or latents."""
    if isinstance(video, list | tuple):
        video = _stack(video, height, width)
    if isinstance(video, np.ndarray):
        if video.ndim != 4 or video.shape[-1] != 3:
            raise ValueError(f"a NumPy video must be (f h w 3), not {video.shape}")
        video = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 3, 1, 2)
    if not isinstance(video, Tensor):
        raise ValueError(f"video must be {FORMS}; got {type(video).__name__} for one video")
    if video.ndim == 4 and video.shape[1] == latent_channels and video.is_floating_point():
        return video
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"a torch video must be (f 3 h w), or latents (f {latent_channels} h w), not "
                         f"{tuple(video.shape)}: change the order of the axes with .permute")
    x = _to_range(video)
    size = (height or x.shape[2], width or x.shape[3])
    if size != x.shape[2:]:
        x = F.interpolate(x, size=size, mode=resize, antialias=resize == "bicubic").clamp(-1, 1)
    return x


def _stack(frames: Sequence[Any], height: int | None, width: int | None) -> np.ndarray | Tensor:
    """A list of frames of one kind -> one array. PIL images become RGB, resized to height and width (Lanczos)."""
    if not frames:
        raise ValueError("a video must have at least one frame")
    if all(isinstance(f, Image.Image) for f in frames):
        size = (width or frames[0].width, height or frames[0].height)
        resize = bool(height or width)
        rgb = [f.convert("RGB") for f in frames]
        frames = [np.asarray(f.resize(size, Image.Resampling.LANCZOS) if resize and f.size != size else f) for f in rgb]
    kind = next((k for k in (np.ndarray, Tensor) if all(isinstance(f, k) for f in frames)), None)
    if kind is None:
        raise ValueError(f"video must be {FORMS}; got frames of {sorted({type(f).__name__ for f in frames})}")
    odd = next((i for i, f in enumerate(frames) if f.shape != frames[0].shape), None)
    if odd is not None:
        raise ValueError(f"frame {odd} has the shape {tuple(frames[odd].shape)}, frame 0 {tuple(frames[0].shape)}: "
                         "give height and width, or frames of one size")
    return np.stack(frames) if kind is np.ndarray else torch.stack(list(frames))


def _to_range(x: Tensor) -> Tensor:
    """Bytes or floats -> float32 in [-1, 1]."""
    if x.dtype == torch.uint8:
        return x.float() / 255 * 2 - 1
    if not x.is_floating_point():
        raise ValueError(f"pixels must be bytes (uint8) or floats in [0, 1], not {x.dtype}")
    x = x.float()
    low, high = x.min().item(), x.max().item()
    if not (low >= -1.001 and high <= 1.001):  # false for NaN, too
        raise ValueError(f"floating-point pixels must be in [0, 1], not from {low:.4g} to {high:.4g}")
    if low < 0:
        logger.warning("The video has negative pixels, so its range is assumed to be [-1, 1] and not [0, 1].")
        return x
    return x * 2 - 1
