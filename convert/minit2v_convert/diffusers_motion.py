"""The diffusers layouts of `MotionAdapter` and of `UNetMotionModel` (AnimateDiff)."""

from .diffusers_unet2d import PROJECTIONS, image_rules
from .diffusers_unet3d import transformer
from .rename import Layout, under

MODULE = [
    ("transformer_blocks.{k}.pos_embed.pe", "blocks.{k}.positions"),
    *transformer("transformer_blocks.{k}.", "blocks.{k}."),
]

ADAPTER = Layout(
    rules=[
        *under("down_blocks.{i}.motion_modules.{j}.", "down.{i}.{j}.", MODULE),
        *under("mid_block.motion_modules.{j}.", "mid.{j}.", MODULE),
        *under("up_blocks.{i}.motion_modules.{j}.", "up.{i}.{j}.", MODULE),
    ]
)
UNET = Layout(
    rules=[
        *under("down_blocks.{i}.motion_modules.{j}.", "down.{i}.blocks.{j}.motion.", MODULE),
        *under("mid_block.motion_modules.{j}.", "mid.{j}.motion.", MODULE),
        *under("up_blocks.{i}.motion_modules.{j}.", "up.{i}.blocks.{j}.motion.", MODULE),
        *image_rules(),
    ],
    conv1x1=PROJECTIONS,
)
