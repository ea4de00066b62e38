"""Text to video with ModelScope's and Zeroscope's UNet (Wang et al. 2023, arXiv:2308.06571)."""

from collections.abc import Callable, Sequence
from typing import Any, Never

import numpy as np
from torch import Tensor

from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from ..models.unet3d import UNet3DConditionModel
from ..models.vae import AutoencoderKL
from ..schedulers.base import Scheduler
from ..techniques.frame_prompts import Interpolate
from .base import DiffusionPipeline, PipelineOutput, StepCallbacks, exclusive
from .checks import Generators, Prompts, check_count, check_generator, check_number, check_size
from .source import lay_grid


class TextToVideoSDPipelineOutput(PipelineOutput):
    """`frames`: (b f h w 3) array, (b f 3 h w) tensor, b lists of f PIL images, or latents (b c f h w)."""

    frames: np.ndarray | Tensor | list[list[Any]]


class TextToVideoSDPipeline(DiffusionPipeline):
    """Makes videos from texts with ModelScope's or Zeroscope's UNet (Wang et al. 2023, arXiv:2308.06571)."""

    COMPONENTS = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "unet": ("UNet3DConditionModel",),
        "scheduler": (),
    }
    FIELDS = ("clip_skip_negative",)
    unet: UNet3DConditionModel
    clip_skip_negative: bool
    HINTS = {
        "video": "; a video is continued by VideoToVideoSDPipeline.from_pipe(pipe)",
        "strength": "; it belongs to VideoToVideoSDPipeline.from_pipe(pipe)",
    }

    def __init__(self, vae: AutoencoderKL | None, text_encoder: CLIPTextModel | None, tokenizer: CLIPTokenizer | None,
                 unet: UNet3DConditionModel | None, scheduler: Scheduler | None, *,
                 compat: str | None = None, clip_skip_negative: bool | None = None):
        components = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        super().__init__(components, compat, {"clip_skip_negative": clip_skip_negative})

    @exclusive
    def __call__(
        self,
        prompt: Prompts = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 16,
        num_inference_steps: int = 50,
        guidance_scale: float = 9.0,
        negative_prompt: Prompts = None,
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
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_interpolation: str | Interpolate = "linear",
        **unknown: Never,
    ) -> TextToVideoSDPipelineOutput:
        """Makes one video for each prompt.

        prompt, negative_prompt: a text, a list of texts, or a dictionary {frame: text}.
        height, width: in pixels, multiples of the VAE's factor (8). The default is the UNet's own size.
        guidance_scale: the scale of classifier-free guidance (arXiv:2207.12598). 1 or less means no guidance.
        eta: the noise of DDIM's steps, from 0 (none) to 1 (as in DDPM).
        generator: one for all videos, or a list with one per video. With a list, a video does not depend on the others.
        latents: the initial noise (b 4 f h/8 w/8), with standard deviation 1.
        prompt_embeds, negative_prompt_embeds: text states (b l d) or (b f l d), instead of texts.
        clip_skip: how many of the text encoder's last layers to leave out.
        callback(step, t, latents): called every `callback_steps` steps.
        callback_on_step_end(pipe, step, t, tensors): called after each step. The dictionary that it returns replaces
        `latents`, `prompt_embeds` or `negative_prompt_embeds`.
        decode_chunk_size: how many frames the VAE decodes at a time, all by default.
        timesteps, sigmas: the caller's own grid instead of `num_inference_steps`, if the scheduler supports it. The
        last of the sigmas, usually 0, is the noise level after the last step.
        Raises ValueError or TypeError if an argument is wrong, before any work.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        batch = self._check_call(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_inference_steps,
                                 guidance_scale, output_type, cross_attention_kwargs, decode_chunk_size, callbacks,
                                 unknown)
        check_number("eta", eta, 0, 1)
        check_generator(generator, batch, self._execution_device)
        height, width = check_size(height, width, self.unet, self.vae_scale_factor)
        check_count("num_frames", num_frames)
        self._check_frame_texts(num_frames, prompt_interpolation,
                                {"prompt": prompt, "negative_prompt": negative_prompt},
                                {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds})
        shape = (batch, self.unet.config.in_channels, num_frames,
                 height // self.vae_scale_factor, width // self.vae_scale_factor)
        self._check_noise(latents, shape)

        device = self._execution_device
        grid, steps = lay_grid(self.scheduler, num_inference_steps, None, device, False, timesteps, sigmas)
        text, negative = self.encode_prompt(prompt, device, 1, guidance_scale > 1, negative_prompt, prompt_embeds,
                                            negative_prompt_embeds, clip_skip=clip_skip,
                                            num_frames=num_frames, prompt_interpolation=prompt_interpolation)
        noise = self._draw_noise(shape, generator, device, text.dtype, latents)
        x = noise * self.scheduler.init_noise_sigma
        x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks)
        video = self._output(x, output_type, decode_chunk_size)
        return TextToVideoSDPipelineOutput(video) if return_dict else (video,)
