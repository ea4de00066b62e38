"""Recognises families of models that minit2v cannot run, so that an error can name them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SDXL, SD2, SD3 = "Stable Diffusion XL", "Stable Diffusion 2.x", "Stable Diffusion 3"
SVD, HOTSHOT, LCM = "Stable Video Diffusion", "Hotshot-XL", "a latent consistency model (LCM)"
INPAINTING = "an inpainting model (9 input channels)"
CHANNELS = {5: "a model for images and depth (5 input channels)", 9: INPAINTING,
            8: "a model with an image as input, such as InstructPix2Pix (8 input channels)"}  # fmt: skip

WIDTH = 320  # output channels of the first convolution of Stable Diffusion
# The beginning of a pipeline's class in model_index.json -> its family.
PIPELINES = {
    "AnimateDiffSDXL": "AnimateDiff for Stable Diffusion XL",
    "CogVideoX": "CogVideoX",
    "Flux": "Flux",
    "HotshotXL": HOTSHOT,
    "HunyuanVideo": "HunyuanVideo",
    "I2VGenXL": "I2VGen-XL",
    "LTX": "LTX-Video",
    "LatentConsistencyModel": LCM,
    "PixArt": "PixArt",
    "StableDiffusion3": SD3,
    "StableDiffusionDepth": CHANNELS[5],
    "StableDiffusionInpaint": INPAINTING,
    "StableDiffusionInstructPix2Pix": CHANNELS[8],
    "StableDiffusionXL": SDXL,
    "StableVideoDiffusion": SVD,
    "Wan": "Wan",
}
# Patterns in names of tensors that only these families have. The first one that fits counts.
NAMES = (
    (r"\.time_stack\.|\.temporal_res_block\.", SVD),
    (r"\.temporal_attentions\.", HOTSHOT),
    (r"(^|\n)lora_te2_", f"a LoRA of {SDXL}"),
    (r"(^|\n)conditioner\.embedders\.|(^|\n)add_embedding\.|input_blocks\.4\.1\.transformer_blocks\.1\.", SDXL),
    (r"time_embed(ding)?\.cond_proj\.", LCM),
    (r"\bjoint_blocks\.", SD3),
    (r"\bdouble_blocks\.", "a model of the Flux family"),
)


def of_index(index: Mapping[str, Any]) -> str:
    """The family of a model_index.json, or "" if minit2v may be able to run it."""
    name = str(index.get("_class_name"))
    return next((family for begin, family in PIPELINES.items() if name.startswith(begin)), "")


def of_unet(config: Mapping[str, Any]) -> str:
    """The family of a UNet's config.json, or "" if minit2v may be able to run it."""
    cls = config.get("_class_name")
    if cls == "UNetSpatioTemporalConditionModel":
        return SVD
    if config.get("addition_embed_type") == "text_time":
        return HOTSHOT if cls == "UNet3DConditionModel" else SDXL
    if cls not in (None, "UNet2DConditionModel"):
        return ""
    if config.get("time_cond_proj_dim") is not None:
        return LCM
    if config.get("use_linear_projection"):
        return SD2
    widths = config.get("block_out_channels", [WIDTH])
    return _of_channels(config.get("in_channels"), widths[0] if isinstance(widths, list | tuple) and widths else 0)


def _of_channels(channels: Any, width: Any) -> str:
    """The family for these input channels, or "". A convolution of another width may be a fork's, and is accepted."""
    return CHANNELS.get(channels, "") if type(channels) is int and width == WIDTH else ""


def of_header(header: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """The family of a checkpoint with this header, {name: (shape, dtype)}, or "" if minit2v may be able to run it.

    A complete file of Stable Diffusion 2 gives "", because ModelScope uses its VAE.
    """
    text = "\n".join(header)
    for sign, family in NAMES:
        if re.search(sign, text):
            return family
    if "temopral_conv" in text or "temp_convs" in text or "motion_modules" in text:
        return ""
    for prefix in ("", "model.diffusion_model."):
        for first, inner in (("conv_in", "down_blocks.0.attentions.0"), ("input_blocks.0.0", "input_blocks.1.1")):
            shape = _shape(header, f"{prefix}{first}.weight")
            if len(shape) != 4 or not any(name.startswith(f"{prefix}time_embed") for name in header):
                continue
            if family := _of_channels(shape[1], shape[0]):
                return family
            text_width = _shape(header, f"{prefix}{inner}.transformer_blocks.0.attn2.to_k.weight")[1:]
            is_linear = len(_shape(header, f"{prefix}{inner}.proj_in.weight")) == 2
            if is_linear and list(text_width) == [1024] and "first_stage_model." not in text:
                return SD2
    return ""


def _shape(header: Mapping[str, tuple[Sequence[int], str]], name: str) -> Sequence[int]:
    return header[name][0] if name in header else ()


def refuse(family: str, what: object = "this") -> None:
    """ValueError if there is a family. what: the file or model, for the message."""
    if family:
        raise ValueError(f"{what} is {family}, which minit2v cannot run; it runs image models of Stable Diffusion 1.x, "
                         "ModelScope and Zeroscope")  # fmt: skip
