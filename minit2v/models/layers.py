"""The layers every network here is made of: plain PyTorch, equation by equation.

b videos, f frames, p pixels of a frame, l text tokens, m texts, h heads, d width of a vector, of a head where h stands
beside it; n stands for whatever is batch.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..techniques.free_noise import FreeNoise


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """t (n,) -> (n dim), dim even: cosines, then sines, at dim / 2 frequencies from 1 down towards 1 / max_period.

    In float32, and in this order of operations, which is the reference's: at t = 999 one rounding of a frequency
    moves a cosine by 6e-5.
    """
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoids(count: int, dim: int) -> Tensor:
    """(count dim): sines at even places, cosines at odd ones, of position * 10,000^(-i / dim), i even.

    Vaswani et al. 2017, section 3.5. Not `timestep_embedding`: other order, other frequencies.
    """
    # On the CPU also where a network is built on `meta`: sines of no numbers would make PyTorch import its compiler.
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * 10_000.0 ** (-steps / dim)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return table.to(device=torch.get_default_device(), dtype=torch.get_default_dtype())


def group_norm(norm: nn.GroupNorm, x: Tensor, f: int) -> Tensor:
    """x ((n f) c h w) -> norm(x), with statistics over f frames together: 1, or those of a whole video."""
    return rearrange(norm(rearrange(x, "(n f) c h w -> n c f h w", f=f)), "n c f h w -> (n f) c h w")


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        inner, context_dim = heads * head_dim, context_dim or dim
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(context_dim, inner, bias=False)
        self.to_v = nn.Linear(context_dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (n p d) attends to context (n l c), which is x itself in self-attention -> (n p d)."""
        q = rearrange(self.to_q(x), "n p (h d) -> n h p d", h=self.heads)
        k, v = (rearrange(to(context), "n l (h d) -> n h l d", h=self.heads) for to in (self.to_k, self.to_v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(y, "n h p d -> n p (h d)"))


class FrameAttention(Attention):
    """Attention across the frames: each pixel attends to itself in all frames of its video."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (b f p d) -> (b f p d)."""
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        q, k, v = (rearrange(y, "b f p (h d) -> (b p) h f d", h=self.heads) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(rearrange(y, "(b p) h f d -> b f p (h d)", b=len(x)))


class FeedForward(nn.Module):
    """Linear, GEGLU (Shazeer 2020, arXiv:2002.05202), Linear; hidden width 4 * dim."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)
        self.chunking: tuple[int, int] | None = None  # (size, axis): run in pieces, to need less memory

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d)."""
        if self.chunking is not None:
            return torch.cat([self.run(piece) for piece in x.split(*self.chunking)], self.chunking[1])
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Attention to x itself, attention to the text, feed-forward: each of a LayerNorm of x, each added to x."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (n p d), context (m l c), a text for each g = n / m images of x -> (n p d)."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        y = rearrange(self.norm2(x), "(m g) p d -> m (g p) d", m=len(context))  # keys and values once for each text
        x = x + rearrange(self.attn2(y, context), "m (g p) d -> (m g) p d", p=x.shape[1])
        return x + self.ff(self.norm3(x))


class FrameTransformerBlock(nn.Module):
    """Attention across the frames, the same again, feed-forward: each of a LayerNorm of x, each added to x."""

    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), FrameAttention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), FrameAttention(dim, heads, head_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (b f p d) -> (b f p d)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x))
        return x + self.ff(self.norm3(x))


class NumberedFrameTransformerBlock(FrameTransformerBlock):
    """The same for frames that are numbered: sinusoids of their positions are added to what both attentions see."""

    def __init__(self, dim: int, heads: int, head_dim: int, positions: int):
        super().__init__(dim, heads, head_dim)
        self.register_buffer("positions", sinusoids(positions, dim)[None])  # (1 f d)
        self.free_noise: FreeNoise | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (b f p d) -> (b f p d)."""
        if self.free_noise is not None:
            return self.in_windows(x, self.free_noise)
        positions = self.positions[0, : x.shape[1], None]
        x = x + self.attn1(self.norm1(x) + positions)
        x = x + self.attn2(self.norm2(x) + positions)
        return x + self.ff(self.norm3(x))

    def in_windows(self, x: Tensor, free_noise: FreeNoise) -> Tensor:
        """x (b f p d) -> (b f p d), each attention seeing the frames of a window, which are numbered from 0."""

        def attend(x: Tensor) -> Tensor:
            positions = self.positions[0, : x.shape[1], None]
            x = x + self.attn1(self.norm1(x) + positions)
            return x + self.attn2(self.norm2(x) + positions)

        x = free_noise.average(attend, x)
        return x + self.ff(self.norm3(x))
