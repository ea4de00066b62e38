"""The beginning of video to video: it reads a video, encodes it, and adds the noise of an intermediate step.

This is SDEdit for all frames at once: Meng et al. 2021, "SDEdit: Guided Image Synthesis and Editing with Stochastic
Differential Equations", arXiv:2108.01073. The UNet makes the frames consistent.
"""

import copy
import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .. import fast
from ..schedulers.base import randn
from .checks import Generators, check_finite, check_latents, check_pixels, check_result, unwrapped
from .frames import to_tensor

ENCODED_AT_ONCE = 8  # frames that the VAE encodes at a time, so that its memory does not grow with the video


def read(
    pipe: Any, video: Any, latents: Tensor | None, height: int | None, width: int | None,
    resize: str = "bicubic",
) -> Any:
    """The checked input: pixels (b 3 f h w) in [-1, 1], or latents (b c f h w), or a video file that is read later."""
    if (video is None) == (latents is None):
        raise ValueError("give a video, or noisy latents instead of it" + ", not both" * (video is not None))
    channels, factor = pipe.unet.config.in_channels, pipe.vae_scale_factor
    for name, value in (("height", height), ("width", width)):
        if value is not None:
            check_pixels(name, value, factor)
    if not isinstance(video, list | tuple | Tensor) and is_file(video):
        return Lazy(video, height, width, factor)
    if latents is not None:
        size = (v // factor if v is not None else letter for v, letter in ((height, "h"), (width, "w")))
        check_latents(latents, ("b", channels, "f", *size))
        return latents
    x = to_tensor(video, height, width, channels, resize)
    if x.shape[1] == channels:
        check_finite("video", x)
    else:
        check_pixels("height", x.shape[3], factor)
        check_pixels("width", x.shape[4], factor)
    return x


def is_file(video: Any) -> bool:
    from ..files.video import VideoFrames  # imported here, because most calls do not need it

    return isinstance(video, VideoFrames)


class Lazy:
    """A video that is read from its file a few frames at a time. It behaves like a tensor (1 3 f h w) for pipelines."""

    def __init__(self, video: Any, height: int | None, width: int | None, factor: int):
        self.video, self.height, self.width, self.device = video, height, width, torch.device("cpu")
        self.shape = (1, 3, len(video), height or video.size[1], width or video.size[0])
        check_pixels("height", self.shape[3], factor)
        check_pixels("width", self.shape[4], factor)

    def __len__(self) -> int:
        return 1

    def to(self, device: Any) -> "Lazy":
        self.device = device
        return self

    def pieces(self, chunk: int) -> Iterator[Tensor]:
        """The video in pieces (1 3 f h w) in [-1, 1], with at most `chunk` frames."""
        frames = iter(self.video)
        while piece := list(itertools.islice(frames, chunk)):
            yield to_tensor(piece, self.height, self.width).to(self.device)


def count_results(prompts: int, source: Tensor, each: int, noisy: bool) -> int:
    """The number of results for these prompts and this source (b ...), with `each` results for every pair.

    A single prompt is used for all videos, and a single video for all prompts. Noisy latents may also be given for each
    result. Raises ValueError if the numbers do not fit.
    """
    videos = len(source)
    if noisy and videos == prompts * each:
        return videos
    if prompts != 1 and videos not in (1, prompts):
        raise ValueError(f"{videos} videos for {prompts} prompts: give one, or one for each")
    return max(prompts, videos) * each


def spread(x: Tensor, batch: int) -> Tensor:
    """x (b ...) -> (batch ...): every row is repeated equally often, and the copies follow each other."""
    return x if len(x) == batch else x.repeat_interleave(batch // len(x), dim=0)


def lay_grid(
    scheduler: Any,
    num_inference_steps: int,
    strength: float | None,
    device: torch.device,
    enforce: bool = False,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> tuple[Tensor, int]:
    """Sets the scheduler's grid. Returns the timesteps of the steps to make, and the number of steps.

    strength: the share of the steps to make; they are the last ones. None makes all, from pure noise.
    enforce: make exactly `num_inference_steps` steps. The grid has more steps, so that they are the share `strength`.
    timesteps, sigmas: the caller's own grid.
    Raises ValueError if the scheduler does not support the grid, or if no grid fits.
    """
    custom = {name: v for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    if len(custom) == 2:
        raise ValueError("timesteps and sigmas exclude each other: give one of them")
    num_inference_steps = total = int(num_inference_steps)  # NumPy's small integers overflow in products
    if custom:
        (name,) = custom
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not support {name}: leave it out")
        scheduler.set_timesteps(**custom, device=device)
        total = scheduler.num_inference_steps
    else:
        if enforce and strength:
            if num_inference_steps / strength >= len(scheduler) + 1:
                raise ValueError(f"{num_inference_steps} steps cannot be the last {strength:g} of a grid of at most "
                                 f"{len(scheduler)}: raise strength or lower num_inference_steps")
            total = int(num_inference_steps / strength)
        scheduler.set_timesteps(total, device=device)
    if strength is None:
        return scheduler.timesteps, total
    steps = min(num_inference_steps if enforce and strength else int(total * strength), total)

    begin = (total - steps) * scheduler.order
    if enforce and begin:
        # PNDM's first steps have additional calls. They are left out with the first steps. Without `enforce`, diffusers
        # counts these calls as steps, and makes more steps.
        begin += max(0, len(scheduler.timesteps) - total * scheduler.order)
    if hasattr(scheduler, "set_begin_index"):  # for solvers that count their steps
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:], steps


def encode_video(
    pipe: Any, x: Tensor, batch: int, generator: Generators, dtype: torch.dtype,
    chunk: int = ENCODED_AT_ONCE, upcast: bool = False,
) -> Tensor:
    """Pixels x (b 3 f h w) -> latents (batch c f h w), drawn from the VAE's distribution. Latents pass unchanged.

    upcast: encode in float32 if the VAE's config says that it overflows in half precision.
    chunk: how many frames are encoded at a time.
    """
    if x.shape[1] == pipe.unet.config.in_channels:
        return spread(x.to(dtype), batch)
    with pipe._placed("vae") as vae:
        if upcast and vae.config.force_upcast and vae.dtype != torch.float32:
            vae = copy.deepcopy(unwrapped(vae)).float()  # a copy, because other pipelines may use the VAE
        pieces = x.pieces(chunk) if isinstance(x, Lazy) else [x]
        encode = fast.runner(vae).encode
        found = [encode(rearrange(piece.to(vae.dtype), "b c f h w -> (b f) c h w"), chunk) for piece in pieces]
        moments = (torch.cat([g.mean for g in found]), torch.cat([g.std for g in found]))
        check_result(moments[0], vae, "the VAE")
        scale = vae.config.scaling_factor
    mean, std = (spread(rearrange(v, "(b f) c h w -> b f c h w", b=len(x)), batch) for v in moments)
    z = mean + std * randn(mean.shape, generator, mean.device, mean.dtype)
    return rearrange(z.to(dtype) * scale, "b f c h w -> b c f h w")


def draw_noise(x: Tensor, generator: Generators, axes: str) -> Tensor:
    """Noise for x (b c f h w). axes: the order of the axes in which it is drawn, as in diffusers."""
    return rearrange(randn(rearrange(x, f"b c f h w -> {axes}").shape, generator, x.device, x.dtype),
                     f"{axes} -> b c f h w", b=len(x))
