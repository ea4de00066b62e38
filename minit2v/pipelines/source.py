"""What video to video begins with: a video read, encoded, and given the noise of a step on the way.

Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, arXiv:2108.01073, frame
by frame; what ties the frames together is the UNet.
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

ENCODED_AT_ONCE = 8  # frames: what the VAE's first layers need would otherwise grow with the video


def read(
    pipe: Any, video: Any, latents: Tensor | None, height: int | None, width: int | None,
    resize: str = "bicubic",
) -> Any:
    """What to begin with, checked: pixels (b 3 f h w) in [-1, 1], or latents (b c f h w); or a file that has them."""
    if (video is None) == (latents is None):
        raise ValueError("give a video, or noisy latents in its place" + ", not both" * (video is not None))
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
    from ..files.video import VideoFrames  # here, so that pipelines are imported without it

    return isinstance(video, VideoFrames)


class Lazy:
    """A video that is read from its file a few frames at a time, with what pipelines ask of a tensor (1 3 f h w)."""

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
        """(1 3 f h w) in [-1, 1], f at most `chunk`."""
        frames = iter(self.video)
        while piece := list(itertools.islice(frames, chunk)):
            yield to_tensor(piece, self.height, self.width).to(self.device)


def count_results(prompts: int, source: Tensor, each: int, noisy: bool) -> int:
    """How many videos are made of these prompts and of this source (b ...), `each` of every pair.

    One prompt or one video serves a batch of the other. Noisy latents may also be given for each result.
    """
    videos = len(source)
    if noisy and videos == prompts * each:
        return videos
    if prompts != 1 and videos not in (1, prompts):
        raise ValueError(f"{videos} videos for {prompts} prompts: give one, or one for each")
    return max(prompts, videos) * each


def spread(x: Tensor, batch: int) -> Tensor:
    """x (b ...) -> (batch ...): every row for as many results, one after the other."""
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
    """The timesteps of the steps that are made, and their number; the scheduler stands where they begin.

    They are the share `strength` of all steps, the last ones; None: all, from pure noise. enforce: the grid has so
    many steps that `num_inference_steps` are that share. timesteps, sigmas: the grid itself.
    """
    custom = {name: v for name, v in (("timesteps", timesteps), ("sigmas", sigmas)) if v is not None}
    if len(custom) == 2:
        raise ValueError("timesteps and sigmas are two ways to lay one grid: give one")
    num_inference_steps = total = int(num_inference_steps)  # NumPy's small numbers overflow in products
    if custom:
        (name,) = custom
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} lays its own grid: it takes no {name}")
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
        # Solver calls that make no step of their own (at PNDM's start) are left out with the start; without `enforce`
        # diffusers' pipelines count them as steps, and make that many more.
        begin += max(0, len(scheduler.timesteps) - total * scheduler.order)
    if hasattr(scheduler, "set_begin_index"):  # of the solvers that count their steps
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:], steps


def encode_video(
    pipe: Any, x: Tensor, batch: int, generator: Generators, dtype: torch.dtype,
    chunk: int = ENCODED_AT_ONCE, upcast: bool = False,
) -> Tensor:
    """x (b 3 f h w), or latents (b c f h w), which pass -> latents (batch c f h w), as the VAE draws them.

    upcast: a VAE that is known to overflow in half precision (its config says so) encodes in float32.
    """
    if x.shape[1] == pipe.unet.config.in_channels:
        return spread(x.to(dtype), batch)
    with pipe._placed("vae") as vae:
        if upcast and vae.config.force_upcast and vae.dtype != torch.float32:
            vae = copy.deepcopy(unwrapped(vae)).float()  # other pipelines may be using this one
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
    """Noise for x (b c f h w). axes: the order in which it is drawn, as the reference does."""
    return rearrange(randn(rearrange(x, f"b c f h w -> {axes}").shape, generator, x.device, x.dtype),
                     f"{axes} -> b c f h w", b=len(x))
