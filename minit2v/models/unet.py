"""The U of all three UNets (Ronneberger et al. 2015, arXiv:1505.04597): what differs between them is one block.

    conv_in -> down: level by level, coarser -> mid -> up: level by level, finer -> norm, SiLU, conv_out
                 |________________ skip connections _______________|
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minit2v_kernels import linear

from ..techniques.free_u import FreeU
from .blocks import Upsample, conv_layout
from .layers import Context, FeedForward, GroupNorm, Linear, timestep_embedding
from .network import Network


def per_level(value: int | tuple[int, ...], levels: int) -> tuple[int, ...]:
    """A published field that is one number for all levels, or a number for each."""
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


@dataclass(frozen=True, eq=False)
class KeysValues:
    """The keys and values of a text in every cross-attention of one UNet: they depend on neither x nor t."""

    of_blocks: Sequence[tuple[Tensor, Tensor] | None]  # k and v (n l heads head_dim); None: the block sees no text

    @property
    def rows(self) -> int:
        """How many texts: n = b, or b f with a text for each frame."""
        return next(len(pair[0]) for pair in self.of_blocks if pair is not None)


class Level(nn.Module):
    """The blocks of one resolution and the convolution that leaves it (None where the way ends)."""

    def __init__(self, blocks: list[nn.Module], resample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


class UNet(Network):
    """Base of the UNets. A subclass says in `make_block` what a block is: (x, emb, context, frames, skip) -> x.

    Its config has the published fields and `attention`, per level, finest first: whether its blocks see the text.
    """

    def __init__(self, config: Any = None, **fields: Any):
        super().__init__(config, **fields)
        config = self.config
        channels, groups = config.block_out_channels, config.norm_num_groups
        layers = per_level(config.layers_per_block, len(channels))
        base, last = channels[0], len(channels) - 1
        levels = list(enumerate(zip(channels, layers, config.attention, strict=True)))
        self.time_mlp = nn.Sequential(Linear(base, 4 * base), nn.SiLU(), Linear(4 * base, 4 * base))
        self.conv_in = nn.Conv2d(config.in_channels, base, 3, padding=1)

        self.down, skips, c = nn.ModuleList(), [base], base  # skips: channels of what the way up will pop
        for i, (c_out, count, attention) in levels:
            blocks = [self.make_block(c if j == 0 else c_out, c_out, attention) for j in range(count)]
            down = nn.Conv2d(c_out, c_out, 3, stride=2, padding=1) if i < last else None
            self.down.append(Level(blocks, down))
            skips += [c_out] * (count + (i < last))
            c = c_out

        self.mid = nn.ModuleList([self.make_block(c, c, True), self.make_block(c, c, False)])

        self.up = nn.ModuleList()
        for i, (c_out, count, attention) in reversed(levels):
            blocks = []
            for _ in range(count + 1):
                blocks.append(self.make_block(c + skips.pop(), c_out, attention))
                c = c_out
            self.up.append(Level(blocks, Upsample(c) if i > 0 else None))

        self.norm_out = GroupNorm(groups, base)
        self.conv_out = nn.Conv2d(base, config.out_channels, 3, padding=1)
        self.clip_norms = False  # whether statistics of `norm_out` span all frames of a video
        self.chunking: tuple[int, int] | None = None  # of the feed-forwards
        self.gradient_checkpointing = False
        self.free_u: FreeU | None = None
        self.fast: Any = None  # what fast.py has made of this network, which then predicts in its own way
        self.time: tuple[Tensor, ...] | None = None  # all blocks' weights and biases for the timestep, laid together

    def make_block(self, c_in: int, c_out: int, attention: bool) -> nn.Module:
        raise NotImplementedError

    def blocks(self) -> Iterator[nn.Module]:
        """Every block, in the order in which x passes them."""
        for part in (*self.down, self.mid, *self.up):
            yield from part.blocks if isinstance(part, Level) else part

    def stem(self, x: Tensor, f: int) -> Tensor:
        """What comes before the first block: x ((b f) c_in h w) -> ((b f) c h w)."""
        return self.conv_in(x)

    def forward(self, x: Tensor, t: int | float | Tensor, context: "Tensor | KeysValues") -> Tensor:
        """x (b c f h w), t a number or (b,), context (b l d), or (b f l d) with a text for each frame, or the
        `keys_values` of either -> the prediction, noise or v (b c f h w)."""
        t, context = self.check(x, t, context)
        return (self if self.fast is None else self.fast).predict(x, t, context)

    def predict(self, x: Tensor, t: Tensor, context: "Tensor | KeysValues") -> Tensor:
        """`forward` for checked tensors: x (b c f h w), t (1,) or (b,), context (b l d) or ((b f) l d)."""
        f = x.shape[2]
        embs = self.project(timestep_embedding(t, self.config.block_out_channels[0]).to(self.dtype))
        contexts = context.of_blocks if isinstance(context, KeysValues) else [context] * len(embs)
        given = iter(list(zip(embs, contexts, strict=True)))  # what each block gets, in the order of `blocks`

        x = self.stem(conv_layout(rearrange(x, "b c f h w -> (b f) c h w")), f)
        skips = [x]
        for level in self.down:
            for block in level.blocks:
                x = self.run(block, x, *next(given), f)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(conv_layout(x))
                skips.append(x)
        for block in self.mid:
            x = self.run(block, x, *next(given), f)
        for i, level in enumerate(self.up):
            for block in level.blocks:
                x, skip = self.join(x, skips.pop(), i)
                x = self.run(block, x, *next(given), f, skip)
            if level.resample is not None:
                x = level.resample(x, skips[-1].shape[-2:])
        x = self.conv_out(self.norm_out(conv_layout(x), f if self.clip_norms else 1, silu=True))
        return rearrange(x, "(b f) c h w -> b c f h w", f=f).contiguous()

    def project(self, emb: Tensor) -> Sequence[Tensor]:
        """emb (m d) of the timestep -> what each block adds for it, (m c_out), in the order of `blocks`."""
        emb = nn.functional.silu(self.time_mlp(emb))  # every block starts from the same SiLU of it
        if self.time is None or torch.is_grad_enabled():
            return [block.res.project(emb) for block in self.blocks()]
        weight, bias, of_convs = self.time
        return linear(emb, weight, bias + of_convs).split([block.res.conv1.out_channels for block in self.blocks()], 1)

    def keys_values(self, context: Tensor) -> "KeysValues":
        """context (b l d) or (b f l d) -> what all blocks make of it, whatever the timestep: to be computed once."""
        d = self.config.cross_attention_dim
        if context.ndim not in (3, 4) or context.shape[-1] != d:
            raise ValueError(f"context must be (batch, [frames,] tokens, width {d}), not {tuple(context.shape)}")
        context = context.flatten(0, -3)
        seeing = [block.spatial.block.attn2 if block.attention else None for block in self.blocks()]
        return KeysValues([attn and attn.keys_values(context) for attn in seeing])

    def join(self, x: Tensor, skip: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """What a block of the `level`-th on the way up is given: x and skip (n c h w)."""
        return (x, skip) if self.free_u is None else self.free_u(x, skip, level)

    def run(
        self, block: nn.Module, x: Tensor, emb: Tensor, context: Context, f: int, skip: Tensor | None = None
    ) -> Tensor:
        """The block; under gradient checkpointing only its input is kept, and backward runs it again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, f, skip, use_reentrant=False)
        return block(x, emb, context, f, skip)

    def check(
        self, x: Tensor, t: int | float | Tensor, context: "Tensor | KeysValues"
    ) -> "tuple[Tensor, Tensor | KeysValues]":
        """t as a tensor (1,) or (b,), context as (n l d). Raises ValueError, one line, where a shape is wrong."""
        c, d = self.config.in_channels, self.config.cross_attention_dim
        if x.ndim != 5 or x.shape[1] != c:
            raise ValueError(f"x must be (batch, {c} channels, frames, height, width), not {tuple(x.shape)}")
        b, f = x.shape[0], x.shape[2]
        if not isinstance(t, Tensor):
            t = torch.full((1,), t, dtype=torch.float32, device=x.device)
        if t.ndim > 1 or t.numel() not in (1, b):
            raise ValueError(f"t must be a number or (batch {b},), not {tuple(t.shape)}")
        t = t.to(x.device).reshape(-1)
        if isinstance(context, KeysValues):
            if context.rows not in (b, b * f):
                raise ValueError(f"the keys and values are of {context.rows} texts, not of {b} or {b} x {f} frames")
            return t, context
        if tuple(context.shape) not in ((b, *context.shape[1:2], d), (b, f, *context.shape[2:3], d)):
            raise ValueError(
                f"context must be (batch {b}, tokens, width {d}), per video, or (batch {b}, frames {f}, tokens, "
                f"width {d}), not {tuple(context.shape)}"
            )
        return t, context.flatten(0, -3)

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
        self.chunking = chunking
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

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What `.to()` and its like come to: weights are elsewhere afterwards."""
        super()._apply(fn, recurse)
        if self.fast is not None and self.fast.sign() != self.fast.signature:
            self.fast.renew()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "time": None, "fast": None}  # a copy's weights lie apart
