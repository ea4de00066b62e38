"""LoRAs for Stable Diffusion 1.5 with kohya's or peft's names, and the numbered layers of IP-Adapter."""

from collections.abc import Callable, Iterable
from dataclasses import replace

from . import configs, shapes
from .configs import CLIP_L, IP_ADAPTER, UNET2D
from .shapes import Config, Get
from .table import Format, Rows

# Kohya's names, `lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight`, have underscores in place of dots. The
# way back is a look-up, because names such as `to_q` have their own underscores.
LEAVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight", "alpha": "alpha"}


def kohya_name(name: str) -> str:
    """`down_blocks.0.attentions.0.proj_in.lora_A.weight` -> the name above without its prefix `lora_unet_`."""
    leaf = next(leaf for leaf in LEAVES if name.endswith(leaf))
    return f"{name.removesuffix('.' + leaf).replace('.', '_')}.{LEAVES[leaf]}"


def kohya_stems(prefix: str, modules: Iterable[str]) -> dict[str, str]:
    """{kohya's name: diffusers' name}, such as {"lora_unet_conv_in": "conv_in", ...}."""
    return {prefix + name.replace(".", "_"): name for name in modules}


# ------------------------------------------------------------------------------------------- LoRAs of some layers


def any_lora(c: Config) -> shapes.Shapes:
    """The shapes of a LoRA for some layers of a network. c["ranks"]: {layer: rank}. Without an alpha the scale is 1."""
    layers = LORA_TARGETS[c["named"]]()
    out: shapes.Shapes = {}
    for module, rank in c["ranks"].items():
        out |= shapes.lora({f"{module}.weight": layers[module]}, rank) | {f"{module}.alpha": ()}
    return out


def infer_any_lora(base: Config, get: Get) -> Config:
    ranks = {}
    for module in LORA_TARGETS[base["named"]]():
        down, up = get(f"{module}.lora_A.weight"), get(f"{module}.lora_B.weight")
        if down or up or get(f"{module}.alpha") is not None:
            ranks[module] = down[0] if down else up[1] if up else 1
    return {**base, "ranks": ranks}


def _unet_layers() -> shapes.Shapes:
    return {n.removesuffix(".weight"): s for n, s in shapes.unet2d(UNET2D).items() if len(s) > 1}


def _text_layers() -> shapes.Shapes:
    return {n.removesuffix(".weight"): s for n, s in shapes.clip_text(CLIP_L).items() if len(s) > 1 and ".layers." in n}


LORA_TARGETS: dict[str, Callable[[], shapes.Shapes]] = {"unet": _unet_layers, "text_encoder": _text_layers}

PEFT_UNET = Format("lora", any_lora, infer_any_lora, {"": {"named": "unet", "ranks": {}}},
                   optional={"{*}.alpha": ""}, written="unet.")  # fmt: skip
PEFT_TEXT = replace(PEFT_UNET, known={"": {"named": "text_encoder", "ranks": {}}}, written="text_encoder.")
KOHYA_UNET = replace(PEFT_UNET, spell=kohya_name)
KOHYA_TEXT = replace(PEFT_TEXT, spell=kohya_name)

# --------------------------------------------------------------------------------------------------------- IP-Adapter

# The k-th attention to the text (in the order down, up, mid) has the number 2k+1, because self-attentions count, too.
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
IMAGE_ENCODER = Format("image_encoder", shapes.clip_image, configs.infer_clip_image,
                       {"CLIP ViT-H/14": configs.CLIP_IMAGE, "CLIP ViT-bigG/14": configs.CLIP_IMAGE_BIG_G},
                       optional={"vision_model.embeddings.position_ids": "I64"})
