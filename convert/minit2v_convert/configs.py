"""The published `config.json`s, and functions `infer_*` that find the fields of a config from the shapes in a file.

Shapes do not tell the number of heads in an attention, the number of groups in a norm, or the image size. For a network
of another size than the published ones, these fields get the published values, unless a config is given.
"""

import math
from collections.abc import Iterator
from typing import Any

from .shapes import Config, Get, Shape

UNET2D: Config = {
    "_class_name": "UNet2DConditionModel", "act_fn": "silu", "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "downsample_padding": 1,
    "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
UNET3D: Config = {
    "_class_name": "UNet3DConditionModel", "act_fn": "silu", "attention_head_dim": 64,
    "block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock3D"] * 3 + ["DownBlock3D"], "downsample_padding": 1, "in_channels": 4,
    "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4,
    "sample_size": 32, "up_block_types": ["UpBlock3D"] + ["CrossAttnUpBlock3D"] * 3,
}  # fmt: skip
VAE: Config = {
    "_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3, "latent_channels": 4, "layers_per_block": 2,
    "norm_num_groups": 32, "out_channels": 3, "sample_size": 512, "scaling_factor": 0.18215,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L: Config = {
    "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0, "eos_token_id": 2,
    "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0, "initializer_range": 0.02,
    "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77, "model_type": "clip_text_model",
    "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
CLIP_H: Config = {
    **CLIP_L, "hidden_act": "gelu", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
    "num_hidden_layers": 23, "projection_dim": 512,
}  # fmt: skip
MOTION: Config = {
    "_class_name": "MotionAdapter", "block_out_channels": [320, 640, 1280, 1280], "motion_layers_per_block": 2,
    "motion_max_seq_length": 32, "motion_mid_block_layers_per_block": 1, "motion_norm_num_groups": 32,
    "motion_num_attention_heads": 8, "use_motion_mid_block": True,
}  # fmt: skip
SPARSE: Config = {
    **UNET2D, "_class_name": "SparseControlNetModel", "concat_conditioning_mask": True, "conditioning_channels": 3,
    "conditioning_embedding_out_channels": [16, 32, 96, 256], "controlnet_conditioning_channel_order": "rgb",
    "down_block_types": ["CrossAttnDownBlockMotion"] * 3 + ["DownBlockMotion"], "motion_max_seq_length": 32,
    "motion_num_attention_heads": 8, "use_simplified_condition_embedding": False,
}  # fmt: skip
UNET_MOTION: Config = {
    "_class_name": "UNetMotionModel", "act_fn": "silu", "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlockMotion"] * 3 + ["DownBlockMotion"],
    "downsample_padding": 1, "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1,
    "motion_max_seq_length": 32, "motion_num_attention_heads": 8, "norm_eps": 1e-05, "norm_num_groups": 32,
    "num_attention_heads": 8, "out_channels": 4, "sample_size": 64,
    "up_block_types": ["UpBlockMotion"] + ["CrossAttnUpBlockMotion"] * 3, "use_motion_mid_block": True,
}  # fmt: skip
CLIP_IMAGE: Config = {
    "architectures": ["CLIPVisionModelWithProjection"], "hidden_act": "gelu", "hidden_size": 1280, "image_size": 224,
    "intermediate_size": 5120, "num_attention_heads": 16, "num_hidden_layers": 32, "patch_size": 14,
    "projection_dim": 1024,
}  # fmt: skip
CLIP_IMAGE_BIG_G: Config = {
    **CLIP_IMAGE, "hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "projection_dim": 1280,
}  # fmt: skip
IP_ADAPTER: Config = {**UNET2D, "image_dim": 1024, "tokens": 4, "resampler": 0}


def _numbered(get: Get, template: str, leaves: tuple[str, ...]) -> Iterator[Shape]:
    """The shapes at `template` with {} = 0, 1, ..., until one is missing. leaves: alternatives for its end."""
    for n in range(64):  # more than in any published network; a limit for damaged files
        shape = _first(get, *(template.format(n) + leaf for leaf in leaves))
        if not shape:
            return
        yield shape


RES_BLOCK = ("conv1.bias", "conv2.bias", "norm2.weight", "norm2.bias", "conv2.weight")
TRANSFORMER = ("norm.weight", "norm.bias", "proj_out.bias", "proj_out.weight")


def _first(get: Get, *names: str) -> Shape | None:
    return next((shape for name in names if (shape := get(name))), None)


def infer_unet(base: Config, get: Get) -> Config:
    """The config of a UNet for images or videos. Fields that shapes do not tell are those of `base`, a published one.
    """
    kind = base["down_block_types"][0].removeprefix("CrossAttnDownBlock")
    widths = [s[0] for s in _numbered(get, "down_blocks.{}.resnets.0.", RES_BLOCK)]
    attend = [any(True for _ in _numbered(get, f"down_blocks.{n}.attentions.{{}}.", TRANSFORMER))
              for n in range(len(widths))]  # fmt: skip
    places = [f"down_blocks.{n}.attentions.0" for n, there in enumerate(attend) if there] + ["mid_block.attentions.0"]
    cross = _first(get, *(f"{p}.transformer_blocks.0.attn2.to_{x}.weight" for p in places for x in "kv"))
    found: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.resnets.{}.", RES_BLOCK)),
        "down_block_types": [f"{'CrossAttn' * a}DownBlock{kind}" for a in attend],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock{kind}" for a in reversed(attend)],
    }
    if cross:
        found["cross_attention_dim"] = cross[1]
    if shape := get("conv_in.weight"):
        found["in_channels"] = shape[1]
    if shape := _first(get, "conv_out.weight", "conv_out.bias"):
        found["out_channels"] = shape[0]
    if shape := _first(get, "transformer_in.proj_in.weight", "transformer_in.proj_in.bias"):
        found["attention_head_dim"] = shape[0] // 8  # it has 8 heads, with the same width as in the other attentions
    return {**base, **found}


def infer_motion(base: Config, get: Get) -> Config:
    widths = [s[0] for s in _numbered(get, "down_blocks.{}.motion_modules.0.", TRANSFORMER)]
    rows = (get(f"{way}_blocks.{n}.motion_modules.0.transformer_blocks.0.pos_embed.pe")
            for way in ("down", "up") for n in range(len(widths)))  # fmt: skip
    rows = next(filter(None, rows), None)
    return {
        **base,
        "block_out_channels": widths,
        "motion_layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.motion_modules.{}.", TRANSFORMER)),
        "use_motion_mid_block": any(True for _ in _numbered(get, "mid_block.motion_modules.{}.", TRANSFORMER)),
        **({"motion_max_seq_length": rows[1]} if rows and len(rows) == 3 else {}),
    }


def infer_unet_motion(base: Config, get: Get) -> Config:
    found = {**infer_motion(base, get), **infer_unet(base, get)}
    return {name: value for name, value in found.items() if name != "motion_layers_per_block"}


def infer_sparse(base: Config, get: Get) -> Config:
    found = infer_unet(base, get)
    simple = get("controlnet_cond_embedding.weight")
    channels = simple or get("controlnet_cond_embedding.conv_in.weight")
    return {**found, "use_simplified_condition_embedding": simple is not None,
            "conditioning_channels": channels[1] - 1 if channels else 3}  # fmt: skip


def infer_vae(base: Config, get: Get) -> Config:
    widths = [s[0] for s in _numbered(get, "encoder.down_blocks.{}.resnets.0.", RES_BLOCK)]
    found: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": sum(1 for _ in _numbered(get, "encoder.down_blocks.0.resnets.{}.", RES_BLOCK)),
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    if shape := _first(get, "post_quant_conv.weight", "post_quant_conv.bias"):
        found["latent_channels"] = shape[0]
    if shape := get("encoder.conv_in.weight"):
        found["in_channels"] = found["out_channels"] = shape[1]
    return {**base, **found}


def infer_clip(base: Config, get: Get) -> Config:
    layers = list(_numbered(get, "text_model.encoder.layers.{}.", ("layer_norm1.weight", "layer_norm2.weight")))
    found: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if layers:
        found |= {"hidden_size": layers[0][0], "num_attention_heads": max(1, layers[0][0] // 64)}
    if shape := _first(get, *(f"text_model.encoder.layers.0.mlp.fc1.{p}" for p in ("bias", "weight"))):
        found["intermediate_size"] = shape[0]
    if shape := get("text_model.embeddings.token_embedding.weight"):
        found["vocab_size"] = shape[0]
    if shape := get("text_model.embeddings.position_embedding.weight"):
        found["max_position_embeddings"] = shape[0]
    return {**base, **found}


def infer_clip_image(base: Config, get: Get) -> Config:
    layers = list(_numbered(get, "vision_model.encoder.layers.{}.", ("layer_norm1.weight", "layer_norm2.weight")))
    found: dict[str, Any] = {"num_hidden_layers": len(layers)}
    if layers and layers[0][0] != base["hidden_size"]:
        found |= {"hidden_size": layers[0][0], "num_attention_heads": max(1, layers[0][0] // 64)}
    if shape := _first(get, *(f"vision_model.encoder.layers.0.mlp.fc1.{p}" for p in ("bias", "weight"))):
        found["intermediate_size"] = shape[0]
    if (shape := get("vision_model.embeddings.patch_embedding.weight")) and len(shape) == 4:
        found["patch_size"] = shape[2]
        if rows := get("vision_model.embeddings.position_embedding.weight"):
            found["image_size"] = shape[2] * math.isqrt(max(0, rows[0] - 1))
    if shape := get("visual_projection.weight"):
        found["projection_dim"] = shape[0]
    return {**base, **found}


# The fields of a config that can be inferred from shapes.
SAID = ("block_out_channels", "layers_per_block", "motion_layers_per_block", "in_channels", "out_channels",
        "latent_channels", "cross_attention_dim", "use_motion_mid_block", "hidden_size", "intermediate_size",
        "num_hidden_layers", "vocab_size", "max_position_embeddings", "patch_size", "image_size")  # fmt: skip


def said(config: Config) -> Config:
    """The fields that shapes also tell, in a common form, to compare two configs."""
    found: dict[str, Any] = {name: config[name] for name in SAID if name in config}
    if "UNet3D" in str(config.get("_class_name")) and "attention_head_dim" in config:
        found["attention_head_dim"] = config["attention_head_dim"]
    for name, value in found.items():
        if isinstance(value, tuple | list) and name.endswith("layers_per_block") and value[1:] == value[:-1] != value:
            found[name] = value[0]
    for name in ("down_block_types", "up_block_types"):
        if isinstance(config.get(name), tuple | list) and "latent_channels" not in found:
            found[f"attention in {name}"] = [str(kind).startswith("CrossAttn") for kind in config[name]]
    return found


def told(config: Config) -> Config:
    """The fields of an inferred config that come from shapes, and not from the published one."""
    kind = ("attention_head_dim",) * ("UNet3D" in str(config.get("_class_name")))
    return {n: config[n] for n in (*SAID, *kind, "down_block_types", "up_block_types") if n in config}


def unfit(config: Config) -> str:
    """The reason why heads or groups do not fit the widths, or ""."""
    widths = [config["hidden_size"]] if "hidden_size" in config else list(config.get("block_out_channels", ()))
    kinds = config.get("down_block_types", ["CrossAttn"] * len(widths))
    attending = [w for w, kind in zip(widths, kinds, strict=False) if str(kind).startswith("CrossAttn")] + widths[-1:]
    for name, among in (("norm_num_groups", widths), ("motion_norm_num_groups", widths),
                        ("attention_head_dim", attending), ("num_attention_heads", attending),
                        ("motion_num_attention_heads", widths)):  # fmt: skip
        if not isinstance(n := config.get(name), int):
            continue
        if n < 1:
            return f"{name} must be at least 1, not {n}"
        if odd := next((w for w in among if w % n), None):
            return f"{name} {n} does not divide {odd}"
    return ""


LORA = tuple(f"transformer_blocks.0.attn{n}.to_{x}.lora_B.weight" for n in (1, 2) for x in ("q", "k", "v", "out.0"))


def infer_motion_lora(base: Config, get: Get) -> Config:
    widths = list(_numbered(get, "down_blocks.{}.motion_modules.0.", LORA))
    return {
        **base,
        "block_out_channels": [s[0] for s in widths],
        "motion_layers_per_block": sum(1 for _ in _numbered(get, "down_blocks.0.motion_modules.{}.", LORA)),
        "use_motion_mid_block": any(True for _ in _numbered(get, "mid_block.motion_modules.{}.", LORA)),
        **({"rank": widths[0][1]} if widths else {}),
    }


def infer_spatial_lora(base: Config, get: Get) -> Config:
    """The config of a spatial LoRA. Its widths are Stable Diffusion's, because it has no layers in the last level."""
    rank = next(_numbered(get, "down_blocks.0.attentions.{}.", LORA), None)
    return {**base, "rank": rank[1]} if rank else base
