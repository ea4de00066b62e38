"""AnimateDiff: an image model of Stable Diffusion 1.5 and a motion adapter make videos.

Guo et al., AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models without Specific Tuning,
arXiv:2307.04725.
"""

from collections.abc import Callable, Sequence
from typing import Any, Never

import numpy as np
from torch import Tensor

from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from ..models.unet2d import UNet2DConditionModel
from ..models.unet_motion import MotionAdapter, UNetMotionModel
from ..models.vae import AutoencoderKL
from ..schedulers.base import Scheduler
from ..techniques.frame_prompts import Interpolate
from ..techniques.free_init import NoisedVideo
from . import source
from .base import DiffusionPipeline, PipelineOutput, StepCallbacks, exclusive
from .checks import (
    Generators,
    Prompts,
    check_component,
    check_count,
    check_generator,
    check_number,
    check_size,
    unwrapped,
)
from .frames import RESIZES


class AnimateDiffPipelineOutput(PipelineOutput):
    """`frames`: (b f h w 3) array, (b f 3 h w) tensor, b lists of f PIL images, or latents (b c f h w)."""

    frames: np.ndarray | Tensor | list[list[Any]]


class AnimateDiffPipeline(DiffusionPipeline):
    """Videos from texts, in the style of any image model of Stable Diffusion 1.5.

    unet: a UNet2DConditionModel, of which with `motion_adapter` a UNetMotionModel is made, and both stay as they were;
    or a UNetMotionModel, which is used as it is (in another `compat` mode: one that shares its tensors).
    `feature_extractor` and `image_encoder` belong to image prompts, which are not here yet: None.
    """

    COMPONENTS = {
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "unet": ("UNet2DConditionModel", "UNetMotionModel"),
        "motion_adapter": ("MotionAdapter",),
        "scheduler": (),
        "feature_extractor": ("CLIPImageProcessor", "CLIPFeatureExtractor"),
        "image_encoder": ("CLIPVisionModelWithProjection",),
    }
    OPTIONAL = ("motion_adapter", "feature_extractor", "image_encoder")
    IDLE = ("motion_adapter",)  # the UNet has a copy
    FIELDS = ("clip_skip_negative",)
    unet: UNetMotionModel
    motion_adapter: MotionAdapter | None
    clip_skip_negative: bool
    STEP_AXES = "b c f h w"
    HINTS = {
        "video": "; a video is continued by AnimateDiffVideoToVideoPipeline.from_pipe(pipe)",
        "strength": "; it belongs to AnimateDiffVideoToVideoPipeline.from_pipe(pipe)",
    }

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | UNetMotionModel | None,
        motion_adapter: MotionAdapter | None,
        scheduler: Scheduler | None,
        feature_extractor: None = None,
        image_encoder: None = None,
        *,
        compat: str | None = None,
        clip_skip_negative: bool | None = None,
    ):
        for name, component in (("feature_extractor", feature_extractor), ("image_encoder", image_encoder)):
            if component is not None:
                raise ValueError(f"{name} must be None: image prompts (IP-Adapter) are not here yet")
        for name, component in (("unet", unet), ("motion_adapter", motion_adapter)):
            check_component(name, component, self.COMPONENTS[name])
        motion_adapter = unwrapped(motion_adapter)
        if not isinstance(motion_adapter, MotionAdapter | None):
            raise TypeError(f"motion_adapter must be a MotionAdapter, not a {type(motion_adapter).__name__}")
        inner = unwrapped(unet)
        if isinstance(inner, UNet2DConditionModel):
            if motion_adapter is None:
                raise ValueError("unet is an image model, to which this pipeline adds motion: give a motion_adapter, "
                                 "MotionAdapter.from_pretrained(...)")
            unet = UNetMotionModel.from_unet2d(inner, motion_adapter, compat=compat)
        elif isinstance(inner, UNetMotionModel):
            in_mode = inner.with_compat(compat)  # another pipeline may share it
            unet = unet if in_mode is inner else in_mode
        elif unet is not None:
            raise TypeError(f"unet must be a UNet2DConditionModel or a UNetMotionModel, not a {type(unet).__name__}")
        components = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                          motion_adapter=motion_adapter, scheduler=scheduler, feature_extractor=None,
                          image_encoder=None)
        super().__init__(components, compat, {"clip_skip_negative": clip_skip_negative})

    @exclusive
    def __call__(
        self,
        prompt: Prompts = None,
        num_frames: int = 16,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        negative_prompt: Prompts = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 16,
        *,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_interpolation: str | Interpolate = "linear",
        **unknown: Never,
    ) -> AnimateDiffPipelineOutput:
        """`num_videos_per_prompt` videos for each prompt, those of one prompt one after the other.

        num_frames: at most as many as the motion adapter has positions, 32 or 24. height, width: in pixels, multiples
        of the VAE's factor (8); the UNet's own size where not given. guidance_scale: above 1, the prediction moves this
        many times the way from the negative prompt to the prompt. eta: the noise of DDIM's steps, 0 to 1. generator:
        one, or one per video, which then does not depend on the others. latents: the starting noise (b 4 f h/8 w/8), of
        standard deviation 1. clip_skip: how many of the text encoder's last layers to leave out. decode_chunk_size:
        frames that the VAE decodes at a time. callback_on_step_end(pipe, step, t, tensors) is called after each step,
        and what it returns replaces `latents`, `prompt_embeds` or `negative_prompt_embeds`; callback(step, t, latents)
        is its older form, called every `callback_steps` steps. The three arguments for image prompts and adapters must
        be None.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_absent(ip_adapter_image, ip_adapter_image_embeds)
        prompts = self._check_call(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_inference_steps,
                                   guidance_scale, output_type, cross_attention_kwargs, decode_chunk_size, callbacks,
                                   unknown)
        check_number("eta", eta, 0, 1)
        check_count("num_videos_per_prompt", num_videos_per_prompt)
        batch = prompts * num_videos_per_prompt
        check_generator(generator, batch, self._execution_device)
        height, width = check_size(height, width, self.unet, self.vae_scale_factor)
        self._check_frames(num_frames)
        self._check_frame_texts(num_frames, prompt_interpolation,
                                {"prompt": prompt, "negative_prompt": negative_prompt},
                                {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds})
        shape = (batch, self.unet.config.in_channels, num_frames,
                 height // self.vae_scale_factor, width // self.vae_scale_factor)
        self._check_noise(latents, shape)

        device = self._execution_device
        grid, steps = source.lay_grid(self.scheduler, num_inference_steps, None, device, False, timesteps, sigmas)
        text, negative = self.encode_prompt(prompt, device, num_videos_per_prompt, guidance_scale > 1, negative_prompt,
                                            prompt_embeds, negative_prompt_embeds, clip_skip=clip_skip,
                                            num_frames=num_frames, prompt_interpolation=prompt_interpolation)
        noise = self._draw_noise(shape, generator, device, text.dtype, latents)
        x = noise * self.scheduler.init_noise_sigma
        x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks)
        video = self._output(x, output_type, decode_chunk_size)
        return AnimateDiffPipelineOutput(video) if return_dict else (video,)

    def _check_absent(self, ip_adapter_image: Any, ip_adapter_image_embeds: Any) -> None:
        """Refuses what the reference has and this package does not have yet."""
        if ip_adapter_image is not None or ip_adapter_image_embeds is not None:
            raise ValueError("ip_adapter_image and ip_adapter_image_embeds must be None: image prompts (IP-Adapter) "
                             "are not here yet")

    def _check_frames(self, frames: Any) -> None:
        check_count("num_frames", frames)
        most, windows = self.unet.config.motion_max_seq_length, self._context_windows
        if windows is not None and windows.length > most:
            raise ValueError(f"windows of {windows.length} frames are too long: the motion adapter knows the positions "
                             f"of {most}")
        if frames > most and windows is None and self._free_noise is None:
            raise ValueError(f"{frames} frames are too many: the motion adapter knows the positions of {most}. Call "
                             "enable_context_windows() or enable_free_noise() for longer videos")


class AnimateDiffVideoToVideoPipeline(AnimateDiffPipeline):
    """Videos from texts and videos, by the same components as `AnimateDiffPipeline`."""

    FIELDS = ("clip_skip_negative", "array_resize")
    HINTS = {
        "num_frames": "; the video has its number of frames, and AnimateDiffPipeline.from_pipe(pipe) needs no video",
        "image": "; a video is given as video=",
    }

    def __init__(
        self,
        vae: AutoencoderKL | None,
        text_encoder: CLIPTextModel | None,
        tokenizer: CLIPTokenizer | None,
        unet: UNet2DConditionModel | UNetMotionModel | None,
        motion_adapter: MotionAdapter | None,
        scheduler: Scheduler | None,
        feature_extractor: None = None,
        image_encoder: None = None,
        *,
        compat: str | None = None,
        clip_skip_negative: bool | None = None,
        array_resize: str | None = None,
    ):
        """array_resize: how arrays and tensors come to the size, "bicubic" or "nearest"; PIL images: by Lanczos."""
        if array_resize not in (None, *RESIZES):
            raise ValueError(f"array_resize must be one of {RESIZES}, not {array_resize!r}")
        super().__init__(vae, text_encoder, tokenizer, unet, motion_adapter, scheduler, feature_extractor,
                         image_encoder, compat=compat, clip_skip_negative=clip_skip_negative)
        self.array_resize = array_resize or self.array_resize

    @exclusive
    def __call__(  # type: ignore[override]
        self,
        video: Any = None,
        prompt: Prompts = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        enforce_inference_steps: bool = False,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 7.5,
        strength: float = 0.8,
        negative_prompt: Prompts = None,
        num_videos_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        ip_adapter_image: None = None,
        ip_adapter_image_embeds: None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int = 16,
        *,
        callback: Callable[[int, Tensor, Tensor], None] | None = None,
        callback_steps: int = 1,
        prompt_interpolation: str | Interpolate = "linear",
        **unknown: Never,
    ) -> AnimateDiffPipelineOutput:
        """`num_videos_per_prompt` new videos for each video and prompt; one of them serves a batch of the other.

        video: PIL images, arrays or tensors (`frames.FORMS`), resized to height and width, or to the UNet's own size;
        or latents, as a tensor (f c h w) or (b f c h w) with the VAE's number of channels. latents: (b c f h w), in
        place of `video`, already noisy: the steps begin with them as they are.
        strength: the share of the steps that are made, the last ones; 1 leaves little of the video, 0 only encodes and
        decodes. enforce_inference_steps: `num_inference_steps` are made, and strength lays a grid of so many more that
        they are its share; given `latents` then count as clean, and are made noisy. timesteps, sigmas: a grid of the
        caller's own, of which strength, or the number of steps where that is enforced, takes its share; for schedulers
        that can.
        decode_chunk_size: also of the frames that are encoded. The other arguments are those of `AnimateDiffPipeline`.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._check_absent(ip_adapter_image, ip_adapter_image_embeds)
        prompts = self._check_call(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_inference_steps,
                                   guidance_scale, output_type, cross_attention_kwargs, decode_chunk_size, callbacks,
                                   unknown)
        check_number("strength", strength, 0, 1)
        check_number("eta", eta, 0, 1)
        check_count("num_videos_per_prompt", num_videos_per_prompt)
        if latents is None:
            height, width = check_size(height, width, self.unet, self.vae_scale_factor)
        x = source.read(self, video, latents, height, width, self.array_resize)
        self._check_frames(x.shape[2])
        self._check_frame_texts(x.shape[2], prompt_interpolation,
                                {"prompt": prompt, "negative_prompt": negative_prompt},
                                {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds})
        batch = source.count_results(prompts, x, num_videos_per_prompt, noisy=latents is not None)
        check_generator(generator, batch, self._execution_device)

        device = self._execution_device
        grid, steps = source.lay_grid(self.scheduler, num_inference_steps, strength, device, enforce_inference_steps,
                                      timesteps, sigmas)
        text, negative = self.encode_prompt(prompt, device, 1, guidance_scale > 1, negative_prompt, prompt_embeds,
                                            negative_prompt_embeds, clip_skip=clip_skip,
                                            num_frames=x.shape[2], prompt_interpolation=prompt_interpolation)
        text, negative = (v if v is None else source.spread(v, batch) for v in (text, negative))

        x = x.to(device)
        if latents is None:
            x = source.encode_video(self, x, batch, generator, text.dtype, decode_chunk_size, upcast=True)
        x = source.spread(x, batch)
        start = NoisedVideo(strength)
        if steps and (latents is None or enforce_inference_steps):
            noise = source.draw_noise(x, generator, "b f c h w" if latents is None else "b c f h w")
            start = NoisedVideo(strength, x, noise)
            x = self.scheduler.add_noise(x, noise, grid[:1])
        if steps:
            x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks, start)
        video = self._output(x, output_type, decode_chunk_size)
        return AnimateDiffPipelineOutput(video) if return_dict else (video,)
