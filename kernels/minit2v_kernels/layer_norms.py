"""LayerNorm with what stands around it in a transformer block: the residual before it, AnimateDiff's positions after.

    s[r]    = x[r] + residual[r]                                             rows r of d numbers; s is returned too
    y[r, i] = (s[r, i] - mean(s[r])) * rstd(s[r]) * weight[i] + bias[i] + positions[frame of r, i]

PyTorch moves a tensor of tokens seven times for these sums and this norm, the kernel four times: x, residual, s, y.
"""

from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import family, launch, pick, sizes, triton_op
from ._tiles import given, planned

WIDEST = 16384  # numbers in a row; wider ones would not fit in the registers of one block


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    positions: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x (b f ... d), weight and bias (d), positions (f d) -> LayerNorm(x) + positions, of x's shape and dtype.

    Statistics in float32 or wider. positions: added after the norm, by the place on axis 1. impl: see `_dispatch.pick`.
    """
    expect(x, None, weight, bias, positions)
    picked = pick("layer_norm", impl, x, weight, bias, positions)
    if callable(picked):
        return picked(x, weight, bias, eps, positions)
    chosen = layer_norm_ref if picked == "torch" else layer_norm_triton
    return chosen(x, weight, bias, eps, positions)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    positions: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s = x + residual, both (b f ... d) -> (s, layer_norm(s, ...)): the norm of s as it is returned, rounded."""
    expect(x, residual, weight, bias, positions)
    picked = pick("add_layer_norm", impl, x, residual, weight, bias, positions)
    if callable(picked):
        return picked(x, residual, weight, bias, eps, positions)
    chosen = add_layer_norm_ref if picked == "torch" else add_layer_norm_triton
    return chosen(x, residual, weight, bias, eps, positions)


def expect(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, positions: Tensor | None) -> None:
    """ValueError where the shapes do not belong together: PyTorch would broadcast them, a kernel read beyond them."""
    if weight.shape != x.shape[-1:] or bias.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)} must be ({x.shape[-1]},)")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must be of x's shape {tuple(x.shape)}")
    if positions is not None and (x.ndim < 3 or positions.shape != (x.shape[1], x.shape[-1])):
        raise ValueError(f"positions {tuple(positions.shape)} must be (f, d) of x (b, f, ..., d), {tuple(x.shape)}")


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, positions: Tensor | None = None
) -> Tensor:
    """The definition, in PyTorch."""
    y = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # In place: nothing needs y before it, and fresh memory costs as much as the sum.
    return y if positions is None else y.add_(positions.view(len(positions), *[1] * (x.ndim - 3), -1))


def add_layer_norm_ref(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The definition, in PyTorch."""
    x = x + residual
    return x, layer_norm_ref(x, weight, bias, eps, positions)


@cache
def layer_norm_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    global tl  # Triton 3.2 looks a kernel's names up in its module alone
    import triton
    import triton.language as tl

    @triton.jit
    def layer_norm_kernel(
        X,  # (rows, D)
        R,  # (rows, D): the residual; read if ADD
        W,  # (D,)
        B,  # (D,)
        P,  # (frames, D): read if PLACE
        S,  # (rows, D): x + residual; written if ADD
        Y,  # (rows, D)
        rows,
        frames,
        inner,  # rows between one frame and the next
        eps,
        D: tl.constexpr,
        BLOCK_R: tl.constexpr,  # rows of a program
        BLOCK_D: tl.constexpr,  # D rounded up to a power of two
        ADD: tl.constexpr,
        PLACE: tl.constexpr,
    ):
        """One program normalises BLOCK_R rows, which stay in its registers between the passes over them."""
        r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        d = tl.arange(0, BLOCK_D)
        there = d < D
        mask = (r < rows)[:, None] & there[None, :]
        offset = r.to(tl.int64)[:, None] * D + d[None, :]  # int64: a video's tokens pass 2**31 numbers

        x = tl.load(X + offset, mask=mask, other=0.0)
        if ADD:
            # Rounded to its dtype as x + residual is in PyTorch: the norm is of the numbers that are stored.
            x = (x.to(tl.float32) + tl.load(R + offset, mask=mask, other=0.0).to(tl.float32)).to(S.dtype.element_ty)
            tl.store(S + offset, x, mask=mask)
        x = x.to(tl.float32)

        # Mean first, then the centred variance: E[x^2] - E[x]^2 cancels where |mean| >> std.
        mean = tl.sum(x, axis=1) / D
        x = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)

        w = tl.load(W + d, mask=there, other=0.0).to(tl.float32)
        b = tl.load(B + d, mask=there, other=0.0).to(tl.float32)
        y = x * rstd[:, None] * w[None, :] + b[None, :]
        if PLACE:
            place = (r // inner) % frames * D
            y += tl.load(P + place[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + offset, y.to(Y.dtype.element_ty), mask=mask)

    return layer_norm_kernel


def tile(d: int, itemsize: int) -> tuple[int, int, int]:
    """Rows of d numbers -> (BLOCK_R, BLOCK_D, warps): one warp per row, so that its sums need no shared memory.

    A warp takes 4 KB, in 16 bits 64 numbers per thread: four rows of 320, two of 640 or one of 1,280. More warps share
    wider rows. Less would leave too few bytes under way, as an SM runs at most 32 blocks; more would spill registers.
    """
    block_d, numbers = max(16, 1 << (d - 1).bit_length()), 4096 // itemsize
    return max(1, min(16, numbers // block_d)), block_d, max(1, min(16, block_d // numbers))


@planned
def plan(
    shape: tuple[int, ...], dtype: torch.dtype, other: torch.dtype, add: bool, place: bool, target: str
) -> tuple[Any, ...]:
    """How rows of this shape are normalised: the dtype of x + residual, of dtype and other, grid, sizes, constants.

    TypeError and ValueError where the kernel cannot.
    """
    d, rows = shape[-1], prod(shape[:-1])
    dtype = torch.promote_types(dtype, other)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"layer_norm's kernel takes float32, float16 and bfloat16, not {dtype}")
    if d > WIDEST or rows >= 2**31 - 16:
        raise ValueError(f"layer_norm's kernel takes up to 2**31 rows of up to {WIDEST} numbers, not {tuple(shape)}")
    frames, inner = (shape[1], prod(shape[2:-1])) if place else (1, 1)
    block_r, block_d, warps = tile(d, dtype.itemsize)
    chosen = {"BLOCK_R": block_r, "num_warps": warps} | given("add_layer_norm", target, d, dtype.itemsize)
    block_r, constants = chosen["BLOCK_R"], {"D": d, "BLOCK_D": block_d, "ADD": add, "PLACE": place, **chosen}
    return dtype, (-(-rows // block_r),), (rows, frames, inner), constants


def run_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None) -> Tensor:
    shape, x = sizes(x), x.contiguous()
    dtype, grid, numbers, constants = plan(
        shape, x.dtype, x.dtype, False, positions is not None, family(x.device)
    )  # fmt: skip
    y = torch.empty(shape, dtype=dtype, device=x.device)
    p = x if positions is None else positions.contiguous()  # x: neither read nor written
    launch(
        layer_norm_kernel(), grid, x, x, weight.contiguous(), bias.contiguous(), p, x, y, *numbers, eps, **constants
    )  # fmt: skip
    return y


def run_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    return add_and_norm(x, residual, weight, bias, eps, positions, False)


def run_add_layer_norm_into(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same with the sum in x's memory, if x is contiguous and of the sum's dtype: every number has one reader."""
    return add_and_norm(x, residual, weight, bias, eps, positions, True)


def add_and_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, positions: Tensor | None, into: bool
) -> tuple[Tensor, Tensor]:
    shape, x, device = sizes(x), x.contiguous(), x.device
    dtype, grid, numbers, constants = plan(
        shape, x.dtype, residual.dtype, True, positions is not None, family(device)
    )  # fmt: skip
    y = torch.empty(shape, dtype=dtype, device=device)
    s = x if into and x.dtype == dtype else torch.empty(shape, dtype=dtype, device=device)
    p = x if positions is None else positions.contiguous()
    launch(
        layer_norm_kernel(), grid, x, residual.contiguous(), weight.contiguous(), bias.contiguous(), p, s, y,
        *numbers, eps, **constants,
    )  # fmt: skip
    return s, y


layer_norm_triton = triton_op(run_layer_norm, layer_norm_ref)
add_layer_norm_triton = triton_op(run_add_layer_norm, add_layer_norm_ref)
