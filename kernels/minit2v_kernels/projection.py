"""A linear layer and the residual that is added to its result, in one matrix product.

    y[r, j] = x[r] . weight[j] + bias[j] + residual[r, j]

PyTorch writes the product, reads it again with the residual, and writes the sum. Here the residual is added in the
registers that hold the product.
"""

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._dispatch import autocast, family, interpreting, launch, pick, sizes, triton_op
from ._tiles import given, planned
from .feed_forward import linear, product_tile, programs


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *, impl: str | None = None) -> Tensor:
    """x (... d), weight (m d), bias (m), residual (... m) -> x weight^T + bias + residual (... m).

    impl: "torch", "triton" or "auto", see `_dispatch.pick`. ValueError on shapes or dtypes that the kernel cannot take.
    """
    picked = pick("linear_add", impl, x, weight, bias, residual)
    if picked == "torch":
        return linear_add_ref(x, weight, bias, residual)
    if callable(picked):
        return picked(x, weight, bias, residual)
    x, weight, bias, residual = autocast(x, weight, bias, residual, product=True)
    expect(x, weight, bias, residual)
    return linear_add_triton(x, weight, bias, residual)


def linear_add_ref(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """The definition, in PyTorch. The sum in place: fresh memory costs as much as the sum."""
    return linear(x, weight, bias).add_(residual)


@cache
def linear_add_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    global tl  # Triton 3.2 looks a kernel's names up in its module alone
    import triton
    import triton.language as tl

    @triton.jit
    def linear_add_kernel(
        X,  # (M, K)
        W,  # (N, K)
        B,  # (N,)
        R,  # (M, N)
        Y,  # (M, N)
        M,
        N,
        K,
        WHOLE: tl.constexpr,  # whether BLOCK_K divides K
        BLOCK_M: tl.constexpr,
        BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr,
        GROUP: tl.constexpr,  # tiles of rows that run side by side, so that one reading of W from L2 serves them all
    ):
        """One program per tile of Y."""
        tiles_n = tl.cdiv(N, BLOCK_N)
        tile = tl.program_id(0)
        tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tl.cdiv(M, BLOCK_M), tiles_n, GROUP)
        # int64: rows x channels of a video pass 2**31
        row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        col = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = tl.arange(0, BLOCK_K)
        # What lies outside is read from the last row and never stored: no masks in the loop.
        inner = tl.minimum(col, N - 1)
        x = X + tl.minimum(row, M - 1)[:, None] * K + k[None, :]
        w = W + inner[None, :] * K + k[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(B + inner).to(tl.float32)[None, :]
        for i in range(0, K, BLOCK_K):
            if WHOLE:
                a = tl.load(x + i)
                b = tl.load(w + i)
            else:
                left = k < K - i
                a = tl.load(x + i, mask=left[None, :], other=0.0)
                b = tl.load(w + i, mask=left[:, None], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        y = row[:, None] * N + col[None, :]
        inside = (row < M)[:, None] & (col < N)[None, :]
        acc += tl.load(R + y, mask=inside, other=0.0).to(tl.float32)
        tl.store(Y + y, acc.to(Y.dtype.element_ty), mask=inside)

    return linear_add_kernel


def expect(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> None:
    """ValueError where the kernel cannot take the arguments."""
    found = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    if len({t.dtype for t in found.values()}) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        dtypes = ", ".join(f"{name} {t.dtype}" for name, t in found.items())
        raise ValueError(f"linear_add: {dtypes}: not one 16- or 32-bit dtype")
    shapes = [tuple(t.shape) for t in (weight, bias, residual)]
    if shapes != [(len(bias), x.shape[-1]), (len(bias),), (*x.shape[:-1], len(bias))]:
        given = ", ".join(str(tuple(t.shape)) for t in found.values())
        raise ValueError(f"linear_add: x, weight, bias, residual must be (... d), (m d), (m), (... m), not {given}")


@planned
def plan(shape: tuple[int, ...], n: int, dtype: torch.dtype, target: str) -> tuple[Any, ...]:
    """How x of this shape becomes n numbers a row: y's shape, grid, sizes, constants."""
    k, m = shape[-1], prod(shape[:-1])
    chosen = product_tile(m, n, k, dtype.itemsize, target) | given("linear_add", target, m, n, k, dtype.itemsize)
    constants = {"WHOLE": k % chosen["BLOCK_K"] == 0, "GROUP": 8, **chosen}
    return (*shape[:-1], n), (programs(m, n, chosen),), (m, n, k), constants


def run_linear_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    dtype = x.dtype
    if dtype == torch.bfloat16 and interpreting():  # which multiplies the bits of bfloat16 as if they were integers
        return run_linear_add(x.float(), weight.float(), bias.float(), residual.float()).to(dtype)
    shape, grid, numbers, constants = plan(sizes(x), bias.shape[0], dtype, family(x.device))
    y = torch.empty(shape, dtype=dtype, device=x.device)
    launch(
        linear_add_kernel(), grid, x.contiguous(), weight.contiguous(), bias.contiguous(), residual.contiguous(), y,
        *numbers, **constants,
    )  # fmt: skip
    return y


linear_add_triton = triton_op(run_linear_add, linear_add_ref)
