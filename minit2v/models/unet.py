"""The U shape of all three UNets (Ronneberger et al. 2015, arXiv:1505.04597). They differ only in their blocks.

    conv_in -> down: level by level, coarser -> mid -> up: level by level, finer -> norm, SiLU, conv_out
                 |________________ skip connections _______________|
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..techniques.free_u import FreeU
from .blocks import TemporalTransformer, Upsample
from .image_prompt import Prompt
from .layers import FeedForward, group_norm, timestep_embedding
from .network import Network


def per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """A field of a config.json as one number for each level. In the file it may be one number for all levels."""
    return (value,) * levels if isinstance(value, int) else value


def check_levels(config: Any, kinds: Mapping[str, str]) -> None:
    """Raises ValueError if the fields that all UNets share contradict each other.

    kinds: maps each block type of the down path to the matching block type of the up path.
    """
    channels, groups = config.block_out_channels, config.norm_num_groups
    levels = len(channels)
    for name, known in (("down_block_types", tuple(kinds)), ("up_block_types", tuple(kinds.values()))):
        types = getattr(config, name)
        if len(types) != levels or not set(types) <= set(known):
            raise ValueError(
                f"{name} must be {' or '.join(known)} for each of the {levels} block_out_channels, not {types}"
            )
    mirrored = tuple(kinds[name] for name in reversed(config.down_block_types))
    if config.up_block_types != mirrored:
        raise ValueError(f"up_block_types must mirror down_block_types: {mirrored}, not {config.up_block_types}")
    layers = per_level(config.layers_per_block, levels)
    if len(layers) != levels or min(layers) < 1:
        raise ValueError(f"layers_per_block must be at least 1 for each of the {levels} levels, not {layers}")
    if groups < 1 or any(c % groups for c in channels):
        raise ValueError(f"norm_num_groups {groups} must divide block_out_channels {channels}")
    if channels[0] % 2:
        raise ValueError(f"block_out_channels[0] must be even (half sines, half cosines), not {channels[0]}")


class Place(NamedTuple):
    """The position of a block in the UNet."""

    part: Literal["down", "mid", "up"]
    level: int  # 0 is the finest, in both paths; "mid" has the coarsest
    index: int  # of the block in its level and path, from 0


class Level(nn.Module):
    """The blocks of one resolution, and the convolution that changes it (None at the last level)."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(Network):
    """Base class of the UNets. A subclass defines its block in `make_block`: (x, emb, context, f) -> x.

    Its config has diffusers' fields. It also has `attention`: whether the blocks of each level see the text, finest
    level first.
    """

    def __init__(self, config: Any = None, **fields: Any):
        super().__init__(config, **fields)
        config = self.config
        channels, groups = config.block_out_channels, config.norm_num_groups
        layers = per_level(config.layers_per_block, len(channels))
        base, last = channels[0], len(channels) - 1
        levels = list(enumerate(zip(channels, layers, config.attention, strict=True)))
        self.time_mlp = nn.Sequential(nn.Linear(base, 4 * base), nn.SiLU(), nn.Linear(4 * base, 4 * base))
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)
        self.temporal_in: TemporalTransformer | None = None  # UNet3D has one

        self.down, skips, c = nn.ModuleList(), [base], base  # skips: channels of the skip connections
        for i, (c_out, count, attention) in levels:
            blocks = []
            for j in range(count):
                blocks.append(self.make_block(c, c_out, attention, Place("down", i, j)))
                c = c_out
            self.down.append(Level(blocks, nn.Conv2d(c, c, 3, stride=2, padding=1) if i < last else None))
            skips += [c] * (count + (i < last))

        self.mid = nn.ModuleList(self.make_block(c, c, j == 0, Place("mid", last, j)) for j in range(2))

        self.up = nn.ModuleList()
        for i, (c_out, count, attention) in reversed(levels):
            blocks = []
            for j in range(count + 1):
                blocks.append(self.make_block(c + skips.pop(), c_out, attention, Place("up", i, j)))
                c = c_out
            self.up.append(Level(blocks, Upsample(c) if i > 0 else None))

        self.norm_out = nn.GroupNorm(groups, base)
        self.conv_out = nn.Conv2d(base, config.out_channels, 3, padding=1)
        self.norm_over_video = False  # whether the statistics of `norm_out` span all frames of a video
        self.gradient_checkpointing = False
        self.free_u: FreeU | None = None
        self.image_projections: nn.ModuleList | None = None  # one for each loaded IP-Adapter

    def make_block(self, c_in: int, c_out: int, attention: bool, place: Place) -> nn.Module:
        """Creates a block. attention: whether its level has transformers. place: where the block will be."""
        raise NotImplementedError

    def blocks(self) -> Iterator[nn.Module]:
        """Every block, in the order in which x passes them."""
        for part in (*self.down, self.mid, *self.up):
            yield from part.blocks if isinstance(part, Level) else part

    def forward(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> Tensor:
        """Predicts the noise, or v, from noisy latents x (b c f h w) -> (b c f h w).

        t: the timestep, a number or a tensor (b,).
        context: the text (b l d), or (b f l d) with one text for each frame, or a Prompt with pictures.
        Raises ValueError if a shape is wrong.
        """
        t, context = self.check(x, t, context)
        f = x.shape[2]
        emb = self.time_mlp(timestep_embedding(t, self.config.block_out_channels[0]).to(self.dtype))
        emb = repeat(emb, "b d -> (b f) d", f=f)

        x = self.conv_in(rearrange(x, "b c f h w -> (b f) c h w"))
        if self.temporal_in is not None:
            x = self.temporal_in(x, f)
        skips = [x]
        for level in self.down:
            for block in level.blocks:
                x = self.run(block, x, emb, context, f)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        for block in self.mid:
            x = self.run(block, x, emb, context, f)
        for i, level in enumerate(self.up):
            for block in level.blocks:
                skip = skips.pop()
                if self.free_u is not None:
                    x, skip = self.free_u(x, skip, i)
                x = self.run(block, torch.cat((x, skip), dim=1), emb, context, f)
            if level.resample is not None:
                x = level.resample(x, skips[-1].shape[-2:])
        x = self.conv_out(F.silu(group_norm(self.norm_out, x, f if self.norm_over_video else 1)))
        return rearrange(x, "(b f) c h w -> b c f h w", f=f)

    def run(self, block: nn.Module, *inputs: Any) -> Tensor:
        """Runs a block. Gradient checkpointing keeps only its input, and the backward pass runs the block again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def save_pretrained(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        if self.image_projections is not None:
            raise ValueError("the UNet has an IP-Adapter, which has its own file: call unload_ip_adapter() first")
        super().save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)

    def check(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> tuple[Tensor, Tensor | Prompt]:
        """t as a tensor (b,), and context as (b l d) or ((b f) l d). Raises ValueError if a shape is wrong."""
        if isinstance(context, Prompt):
            t, text = self.check(x, t, context.text)
            there = len(self.image_projections or ())
            if len(context.images) != there:
                raise ValueError(f"the context has pictures for {len(context.images)} IP-Adapters, not for {there}")
            return t, context.flat(text, x.shape[0], x.shape[2], self.config.cross_attention_dim)
        c, d = self.config.in_channels, self.config.cross_attention_dim
        if x.ndim != 5 or x.shape[1] != c:
            raise ValueError(f"x must be (batch, {c} channels, frames, height, width), not {tuple(x.shape)}")
        b, f = x.shape[0], x.shape[2]
        t = torch.as_tensor(t, device=x.device)
        if t.ndim > 1 or t.numel() not in (1, b):
            raise ValueError(f"t must be a number or (batch {b},), not {tuple(t.shape)}")
        if tuple(context.shape) not in ((b, *context.shape[1:2], d), (b, f, *context.shape[2:3], d)):
            raise ValueError(
                f"context must be (batch {b}, tokens, width {d}), or (batch {b}, frames {f}, tokens, width {d}) with "
                f"one text for each frame, not {tuple(context.shape)}"
            )
        return t.reshape(-1).expand(b), context.flatten(0, -3)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Saves memory: the feed-forward layers process `chunk_size` frames (dim 0) or pixels (dim 1) at a time.

        chunk_size is 1 by default. Raises ValueError if it is below 1, or if dim is not 0 or 1.
        """
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (frames) or 1 (pixels), not {dim!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size!r}")
        self.set_chunking((int(chunk_size or 1), int(dim) - 3))  # axes of (... frames pixels d), from the end

    def disable_forward_chunking(self) -> None:
        self.set_chunking(None)

    @property
    def chunking(self) -> tuple[int, int] | None:
        """(size, axis) of the pieces in which the feed-forward layers run. None means one piece."""
        return next((m.chunking for m in self.modules() if isinstance(m, FeedForward)), None)

    def set_chunking(self, chunking: tuple[int, int] | None) -> None:
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.chunking = chunking

    def enable_gradient_checkpointing(self) -> None:
        """Saves memory in training: the backward pass runs each block again instead of keeping its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """FreeU (Si et al. 2023, arXiv:2309.11497) in the two coarsest levels of the up path.

        b1, b2: factors of half of the backbone's channels. s1, s2: factors of the low frequencies of the skip
        connections. The number 1 or 2 is the level, coarsest first.
        """
        self.free_u = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        self.free_u = None
