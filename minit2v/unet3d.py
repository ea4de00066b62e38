"""ModelScope's text-to-video UNet: a Stable Diffusion UNet with a temporal half after every spatial half.

Wang et al. 2023, "ModelScope Text-to-Video Technical Report", arXiv:2308.06571. 1.41 B parameters; Zeroscope is the
same network. Every block is space, time, space, time: ResBlock, TemporalConv, SpatialTransformer, TemporalTransformer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minit2v_convert import diffusers_unet3d

from .blocks import ResBlock, SpatialTransformer, TemporalConv, TemporalTransformer, Upsample, conv_layout, norm_silu
from .hub import Network
from .layers import FeedForward, Linear, timestep_embedding


@dataclass(frozen=True)
class UNet3DConfig:
    """The published model's config.json, field by field."""

    sample_size: int | tuple[int, int] = 32  # of the latents; only the pipelines read it, for the default size
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock3D",) * 3 + ("DownBlock3D",)
    up_block_types: tuple[str, ...] = ("UpBlock3D",) + ("CrossAttnUpBlock3D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # per level, finest first
    layers_per_block: int = 2  # blocks per level on the way down; one more on the way up
    norm_num_groups: int = 32
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64  # really the width of a head; Stable Diffusion's field of this name is their number

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
        levels, width, groups = len(self.block_out_channels), self.attention_head_dim, self.norm_num_groups
        for name, known in (
            ("down_block_types", ("DownBlock3D", "CrossAttnDownBlock3D")),
            ("up_block_types", ("UpBlock3D", "CrossAttnUpBlock3D")),
        ):
            types = getattr(self, name)
            if len(types) != levels or not set(types) <= set(known):
                raise ValueError(
                    f"{name} must be one of {', '.join(known)} for each of the {levels} block_out_channels, not {types}"
                )
        mirrored = tuple("CrossAttnUpBlock3D" if a else "UpBlock3D" for a in reversed(self.attention))
        if self.up_block_types != mirrored:
            raise ValueError(f"up_block_types must mirror down_block_types: {mirrored}, not {self.up_block_types}")
        if not 0 < width <= min(self.block_out_channels):
            raise ValueError(
                f"attention_head_dim is the width of a head, at most {min(self.block_out_channels)}, "
                f"the narrowest of block_out_channels, not {width!r}"
            )
        if self.layers_per_block < 1:
            raise ValueError(f"layers_per_block must be at least 1, not {self.layers_per_block}")
        if groups < 1 or any(c % groups for c in self.block_out_channels):
            raise ValueError(f"norm_num_groups {groups} must divide block_out_channels {self.block_out_channels}")
        if self.block_out_channels[0] % 2:
            raise ValueError(f"block_out_channels[0] must be even (sines, cosines), not {self.block_out_channels[0]}")

    @property
    def attention(self) -> tuple[bool, ...]:
        """Per level, finest first: whether its blocks have transformers."""
        return tuple(name == "CrossAttnDownBlock3D" for name in self.down_block_types)


class Block(nn.Module):
    """space, time, space, time: ResBlock -> TemporalConv [-> SpatialTransformer -> TemporalTransformer]."""

    def __init__(self, config: UNet3DConfig, c_in: int, c_out: int, attention: bool):
        super().__init__()
        groups, head_dim = config.norm_num_groups, config.attention_head_dim
        self.res = ResBlock(c_in, c_out, 4 * config.block_out_channels[0], groups)
        self.temporal_conv = TemporalConv(c_out, groups)
        self.attention = attention
        if attention:
            heads = c_out // head_dim
            self.spatial = SpatialTransformer(c_out, heads, head_dim, config.cross_attention_dim, groups)
            self.temporal = TemporalTransformer(c_out, heads, head_dim, groups)

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, f: int) -> Tensor:
        """x ((b f) c h w), emb (b d), context (b l d) -> ((b f) c h w)."""
        x = self.temporal_conv(self.res(x, emb), f)
        if self.attention:
            x = self.temporal(self.spatial(x, context), f)
        return x


class Level(nn.Module):
    """The blocks of one resolution and the convolution that leaves it (None where the way ends)."""

    def __init__(self, blocks: list[Block], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet3DConditionModel(Network):
    """The whole network. Keyword arguments are the fields of UNet3DConfig."""

    Config = UNet3DConfig
    layout = diffusers_unet3d.LAYOUT

    def __init__(self, config: UNet3DConfig | None = None, **fields: Any):
        super().__init__(config, **fields)
        config = self.config
        channels, layers, groups = config.block_out_channels, config.layers_per_block, config.norm_num_groups
        base, last = channels[0], len(channels) - 1
        levels = list(enumerate(zip(channels, config.attention, strict=True)))
        self.time_mlp = nn.Sequential(Linear(base, 4 * base), nn.SiLU(), Linear(4 * base, 4 * base))
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)
        self.temporal_in = TemporalTransformer(base, 8, config.attention_head_dim, groups)

        self.down, skips, c = nn.ModuleList(), [base], base  # skips: channels of what the way up will pop
        for i, (c_out, attention) in levels:
            blocks = [Block(config, c if j == 0 else c_out, c_out, attention) for j in range(layers)]
            down = nn.Conv2d(c_out, c_out, 3, stride=2, padding=1) if i < last else None
            self.down.append(Level(blocks, down))
            skips += [c_out] * (layers + (i < last))
            c = c_out

        self.mid = nn.ModuleList([Block(config, c, c, True), Block(config, c, c, False)])

        self.up = nn.ModuleList()
        for i, (c_out, attention) in reversed(levels):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(Block(config, c + skips.pop(), c_out, attention))
                c = c_out
            self.up.append(Level(blocks, Upsample(c) if i > 0 else None))

        self.norm_out = nn.GroupNorm(groups, base)
        self.conv_out = nn.Conv2d(base, config.out_channels, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, t: int | float | Tensor, context: Tensor) -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d) -> the prediction, noise or v (b c f h w)."""
        t = self.check(x, t, context)
        b, _, f, _, _ = x.shape
        emb = timestep_embedding(t, self.config.block_out_channels[0]).to(self.dtype)
        emb = nn.functional.silu(self.time_mlp(emb)).expand(b, -1)  # every block starts from the same SiLU of it

        x = conv_layout(rearrange(x, "b c f h w -> (b f) c h w"))
        x = self.temporal_in(self.conv_in(x), f)
        skips = [x]
        for level in self.down:
            for block in level.blocks:
                x = self.run(block, x, emb, context, f)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(conv_layout(x))
                skips.append(x)
        for block in self.mid:
            x = self.run(block, x, emb, context, f)
        for level in self.up:
            for block in level.blocks:
                x = self.run(block, torch.cat([x, skips.pop()], dim=1), emb, context, f)
            if level.resample is not None:
                x = level.resample(x, skips[-1].shape[-2:])
        x = self.conv_out(norm_silu(self.norm_out, conv_layout(x)))
        return rearrange(x, "(b f) c h w -> b c f h w", f=f).contiguous()

    def run(self, block: Block, x: Tensor, emb: Tensor, context: Tensor, f: int) -> Tensor:
        """The block; under gradient checkpointing only its input is kept, and backward runs it again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, f, use_reentrant=False)
        return block(x, emb, context, f)

    def check(self, x: Tensor, t: int | float | Tensor, context: Tensor) -> Tensor:
        """t as a tensor (1,) or (b,). Raises ValueError, one line, where a shape is wrong."""
        c, d = self.config.in_channels, self.config.cross_attention_dim
        if x.ndim != 5 or x.shape[1] != c:
            raise ValueError(f"x must be (batch, {c} channels, frames, height, width), not {tuple(x.shape)}")
        b = x.shape[0]
        if context.ndim != 3 or context.shape[0] != b or context.shape[2] != d:
            raise ValueError(f"context must be (batch {b}, tokens, width {d}), per video, not {tuple(context.shape)}")
        if not isinstance(t, Tensor):
            t = torch.full((1,), t, dtype=torch.float32, device=x.device)
        if t.ndim > 1 or t.numel() not in (1, b):
            raise ValueError(f"t must be a number or (batch {b},), not {tuple(t.shape)}")
        return t.to(x.device).reshape(-1)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Run the feed-forwards on `chunk_size` (default 1) frames (dim 0) or pixels (dim 1) at a time: less memory."""
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (frames) or 1 (pixels), not {dim!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size!r}")
        self.set_chunking((chunk_size or 1, dim))

    def disable_forward_chunking(self) -> None:
        self.set_chunking(None)

    def set_chunking(self, chunking: tuple[int, int] | None) -> None:
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.chunking = chunking

    def enable_gradient_checkpointing(self) -> None:
        """Trade a second forward pass of each block for the memory of its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False
