"""Video to video: a video is encoded, gets the noise of a step on the way, and is denoised from there.

Meng et al., SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations, arXiv:2108.01073, frame
by frame; what ties the frames together is the UNet.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..schedulers.base import randn
from .base import StepCallbacks
from .checks import Generators, check_finite, check_generator, check_latents, check_number, check_pixels, check_result
from .frames import to_tensor
from .text_to_video import TextToVideoSDPipeline, TextToVideoSDPipelineOutput

ENCODED_AT_ONCE = 8  # frames: what the VAE's first layers need would otherwise grow with the video


class VideoToVideoSDPipeline(TextToVideoSDPipeline):
    """Videos from texts and videos, by the same components as `TextToVideoSDPipeline`."""

    HINTS = {
        "num_frames": "; the video has its number of frames",
        "image": "; a video is given as video=",
    }

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: str | list[str] | None = None,
        video: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        guidance_scale: float = 15.0,
        negative_prompt: str | list[str] | None = None,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = None,
        **unknown: Any,
    ) -> TextToVideoSDPipelineOutput | tuple[Any]:
        """A new video for each video and prompt; one of them serves a batch of the other.

        video: PIL images, arrays or tensors (`frames.FORMS`), resized to height and width where given; or latents, as
        a tensor (f c h w) or (b f c h w) with the VAE's number of channels. latents: (b c f h w), in place of `video`,
        already noisy: the steps begin with them as they are. strength: the share of the steps that are made, the last
        ones; 1 leaves little of the video, 0 only encodes and decodes. The other arguments are those of
        `TextToVideoSDPipeline`.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        batch = self._check_call(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_inference_steps,
                                 guidance_scale, output_type, cross_attention_kwargs, decode_chunk_size, callbacks,
                                 unknown)
        check_number("strength", strength, 0, 1)
        check_number("eta", eta, 0, 1)
        if (video is None) == (latents is None):
            raise ValueError("give a video, or noisy latents in its place" + ", not both" * (video is not None))
        source = self._read(video, latents, height, width)
        if len(source) not in (1, batch) and batch != 1:
            raise ValueError(f"{len(source)} videos for {batch} prompts: give one, or one for each")
        batch = max(batch, len(source))
        check_generator(generator, batch, self._execution_device)

        device = self._execution_device
        steps = min(int(num_inference_steps * strength), num_inference_steps)
        begin = (num_inference_steps - steps) * self.scheduler.order
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        if hasattr(self.scheduler, "set_begin_index"):  # of the solvers that count their steps
            self.scheduler.set_begin_index(begin)
        timesteps = self.scheduler.timesteps[begin:]
        text, negative = self.encode_prompt(prompt, device, 1, guidance_scale > 1, negative_prompt, prompt_embeds,
                                            negative_prompt_embeds, clip_skip=clip_skip)
        if len(text) < batch:
            text, negative = (v if v is None else v.expand(batch, -1, -1) for v in (text, negative))

        x = source.to(device)
        if latents is None:
            x = self._encode_video(x, batch, generator, text.dtype)
            if steps:
                x = self._add_noise(x, timesteps[:1], generator)
        x = x.expand(batch, -1, -1, -1, -1)
        if steps:
            x = self.denoise(x, timesteps, steps, text, negative, guidance_scale, eta, generator, callbacks)
        video = self._output(x, output_type, decode_chunk_size)
        return TextToVideoSDPipelineOutput(video) if return_dict else (video,)

    def _read(self, video: Any, latents: Tensor | None, height: int | None, width: int | None) -> Tensor:
        """What to begin with, checked: pixels (b 3 f h w) in [-1, 1], or latents (b c f h w)."""
        channels = self.unet.config.in_channels
        if latents is not None:
            check_latents(latents, ("b", channels, "f", "h", "w"))
            return latents
        for name, value in (("height", height), ("width", width)):
            if value is not None:
                check_pixels(name, value, self.vae_scale_factor)
        x = to_tensor(video, height, width, channels)
        if x.shape[1] == channels:
            check_finite("video", x)
        else:
            check_pixels("height", x.shape[3], self.vae_scale_factor)
            check_pixels("width", x.shape[4], self.vae_scale_factor)
        return x

    def _encode_video(self, x: Tensor, batch: int, generator: Generators, dtype: torch.dtype) -> Tensor:
        """x (b 3 f h w), or latents (b c f h w), which pass -> latents (batch c f h w), as the VAE draws them."""
        if x.shape[1] == self.unet.config.in_channels:
            return x.to(dtype).expand(batch, -1, -1, -1, -1)
        with self._placed("vae") as vae:
            gaussian = vae.encode(rearrange(x.to(vae.dtype), "b c f h w -> (b f) c h w"), ENCODED_AT_ONCE)
            check_result(gaussian.mean, vae, "the VAE")
        mean, std = (v.repeat(batch // len(x), 1, 1, 1) for v in (gaussian.mean, gaussian.std))
        z = mean + std * randn(mean.shape, generator, mean.device, mean.dtype)
        return rearrange(z.to(dtype) * self.vae.config.scaling_factor, "(b f) c h w -> b c f h w", b=batch)

    def _add_noise(self, x: Tensor, t: Tensor, generator: Generators) -> Tensor:
        """x (b c f h w) clean -> noisy as at t (1,); the noise is drawn in the order of the videos, frame by frame."""
        frames = rearrange(x, "b c f h w -> (b f) c h w")
        noise = randn(frames.shape, generator, x.device, x.dtype)
        return rearrange(self.scheduler.add_noise(frames, noise, t), "(b f) c h w -> b c f h w", b=len(x))
