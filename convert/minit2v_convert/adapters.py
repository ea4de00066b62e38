"""LoRAs of Stable Diffusion 1.5 in kohya's names and in peft's, and IP-Adapter's numbers."""

from collections.abc import Iterable
from dataclasses import replace

from . import shapes
from .shapes import IP_ADAPTER, UNET2D
from .table import Format, Rows

# Kohya's names, `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, have underscores for dots. The way
# back cannot be guessed, since `to_q` has one of its own: it is looked up.
LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}


def kohya_name(name: str) -> str:
    """`down_blocks.0.attentions.0.proj_in.lora_A.weight` -> as above, without what it begins with."""
    leaf = next(leaf for leaf in LEAVES if name.endswith(leaf))
    return f"{name.removesuffix('.' + leaf).replace('.', '_')}.{LEAVES[leaf]}"


def kohya_stems(prefix: str, modules: Iterable[str]) -> dict[str, str]:
    """{"lora_unet_conv_in": "conv_in", ...}"""
    return {prefix + name.replace(".", "_"): name for name in modules}


PEFT_UNET = Format("lora", shapes.any_lora, shapes.infer_any_lora, {"": {"named": "unet", "ranks": {}}},
                   optional={"{*}.alpha": ""}, written="unet.")  # fmt: skip
PEFT_TEXT = replace(PEFT_UNET, known={"": {"named": "text_encoder", "ranks": {}}}, written="text_encoder.")
KOHYA_UNET = replace(PEFT_UNET, spell=kohya_name)
KOHYA_TEXT = replace(PEFT_TEXT, spell=kohya_name)

# The k-th attention to the text (down, up, mid) has the number 2k+1: the attentions to the image itself count too.
IP_ADAPTER_ROWS: Rows = [
    *[(f"ip_adapter.{2 * k + 1}.to_{{x}}.weight", f"{name}.processor.to_{{x}}.0.weight")
      for k, name in enumerate(shapes.attended(shapes.unet2d(UNET2D)))],
    ("image_proj.{*}", "image_proj.{*}"),
]  # fmt: skip
IP_KNOWN = {
    "sd15": IP_ADAPTER,
    "plus, sd15": {**IP_ADAPTER, "image_dim": 1280, "tokens": 16, "resampler": 4},
}
IP = Format("ip_adapter", shapes.ip_adapter, lambda base, get: base, IP_KNOWN, IP_ADAPTER_ROWS)
IMAGE_ENCODER = Format("image_encoder", shapes.clip_image, lambda base, get: base,
                       {"CLIP ViT-H/14": shapes.CLIP_IMAGE}, optional={"vision_model.embeddings.position_ids": "I64"})
