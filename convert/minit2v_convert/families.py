"""Other families of models: known by what their files say, so that an error can name them. They are not run here."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

SDXL, SD2, SD3 = "Stable Diffusion XL", "Stable Diffusion 2.x", "Stable Diffusion 3"
SVD, HOTSHOT, LCM = "Stable Video Diffusion", "Hotshot-XL", "a latent consistency model (LCM)"
INPAINTING = "an inpainting model (9 channels in)"
CHANNELS = {5: "a model of images and depth (5 channels in)", 9: INPAINTING,
            8: "a model that is given an image, such as InstructPix2Pix (8 channels in)"}  # fmt: skip

WIDTH = 320  # channels behind the first convolution of Stable Diffusion
# The first letters of a pipeline's class in model_index.json.
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
# What only their networks have in names of tensors, the first that fits.
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
    """The family that a model_index.json speaks of, "" where it may be one that is run here."""
    name = str(index.get("_class_name"))
    return next((family for begin, family in PIPELINES.items() if name.startswith(begin)), "")


def of_unet(config: Mapping[str, Any]) -> str:
    """The family of a UNet's config.json, "" where it may be one that is run here."""
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
    """The family of a first convolution, where it is as wide as the published models': a fork's own is not refused."""
    return CHANNELS.get(channels, "") if type(channels) is int and width == WIDTH else ""


def of_header(header: Mapping[str, tuple[Sequence[int], str]]) -> str:
    """The family of a file of weights, from its header: name -> (shape, dtype). "" where it may be one run here.

    Not of a whole file of Stable Diffusion 2, of which ModelScope took the VAE.
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
    """ValueError that says what it is, where it is of another family."""
    if family:
        raise ValueError(f"{what} is {family}, which is not run here; image models of Stable Diffusion 1.x, ModelScope "
                         "and Zeroscope are")  # fmt: skip
