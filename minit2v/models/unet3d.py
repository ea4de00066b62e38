"""ModelScope's text-to-video UNet: a Stable Diffusion UNet with a temporal layer after every spatial layer.

Wang et al. 2023, "ModelScope Text-to-Video Technical Report", arXiv:2308.06571. It has 1.41 billion parameters.
Zeroscope is the same network. Every block is space, time, space, time: ResBlock, TemporalConv, SpatialTransformer,
TemporalTransformer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minit2v_convert import diffusers_unet3d

from .blocks import ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer
from .unet import Place, UNet, check_levels


@dataclass(frozen=True)
class UNet3DConfig:
    """The official model's config.json, field by field."""

    sample_size: int | tuple[int, int] = 32  # height and width of the latents: the default size of pipelines
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up_block_types: tuple[str, ...] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    layers_per_block: int = 2  # blocks per level in the down path; the up path has one more
    norm_num_groups: int = 32
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64  # here it is the width of a head; in Stable Diffusion it is their number
    dropout: float = 0.0  # in the temporal convolutions, for training only; ModelScope's authors trained with 0.1

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        "num_attention_heads": None,
        "time_cond_proj_dim": None,
    }
    IGNORED: ClassVar[dict[str, str]] = {}

    def __post_init__(self):
        check_levels(self, {"DownBlock3D": "UpBlock3D", "CrossAttnDownBlock3D": "CrossAttnUpBlock3D"})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout!r}")
        if not 0 < self.attention_head_dim <= min(self.block_out_channels):
            raise ValueError(
                f"attention_head_dim is the width of a head, at most {min(self.block_out_channels)}, "
                f"the narrowest of block_out_channels, not {self.attention_head_dim!r}"
            )

    @property
    def attention(self) -> tuple[bool, ...]:
        """For each level, finest first: whether its blocks have transformers."""
        return tuple(name == "CrossAttnDownBlock3D" for name in self.down_block_types)


class Block(nn.Module):
    """ResBlock -> TemporalConv [-> SpatialTransformer -> TemporalTransformer]: space, time, space, time."""

    def __init__(self, config: UNet3DConfig, c_in: int, c_out: int, attention: bool):
        super().__init__()
        groups, head_dim = config.norm_num_groups, config.attention_head_dim
        heads, self.attention = c_out // head_dim, attention
        self.res = ResBlock(c_in, c_out, 4 * config.block_out_channels[0], groups)
        self.temporal_conv = TemporalConv(c_out, groups, config.dropout)
        if attention:
            self.spatial = SpatialTransformer(c_out, heads, head_dim, config.cross_attention_dim, groups)
            self.temporal = TemporalTransformer(c_out, heads, head_dim, groups)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, f: int) -> Tensor:
        """x ((b f) c h w), timestep embedding emb ((b f) d), context (b l d) or ((b f) l d) -> ((b f) c_out h w)."""
        x = self.temporal_conv(self.res(x, emb), f)
        if self.attention:
            x = self.temporal(self.spatial(x, context), f)
        return x


class UNet3DConditionModel(UNet):
    """The UNet of ModelScope and Zeroscope. Keyword arguments are the fields of UNet3DConfig."""

    Config = UNet3DConfig
    config: UNet3DConfig
    layout = diffusers_unet3d.LAYOUT

    def __init__(self, config: UNet3DConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        c = self.config
        self.temporal_in = TemporalTransformer(c.block_out_channels[0], 8, c.attention_head_dim, c.norm_num_groups)

    def make_block(self, c_in: int, c_out: int, attention: bool, place: Place) -> nn.Module:
        return Block(self.config, c_in, c_out, attention)
