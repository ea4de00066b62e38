"""IP-Adapter's numbers and kohya's names: tables over the names of Stable Diffusion 1.5."""

from collections.abc import Iterable

from . import shapes
from .shapes import IP_ADAPTER, UNET2D
from .table import Format, Rows

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


def kohya_stems(prefix: str, weights: Iterable[str]) -> dict[str, str]:
    """{"lora_unet_conv_in": "conv_in", ...}: every linear layer and convolution of these names, dots as underscores.

    The way back cannot be guessed, since `to_q` has an underscore of its own: names are looked up here.
    """
    modules = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return {f"{prefix}_{name.replace('.', '_')}": name for name in modules}


def kohya_unet() -> dict[str, str]:
    named = shapes.unet2d(UNET2D)
    return kohya_stems("lora_unet", [name for name, shape in named.items() if len(shape) > 1])


def kohya_text() -> dict[str, str]:
    named = shapes.clip_text(shapes.CLIP_L)
    layers = [name for name, shape in named.items() if len(shape) > 1 and ".layers." in name]
    return kohya_stems("lora_te", layers)
