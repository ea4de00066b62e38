"""A convolution along the frames: one matrix product over three frames' channels, in channels-last memory.

    y[b, :, f, p] = bias + sum over t of weight[:, :, t] x[b, :, f + t - 1, p] (+ residual),  x = 0 outside the video

Rows are (b f p), a frame's neighbours lie p rows away: nothing is unfolded, and nothing padded.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import autocast, family, interpreting, launch, pick, sizes, triton_op
from ._tiles import given, planned
from .feed_forward import product_tile, programs


def temporal_conv(
    x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """x (b c f p) in channels-last memory, weight (c_out c 3 1 1), bias (c_out) -> (b c_out f p).

    Along f, padded by one frame of zeros at either end; plus `residual`, of the result's shape. A weight in
    channels-last memory (torch.channels_last_3d) is read where it is, any other is rearranged at every call of the
    kernel. impl: "torch", "triton" or "auto", see `_dispatch.pick`.
    """
    picked = pick("temporal_conv", impl, x, weight, bias, residual)
    if picked == "torch":
        return temporal_conv_ref(x, weight, bias, residual)
    if callable(picked):
        return picked(x, weight, bias, residual)
    x, weight, bias, residual = autocast(x, weight, bias, residual, product=True)
    expect(x, weight, bias, residual)
    return temporal_conv_triton(x, weight, bias, residual)


def temporal_conv_ref(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """The definition, in PyTorch.

    A convolution over (f, h, w) with a kernel of (3, 1, 1) is a convolution in two dimensions. Its image has f rows and
    (h w) columns, and its kernel is (3, 1). In two dimensions every backend has a fast path; in three the CPU has none.
    """
    y = F.conv2d(x, weight.squeeze(-1), bias, padding=(1, 0))
    return y if residual is None else y.add_(residual)


@cache
def temporal_conv_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    global tl  # Triton 3.2 looks a kernel's names up in its module alone
    import triton
    import triton.language as tl

    @triton.jit
    def temporal_conv_kernel(
        X,  # (M, C), M = videos x F x P
        W,  # (N, 3, C)
        B,  # (N,)
        R,  # (M, N), or anything where not RESIDUAL
        Y,  # (M, N)
        M,
        N,
        C,
        F,  # frames
        P,  # pixels of a frame
        RESIDUAL: tl.constexpr,
        WHOLE: tl.constexpr,  # whether BLOCK_K divides C
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,  # tiles of rows that run side by side, so that one reading of W from L2 serves them all
    ):
        """One program per tile of Y; its rows may span frames, and videos."""
        tiles_n = tl.cdiv(N, BLOCK_N)
        tile = tl.program_id(0)
        tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
        # int64: rows x channels of a video pass 2**31
        first = tile_m.to(tl.int64) * BLOCK_M
        row = first + tl.arange(0, BLOCK_M)
        col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        frame = ((first % (F * P)).to(tl.int32) + tl.arange(0, BLOCK_M)) // P % F
        inner = tl.minimum(col, N - 1)  # columns outside are read from the last one and never stored
        x = X + row[:, None] * C + k[None, :]
        w = W + inner[None, :] * 3 * C + k[:, None]

        # One loop over taps and channels: its pipeline fills once. A tap that lies outside for all rows is left out.
        steps = tl.cdiv(C, BLOCK_K)
        begin = tl.where(tl.max(frame, axis=0) == 0, steps, 0)
        end = tl.where(tl.min(frame, axis=0) == F - 1, 2 * steps, 3 * steps)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(B + inner).to(tl.float32)[None, :]
        for step in range(begin, end):
            tap = step // steps
            i = (step - tap * steps) * BLOCK_K
            inside = ((frame + tap >= 1) & (frame + tap <= F) & (row < M))[:, None]
            a = x + ((tap - 1).to(tl.int64) * P * C + i)
            if WHOLE:
                a = tl.load(a, mask=inside, other=0.0)
                b = tl.load(w + (tap * C + i))
            else:
                left = k < C - i
                a = tl.load(a, mask=inside & left[None, :], other=0.0)
                b = tl.load(w + (tap * C + i), mask=left[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")

        y = row[:, None] * N + col[None, :]
        inside = (row < M)[:, None] & (col < N)[None, :]
        if RESIDUAL:
            acc += tl.load(R + y, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + y, acc.to(Y.dtype.element_ty), mask=inside)

    return temporal_conv_kernel


def expect(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> None:
    """ValueError where the kernel cannot take the arguments."""
    if len({x.dtype, weight.dtype, bias.dtype}) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"temporal_conv: x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}: not one 16- or 32-bit dtype"
        )
    (b, c, f, p), n = x.shape, len(weight)
    given = [tuple(t.shape) for t in (x, weight, bias, residual) if t is not None]
    if given[1:] != [(n, c, 3, 1, 1), (n,), (b, n, f, p)][: len(given) - 1]:
        raise ValueError(
            "temporal_conv: x, weight, bias and residual must be (b c f p), (c_out c 3 1 1), (c_out) and "
            f"(b c_out f p), not {', '.join(map(str, given))}"
        )


@planned
def plan(shape: tuple[int, ...], n: int, dtype: torch.dtype, target: str, residual: bool) -> tuple[Any, ...]:
    """How x of this shape becomes n channels: y's shape, grid, sizes, constants."""
    b, c, f, p = shape
    m = b * f * p
    chosen = product_tile(m, n, c, dtype.itemsize, target)
    chosen |= given("temporal_conv", target, m, n, c, dtype.itemsize)
    constants = {"RESIDUAL": residual, "WHOLE": c % chosen["BLOCK_K"] == 0, "GROUP": 8, **chosen}
    return (b, n, f, p), (programs(m, n, chosen),), (m, n, c, f, p), constants


def run_temporal_conv(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    dtype = x.dtype
    if dtype == torch.bfloat16 and interpreting():  # which multiplies the bits of bfloat16 as if they were integers
        y = run_temporal_conv(x.float(), weight.float(), bias.float(), None if residual is None else residual.float())
        return y.to(dtype)
    shape, grid, numbers, constants = plan(sizes(x), bias.shape[0], dtype, family(x.device), residual is not None)
    last = torch.channels_last
    y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=last)
    # Nothing is copied that lies in channels-last memory: x and residual as (b f p c), the weight as (c_out 3 c).
    launch(
        temporal_conv_kernel(), grid, x.contiguous(memory_format=last),
        weight.contiguous(memory_format=torch.channels_last_3d), bias.contiguous(),
        y if residual is None else residual.contiguous(memory_format=last), y, *numbers, **constants,
    )  # fmt: skip
    return y


temporal_conv_triton = triton_op(run_temporal_conv, temporal_conv_ref)
