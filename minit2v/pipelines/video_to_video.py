"""Video to video with ModelScope's and Zeroscope's UNet (SDEdit, arXiv:2108.01073)."""

from collections.abc import Callable, Sequence
from typing import Any, Never

from torch import Tensor

from ..techniques.frame_prompts import Interpolate
from ..techniques.free_init import NoisedVideo
from . import source
from .base import StepCallbacks, exclusive
from .checks import Generators, Prompts, check_generator, check_number
from .text_to_video import TextToVideoSDPipeline, TextToVideoSDPipelineOutput


class VideoToVideoSDPipeline(TextToVideoSDPipeline):
    """Makes videos from texts and videos, with the components of `TextToVideoSDPipeline`."""

    HINTS = {
        "num_frames": "; the video has its number of frames, and TextToVideoSDPipeline.from_pipe(pipe) needs no video",
        "image": "; a video is given as video=",
    }

    @exclusive
    def __call__(  # type: ignore[override]
        self,
        prompt: Prompts = None,
        video: Any = None,
        strength: float = 0.6,
        num_inference_steps: int = 50,
        guidance_scale: float = 15.0,
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
        height: int | None = None,
        width: int | None = None,
        callback_on_step_end: Callable[..., dict[str, Tensor] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        decode_chunk_size: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        prompt_interpolation: str | Interpolate = "linear",
        **unknown: Never,
    ) -> TextToVideoSDPipelineOutput:
        """Makes a new video for each pair of video and prompt. One video may have many prompts, and the reverse.

        video: PIL images, arrays or tensors (see `frames.FORMS`). They are resized to height and width if given.
        Latents are possible, too: a tensor (f c h w) or (b f c h w) with the VAE's channels.
        latents: noisy latents (b c f h w), instead of `video`. The first step gets them unchanged.
        strength: the share of the steps that are made; they are the last ones. 1 keeps little of the video, 0 only
        encodes and decodes it.
        timesteps, sigmas: as in text to video. `strength` selects their last part.
        The other arguments and the errors are those of `TextToVideoSDPipeline`.
        """
        callbacks = StepCallbacks(callback, callback_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        batch = self._check_call(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, num_inference_steps,
                                 guidance_scale, output_type, cross_attention_kwargs, decode_chunk_size, callbacks,
                                 unknown)
        check_number("strength", strength, 0, 1)
        check_number("eta", eta, 0, 1)
        x = source.read(self, video, latents, height, width)
        self._check_frame_texts(x.shape[2], prompt_interpolation,
                                {"prompt": prompt, "negative_prompt": negative_prompt},
                                {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds})
        batch = source.count_results(batch, x, 1, noisy=latents is not None)
        check_generator(generator, batch, self._execution_device)

        device = self._execution_device
        grid, steps = source.lay_grid(self.scheduler, num_inference_steps, strength, device, False, timesteps, sigmas)
        text, negative = self.encode_prompt(prompt, device, 1, guidance_scale > 1, negative_prompt, prompt_embeds,
                                            negative_prompt_embeds, clip_skip=clip_skip,
                                            num_frames=x.shape[2], prompt_interpolation=prompt_interpolation)
        text, negative = (v if v is None else source.spread(v, batch) for v in (text, negative))

        x, start = x.to(device), NoisedVideo(strength)
        if latents is None:
            x = source.encode_video(self, x, batch, generator, text.dtype)
            if steps:
                noise = source.draw_noise(x, generator, "(b f) c h w")
                start = NoisedVideo(strength, x, noise)
                x = self.scheduler.add_noise(x, noise, grid[:1])
        x = source.spread(x, batch)
        if steps:
            x = self.denoise(x, grid, steps, text, negative, guidance_scale, eta, generator, callbacks,
                             start)
        video = self._output(x, output_type, decode_chunk_size)
        return TextToVideoSDPipelineOutput(video) if return_dict else (video,)
