"""AnimateDiff: an image model of Stable Diffusion 1.5 and a motion adapter make videos.

Guo et al. 2023, "AnimateDiff: Animate Your Personalized Text-to-Image Diffusion Models without Specific Tuning",
arXiv:2307.04725.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ..adapters import ip_adapter
from ..adapters.ip_adapter import Pictures
from ..models.clip import CLIPTextModel
from ..models.clip_vision import CLIPVisionModelWithProjection
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
    check_result,
    check_size,
    unwrapped,
)
from .frames import RESIZES


class AnimateDiffPipelineOutput(PipelineOutput):
    """`frames`: (b f h w 3) array, (b f 3 h w) tensor, b lists of f PIL images, or latents (b c f h w)."""

    frames: np.ndarray | Tensor | list[list[Any]]


class AnimateDiffPipeline(DiffusionPipeline):
    """Makes videos from texts, in the style of any Stable Diffusion 1.5 image model (arXiv:2307.04725).

    unet: a UNet2DConditionModel together with `motion_adapter`, or a UNetMotionModel. From the first two a new
    UNetMotionModel is made; they do not change.
    image_encoder: turns pictures into vectors for IP-Adapters. `load_ip_adapter` loads it.
    feature_extractor: always None. The image_encoder's config says how to prepare pictures.
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
    FIELDS = ("clip_skip_negative", "mask_grid")
    unet: UNetMotionModel
    motion_adapter: MotionAdapter | None
    image_encoder: CLIPVisionModelWithProjection | None
    clip_skip_negative: bool
    mask_grid: str
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
        image_encoder: CLIPVisionModelWithProjection | None = None,
        *,
        compat: str | None = None,
        clip_skip_negative: bool | None = None,
        mask_grid: str | None = None,
    ):
        if mask_grid not in (None, "exact", "published"):
            raise ValueError(f"mask_grid must be 'exact' or 'published', not {mask_grid!r}")
        if feature_extractor is not None:
            raise ValueError("feature_extractor must be None: the image_encoder's config says how to prepare pictures")
        for name, component in (("unet", unet), ("motion_adapter", motion_adapter)):
            check_component(name, component, self.COMPONENTS[name])
        motion_adapter = unwrapped(motion_adapter)
        if not isinstance(motion_adapter, MotionAdapter | None):
            raise TypeError(f"motion_adapter must be a MotionAdapter, not a {type(motion_adapter).__name__}")
        inner = unwrapped(unet)
        if isinstance(inner, UNet2DConditionModel):
            if motion_adapter is None:
                raise ValueError("unet is an image model, and this pipeline needs motion modules: give "
                                 "motion_adapter=MotionAdapter.from_pretrained(...)")
            unet = UNetMotionModel.from_unet2d(inner, motion_adapter, compat=compat)
        elif isinstance(inner, UNetMotionModel):
            in_mode = inner.with_compat(compat)  # not in place, because another pipeline may use the UNet
            unet = unet if in_mode is inner else in_mode
        elif unet is not None:
            raise TypeError(f"unet must be a UNet2DConditionModel or a UNetMotionModel, not a {type(unet).__name__}")
        components = dict(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet,
                          motion_adapter=motion_adapter, scheduler=scheduler, feature_extractor=None,
                          image_encoder=image_encoder)
        super().__init__(components, compat, {"clip_skip_negative": clip_skip_negative, "mask_grid": mask_grid})

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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
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
        """Makes `num_videos_per_prompt` videos for each prompt. The videos of a prompt follow each other.

        num_frames: at most the positions of the motion adapter (32, or 24 in version 1), unless context windows or
        FreeNoise are on.
        height, width: in pixels, multiples of the VAE's factor (8). The default is the UNet's own size.
        guidance_scale: the scale of classifier-free guidance (arXiv:2207.12598). 1 or less means no guidance.
        eta: the noise of DDIM's steps, from 0 (none) to 1 (as in DDPM).
        generator: one for all videos, or a list with one per video. With a list, a video does not depend on the others.
        latents: the initial noise (b 4 f h/8 w/8), with standard deviation 1.
        clip_skip: how many of the text encoder's last layers to leave out.
        decode_chunk_size: how many frames the VAE decodes at a time.
        callback_on_step_end(pipe, step, t, tensors): called after each step. The dictionary that it returns replaces
        `latents`, `prompt_embeds` or `negative_prompt_embeds`. callback(step, t, latents) is its older form, which is
        called every `callback_steps` steps.
        ip_adapter_image, ip_adapter_image_embeds: pictures for IP-Adapters, see `prepare_ip_adapter_image_embeds`.
        cross_attention_kwargs: {"scale": the weight of LoRAs, "ip_adapter_masks": one tensor (1 i H W) per adapter}.
        A mask says where in the video each of i pictures acts (see `IPAdapterMaskProcessor`).
        Raises ValueError or TypeError if an argument is wrong, before any work.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        masks, cross_attention_kwargs = _take_masks(cross_attention_kwargs)
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
        pictures = self._pictures(ip_adapter_image, ip_adapter_image_embeds, masks, shape, guidance_scale > 1)
        grid, steps = source.lay_grid(self.scheduler, num_inference_steps, None, device, False, timesteps, sigmas)
        text, negative = self.encode_prompt(prompt, device, num_videos_per_prompt, guidance_scale > 1, negative_prompt,
                                            prompt_embeds, negative_prompt_embeds, clip_skip=clip_skip,
                                            num_frames=num_frames, prompt_interpolation=prompt_interpolation)
        noise = self._draw_noise(shape, generator, device, text.dtype, latents)
        x = noise * self.scheduler.init_noise_sigma
        x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks, pictures=pictures)
        video = self._output(x, output_type, decode_chunk_size)
        return AnimateDiffPipelineOutput(video) if return_dict else (video,)


    def _check_frames(self, frames: Any) -> None:
        check_count("num_frames", frames)
        most, windows = self.unet.config.motion_max_seq_length, self._context_windows
        if windows is not None and windows.length > most:
            raise ValueError(f"windows of {windows.length} frames are too long: the motion adapter has positions for "
                             f"{most}")
        if frames > most and windows is None and self._free_noise is None:
            raise ValueError(f"{frames} frames are too many: the motion adapter has positions for {most}. Call "
                             "enable_context_windows() or enable_free_noise() for longer videos")

    # IP-Adapter ------------------------------------------------------------------------------------------------------

    def load_ip_adapter(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        subfolder: str | Sequence[str] | None = None,
        weight_name: str | Sequence[str] | None = None,
        image_encoder_folder: str | None = "image_encoder",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
    ) -> None:
        """Puts one or several IP-Adapters into the UNet (Ye et al. 2023, arXiv:2308.06721).

        The kind is known by the content: base, light, plus, plus-face, full-face. New adapters replace loaded ones, and
        have the scale 1. They are in every pipeline that shares the UNet.
        pretrained_model_name_or_path_or_dict: a folder or hub id (with subfolder= and weight_name=), a file, its
        address, or a dictionary of tensors. A list of these loads several adapters.
        image_encoder_folder: where to find the image encoder, if the pipeline has none. A plain name is a folder beside
        the file. A name with a slash is a path from the root of the repository. If it does not exist, the published
        encoder of h94/IP-Adapter is used. None loads no encoder; then calls need `ip_adapter_image_embeds`.
        Raises FileNotFoundError, OSError or ValueError. After an error nothing has changed.
        """
        if self.unet is None:
            raise ValueError("an IP-Adapter needs the pipeline's unet, which is None")
        unet = unwrapped(self.unet)
        where: dict[str, Any] = dict(revision=revision, local_files_only=local_files_only, token=token,
                                     cache_dir=cache_dir, force_download=force_download)
        given = (pretrained_model_name_or_path_or_dict, subfolder, weight_name)
        places = [ip_adapter.find(*one, **where) for one in _in_step(*given)]
        adapters = [ip_adapter.read(place, unet) for place in places]
        encoder = self.image_encoder
        if encoder is None and image_encoder_folder is not None:
            encoder = ip_adapter.find_encoder(places[0], adapters[0], image_encoder_folder, dtype=self.dtype, **where)
        for place, adapter in zip(places, adapters, strict=True):
            if encoder is not None:
                ip_adapter.check_encoder(encoder, adapter.image_proj, place.label)
        ip_adapter.install(unet, adapters)
        if encoder is not self.image_encoder:
            self.image_encoder = encoder.to(self.device)

    def set_ip_adapter_scale(self, scale: Any) -> None:
        """Sets the weight of the pictures, 0 for no effect. The scale is in every pipeline that shares the UNet.

        scale: a number for all adapters, or a list with one entry for each. An entry may also be:
        - {"down": x, "mid": x, "up": x}. x is a number, a list with one number for each cross-attention of a block, or
          {"block_1": number or list}. Blocks are counted from 0 in the order of execution. Missing entries are 0.
        - a list with a number for each picture, as in [[0.7, 0.4]], if the pictures have masks.
        Raises ValueError if it does not fit the UNet and its adapters.
        """
        if self.unet is None:
            raise ValueError("IP-Adapters are in the pipeline's unet, which is None")
        ip_adapter.set_scales(unwrapped(self.unet), scale)

    def unload_ip_adapter(self) -> None:
        """Removes all IP-Adapters from the UNet, and the image encoder from this pipeline."""
        if self.unet is not None:
            ip_adapter.remove(unwrapped(self.unet))
        self.image_encoder = None

    @torch.no_grad()
    def encode_image(
        self, image: Any, device: torch.device | str | None = None, num_images_per_prompt: int = 1,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encodes i pictures for one adapter. Returns (states of the pictures, states for "no picture").

        image: see `prepare_ip_adapter_image_embeds`. The states are (i c): vectors of whole pictures, and zeros. With
        output_hidden_states they are (i l c): CLIP's states before the last layer, and those of an empty picture. If
        there is a picture for each frame, they are (f i ...). Raises ValueError if the pipeline has no image_encoder.
        """
        if self.image_encoder is None:
            raise ValueError("to read pictures, the pipeline needs its image_encoder, which is None: load it with "
                             "load_ip_adapter, or give ip_adapter_image_embeds")
        pixels = ip_adapter.pixels_of(image, self.image_encoder)
        frames = pixels.shape[1]
        pixels = rearrange(pixels, "i f c h w -> (f i) c h w").to(self._execution_device, self.image_encoder.dtype)
        with self._placed("image_encoder") as encoder:
            run = encoder.penultimate if output_hidden_states else encoder
            x = torch.cat([run(piece) for piece in pixels.split(16)])
            none = run(torch.zeros_like(pixels[:1])).expand_as(x) if output_hidden_states else torch.zeros_like(x)
            check_result(x, encoder, "the image encoder")
        x, none = (y.to(device or y.device).repeat_interleave(num_images_per_prompt, dim=0) for y in (x, none))
        if frames > 1:
            x, none = (rearrange(y, "(f i) ... -> f i ...", f=frames) for y in (x, none))
        return x, none

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """Encodes pictures for all adapters. Returns one tensor for each adapter: (n i c), or (n i l c) for some kinds.

        n is `num_images_per_prompt`; with guidance twice that, the negative half first.
        ip_adapter_image: a picture (PIL image, array, or tensor of prepared pixels) if there is one adapter. Otherwise
        a list with one entry for each adapter. An entry may be a list of pictures, which act together. Each of these
        may be a list with a picture for each frame. Then the result is (n f i ...). So [[a, b]] is two pictures for one
        adapter, and [[[a, b, c]]] is one picture that changes over three frames.
        ip_adapter_image_embeds: earlier results of this method, instead of pictures. n may also be 1, or 2 with
        guidance.
        Raises ValueError if there is not one entry for each adapter, or if an entry is something else.
        """
        read = ip_adapter.projections(unwrapped(self.unet))
        device, several = device or self._execution_device, 2 if do_classifier_free_guidance else 1
        if not read:
            raise ValueError("ip_adapter_image, ip_adapter_image_embeds: there is no IP-Adapter, load one with "
                             "load_ip_adapter")
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            raise ValueError("give ip_adapter_image or ip_adapter_image_embeds, not both")
        if ip_adapter_image_embeds is None:
            entries = list(ip_adapter_image) if isinstance(ip_adapter_image, list | tuple) else [ip_adapter_image]
            if len(entries) != len(read):
                hint = "; several pictures of one adapter are a list in that list, [[a, b]]" * (len(read) == 1)
                raise ValueError(f"ip_adapter_image has {len(entries)} entries for {len(read)} IP-Adapters{hint}")
            pairs = [self.encode_image(e, device, 1, p.reads_states) for e, p in zip(entries, read, strict=True)]
            embeds = [torch.stack([none, x][-several:]) for x, none in pairs]
        else:
            embeds = ip_adapter.check_embeds(ip_adapter_image_embeds, read, several, num_images_per_prompt)
        return [x.to(device) if len(x) == several * num_images_per_prompt
                else x.to(device).repeat_interleave(num_images_per_prompt, dim=0) for x in embeds]

    def _pictures(
        self, image: Any, embeds: Sequence[Tensor] | None, masks: Any, shape: tuple[int, ...], guided: bool
    ) -> Pictures | None:
        """The pictures of a call for its IP-Adapters. shape: of the latents (b c f h w). Raises ValueError."""
        if image is None and embeds is None:
            if masks is not None:
                raise ValueError("ip_adapter_masks: there are no pictures to mask, give ip_adapter_image")
            return None
        features = self.prepare_ip_adapter_image_embeds(image, embeds, None, shape[0], guided)
        unet = unwrapped(self.unet)
        counts = []
        for x, projection in zip(features, ip_adapter.projections(unet), strict=True):
            by_frame = x.ndim - projection.reads_states == 4
            if by_frame and x.shape[1] != shape[2]:
                raise ValueError(f"there are pictures for {x.shape[1]} frames, but the video has {shape[2]}")
            counts.append(x.shape[2 if by_frame else 1])
        fitted = [m if m is None else ip_adapter.fit_mask(m, *shape[3:], unet, self.mask_grid == "published")
                  for m in ip_adapter.check_masks(masks, counts, unet)]
        return Pictures(features, fitted)


def _take_masks(cross_attention_kwargs: Any) -> tuple[Any, Any]:
    """(masks of IP-Adapters, the other arguments)."""
    if not isinstance(cross_attention_kwargs, dict) or "ip_adapter_masks" not in cross_attention_kwargs:
        return None, cross_attention_kwargs
    rest = {name: value for name, value in cross_attention_kwargs.items() if name != "ip_adapter_masks"}
    return cross_attention_kwargs["ip_adapter_masks"], rest or None


def _in_step(what: Any, subfolder: Any, weight_name: Any) -> list[tuple[Any, Any, Any]]:
    """(path, subfolder, weight name) for each adapter. A single value, or a list of one, is the same for all."""
    lists = [[*x] if isinstance(x, list | tuple) else [x] for x in (what, subfolder, weight_name)]
    count = max(map(len, lists))
    if not all(len(x) in (1, count) for x in lists):
        raise ValueError(f"{len(lists[0])} paths, {len(lists[1])} subfolders and {len(lists[2])} weight_names do not "
                         "belong together: give one for each adapter")
    return list(zip(*(x * count if len(x) == 1 else x for x in lists), strict=True))


class AnimateDiffVideoToVideoPipeline(AnimateDiffPipeline):
    """Makes videos from texts and videos, with the components of `AnimateDiffPipeline` (SDEdit, arXiv:2108.01073)."""

    FIELDS = ("clip_skip_negative", "mask_grid", "array_resize")
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
        image_encoder: CLIPVisionModelWithProjection | None = None,
        *,
        compat: str | None = None,
        clip_skip_negative: bool | None = None,
        mask_grid: str | None = None,
        array_resize: str | None = None,
    ):
        """array_resize: how to resize arrays and tensors, "bicubic" or "nearest". PIL images are resized by Lanczos."""
        if array_resize not in (None, *RESIZES):
            raise ValueError(f"array_resize must be one of {RESIZES}, not {array_resize!r}")
        super().__init__(vae, text_encoder, tokenizer, unet, motion_adapter, scheduler, feature_extractor,
                         image_encoder, compat=compat, clip_skip_negative=clip_skip_negative, mask_grid=mask_grid)
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
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Sequence[Tensor] | None = None,
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
        """Makes `num_videos_per_prompt` new videos for each pair of video and prompt. One video may have many prompts.

        video: PIL images, arrays or tensors (see `frames.FORMS`). They are resized to height and width, or to the
        UNet's own size. Latents are possible, too: a tensor (f c h w) or (b f c h w) with the VAE's channels.
        latents: noisy latents (b c f h w), instead of `video`. The first step gets them unchanged.
        strength: the share of the steps that are made; they are the last ones. 1 keeps little of the video, 0 only
        encodes and decodes it.
        enforce_inference_steps: make exactly `num_inference_steps` steps. The grid then has more steps, so that they
        are the share `strength` of it. `latents` are then clean, and noise is added to them.
        timesteps, sigmas: the caller's own grid, if the scheduler supports it. `strength` selects its last part.
        decode_chunk_size: also the number of frames that the VAE encodes at a time.
        The other arguments and the errors are those of `AnimateDiffPipeline`.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        masks, cross_attention_kwargs = _take_masks(cross_attention_kwargs)
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
        factor = 1 if x.shape[1] == self.unet.config.in_channels else self.vae_scale_factor
        shape = (batch, self.unet.config.in_channels, x.shape[2], x.shape[3] // factor, x.shape[4] // factor)
        pictures = self._pictures(ip_adapter_image, ip_adapter_image_embeds, masks, shape, guidance_scale > 1)
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
            x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks, start, pictures)
        video = self._output(x, output_type, decode_chunk_size)
        return AnimateDiffPipelineOutput(video) if return_dict else (video,)
