"""The U of all three UNets (Ronneberger et al. 2015, arXiv:1505.04597): what differs between them is one block.

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
    """A config.json's field that is one number for all levels, or a number for each."""
    return (value,) * levels if isinstance(value, int) else value


def check_levels(config: Any, kinds: Mapping[str, str]) -> None:
    """Raises ValueError where the fields that all UNets share contradict each other.

    kinds: for each block type on the way down, without and with attention, that on the way up.
    """
    channels, groups = config.block_out_channels, config.norm_num_groups
    levels = len(channels)
    for name, known in (("down_block_types", tuple(kinds)), ("up_block_types", tuple(kinds.values()))):
        types = getattr(config, name)
        if len(types) != levels or not set(types) <= set(known):
            raise ValueError(
                f"{name} must be one of {', '.join(known)} for each of the {levels} block_out_channels, not {types}"
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
        raise ValueError(f"block_out_channels[0] must be even (sines, cosines), not {channels[0]}")


class Place(NamedTuple):
    """Where in the U a block stands."""

    part: Literal["down", "mid", "up"]
    level: int  # 0 is the finest, also on the way up; the middle is on the coarsest
    index: int  # among the blocks of its level on that way, from 0


class Level(nn.Module):
    """The blocks of one resolution and the convolution that leaves it (None where the way ends)."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(Network):
    """Base of the UNets. A subclass says in `make_block` what a block is: (x, emb, context, f) -> x.

    Its config has diffusers' fields and `attention`, per level, finest first: whether its blocks see the text.
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

        self.down, skips, c = nn.ModuleList(), [base], base  # skips: channels of what the way up will pop
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
        self.norm_over_video = False  # whether statistics of `norm_out` span all frames of a video
        self.gradient_checkpointing = False
        self.free_u: FreeU | None = None
        self.image_projections: nn.ModuleList | None = None  # of IP-Adapters, which make_block's attentions then have

    def make_block(self, c_in: int, c_out: int, attention: bool, place: Place) -> nn.Module:
        """A block of the U; attention: whether its level has transformers. It may differ from place to place."""
        raise NotImplementedError

    def blocks(self) -> Iterator[nn.Module]:
        """Every block, in the order in which x passes them."""
        for part in (*self.down, self.mid, *self.up):
            yield from part.blocks if isinstance(part, Level) else part

    def forward(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d), or (b f l d) with a text for each frame, or a Prompt
        -> the prediction, noise or v (b c f h w)."""
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
        """The block; under gradient checkpointing only its input is kept, and backward runs it again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def save_pretrained(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        if self.image_projections is not None:
            raise ValueError("an IP-Adapter is in the UNet, and its place is its own file: unload_ip_adapter() first")
        super().save_pretrained(folder, safe_serialization=safe_serialization, variant=variant)

    def check(self, x: Tensor, t: int | float | Tensor, context: Tensor | Prompt) -> tuple[Tensor, Tensor | Prompt]:
        """t as a tensor (b,), context as (b l d) or ((b f) l d). ValueError, one line, where a shape is wrong."""
        if isinstance(context, Prompt):
            t, text = self.check(x, t, context.text)
            there = len(self.image_projections or ())
            if len(context.images) != there:
                raise ValueError(f"tokens of pictures for {len(context.images)} IP-Adapters, of which {there} are here")
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
                f"context must be (batch {b}, tokens, width {d}), per video, or (batch {b}, frames {f}, tokens, "
                f"width {d}), not {tuple(context.shape)}"
            )
        return t.reshape(-1).expand(b), context.flatten(0, -3)

    def enable_forward_chunking(self, chunk_size: int | None = None, dim: int = 0) -> None:
        """Run the feed-forwards on `chunk_size` (default 1) frames (dim 0) or pixels (dim 1) at a time: less memory."""
        if dim not in (0, 1):
            raise ValueError(f"dim must be 0 (frames) or 1 (pixels), not {dim!r}")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, not {chunk_size!r}")
        self.set_chunking((int(chunk_size or 1), int(dim) - 3))  # axes of (... frames pixels d), from the end

    def disable_forward_chunking(self) -> None:
        self.set_chunking(None)

    @property
    def chunking(self) -> tuple[int, int] | None:
        """(size, axis) of the pieces in which the feed-forwards run, None where they run at once."""
        return next((m.chunking for m in self.modules() if isinstance(m, FeedForward)), None)

    def set_chunking(self, chunking: tuple[int, int] | None) -> None:
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.chunking = chunking

    def enable_gradient_checkpointing(self) -> None:
        """Trade a second forward pass of each block for the memory of its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        self.gradient_checkpointing = False

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Multiply the backbone by b and the low frequencies of the skips by s in the two coarsest levels (FreeU)."""
        self.free_u = FreeU(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        self.free_u = None
