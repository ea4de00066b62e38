"""GroupNorm and SiLU, the most frequent pair of the video UNets, with what stands before it: skip, residual, timestep.

    y[i, c, p] = silu((x[i, c, p] - mean) * rstd * weight[c] + bias[c]),    mean and rstd of i's video and c's group

`group_norm_silu_ref` and `add_group_norm_silu_ref` are the specification; the kernels are judged against them in
float64 (tests/kernels/accuracy_norm.py).

Small frames in channels-last memory take one kernel, `whole`. A program keeps the numbers of its groups in registers.

Larger ones take three kernels. `moments` splits the positions. For each split it computes one mean and one sum of
squares per channel. (With one program per group there would be only 2 x 32 programs for a clip, too few to fill a GPU.
And groups of 10 or 30 channels do not fit loads of 16 bytes.) `coefficients` merges these per group. It folds all that
is constant in a channel into y = (x - shift) * scale + offset. `apply` computes y. It goes backwards through memory,
because the cache still holds the end of x. Contiguous memory (n c *spatial) goes through the same three kernels.
"""

from functools import cache
from math import gcd, prod
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import autocast, family, launch, pick, sizes, triton_op
from ._tiles import given, like, planned, processors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    frames: int = 1,
    skip: Tensor | None = None,
    emb: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """x ((n frames) c *spatial), weight (c), bias (c) -> like x; statistics span `frames` entries, in float32 or wider.

    skip ((n frames) c2 *spatial): the norm is of torch.cat((x, skip), 1); weight, bias and the result have c + c2.
    emb (m c), m dividing the entries: entry i of x gets emb[i * m // entries] added before the norm.
    silu: False for the norm alone. impl: "torch", "triton" or "auto", see `_dispatch.pick`.
    The result is in channels-last memory where x is, else contiguous. ValueError on shapes that do not fit.
    """
    expect("group_norm_silu", x, weight, bias, groups, frames, skip, emb)
    picked = pick("group_norm_silu", impl, x, weight, bias, skip, emb)
    if picked == "torch":
        return group_norm_silu_ref(x, weight, bias, groups, eps, silu, frames, skip, emb)
    if callable(picked):
        return picked(x, weight, bias, groups, eps, silu, frames, skip, emb)
    x, skip, emb = autocast(x, skip, emb, product=False)
    expect_dtypes("group_norm_silu", x, skip, emb)
    return group_norm_silu_triton(x, weight, bias, groups, eps, silu, frames, skip, emb)


def add_group_norm_silu(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    frames: int = 1,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual ((n frames) c *spatial) -> x + residual, and its `group_norm_silu`; both in x's memory format."""
    expect("add_group_norm_silu", x, weight, bias, groups, frames)
    if x.shape != residual.shape:
        raise ValueError(f"add_group_norm_silu: residual is {tuple(residual.shape)}, and x {tuple(x.shape)}")
    picked = pick("add_group_norm_silu", impl, x, residual, weight, bias)
    if picked == "torch":
        return add_group_norm_silu_ref(x, residual, weight, bias, groups, eps, silu, frames)
    if callable(picked):
        return picked(x, residual, weight, bias, groups, eps, silu, frames)
    x, residual = autocast(x, residual, product=False)
    expect_dtypes("add_group_norm_silu", x, residual)
    return add_group_norm_silu_triton(x, residual, weight, bias, groups, eps, silu, frames)


def group_norm_silu_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    frames: int = 1,
    skip: Tensor | None = None,
    emb: Tensor | None = None,
) -> Tensor:
    """The definition, in PyTorch. SiLU in place: fresh memory for large tensors costs as much as the arithmetic."""
    last = channels_last(x)
    if emb is not None:
        x = (x.unflatten(0, (len(emb), -1)) + emb.view(len(emb), 1, -1, *[1] * (x.ndim - 2))).flatten(0, 1)
    if skip is not None:
        x = torch.cat((x, skip), 1)
    # With more than one frame: (n c frames p). The batch is split off last. In another order a batch of 1 gets a
    # stride by which PyTorch no longer knows the layout.
    h = x if frames == 1 else x.flatten(2).unflatten(0, (-1, frames)).transpose(1, 2)
    if h.is_cpu and torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad) and not h.requires_grad:
        h = h.contiguous()  # PyTorch's backward crashes in channels-last memory where only the weights want a gradient
    h = F.group_norm(h, groups, weight, bias, eps)
    if silu:
        h = F.silu(h, inplace=True)
    if frames > 1:
        h = h.transpose(1, 2).reshape(x.shape)
    if last:
        return h if channels_last(h) else h.movedim(1, -1).contiguous().movedim(-1, 1)
    return h.contiguous()


def add_group_norm_silu_ref(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float = 1e-5,
    silu: bool = True,
    frames: int = 1,
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, group_norm_silu_ref(total, weight, bias, groups, eps, silu, frames)


def expect(
    op: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    frames: int,
    skip: Tensor | None = None,
    emb: Tensor | None = None,
) -> None:
    """ValueError, naming both sizes, where the arguments' shapes do not fit each other."""
    if x.ndim < 3:
        raise ValueError(f"{op}: x must be (n c *spatial), not {tuple(x.shape)}")
    n, c = x.shape[:2]
    if skip is not None:
        if skip.ndim != x.ndim or skip.shape[0] != n or skip.shape[2:] != x.shape[2:]:
            raise ValueError(f"{op}: skip is {tuple(skip.shape)}, and x {tuple(x.shape)}")
        c += skip.shape[1]
    if groups < 1 or c % groups:
        raise ValueError(f"{op}: {c} channels do not divide into {groups} groups")
    if weight.shape != (c,) or bias.shape != (c,):
        raise ValueError(f"{op}: {c} channels, weight {tuple(weight.shape)} and bias {tuple(bias.shape)}")
    if frames < 1 or n % frames:
        raise ValueError(f"{op}: {n} frames do not divide into videos of {frames} frames")
    if emb is not None and (emb.ndim != 2 or emb.shape[1] != x.shape[1] or not len(emb) or n % len(emb)):
        raise ValueError(f"{op}: emb is {tuple(emb.shape)}, which does not fit x {tuple(x.shape)}")


def expect_dtypes(op: str, x: Tensor, *others: Tensor | None) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"{op}: the kernel takes float32, float16 and bfloat16, not {x.dtype}; impl='torch' does")
    for other in others:
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{op}: the kernel takes one dtype, not {x.dtype} and {other.dtype}")


def channels_last(x: Tensor) -> bool:
    """Whether a position's channels lie together, and contiguous memory is not what x also is."""
    if x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x.movedim(1, -1).is_contiguous()


@cache
def kernels() -> SimpleNamespace:
    """The kernels; Triton is imported here, at the first use.

    To them a tensor is (n, t, c): n segments of t positions of c channels. In channels-last memory a segment is as
    many frames as share their statistics and their timestep; else the memory is (n, c, t), and a segment one frame.
    """
    global tl, pointers, load, means, centred  # Triton 3.2 and the interpreter look names up in the module alone
    import triton
    import triton.language as tl

    @triton.jit
    def pointers(P, segment, row, rows, c, T, C, CHANNELS_LAST: tl.constexpr):
        """To the elements (segment, row + rows, c) of P (n, t, c); rows and c broadcast, c along the last axis."""
        segment = segment.to(tl.int64)  # frames x pixels x channels of a batch pass 2**31
        if CHANNELS_LAST:
            at = P + (segment * T + row) * C + (rows * C + c)
        else:
            at = P + segment * T * C + (row + rows + c.to(tl.int64) * T)
        return at

    @triton.jit
    def load(X, SKIP, segment, row, rows, c, mask, T, C, C1, HAS_SKIP: tl.constexpr, CHANNELS_LAST: tl.constexpr):
        """Of torch.cat((x, skip), channels), which does not exist: what is no channel of x is left to the second load.

        A choice between two pointers would be one load, but Triton 3.6 cannot compile it for AMD.
        """
        x = tl.load(pointers(X, segment, row, rows, c, T, C1, CHANNELS_LAST), mask=mask & (c < C1), other=0.0)
        if HAS_SKIP:
            at = pointers(SKIP, segment, row, rows, c - C1, T, C - C1, CHANNELS_LAST)
            x = tl.load(at, mask=mask & (c >= C1), other=x)
        return x

    @triton.jit(do_not_specialize=["SPLITS"])
    def group_norm_moments(
        X,  # (n, t, c1)
        SKIP,  # (n, t, c - c1)
        RESIDUAL,  # (n, t, c)
        SUM,  # (n, t, c): x + residual
        MOMENTS,  # (n, splits, 3, c) float32: a shift, the mean less it, the sum of squares about the mean
        T,
        C,
        C1,
        SPLITS,
        ROWS,  # positions of a split
        HAS_SKIP: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        UNROLL: tl.constexpr,  # tiles that are loaded at once
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program per (segment, split, tile of channels)."""
        tiles = (C + BLOCK_C - 1) // BLOCK_C
        part = tl.program_id(0) // tiles
        segment, split = part // SPLITS, part % SPLITS
        c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        first = split * ROWS
        last = tl.minimum(first + ROWS, T)

        # Sums about a shift near the mean, here that of the first positions: sums about 0 cancel where |mean| >> std.
        rows = tl.arange(0, UNROLL)[:, None, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :, None]
        channels = c[None, None, :]
        valid = (first + rows < last) & (channels < C)
        head = load(X, SKIP, segment, first, rows, channels, valid, T, C, C1, HAS_SKIP, CHANNELS_LAST).to(tl.float32)
        if HAS_RESIDUAL:
            start = pointers(RESIDUAL, segment, first, rows, channels, T, C, CHANNELS_LAST)
            head += tl.load(start, mask=valid, other=0.0).to(tl.float32)
        shift = tl.sum(tl.sum(head, axis=0), axis=0) / tl.minimum(last - first, UNROLL * BLOCK_T)

        total = tl.full((BLOCK_T, BLOCK_C), 0.0, tl.float32)
        squares = tl.full((BLOCK_T, BLOCK_C), 0.0, tl.float32)
        for row in range(first, last, UNROLL * BLOCK_T):
            mask = (row + rows < last) & (channels < C)
            x = load(X, SKIP, segment, row, rows, channels, mask, T, C, C1, HAS_SKIP, CHANNELS_LAST)
            if HAS_RESIDUAL:
                at = pointers(RESIDUAL, segment, row, rows, channels, T, C, CHANNELS_LAST)
                x = (x.to(tl.float32) + tl.load(at, mask=mask, other=0.0).to(tl.float32)).to(SUM.dtype.element_ty)
                tl.store(pointers(SUM, segment, row, rows, channels, T, C, CHANNELS_LAST), x, mask=mask)
            d = tl.where(mask, x.to(tl.float32) - shift[None, None, :], 0.0)
            total += tl.sum(d, axis=0)
            squares += tl.sum(d * d, axis=0)
        s = tl.sum(total, axis=0)
        mean = s / (last - first)
        to = MOMENTS + part.to(tl.int64) * 3 * C + c
        tl.store(to, shift, mask=c < C)
        tl.store(to + C, mean, mask=c < C)
        tl.store(to + 2 * C, tl.sum(squares, axis=0) - s * mean, mask=c < C)

    @triton.jit
    def means(MOMENTS, EMB, part, SPLITS, PER_EMB, C, C1, c, mask, origin, added, HAS_EMB: tl.constexpr):
        """(p, c): the means of x + emb over parts (segment, split) of one video, less `origin` + `added`."""
        at = MOMENTS + part[:, None] * (3 * C) + c[None, :]
        mean = tl.load(at, mask=mask, other=0.0) - origin + tl.load(at + C, mask=mask, other=0.0)
        if HAS_EMB:  # moves the mean, and nothing else
            emb = EMB + (part // SPLITS // PER_EMB)[:, None] * C1 + c[None, :]
            mean += tl.load(emb, mask=mask & (c < C1)[None, :], other=0.0).to(tl.float32) - added
        return mean

    # Compiled once per tile, not once per kind of each number: a network asks for a hundred combinations of these.
    @triton.jit(do_not_specialize=["T", "C1", "SPLITS"])
    def group_norm_coefficients(
        MOMENTS,  # (videos, segments, splits, 3, c) float32
        EMB,  # (m, c1)
        W,  # (c,)
        B,  # (c,)
        TABLE,  # (videos, segments, 3, c) float32: shift, scale and offset of y = (x - shift) * scale + offset
        T,
        C,
        C1,
        G,
        SEGMENTS,  # of a video
        SPLITS,
        ROWS,
        PER_EMB,  # segments that share a row of EMB
        eps,
        HAS_EMB: tl.constexpr,
        BLOCK_P: tl.constexpr,  # parts per tile
        BLOCK_C: tl.constexpr,  # all channels of a group
    ):
        """One program per (video, group): Chan's formula, 1979, for parts of any size."""
        video, g = (tl.program_id(0) // G).to(tl.int64), tl.program_id(0) % G
        CG = C // G
        j = tl.arange(0, BLOCK_C)
        c = g * CG + j
        parts = SEGMENTS * SPLITS
        # All means are taken relative to one of them, so that their digits are those of the deviations.
        origin = tl.load(MOMENTS + video * parts * 3 * C + g * CG)
        added = 0.0
        if HAS_EMB:
            emb = EMB + video * SEGMENTS // PER_EMB * C1 + g * CG
            added = tl.load(emb, mask=g * CG < C1, other=0.0).to(tl.float32)

        moved = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < parts)[:, None] & (j < CG)[None, :]
            d = means(MOMENTS, EMB, video * parts + p, SPLITS, PER_EMB, C, C1, c, mask, origin, added, HAS_EMB)
            count = tl.minimum(ROWS, T - p % SPLITS * ROWS).to(tl.float32)
            moved += tl.where(mask, count[:, None] * d, 0.0)
        size = 1.0 * T * SEGMENTS * CG
        centre = tl.sum(moved) / size

        squares = tl.full((BLOCK_P, BLOCK_C), 0.0, tl.float32)
        for start in range(0, parts, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < parts)[:, None] & (j < CG)[None, :]
            part = video * parts + p
            d = means(MOMENTS, EMB, part, SPLITS, PER_EMB, C, C1, c, mask, origin, added, HAS_EMB) - centre
            count = tl.minimum(ROWS, T - p % SPLITS * ROWS).to(tl.float32)
            within = tl.load(MOMENTS + part[:, None] * (3 * C) + 2 * C + c[None, :], mask=mask, other=0.0)
            squares += tl.where(mask, within + count[:, None] * d * d, 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(squares) / size + eps)

        scale = tl.load(W + c, mask=j < CG, other=0.0).to(tl.float32) * rstd
        bias = tl.load(B + c, mask=j < CG, other=0.0).to(tl.float32)
        for k in range(0, SEGMENTS):
            segment = video * SEGMENTS + k
            moved_by = tl.full((BLOCK_C,), 0.0, tl.float32) - centre
            if HAS_EMB:
                here = EMB + segment // PER_EMB * C1 + c
                moved_by += tl.load(here, mask=(j < CG) & (c < C1), other=0.0).to(tl.float32) - added
            to = TABLE + segment * 3 * C + c
            tl.store(to, tl.full((BLOCK_C,), 0.0, tl.float32) + origin, mask=j < CG)
            tl.store(to + C, scale, mask=j < CG)
            tl.store(to + 2 * C, moved_by * scale + bias, mask=j < CG)

    @triton.jit
    def group_norm_apply(
        X,  # (n, t, c1)
        SKIP,  # (n, t, c - c1)
        TABLE,  # (n, 3, c) float32
        Y,  # (n, t, c)
        T,
        C,
        C1,
        SILU: tl.constexpr,
        HAS_SKIP: tl.constexpr,
        CHANNELS_LAST: tl.constexpr,
        BLOCK_T: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        """One program per (segment, tile of positions, tile of channels), the last of them first."""
        pid = tl.num_programs(0) - 1 - tl.program_id(0)
        tiles = (C + BLOCK_C - 1) // BLOCK_C
        c = pid % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        stretches = (T + BLOCK_T - 1) // BLOCK_T
        segment, row = pid // tiles // stretches, pid // tiles % stretches * BLOCK_T
        rows = tl.arange(0, BLOCK_T)[:, None]
        mask = (row + rows < T) & (c < C)[None, :]
        at = TABLE + segment.to(tl.int64) * 3 * C + c  # before x: after it, a register spills on an A100
        shift = tl.load(at, mask=c < C, other=0.0)
        scale = tl.load(at + C, mask=c < C, other=0.0)
        offset = tl.load(at + 2 * C, mask=c < C, other=0.0)
        x = load(X, SKIP, segment, row, rows, c[None, :], mask, T, C, C1, HAS_SKIP, CHANNELS_LAST).to(tl.float32)
        y = (x - shift[None, :]) * scale[None, :] + offset[None, :]
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        at = pointers(Y, segment, row, rows, c[None, :], T, C, CHANNELS_LAST)
        tl.store(at, y.to(Y.dtype.element_ty), mask=mask)

    @triton.jit
    def centred(x, group, mask, size, GROUPS: tl.constexpr):
        """x less the mean of its group; outside of the mask as it is."""
        for k in tl.static_range(GROUPS):
            mine = mask & (group == k)
            x = tl.where(mine, x - tl.sum(tl.where(mine, x, 0.0)) / size, x)
        return x

    @triton.jit(do_not_specialize=["T", "PER_EMB"])
    def group_norm_whole(
        X,  # (videos, t, c1)
        SKIP,  # (videos, t, c - c1)
        RESIDUAL,  # (videos, t, c)
        SUM,  # (videos, t, c): x + residual
        EMB,  # (m, c1)
        W,  # (c,)
        B,  # (c,)
        Y,  # (videos, t, c)
        T,  # positions of a video, in all its frames
        C,
        C1,
        PER_EMB,  # positions that share a row of EMB
        eps,
        SILU: tl.constexpr,
        HAS_SKIP: tl.constexpr,
        HAS_RESIDUAL: tl.constexpr,
        HAS_EMB: tl.constexpr,
        WIDTH: tl.constexpr,  # channels of a group
        GROUPS: tl.constexpr,  # of a program: together they have a multiple of 8 channels
        BLOCK: tl.constexpr,  # vectors of 8 channels, a power of two
    ):
        """One program per (video, GROUPS groups). It reads their numbers once and keeps them in its registers."""
        VECTORS: tl.constexpr = WIDTH * GROUPS // 8  # of a position
        tiles = C // (WIDTH * GROUPS)
        video, first = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * (WIDTH * GROUPS)
        i = tl.arange(0, BLOCK)
        rows = (i // VECTORS)[:, None]
        inner = (i % VECTORS * 8)[:, None] + tl.arange(0, 8)[None, :]
        c, group, mask = first + inner, inner // WIDTH, rows < T

        x = load(X, SKIP, video, 0, rows, c, mask, T, C, C1, HAS_SKIP, True)
        if HAS_RESIDUAL:
            more = tl.load(pointers(RESIDUAL, video, 0, rows, c, T, C, True), mask=mask, other=0.0)
            x = (x.to(tl.float32) + more.to(tl.float32)).to(SUM.dtype.element_ty)
            tl.store(pointers(SUM, video, 0, rows, c, T, C, True), x, mask=mask)

        # Twice: the first mean is rounded, and the second one is that of small numbers.
        size = 1.0 * T * WIDTH
        d = centred(x.to(tl.float32), group, mask, size, GROUPS)
        if HAS_EMB:  # less the one of each group's first channel, so that large ones cost no digits
            start = video * T
            row = start // PER_EMB + ((start % PER_EMB).to(tl.int32) + rows) // PER_EMB
            e = tl.load(EMB + row * C1 + c, mask=mask & (c < C1), other=0.0).to(tl.float32)
            for k in tl.static_range(GROUPS):
                at = first + k * WIDTH
                added = tl.load(EMB + start // PER_EMB * C1 + at, mask=at < C1, other=0.0).to(tl.float32)
                e = tl.where(mask & (group == k), e - added, e)
            d += e
        d = centred(d, group, mask, size, GROUPS)
        for k in tl.static_range(GROUPS):
            mine = mask & (group == k)
            d = tl.where(mine, d * (1.0 / tl.sqrt(tl.sum(tl.where(mine, d * d, 0.0)) / size + eps)), d)
        y = d * tl.load(W + c).to(tl.float32) + tl.load(B + c).to(tl.float32)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        tl.store(pointers(Y, video, 0, rows, c, T, C, True), y.to(Y.dtype.element_ty), mask=mask)

    return SimpleNamespace(
        moments=group_norm_moments, coefficients=group_norm_coefficients, apply=group_norm_apply,
        whole=group_norm_whole,
    )  # fmt: skip


RESIDENT = 4  # programs of `moments` that each holds, 8 KB of loads on their way in each: 4 with Triton 3.6, 7 with 3.9
LARGEST = 32768  # bytes of x that a program of `whole` keeps: 32 numbers for each of 512 threads; of 64, some spill
LAUNCH = 5_000_000  # bytes that a GPU moves while it starts a kernel: about a microsecond. Assumed, not measured
APPLY_T = 64  # positions per tile of `apply`: 8 KB of 16 bits each for 8 or 9 programs at a time


def power_of_2(size: int) -> int:
    """The smallest power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def channel_tile(channels: int) -> int:
    """64 divides the channels of every published network."""
    return min(64, power_of_2(channels))


def moments_tile(dtype: torch.dtype, residual: bool, target: str) -> tuple[int, int]:
    """(UNROLL, BLOCK_T) of `moments`: four 16-byte loads per thread, of 128, are on their way at once.

    Two of AMD's threads, which are 256. A row of BLOCK_T is a row of threads, so that UNROLL is added up within each.
    """
    if target.startswith("gfx"):
        return 2, 16 if dtype == torch.float32 else 32
    return (2 if dtype == torch.float32 or residual else 4), 16


@cache
def split(segments: int, positions: int, channels: int, tile: int, target: str) -> tuple[int, int]:
    """(splits, positions per split, a multiple of `tile`), such that the programs end together.

    A model, not a measurement: processors take programs RESIDENT at a time, and the last few take them as long.
    """
    programs = segments * -(-channels // channel_tile(channels))

    def time(rows: int) -> int:
        return rows * -(-programs * -(-positions // rows) // (processors(target) * RESIDENT))

    most = max(1, 3 * RESIDENT * processors(target) // programs)
    rows = min((-(-positions // (splits * tile)) * tile for splits in range(1, most + 1)), key=time)
    return -(-positions // rows), rows


def segment_frames(n: int, frames: int, rows_of_emb: int | None) -> int:
    """How many consecutive entries of n share their video and their row of emb."""
    return frames if rows_of_emb is None else gcd(frames, n // rows_of_emb)


def merge_tile(channels_per_group: int, parts: int) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, warps) of `coefficients`: 8 elements per thread, as far as 4 warps go.

    More only where the channels of one part are more. This kernel is a chain of short waits, not of work.
    """
    block_c = power_of_2(channels_per_group)
    block_p = min(power_of_2(parts), max(1, 1024 // block_c))
    return block_p, block_c, min(4, power_of_2(-(-block_p * block_c // 256)))


def whole_tile(
    shape: tuple[int, ...], c: int, groups: int, frames: int, itemsize: int, target: str
) -> tuple[int, int, int] | None:
    """(GROUPS, BLOCK, warps) of `whole`, for x of this shape in channels-last memory; None where it cannot.

    Every load takes 8 channels of x or of skip. A program takes one group, or two if one has no multiple of 8
    channels. With four groups, of 10 channels each, the kernel for AMD spills.
    """
    (_, c1, *spatial), width = shape, c // groups
    together = [k for k in (1, 2) if width * k % 8 == 0 and groups % k == 0]
    if not together or c1 % 8:
        return None
    block = power_of_2(frames * prod(spatial) * width * together[0] // 8)
    warps = block // (256 if like(target).startswith("gfx") else 128)  # 32 numbers for each thread; AMD's warps have 64
    return (together[0], block, max(1, warps)) if 8 * block * itemsize <= LARGEST else None


def launches(shape: tuple[int, ...], c: int, groups: int, frames: int, last: bool, itemsize: int, target: str) -> int:
    """1 or 3 kernels for x of this shape, whichever takes less time, counted.

    One kernel has few programs, so one multiprocessor may have to move more than its share. That must cost less than
    the two launches that are saved. last: whether x is in channels-last memory.
    """
    tile = whole_tile(shape, c, groups, frames, itemsize, target) if last else None
    if tile is None:
        return 3
    moved, programs = 2 * shape[0] * c * prod(shape[2:]) * itemsize, shape[0] // frames * groups // tile[0]
    count = processors(target)
    return 1 if -(-programs // count) * count * moved // programs <= moved + 2 * LAUNCH else 3


@planned
def plan(
    shape: tuple[int, ...], c: int, groups: int, frames: int, rows_of_emb: int | None, last: bool, dtype: torch.dtype,
    target: str, silu: bool, skip: bool, residual: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """How x of this shape is normalised: y's shape, and each kernel's grid, sizes, constants.

    In one launch: of `whole`. In three: None in its place, and then the shapes of moments and table, and of those
    kernels. c: the channels of x and skip together.
    """
    n, c1, *spatial = shape
    span = segment_frames(n, frames, rows_of_emb) if last else 1
    segments, t = n // span, prod(spatial) * span
    unroll, block_t = moments_tile(dtype, residual, like(target))
    chosen = {"UNROLL": unroll, "BLOCK_T": block_t, "APPLY_T": APPLY_T}
    chosen["LAUNCHES"] = launches(shape, c, groups, frames, last, dtype.itemsize, target)
    chosen |= given("group_norm_silu", target, segments, t, c, dtype.itemsize)
    if chosen["LAUNCHES"] == 1:
        return (n, c, *spatial), whole(shape, c, groups, frames, rows_of_emb, last, dtype, target, silu, skip, residual)
    unroll, block_t, apply_t = chosen["UNROLL"], chosen["BLOCK_T"], chosen["APPLY_T"]
    splits, rows = split(segments, t, c, unroll * block_t, target)
    block_c = channel_tile(c)
    tiles = -(-c // block_c)
    block_p, group_c, warps = merge_tile(c // groups, splits * frames // span)
    per_emb = 1 if rows_of_emb is None else segments // rows_of_emb
    both = {"HAS_SKIP": skip, "CHANNELS_LAST": last}
    return (
        (n, c, *spatial), None, (segments, splits, 3, c), (segments, 3, c),
        (segments * splits * tiles,), (t, c, c1, splits, rows),
        {**both, "HAS_RESIDUAL": residual, "UNROLL": unroll, "BLOCK_T": block_t, "BLOCK_C": block_c},
        (n // frames * groups,), (t, c, c1, groups, frames // span, splits, rows, per_emb),
        {"HAS_EMB": rows_of_emb is not None, "BLOCK_P": block_p, "BLOCK_C": group_c, "num_warps": warps},
        (segments * -(-t // apply_t) * tiles,), (t, c, c1),
        {**both, "SILU": silu, "BLOCK_T": apply_t, "BLOCK_C": block_c},
    )  # fmt: skip


def whole(
    shape: tuple[int, ...], c: int, groups: int, frames: int, rows_of_emb: int | None, last: bool, dtype: torch.dtype,
    target: str, silu: bool, skip: bool, residual: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Grid, sizes and constants of the one kernel. ValueError where it cannot: a table of tiles may ask for it."""
    n, c1, *spatial = shape
    tile = whole_tile(shape, c, groups, frames, dtype.itemsize, target) if last else None
    if tile is None:
        raise ValueError(f"group_norm_silu: LAUNCHES=1 does not fit x {shape} with {groups} groups of {c} channels")
    together, block, warps = tile
    positions = prod(spatial)
    return (
        (n // frames * (groups // together),), (frames * positions, c, c1, n * positions // (rows_of_emb or 1)),
        {
            "SILU": silu, "HAS_SKIP": skip, "HAS_RESIDUAL": residual, "HAS_EMB": rows_of_emb is not None,
            "WIDTH": c // groups, "GROUPS": together, "BLOCK": block, "num_warps": warps,
        },
    )  # fmt: skip


def laid_out(x: Tensor, last: bool) -> Tensor:
    """x in channels-last or in contiguous memory."""
    if not last:
        return x.contiguous()
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def fresh(shape: tuple[int, ...], last: bool, like: Tensor) -> Tensor:
    """Of like's dtype, on its device."""
    if last and len(shape) == 4:
        return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    if last:
        return torch.empty((shape[0], *shape[2:], shape[1]), dtype=like.dtype, device=like.device).movedim(-1, 1)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    frames: int,
    skip: Tensor | None,
    emb: Tensor | None,
) -> tuple[Tensor | None, Tensor]:
    """(x + residual or None, y)."""
    last, device = channels_last(x), x.device
    if not x.numel():
        y = fresh((len(x), len(bias), *x.shape[2:]), last, x)
        return None if residual is None else torch.empty_like(y), y
    x = laid_out(x, last)
    shape, whole, *three = plan(
        sizes(x), bias.shape[0], groups, frames, None if emb is None else emb.shape[0], last, x.dtype, family(device),
        silu, skip is not None, residual is not None,
    )  # fmt: skip
    y = fresh(shape, last, x)
    total = None if residual is None else fresh(shape, last, x)
    weight, bias = weight.contiguous(), bias.contiguous()
    # x and weight stand for what is absent
    skip = x if skip is None else laid_out(skip, last)
    emb = weight if emb is None else emb.contiguous()
    read = x if total is None else total
    residual = x if residual is None else laid_out(residual, last)
    found = kernels()
    if whole is not None:
        grid, numbers, constants = whole
        launch(found.whole, grid, x, skip, residual, read, emb, weight, bias, y, *numbers, eps, **constants)
        return total, y
    (
        of_moments, of_table, moments_grid, moments_sizes, moments_constants, merge_grid, merge_sizes, merge_constants,
        apply_grid, apply_sizes, apply_constants,
    ) = three  # fmt: skip
    moments = torch.empty(of_moments, dtype=torch.float32, device=device)
    table = torch.empty(of_table, dtype=torch.float32, device=device)
    launch(found.moments, moments_grid, x, skip, residual, read, moments, *moments_sizes, **moments_constants)
    launch(found.coefficients, merge_grid, moments, emb, weight, bias, table, *merge_sizes, eps, **merge_constants)
    launch(found.apply, apply_grid, read, skip, table, y, *apply_sizes, **apply_constants)
    return total, y


def run_group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    silu: bool,
    frames: int,
    skip: Tensor | None,
    emb: Tensor | None,
) -> Tensor:
    return run(x, None, weight, bias, groups, eps, silu, frames, skip, emb)[1]


def run_add_group_norm_silu(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool, frames: int
) -> tuple[Tensor, Tensor]:
    total, y = run(x, residual, weight, bias, groups, eps, silu, frames, None, None)
    assert total is not None
    return total, y


group_norm_silu_triton = triton_op(run_group_norm_silu, group_norm_silu_ref)
add_group_norm_silu_triton = triton_op(run_add_group_norm_silu, add_group_norm_silu_ref)
