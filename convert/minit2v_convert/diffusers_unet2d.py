"""The diffusers layout of `UNet2DConditionModel` (Stable Diffusion 1.5): 686 names."""

from .diffusers_unet3d import SKIP, TRANSFORMER, WAYS, res_block
from .rename import Layout, Rules, under

SPATIAL = under("attentions.{j}.", "blocks.{j}.spatial.", TRANSFORMER)
PROJECTIONS = [
    f"{where}.spatial.{name}.weight"
    for where in ("down.{i}.blocks.{j}", "mid.{j}", "up.{i}.blocks.{j}")
    for name in ("proj_in", "proj_out")
]


def image_rules() -> Rules:
    """The rules for the image model. A UNet with motion modules has the same names, and more."""
    level = [*res_block(), *SKIP, *SPATIAL]
    mid = [(source, target.removeprefix("blocks.")) for source, target in [*res_block(), *SPATIAL]]
    return [
        *WAYS,
        *under("down_blocks.{i}.", "down.{i}.", level),
        *under("mid_block.", "mid.", mid),
        *under("up_blocks.{i}.", "up.{i}.", level),
    ]


LAYOUT = Layout(rules=image_rules(), conv1x1=PROJECTIONS)
