"""SiLU(GroupNorm(x)), the most frequent pair of the video UNets, in one kernel.

    y[n, c, i] = silu((x[n, c, i] - mean[n, g(c)]) * rstd[n, g(c)] * weight[c] + bias[c])

`group_norm_silu_ref` is the specification; the kernel is judged against it in float64 (tests/kernels/test_kernels.py).
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import launch, pick, triton_op


def group_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5, *, impl: str | None = None
) -> Tensor:
    """x (n c *spatial), weight (c), bias (c) -> same shape, dtype and memory format; statistics in float32 or wider.

    impl: "torch", "triton" or "auto", see `_dispatch.pick`.
    """
    if pick("group_norm_silu", impl, x) == "torch":
        return group_norm_silu_ref(x, weight, bias, groups, eps)
    return group_norm_silu_triton(x, weight, bias, groups, eps)


def group_norm_silu_ref(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """The definition, in PyTorch. SiLU in place: fresh memory for large tensors costs as much as the arithmetic."""
    return F.silu(F.group_norm(x, groups, weight, bias, eps), inplace=True)


@cache
def triton_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    import triton
    import triton.language as tl

    @triton.jit
    def group_norm_silu_kernel(
        X,  # (n, s, c) or (n, c, s) in memory, as stride_s and stride_c say
        W,  # (c,)
        B,  # (c,)
        Y,  # as X
        C,
        S,  # s: the number of positions
        G,
        stride_s,
        stride_c,
        eps,
        BLOCK_S: tl.constexpr,  # positions per tile
        BLOCK_C: tl.constexpr,  # channels per tile: all of one group
    ):
        """One program per (sample, group). A tile is BLOCK_S positions by one group's channels."""
        n, g = tl.program_id(0), tl.program_id(1)
        CG = C // G
        rows = tl.arange(0, BLOCK_S)
        c = tl.arange(0, BLOCK_C)
        channels = g * CG + c
        in_group = c < CG
        base = n.to(tl.int64) * C * S  # int64: frames x channels x pixels of a batch pass 2**31
        cols = channels.to(tl.int64) * stride_c

        # Mean first, then the centred variance: E[x^2] - E[x]^2 cancels where |mean| >> std.
        acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for i in range(0, S, BLOCK_S):
            s = i + rows
            mask = (s < S)[:, None] & in_group[None, :]
            x = tl.load(X + base + s.to(tl.int64)[:, None] * stride_s + cols[None, :], mask=mask, other=0.0)
            acc += x.to(tl.float32)
        mean = tl.sum(tl.sum(acc, axis=1), axis=0) / (CG * S)
        acc = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for i in range(0, S, BLOCK_S):
            s = i + rows
            mask = (s < S)[:, None] & in_group[None, :]
            x = tl.load(X + base + s.to(tl.int64)[:, None] * stride_s + cols[None, :], mask=mask, other=0.0)
            d = tl.where(mask, x.to(tl.float32) - mean, 0.0)
            acc += d * d
        rstd = 1.0 / tl.sqrt(tl.sum(tl.sum(acc, axis=1), axis=0) / (CG * S) + eps)

        w = tl.load(W + channels, mask=in_group, other=0.0).to(tl.float32) * rstd
        b = tl.load(B + channels, mask=in_group, other=0.0).to(tl.float32)
        for i in range(0, S, BLOCK_S):
            s = i + rows
            mask = (s < S)[:, None] & in_group[None, :]
            offset = base + s.to(tl.int64)[:, None] * stride_s + cols[None, :]
            x = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean) * w[None, :] + b[None, :]
            y = y / (1.0 + tl.exp(-y))
            tl.store(Y + offset, y.to(Y.dtype.element_ty), mask=mask)

    return group_norm_silu_kernel


def tile(channels_per_group: int, positions: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_C): powers of two, at most 4096 elements unless one position's channels are more."""
    block_c = 1 << (channels_per_group - 1).bit_length()
    block_s = 1 << (positions - 1).bit_length()
    return max(1, min(block_s, 4096 // block_c)), block_c


def run_group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    if x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    y = torch.empty_like(x)
    (n, c), s = x.shape[:2], x[0, 0].numel()
    # channels-last: a position's channels lie together; contiguous: a channel's positions do
    stride_s, stride_c = (1, s) if x.is_contiguous() else (c, 1)
    block_s, block_c = tile(c // groups, s)
    launch(
        triton_kernel(), (n, groups), x, weight, bias, y, c, s, groups, stride_s, stride_c, eps,
        BLOCK_S=block_s, BLOCK_C=block_c,
    )  # fmt: skip
    return y


group_norm_silu_triton = triton_op(run_group_norm_silu, group_norm_silu_ref)
