"""The layout of ModelScope's text-to-video, which Zeroscope also uses.

`text2video_pytorch_model.pth` is the UNet (UNetSD). `open_clip_pytorch_model.bin` is the text encoder. The third file,
`VQGAN_autoencoder.pth`, has the layout of latent diffusion (`ldm`).
"""

from . import configs, shapes
from .configs import CLIP_H, UNET3D
from .ldm import IDS, RES, SKIP, WAYS, glance, unet_numbers
from .shapes import Config, Get
from .table import CONV1D, Format, Numbers, Rows, below

TEMPORAL: Rows = [  # diffusers has linear layers, the authors have convolutions of size 1
    ("proj_in.weight", "proj_in.weight", CONV1D),
    ("proj_out.weight", "proj_out.weight", CONV1D),
    ("{*}", "{*}"),
]
UNETSD_ROWS: Rows = [
    *WAYS,
    *below("input_blocks.0.1.", "transformer_in.", TEMPORAL),
    *below("input_blocks.{n*i+j+1}.0.", "down_blocks.{i}.resnets.{j}.", [*RES, *SKIP]),
    ("input_blocks.{n*i+j+1}.0.temopral_conv.{*}", "down_blocks.{i}.temp_convs.{j}.{*}"),  # the authors' spelling
    ("input_blocks.{n*i+j+1}.1.{*}", "down_blocks.{i}.attentions.{j}.{*}"),
    *below("input_blocks.{n*i+j+1}.2.", "down_blocks.{i}.temp_attentions.{j}.", TEMPORAL),
    ("input_blocks.{n*i+n}.op.{p}", "down_blocks.{i}.downsamplers.0.conv.{p}"),
    *below("middle_block.0.", "mid_block.resnets.0.", RES),
    ("middle_block.0.temopral_conv.{*}", "mid_block.temp_convs.0.{*}"),
    ("middle_block.1.{*}", "mid_block.attentions.0.{*}"),
    *below("middle_block.2.", "mid_block.temp_attentions.0.", TEMPORAL),
    *below("middle_block.3.", "mid_block.resnets.1.", RES),
    ("middle_block.3.temopral_conv.{*}", "mid_block.temp_convs.1.{*}"),
    *below("output_blocks.{n*i+j}.0.", "up_blocks.{i}.resnets.{j}.", [*RES, *SKIP]),
    ("output_blocks.{n*i+j}.0.temopral_conv.{*}", "up_blocks.{i}.temp_convs.{j}.{*}"),
    ("output_blocks.{n*i+j}.1.{*}", "up_blocks.{i}.attentions.{j}.{*}"),
    *below("output_blocks.{n*i+j}.2.", "up_blocks.{i}.temp_attentions.{j}.", TEMPORAL),
    ("output_blocks.{n*i+n-1}.{up[i]}.conv.{p}", "up_blocks.{i}.upsamplers.0.conv.{p}"),
]


def unetsd_numbers(c: Config) -> Numbers:
    """As in latent diffusion, but with the temporal attention before the upsampling layer."""
    numbers = unet_numbers(c)
    return {**numbers, "up": [3 if up == 2 else 1 for up in numbers["up"]]}


UNETSD = Format("unet", shapes.unet3d, configs.infer_unet, {"ModelScope or Zeroscope": UNET3D}, UNETSD_ROWS,
                unetsd_numbers, glance)  # fmt: skip

OPEN_CLIP_ROWS: Rows = [
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    *below("transformer.resblocks.{i}.", "text_model.encoder.layers.{i}.", [
        ("ln_1.{p}", "layer_norm1.{p}"),
        ("attn.in_proj_{p}", "self_attn.{q,k,v}_proj.{p}"),
        ("attn.out_proj.{p}", "self_attn.out_proj.{p}"),
        ("ln_2.{p}", "layer_norm2.{p}"),
        ("mlp.c_fc.{p}", "mlp.fc1.{p}"),
        ("mlp.c_proj.{p}", "mlp.fc2.{p}"),
    ]),
    ("ln_final.{p}", "text_model.final_layer_norm.{p}"),
]  # fmt: skip


def open_clip_shapes(c: Config) -> shapes.Shapes:
    return {name: shape for name, shape in shapes.clip_text(c).items() if name not in IDS}


def infer_open_clip(base: Config, get: Get) -> Config:
    """The config for diffusers, with one block less, because the UNet was trained on the input of the last block."""
    found = configs.infer_clip(base, get)
    return {**found, "num_hidden_layers": found["num_hidden_layers"] - 1}


OPEN_CLIP = Format(
    "text_encoder", open_clip_shapes, infer_open_clip, {"OpenCLIP ViT-H/14": CLIP_H}, OPEN_CLIP_ROWS,
    numbers=lambda c: {"last": c["num_hidden_layers"]},
    ignored={
        "visual.{*}": "the image encoder, which text-to-video does not use",
        "transformer.resblocks.{last}.{*}": "the last block, because the UNet takes its input",
        "text_projection": "after the last block",
        "logit_scale": "only for the contrastive loss",
    },
)  # fmt: skip
OPEN_CLIP_LOST = (
    "open_clip_pytorch_model.bin cannot be made from diffusers' text encoder, which lacks the image encoder and the "
    "last block: keep the authors' file"
)
