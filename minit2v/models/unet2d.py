"""Stable Diffusion 1.5's UNet: images from text (Rombach et al. 2022, arXiv:2112.10752), 860 million parameters."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from minit2v_convert import diffusers_unet2d

from .blocks import MotionModule, ResBlock, SpatialTransformer
from .unet import Place, UNet, check_levels


@dataclass(frozen=True)
class UNet2DConfig:
    """The official model's config.json, field by field."""

    sample_size: int | tuple[int, int] | None = 64  # height and width of the latents: the default size of pipelines
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    layers_per_block: int | tuple[int, ...] = 2  # blocks per level in the down path; the up path has one more
    norm_num_groups: int = 32
    cross_attention_dim: int = 768
    attention_head_dim: int = 8  # here it is the number of heads; in UNet3D it is the width of a head

    FIXED: ClassVar[dict[str, Any]] = {
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-5,
        # Fields of newer files. Other networks with the same class name have other values.
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "attention_type": "default",
        "class_embed_type": None,
        "class_embeddings_concat": False,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "mid_block_only_cross_attention": None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "num_attention_heads": None,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "projection_class_embeddings_input_dim": None,
        "resnet_out_scale_factor": 1.0,
        "resnet_skip_time_act": False,
        "resnet_time_scale_shift": "default",
        "reverse_transformer_layers_per_block": None,
        "time_cond_proj_dim": None,
        "time_embedding_act_fn": None,
        "time_embedding_dim": None,
        "time_embedding_type": "positional",
        "timestep_post_act": None,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
    }
    IGNORED: ClassVar[dict[str, str]] = {
        "addition_embed_type_num_heads": "belongs to addition_embed_type, which is None",
        "dropout": "for training only",
        "upcast_attention": "the softmax is always computed in float32 or wider",
    }

    def __post_init__(self):
        check_levels(self, {"DownBlock2D": "UpBlock2D", "CrossAttnDownBlock2D": "CrossAttnUpBlock2D"})
        check_heads("attention_head_dim", self.attention_head_dim, self.block_out_channels)

    @property
    def attention(self) -> tuple[bool, ...]:
        """For each level, finest first: whether its blocks have transformers."""
        return tuple(name == "CrossAttnDownBlock2D" for name in self.down_block_types)

    @property
    def heads(self) -> int:
        return self.attention_head_dim


def check_heads(name: str, heads: int, channels: tuple[int, ...]) -> None:
    if heads < 1 or any(c % heads for c in channels):
        raise ValueError(f"{name} is the number of heads: it must divide block_out_channels {channels}, not {heads}")


class Block(nn.Module):
    """ResBlock [-> SpatialTransformer] [-> MotionModule]. Only AnimateDiff has motion modules."""

    def __init__(self, config: Any, c_in: int, c_out: int, attention: bool):
        super().__init__()
        heads, groups = config.heads, config.norm_num_groups
        self.res = ResBlock(c_in, c_out, 4 * config.block_out_channels[0], groups)
        self.attention = attention
        if attention:
            self.spatial = SpatialTransformer(c_out, heads, c_out // heads, config.cross_attention_dim, groups)
        self.motion: MotionModule | None = None
        self.norm_over_video = False  # whether the ResBlock's norms span all frames, as AnimateDiff v1's do

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, f: int) -> Tensor:
        """x ((b f) c h w), timestep embedding emb ((b f) d), context (b l d) or ((b f) l d) -> ((b f) c_out h w)."""
        x = self.res(x, emb, f if self.norm_over_video else 1)
        if self.attention:
            x = self.spatial(x, context)
        return x if self.motion is None else self.motion(x, f)


class UNet2DConditionModel(UNet):
    """Stable Diffusion's UNet for images. Keyword arguments are the fields of UNet2DConfig."""

    Config = UNet2DConfig
    config: UNet2DConfig
    layout = diffusers_unet2d.LAYOUT

    def make_block(self, c_in: int, c_out: int, attention: bool, place: Place) -> nn.Module:
        return Block(self.config, c_in, c_out, attention)

    def forward(self, x: Tensor, t: int | float | Tensor, context: Tensor) -> Tensor:
        """Predicts the noise, or v, from noisy latents x (b c h w) -> (b c h w).

        t: the timestep, a number or a tensor (b,). context: the text (b l d).
        Raises ValueError if a shape is wrong.
        """
        c = self.config.in_channels
        if x.ndim != 4 or x.shape[1] != c:
            raise ValueError(f"x must be (batch, {c} channels, height, width), not {tuple(x.shape)}")
        return super().forward(x[:, :, None], t, context)[:, :, 0]
