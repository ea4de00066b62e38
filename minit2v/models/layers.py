"""The layers every network here is made of.

b batch, f frames, p pixels of a frame, l text tokens, d width of a vector; n stands for whatever is batch here.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minit2v_kernels import add_layer_norm, geglu, group_norm_silu, layer_norm, linear, temporal_attention
from minit2v_kernels._dispatch import pick

Context = Tensor | tuple[Tensor, Tensor]  # what is attended to: vectors (n m c), or the keys and values made of them


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
    """nn.Linear by `minit2v_kernels.linear`, which is faster on some CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        """x (... in_features) -> (... out_features)."""
        return linear(x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm by `minit2v_kernels.group_norm_silu`: with what stands before and behind it in these networks."""

    def forward(
        self, x: Tensor, frames: int = 1, *, silu: bool = False, skip: Tensor | None = None, emb: Tensor | None = None
    ) -> Tensor:
        """x ((n frames) c *spatial), skip ((n frames) c2 *spatial), emb (m c) -> ((n frames) c + c2 *spatial).

        Of x + emb and skip, one behind the other; the statistics span `frames` frames. The layout in memory is x's.
        """
        return group_norm_silu(
            x, self.weight, self.bias, self.num_groups, self.eps, silu=silu, frames=frames, skip=skip, emb=emb
        )


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by `minit2v_kernels.layer_norm`; `add` takes a residual into the same pass over memory."""

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """x (n l ... d), positions (l d) -> LayerNorm(x) + positions."""
        return layer_norm(x, self.weight, self.bias, self.eps, positions=positions)

    def add(self, x: Tensor, residual: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Both (n l ... d) -> (s, LayerNorm(s) + positions), s being x + residual."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, positions=positions)


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
        self.qkv: Tensor | None = None  # the weights of to_q, to_k and to_v in one, where fast.py laid them together

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x (n l d), along axis 1; context (n m c) or its `keys_values`, None for x itself -> (n l d).

        x (b f p d), without a context: across the frames, each pixel by itself -> (b f p d).
        """
        if context is None:
            q, k, v = self.project(x)
        else:
            q = self.split(self.to_q(x))
            k, v = context if isinstance(context, tuple) else self.keys_values(context)
        return self.to_out((attend if x.ndim == 3 else temporal_attention)(q, k, v).flatten(-2))

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (... d) -> q, k, v (... h d)."""
        # PyTorch's attention across the frames moves nothing if q, k and v are three tensors. The kernel can read one.
        apart = x.ndim == 4 and pick("temporal_attention", None, x) == "torch"
        if self.qkv is None or apart or torch.is_grad_enabled():
            return tuple(self.split(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        return linear(x, self.qkv).unflatten(-1, (3, -1, self.head_dim)).unbind(-3)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """context (n m c) -> k, v (n m h d)."""
        return self.split(self.to_k(context)), self.split(self.to_v(context))

    def split(self, x: Tensor) -> Tensor:
        """(... (h d)) -> (... h d)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "qkv": None}  # the weights of a copy lie apart


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (n l h d), k and v (n m h d) -> (n l h d)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


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
            return self.run(x)
        size, axis = self.chunking
        return torch.cat([self.run(piece) for piece in x.split(size, axis)], axis)

    def run(self, x: Tensor) -> Tensor:
        return self.proj_out(geglu(x, self.proj_in.weight, self.proj_in.bias))


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
        self.norm1, self.attn1 = LayerNorm(dim), Attention(dim, heads, head_dim)
        self.norm2, self.attn2 = LayerNorm(dim), Attention(dim, heads, head_dim, context_dim)
        self.norm3, self.ff = LayerNorm(dim), FeedForward(dim)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x (n l ... d), context (b m c) with b dividing n, or its keys and values -> (n l ... d).

        A norm takes the sum before it along: x + attn1(...) is made by `norm2.add`, beside its norm y.
        """
        positions = None if self.positions is None else self.positions[0, : x.shape[1]]
        y = self.norm1(x, positions)
        x, y = self.norm2.add(self.attn1(y), x, positions)
        x, y = self.norm3.add(self.ask(y, context), x)
        return self.ff(y.reshape(-1, *y.shape[-2:])).view_as(x).add_(x)  # in place: fresh memory costs, too

    def ask(self, y: Tensor, context: Context | None) -> Tensor:
        """The second attention, of y (n l ... d).

        A row of the context serves n / b rows of y: their queries stand in one row, so keys and values exist once.
        """
        if context is None:
            return self.attn2(y)
        rows = len(context[0]) if isinstance(context, tuple) else len(context)
        return self.attn2(y.reshape(rows, -1, y.shape[-1]), context).view_as(y)
