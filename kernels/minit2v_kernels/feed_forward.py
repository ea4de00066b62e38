"""The GEGLU of a feed-forward (Shazeer 2020, arXiv:2002.05202): projection and gate in one matrix product.

    y[r, j] = value * gelu(gate),  value = x[r] . weight[j] + bias[j],  gate = x[r] . weight[m + j] + bias[m + j]

In PyTorch both halves (2m wide) are written, read, and gated in two more passes. They are the widest tensors of a UNet
and its peak in memory. Here a program holds the same tile of both halves and writes the product alone.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import autocast, family, interpreting, launch, pick, sizes, triton_op
from ._tiles import given, like, planned, processors

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (... d), weight (m d), bias (m) -> (... m): F.linear; on the CPU, without gradients, through oneDNN.

    Its float32 kernels use AVX-512 on every x86 that has it. MKL's, which F.linear calls, do so on Intel's only: on
    AMD's they take twice the time.
    """
    if x.is_cpu and x.dtype == torch.float32 and ONEDNN and not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def geglu(x: Tensor, weight: Tensor, bias: Tensor, *, impl: str | None = None) -> Tensor:
    """x (... d), weight (2m d), bias (2m) -> (... m): the first half of a projection, times GELU of the second.

    GELU is the exact one, by erf. impl: "torch", "triton" or "auto", see `_dispatch.pick`.
    """
    picked = pick("geglu", impl, x, weight, bias)
    if picked == "torch":
        return geglu_ref(x, weight, bias)
    if callable(picked):
        return picked(x, weight, bias)
    x, weight, bias = autocast(x, weight, bias, product=True)
    expect(x, weight, bias)
    return geglu_triton(x, weight, bias)


def geglu_ref(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The definition, in PyTorch. The product in place: these tensors are the widest of the UNet."""
    value, gate = linear(x, weight, bias).chunk(2, dim=-1)
    return F.gelu(gate).mul_(value)


@cache
def geglu_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    global tl  # Triton 3.2 looks a kernel's names up in its module alone
    import triton
    import triton.language as tl

    @triton.jit
    def geglu_kernel(
        X,  # (M, K)
        W,  # (2 N, K): the rows of the values, then those of the gates
        B,  # (2 N,)
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
        """One program per tile of Y, with an accumulator for its values and one for its gates."""
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
        w_value = W + inner[None, :] * K + k[:, None]
        w_gate = W + (inner + N)[None, :] * K + k[:, None]

        # The sums begin with the bias: added at the end, it would need registers that the sums leave no room for.
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        value = zeros + tl.load(B + inner).to(tl.float32)[None, :]
        gate = zeros + tl.load(B + inner + N).to(tl.float32)[None, :]
        for i in range(0, K, BLOCK_K):
            if WHOLE:
                a = tl.load(x + i)
                b = tl.load(w_value + i)
                c = tl.load(w_gate + i)
            else:
                left = k < K - i
                a = tl.load(x + i, mask=left[None, :], other=0.0)
                b = tl.load(w_value + i, mask=left[:, None], other=0.0)
                c = tl.load(w_gate + i, mask=left[:, None], other=0.0)
            value = tl.dot(a, b, value, input_precision="ieee")
            gate = tl.dot(a, c, gate, input_precision="ieee")

        y = value * (gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476)))
        inside = (row < M)[:, None] & (col < N)[None, :]
        tl.store(Y + row[:, None] * N + col[None, :], y.to(Y.dtype.element_ty), mask=inside)

    return geglu_kernel


def tile(block_m: int, block_n: int, block_k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages
    }  # fmt: skip


def programs(m: int, n: int, tile: dict[str, int]) -> int:
    """How many tiles cover (m n)."""
    return -(-m // tile["BLOCK_M"]) * -(-n // tile["BLOCK_N"])


def best_tile(m: int, n: int, choices: Sequence[dict[str, int]], target: str) -> dict[str, int]:
    """Of tiles from the largest to the smallest: the largest, if no smaller one takes a tenth less time, counted.

    The time is that of the multiprocessor with the most programs. So what a tile computes outside of (m n) counts, and
    what the last wave leaves idle. A large tile reads less for each product: that is why a smaller one must gain.
    """
    count = processors(target)

    def time(t: dict[str, int]) -> int:
        return -(-programs(m, n, t) // count) * t["BLOCK_M"] * t["BLOCK_N"]

    best = choices[0]
    for smaller in choices[1:]:
        if time(smaller) < 0.9 * time(best):
            best = smaller
    return best


def product_tile(m: int, n: int, k: int, itemsize: int, target: str) -> dict[str, int]:
    """Tile, warps and stages for (m n), a plain product of rows of k; target: see `_dispatch.family`.

    None of them spills registers.
    """
    if itemsize == 4 or k % 64:  # float32 without tensor cores, and what no model asks for
        return tile(64, 64, 16, 4, 2)
    tiles = like(target)
    stages = 2 if tiles.startswith("gfx") else 3  # 64 KiB of shared memory
    sizes = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4))
    choices = [tile(rows, columns, 64, warps, stages) for rows, columns, warps in sizes]
    if tiles == "sm_90":
        choices = [tile(256, 128, 64, 8, 4), tile(256, 64, 64, 8, 4), *choices]
    if target[:5] in ("gfx11", "gfx12"):  # warps of 32 threads: half the registers, and 128 x 128 spills
        choices = choices[1:]
    return best_tile(m, n, choices, target)


def geglu_tile(m: int, n: int, k: int, itemsize: int, target: str) -> dict[str, int]:
    """Tile, warps and stages for (m n) out of rows of k; target: see `_dispatch.family`.

    None of them spills registers. (Two accumulators: a tile of 128 x 64 weighs as much as one of 128 x 128 in a plain
    product.)
    """
    tiles = like(target)
    amd = tiles.startswith("gfx")
    if itemsize == 4 or k % 64:  # float32 without tensor cores, and what no model asks for
        return tile(64, 64, 16, 4 if amd else 8, 2)  # the same threads, as AMD's warps have twice as many
    stages = 2 if amd else 3  # 64 KiB of shared memory
    choices = [tile(128, 64, 64, 8, stages), tile(64, 64, 64, 4, stages), tile(64, 32, 64, 4, stages)]
    if tiles == "sm_90" and k >= 512:  # one block per multiprocessor: nothing else covers its first and last steps
        choices = [tile(128, 128, 64, 8, 4), *choices]
    return best_tile(m, n, choices, target)


def expect(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """ValueError where the kernel cannot take the arguments."""
    if len({x.dtype, weight.dtype, bias.dtype}) > 1 or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"geglu: x {x.dtype}, weight {weight.dtype}, bias {bias.dtype}: not one 16- or 32-bit dtype")
    n, k = weight.shape
    if x.shape[-1] != k or n % 2 or bias.shape != (n,):
        found = ", ".join(str(tuple(t.shape)) for t in (x, weight, bias))
        raise ValueError(f"geglu: x, weight and bias must be (... d), (2m d) and (2m), not {found}")


@planned
def plan(shape: tuple[int, ...], of_weight: tuple[int, ...], dtype: torch.dtype, target: str) -> tuple[Any, ...]:
    """How x of this shape is multiplied: y's shape, grid, sizes, constants."""
    (n, k), m = of_weight, prod(shape[:-1])
    n //= 2
    chosen = geglu_tile(m, n, k, dtype.itemsize, target) | given("geglu", target, m, n, k, dtype.itemsize)
    constants = {"WHOLE": k % chosen["BLOCK_K"] == 0, "GROUP": 8, **chosen}
    return (*shape[:-1], n), (programs(m, n, chosen),), (m, n, k), constants


def run_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = x.dtype
    if dtype == torch.bfloat16 and interpreting():  # which multiplies the bits of bfloat16 as if they were integers
        return run_geglu(x.float(), weight.float(), bias.float()).to(dtype)
    shape, grid, numbers, constants = plan(sizes(x), sizes(weight), dtype, family(x.device))
    y = torch.empty(shape, dtype=dtype, device=x.device)
    launch(
        geglu_kernel(), grid, x.contiguous(), weight.contiguous(), bias.contiguous(), y, *numbers, **constants
    )  # fmt: skip
    return y


geglu_triton = triton_op(run_geglu, geglu_ref)
