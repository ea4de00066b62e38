"""The layout of CompVis' latent diffusion: UNet, VAE and text encoder of Stable Diffusion 1.x in single files.

The UNet's blocks are in two flat lists, with `n` entries for each level. In the encoder these are the ResBlocks and the
downsampling layer. In the decoder there is one ResBlock more, and the last entry also has the upsampling layer.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

from . import configs, shapes
from .configs import CLIP_L, UNET2D, VAE
from .shapes import POSITION_IDS, Config
from .table import CONV2D, SAME, Format, Numbers, Rows, below

WAYS: Rows = [
    ("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
    ("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
    ("input_blocks.0.0.{p}", "conv_in.{p}"),
    ("out.0.{p}", "conv_norm_out.{p}"),
    ("out.2.{p}", "conv_out.{p}"),
]
RES: Rows = [
    ("in_layers.0.{p}", "norm1.{p}"),
    ("in_layers.2.{p}", "conv1.{p}"),
    ("emb_layers.1.{p}", "time_emb_proj.{p}"),
    ("out_layers.0.{p}", "norm2.{p}"),
    ("out_layers.3.{p}", "conv2.{p}"),
]
SKIP: Rows = [("skip_connection.{p}", "conv_shortcut.{p}")]

UNET_ROWS: Rows = [
    *WAYS,
    *below("input_blocks.{n*i+j+1}.0.", "down_blocks.{i}.resnets.{j}.", [*RES, *SKIP]),
    ("input_blocks.{n*i+j+1}.1.{*}", "down_blocks.{i}.attentions.{j}.{*}"),
    ("input_blocks.{n*i+n}.0.op.{p}", "down_blocks.{i}.downsamplers.0.conv.{p}"),
    *below("middle_block.0.", "mid_block.resnets.0.", RES),
    ("middle_block.1.{*}", "mid_block.attentions.0.{*}"),
    *below("middle_block.2.", "mid_block.resnets.1.", RES),
    *below("output_blocks.{n*i+j}.0.", "up_blocks.{i}.resnets.{j}.", [*RES, *SKIP]),
    ("output_blocks.{n*i+j}.1.{*}", "up_blocks.{i}.attentions.{j}.{*}"),
    ("output_blocks.{n*i+n-1}.{up[i]}.conv.{p}", "up_blocks.{i}.upsamplers.0.conv.{p}"),
]


def unet_numbers(c: Config) -> Numbers:
    attends = [kind.startswith("CrossAttn") for kind in c["up_block_types"]]
    return {"n": c["layers_per_block"] + 1, "up": [2 if a else 1 for a in attends]}


def glance(names: Iterable[str]) -> Numbers:
    """n is the index of the first downsampling layer."""
    found = (re.fullmatch(r"input_blocks\.(\d+)\.(0\.)?op\.\w+", name) for name in names)
    return {"n": min((int(m[1]) for m in found if m), default=3)}


UNET = Format("unet", shapes.unet2d, configs.infer_unet, {"Stable Diffusion 1.5": UNET2D}, UNET_ROWS, unet_numbers,
              glance)  # fmt: skip
EMA = replace(UNET, spell=lambda name: "model_ema." + f"diffusion_model.{name}".replace(".", ""))

# ----------------------------------------------------------------------------------------------------------------- VAE

VAE_RES: Rows = [
    *[(f"{n}.{{p}}", f"{n}.{{p}}") for n in ("norm1", "conv1", "norm2", "conv2")],
    ("nin_shortcut.{p}", "conv_shortcut.{p}"),
]
VAE_ATTENTION: Rows = [
    ("norm.{p}", "group_norm.{p}"),
    *[(f"{n}.weight", f"to_{n}.weight", CONV2D) for n in "qkv"],
    *[(f"{n}.bias", f"to_{n}.bias") for n in "qkv"],
    ("proj_out.weight", "to_out.0.weight", CONV2D),
    ("proj_out.bias", "to_out.0.bias"),
]
VAE_ROWS: Rows = [
    *below("{half}.mid.block_1.", "{half}.mid_block.resnets.0.", VAE_RES[:-1]),
    *below("{half}.mid.attn_1.", "{half}.mid_block.attentions.0.", VAE_ATTENTION),
    *below("{half}.mid.block_2.", "{half}.mid_block.resnets.1.", VAE_RES[:-1]),
    *below("encoder.down.{i}.block.{j}.", "encoder.down_blocks.{i}.resnets.{j}.", VAE_RES),
    ("encoder.down.{i}.downsample.conv.{p}", "encoder.down_blocks.{i}.downsamplers.0.conv.{p}"),
    *below("decoder.up.{last-i}.block.{j}.", "decoder.up_blocks.{i}.resnets.{j}.", VAE_RES),
    ("decoder.up.{last-i}.upsample.conv.{p}", "decoder.up_blocks.{i}.upsamplers.0.conv.{p}"),
    ("{half}.norm_out.{p}", "{half}.conv_norm_out.{p}"),
    ("{half}.{conv}.{p}", "{half}.{conv}.{p}"),  # conv_in, conv_out
    ("{conv}.{p}", "{conv}.{p}"),  # quant_conv, post_quant_conv
]
AUTOENCODER = Format("vae", shapes.vae, configs.infer_vae, {"Stable Diffusion's": VAE}, VAE_ROWS,
                     numbers=lambda c: {"last": len(c["block_out_channels"]) - 1})  # fmt: skip

# Names of the attention in diffusers before 0.17. One of two files in the folder of Stable Diffusion 1.5 has them.
OLD_VAE_ROWS: Rows = [
    *[(f"{{half}}.mid_block.attentions.0.{old}.{{p}}", f"{{half}}.mid_block.attentions.0.{new}.{{p}}")
      for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))],
    *SAME,
]  # fmt: skip
OLD_AUTOENCODER = replace(AUTOENCODER, rows=OLD_VAE_ROWS)

# An old conversion script leaves diffusers' new names of the attention between the authors' names.
HALF_OLD_VAE_ROWS: Rows = [
    *below("{half}.mid.attn_1.", "{half}.mid_block.attentions.0.", [
        (f"{n}.{p}", f"{n}.{p}", *[CONV2D] * (p == "weight"))
        for n in ("to_q", "to_k", "to_v", "to_out.0") for p in ("weight", "bias")]),
    *VAE_ROWS,
]  # fmt: skip
HALF_OLD_AUTOENCODER = replace(AUTOENCODER, rows=HALF_OLD_VAE_ROWS)

# -------------------------------------------------------------------------------------------------------- text encoder

IDS = {POSITION_IDS: "I64"}  # 0, 1, 2, ...; useless in fp16 merges, where they are rounded
TEXT = Format("text_encoder", shapes.clip_text, configs.infer_clip, {"CLIP ViT-L/14": CLIP_L}, optional=IDS)
BARE_TEXT = replace(TEXT, rows=[("{*}", "text_model.{*}")])  # in some merged models

# --------------------------------------------------------------------------------------------- what else is in the file

SCHEDULE = "the noise schedule, which the scheduler computes from its config"
BUFFERS = {
    name: SCHEDULE
    for name in (
        "betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
        "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
    )
}  # fmt: skip
COUNTERS = {name: "a counter of the trainer's moving average" for name in ("model_ema.decay", "model_ema.num_updates")}
AVERAGE = {"model_ema.{*}": "the moving average of the UNet's weights, taken instead of them with ema=True"}
PLACES = ("", "transformer.", "transformer.text_model.")
DREAMBOOTH = {
    "embedding_manager.{*}": "words of textual inversion, which belong in separate files",
    **{f"cond_stage_model.{place}logit_scale": "only for the contrastive loss" for place in PLACES},
    **{f"cond_stage_model.{place}text_projection{end}": "after the text encoder's last layer, not used"
       for place in PLACES for end in ("", ".weight")},
    **dict.fromkeys(("logvar", "lvlb_weights"), "only for the training loss"),
}  # fmt: skip
LOSS = {"loss.{*}": "the discriminator and the perceptual loss: only training needs them"}
UNUSED = {
    **BUFFERS, **COUNTERS,
    "model.{*}": "the UNet of Stable Diffusion 2: ModelScope reads only the VAE of this file",
    "model_ema.{*}": "a moving average of the UNet: ModelScope reads only the VAE of this file",
    "cond_stage_model.{*}": "the text encoder of Stable Diffusion 2: ModelScope reads only the VAE of this file",
}  # fmt: skip
