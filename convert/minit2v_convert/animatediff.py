"""The files of AnimateDiff's authors (guoyww): motion modules, motion LoRAs, the domain adapter, SparseCtrl.

If such a file contains the image model, its names are already those of diffusers.
"""

from dataclasses import replace

from . import configs, shapes
from .configs import MOTION, SPARSE, UNET2D
from .shapes import Config
from .table import SAME, Format, Rows, below

ATTENTIONS: Rows = [
    ("attention_blocks.0.{*}", "attn1.{*}"),
    ("attention_blocks.1.{*}", "attn2.{*}"),
]
NORMS: Rows = [("norms.0.{p}", "norm1.{p}"), ("norms.1.{p}", "norm2.{p}"), ("ff_norm.{p}", "norm3.{p}")]
WHERE = ("down_blocks.{i}.motion_modules.{j}.", "mid_block.motion_modules.{j}.", "up_blocks.{i}.motion_modules.{j}.")


def modules(rows: Rows) -> Rows:
    """The rows of all motion modules, from the rows of one transformer block. Names around the block do not change."""
    block = below("transformer_blocks.{k}.", "transformer_blocks.{k}.", rows)
    return [row for w in WHERE for row in below(w + "temporal_transformer.", w, [*block, ("{*}", "{*}")])]


# Each attention has a copy of the position encodings.
MOTION_ROWS = modules([("attention_blocks.{0,1}.pos_encoder.pe", "pos_embed.pe"), *ATTENTIONS, *NORMS])

SDXL = {**MOTION, "block_out_channels": [320, 640, 1280], "use_motion_mid_block": False}
MOTION_CONFIGS = {
    "v2": MOTION,
    "v3": {**MOTION, "use_motion_mid_block": False},
    "v1": {**MOTION, "use_motion_mid_block": False, "motion_max_seq_length": 24},
    "sdxl": SDXL,
}
MODULES = Format("motion_adapter", shapes.motion_adapter, configs.infer_motion, MOTION_CONFIGS, MOTION_ROWS,
                 computed={"{*}.pos_embed.pe": "sinusoids"})  # fmt: skip


def resnet_norms(c: Config) -> Config:
    """Our config field `resnet_norms`: whether the image model's norms span a video or a frame. {} if unknown.

    The authors' files have as many positions as were trained: 24 in v1, 32 in later versions.
    """
    if c["use_motion_mid_block"] or c["motion_max_seq_length"] == 32:
        return {"resnet_norms": "frame"}
    return {"resnet_norms": "video"} if c["motion_max_seq_length"] == 24 else {}


# In diffusers' files v1 has 32 positions, like v3.
ADAPTER = replace(MODULES, rows=SAME, computed={},
                  known={v.replace("v3", "v1 or v3"): c for v, c in MOTION_CONFIGS.items()})  # fmt: skip

# --------------------------------------------------------------------------------------------------------------- LoRAs

LORA_LAYERS: Rows = [  # of one attention; diffusers 0.11 to 0.17 kept LoRAs in its `processor`
    ("processor.to_out_lora.down.{p}", "to_out.0.lora_A.{p}"),
    ("processor.to_out_lora.up.{p}", "to_out.0.lora_B.{p}"),
    ("processor.{x}_lora.down.{p}", "{x}.lora_A.{p}"),
    ("processor.{x}_lora.up.{p}", "{x}.lora_B.{p}"),
]
MOTION_LORA_ROWS: Rows = [
    row
    for w in WHERE
    for n in (0, 1)
    for row in below(f"{w}temporal_transformer.transformer_blocks.{{k}}.attention_blocks.{n}.",
                     f"{w}transformer_blocks.{{k}}.attn{n + 1}.", LORA_LAYERS)
]  # fmt: skip
LORA_ROWS: Rows = below("{*}.", "{*}.", LORA_LAYERS)  # names in files on the hub, and in every domain adapter

MOTION_LORA = Format("lora", shapes.motion_lora, configs.infer_motion_lora,
                     {"v2": {**MOTION, "rank": 64}, "v1 or v3": {**MOTION_CONFIGS["v3"], "rank": 64}},
                     MOTION_LORA_ROWS, written="unet.")  # fmt: skip
HUB_MOTION_LORA = replace(MOTION_LORA, rows=LORA_ROWS)
PEFT_MOTION_LORA = replace(MOTION_LORA, rows=SAME)
DOMAIN_ADAPTER = Format("lora", shapes.spatial_lora, configs.infer_spatial_lora, {"v3": {**UNET2D, "rank": 128}},
                        LORA_ROWS, written="unet.")  # fmt: skip
PEFT_DOMAIN_ADAPTER = replace(DOMAIN_ADAPTER, rows=SAME)

# ---------------------------------------------------------------------------------------------------------- SparseCtrl

SPARSE_MODULES = modules([("attention_blocks.0.pos_encoder.pe", "pos_embed.pe"), ATTENTIONS[0], NORMS[0], NORMS[2]])
SPARSE_ROWS: Rows = [  # only the encoder has motion modules
    *[row for row in SPARSE_MODULES if row[1].startswith("down_blocks")],
    *SAME,
]
SPARSE_KNOWN = {
    "scribble": SPARSE,
    "rgb": {**SPARSE, "conditioning_channels": 4, "use_simplified_condition_embedding": True},
}
SPARSE_CONTROL = Format("controlnet", shapes.sparse_control, configs.infer_sparse, SPARSE_KNOWN, SPARSE_ROWS)
HUB_SPARSE_CONTROL = replace(SPARSE_CONTROL, rows=SAME)
