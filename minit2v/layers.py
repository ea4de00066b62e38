"""The layers every network here is made of.

b batch, f frames, p pixels of a frame, l text tokens, d width of a vector; n stands for whatever is batch here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_HEADS = 65535  # what one axis of a CUDA grid may count; a video of 1024x576 has 9,216 x 8 in its first layer
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


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


class Linear(nn.Linear):
    """nn.Linear; on the CPU, without gradients, through oneDNN.

    Its float32 kernels use AVX-512 on every x86 that has it. MKL's, which nn.Linear calls, do so on Intel's only: on
    AMD's they take twice the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (... in_features) -> (... out_features)."""
        if x.is_cpu and x.dtype == torch.float32 and ONEDNN and not torch.is_grad_enabled():
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return super().forward(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (n h l d), k and v (n h m d) -> (n h l d), in as few calls as the GPU kernels can take."""
    if q.shape[1] <= MAX_HEADS:
        return F.scaled_dot_product_attention(q, k, v)
    pieces = zip(*(y.split(MAX_HEADS, dim=1) for y in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces], dim=1)


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2)."""

    def __init__(self, dim: int, heads: int, head_dim: int, context_dim: int | None = None):
        super().__init__()
        inner, context_dim = heads * head_dim, context_dim or dim
        self.head_dim = head_dim
        self.to_q = Linear(dim, inner, bias=False)
        self.to_k = Linear(context_dim, inner, bias=False)
        self.to_v = Linear(context_dim, inner, bias=False)
        self.to_out = Linear(inner, dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (n l ... d), context (n m ... c) or None for x itself -> (n l ... d).

        Attention runs along axis 1. Axes between it and the last are independent of each other, as heads are, so they
        are counted as heads: (b f p d) is each pixel attending across the frames, without moving one byte.
        """
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], -1, self.head_dim).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(attend(q, k, v).transpose(1, 2).reshape(*x.shape[:-1], -1))


class FeedForward(nn.Module):
    """Linear, GEGLU (Shazeer 2020, arXiv:2002.05202), Linear; hidden width 4 * dim."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj_in = Linear(dim, 8 * dim)
        self.proj_out = Linear(4 * dim, dim)
        self.chunking: tuple[int, int] | None = None  # (size, axis 0 or 1): run in pieces, to need less memory

    def forward(self, x: Tensor) -> Tensor:
        """x (n l d) -> (n l d)."""
        if self.chunking is None:
            return self.geglu(x)
        size, axis = self.chunking
        return torch.cat([self.geglu(piece) for piece in x.split(size, axis)], axis)

    def geglu(self, x: Tensor) -> Tensor:
        x, gate = self.proj_in(x).chunk(2, dim=-1)
        # In place: these tensors are the widest of the UNet, and its peak in memory.
        return self.proj_out(F.gelu(gate).mul_(x))


class TransformerBlock(nn.Module):
    """Attention, attention again, feed-forward: each on a LayerNorm of x, each added to x.

    The second attention looks at the text where the block was made with a `context_dim`, else at x again. With
    `positions`, how many of axis 1 can be told apart, their sinusoids are added to what both attentions see.
    """

    def __init__(
        self, dim: int, heads: int, head_dim: int, context_dim: int | None = None, positions: int | None = None
    ):
        super().__init__()
        self.register_buffer("positions", sinusoids(positions, dim)[None] if positions else None)  # (1 l d)
        self.norm1, self.attn1 = nn.LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = nn.LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = nn.LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x (n l ... d), context (b m c) with b dividing n -> (n l ... d).

        A row of the context serves n / b rows of x: their queries stand in one row, so keys and values exist once.
        """
        x = x + self.attn1(self.place(self.norm1(x)))
        y = self.place(self.norm2(x))
        if context is not None:
            y = y.reshape(len(context), -1, y.shape[-1])
        x = x + self.attn2(y, context).view_as(x)
        y = self.norm3(x)
        return x + self.ff(y.reshape(-1, *y.shape[-2:])).view_as(x)

    def place(self, x: Tensor) -> Tensor:
        """x (n l ... d) plus where along axis 1 each row stands."""
        if self.positions is None:
            return x
        return x + self.positions[:, : x.shape[1]].unflatten(1, (-1, *[1] * (x.ndim - 3)))
