"""The layers that every network here is made of: plain PyTorch, equation by equation.

b videos, f frames, p pixels of a frame, l text tokens, m texts, h heads, n batch (of any kind), c width of a text
token. d is the width of a vector; in a shape that also has h, it is the width of a head.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..techniques.free_noise import FreeNoise


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """t (n,) -> (n dim), dim even: cosines, then sines, of t times dim / 2 frequencies.

    The frequencies fall from 1 towards 1 / max_period. dtype and order of the operations are the reference's: at
    t = 999 one rounding of a frequency changes a cosine by 6e-5.
    """
    steps = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (dim // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoids(count: int, dim: int) -> Tensor:
    """Position encoding (count dim): sines at even places and cosines at odd places of position * 10,000^(-i / dim).

    i is even, from 0 to dim - 2 (Vaswani et al. 2017, section 3.5). `timestep_embedding` has another order and other
    frequencies.
    """
    # It is computed on the CPU, because sines on the device `meta` would make PyTorch import its compiler.
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu")
    angles = torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * 10_000.0 ** (-steps / dim)
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return table.to(device=torch.get_default_device(), dtype=torch.get_default_dtype())


def group_norm(norm: nn.GroupNorm, x: Tensor, f: int) -> Tensor:
    """x ((n f) c h w) -> norm(x), with statistics over f frames together. f is 1, or all frames of a video."""
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
        """x (n p d) attends to context (n l c) -> (n p d). In self-attention, context is x itself."""
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
    """Linear, GEGLU (Shazeer 2020, arXiv:2002.05202), Linear. The hidden width is 4 * dim."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)
        self.chunking: tuple[int, int] | None = None  # (size, axis) of the pieces; saves memory

    def forward(self, x: Tensor) -> Tensor:
        """x (... d) -> (... d)."""
        if self.chunking is not None:
            return torch.cat([self.run(piece) for piece in x.split(*self.chunking)], self.chunking[1])
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        value, gate = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward. Each reads a LayerNorm of x and is added to x."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (n p d), context (m l c) -> (n p d). Each text serves g = n / m images of x in a row."""
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        y = rearrange(self.norm2(x), "(m g) p d -> m (g p) d", m=len(context))  # one set of keys and values per text
        x = x + rearrange(self.attn2(y, context), "m (g p) d -> (m g) p d", p=x.shape[1])
        return x + self.ff(self.norm3(x))


class FrameTransformerBlock(nn.Module):
    """Attention across the frames, twice, then feed-forward. Each reads a LayerNorm of x and is added to x."""

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
    """FrameTransformerBlock with a position encoding: it is added to the input of both attention layers."""

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
        """x (b f p d) -> (b f p d). Attention sees one window of frames at a time, with positions from 0."""

        def attend(x: Tensor) -> Tensor:
            positions = self.positions[0, : x.shape[1], None]
            x = x + self.attn1(self.norm1(x) + positions)
            return x + self.attn2(self.norm2(x) + positions)

        x = free_noise.average(attend, x)
        return x + self.ff(self.norm3(x))
