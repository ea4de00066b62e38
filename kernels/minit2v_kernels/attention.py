"""Attention across the frames of a video, each pixel and head by itself: many very short sequences.

    y[b, i, p, h] = sum_j softmax_j(q[b, i, p, h] . k[b, j, p, h] / sqrt(d)) v[b, j, p, h]        i, j: frames

Vaswani et al. 2017, arXiv:1706.03762, section 3.2. The kernel reads q, k and v where the projections wrote them: a
pixel's frames lie far apart, but each of them is one contiguous row per head, so nothing is permuted, in or out.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import launch, pick, triton_op

MAX_HEADS = 65535  # what one axis of a CUDA grid may count; a video of 1024x576 has 9,216 x 8 in its first layer
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernel takes


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, impl: str | None = None
) -> Tensor:
    """q, k, v (b f p h d) -> (b f p h d), contiguous: attention along f, scale d^-0.5, softmax in float32 or wider.

    q, k and v may be views of one fused projection, (b f p 3 h d): no layout of b, f and p costs a copy in the kernel,
    if h and d lie together and all three tensors have the same strides.
    window: frame i sees the frames j with |i - j| < window; causal: only those with j <= i. Itself a frame always sees.
    impl: "torch", "triton" or "auto", see `_dispatch.pick`. Raises ValueError on other shapes, and window < 1.
    """
    if q.ndim != 5 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"temporal_attention: q, k and v must have one shape (b f p h d), not {shapes}")
    if window is not None and window < 1:
        raise ValueError(f"temporal_attention: window must be at least 1, the frame itself, not {window}")
    window = q.shape[1] if window is None else min(window, q.shape[1])
    if pick("temporal_attention", impl, q) == "torch":
        return temporal_attention_ref(q, k, v, causal, window)
    return temporal_attention_triton(q, k, v, causal, window)


def temporal_attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int | None = None) -> Tensor:
    """The definition, in PyTorch. Pixels are independent of each other, as heads are, so they are counted as heads."""
    b, f, p, h, d = q.shape
    mask = None
    if causal or (window is not None and window < f):
        ago = torch.arange(f, device=q.device)[:, None] - torch.arange(f, device=q.device)  # i - j
        mask = (ago >= (0 if causal else -f)) & (ago.abs() < (f if window is None else window))
    # Views, where q, k and v have a tensor each: not one byte moves.
    pieces = zip(*(x.reshape(b, f, p * h, d).transpose(1, 2).split(MAX_HEADS, 1) for x in (q, k, v)), strict=True)
    found = [F.scaled_dot_product_attention(*piece, attn_mask=mask) for piece in pieces]
    y = found[0] if len(found) == 1 else torch.cat(found, 1)
    return y.transpose(1, 2).reshape(b, f, p, h, d).contiguous()


@cache
def temporal_attention_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    import triton
    import triton.language as tl

    @triton.jit
    def temporal_attention_kernel(
        Q,  # (b, F, pixels, heads, D): strides as given, then D, then 1
        K,  # as Q
        V,  # as Q
        Y,  # (b, F, pixels, heads, D), contiguous
        pixels,
        heads,
        stride_b,
        stride_f,
        stride_p,
        scale,  # times log2(e): exp2 is what the hardware has
        F: tl.constexpr,
        D: tl.constexpr,
        CAUSAL: tl.constexpr,
        WINDOW: tl.constexpr,  # F: all frames
        PIXELS: tl.constexpr,  # per program; more than one only if all their frames are at most BLOCK
        BLOCK: tl.constexpr,  # rows of a tile: frames, pixel after pixel
        D1: tl.constexpr,  # D = D1 + D2, powers of two (the tail is masked), D2 may be 0
        D2: tl.constexpr,
    ):
        """One program per (batch, PIXELS pixels, BLOCK queries, head), heads fastest: they share cache lines.

        The tokens of the pixels stand in one column, pixel after pixel; a tile of scores is masked to its diagonal
        blocks, where query and key are of the same pixel. Up to BLOCK frames there is one tile and the loop runs once;
        beyond it is FlashAttention's online softmax (Dao et al. 2022, arXiv:2205.14135).
        """
        blocks: tl.constexpr = (PIXELS * F + BLOCK - 1) // BLOCK
        pid = tl.program_id(0)
        h, pid = pid % heads, pid // heads
        start, pid = (pid % blocks) * BLOCK, pid // blocks
        groups = tl.cdiv(pixels, PIXELS)
        b, p0 = (pid // groups).to(tl.int64), (pid % groups) * PIXELS
        base = b * stride_b + h * D
        d1 = tl.arange(0, D1)
        d2 = D1 + tl.arange(0, D2 if D2 else 1)

        rows = start + tl.arange(0, BLOCK)
        p, f = rows // F, rows % F
        real = (p < PIXELS) & (p0 + p < pixels)
        at = base + f.to(tl.int64) * stride_f + (p0 + p).to(tl.int64) * stride_p
        mask1 = real[:, None] & (d1 < D)[None, :]
        mask2 = real[:, None] & (d2 < D)[None, :]
        q1 = tl.load(Q + at[:, None] + d1[None, :], mask=mask1, other=0.0)
        if D2:
            q2 = tl.load(Q + at[:, None] + d2[None, :], mask=mask2, other=0.0)

        top = tl.full((BLOCK,), float("-inf"), tl.float32)  # the largest score so far
        total = tl.zeros((BLOCK,), tl.float32)
        y1 = tl.zeros((BLOCK, D1), tl.float32)
        y2 = tl.zeros((BLOCK, D2 if D2 else 1), tl.float32)
        first, last = 0, PIXELS * F  # of the keys that these queries see
        if blocks > 1:
            if CAUSAL:
                last = tl.minimum(last, start + BLOCK)
            if WINDOW < F:
                first = tl.maximum(0, start - WINDOW + 1) // BLOCK * BLOCK
                last = tl.minimum(last, start + BLOCK - 1 + WINDOW)
        for key in range(first, last, BLOCK):
            keys = key + tl.arange(0, BLOCK)
            pk, fk = keys // F, keys % F
            exists = (pk < PIXELS) & (p0 + pk < pixels)
            at_k = base + fk.to(tl.int64) * stride_f + (p0 + pk).to(tl.int64) * stride_p
            some1 = exists[:, None] & (d1 < D)[None, :]
            some2 = exists[:, None] & (d2 < D)[None, :]
            k1 = tl.load(K + at_k[:, None] + d1[None, :], mask=some1, other=0.0)
            v1 = tl.load(V + at_k[:, None] + d1[None, :], mask=some1, other=0.0)
            s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            if D2:
                k2 = tl.load(K + at_k[:, None] + d2[None, :], mask=some2, other=0.0)
                v2 = tl.load(V + at_k[:, None] + d2[None, :], mask=some2, other=0.0)
                s += tl.dot(q2, tl.trans(k2), input_precision="ieee")

            seen = (p[:, None] == pk[None, :]) & exists[None, :]
            if CAUSAL:
                seen = seen & (fk[None, :] <= f[:, None])
            if WINDOW < F:
                seen = seen & (tl.abs(fk[None, :] - f[:, None]) < WINDOW)
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # rows that see nothing here: of no frame, or later
            weights = tl.exp2((s - shift[:, None]) * scale)
            less = tl.exp2((top - shift) * scale)
            total = total * less + tl.sum(weights, 1)
            top = higher
            w = weights.to(V.dtype.element_ty)
            new1 = tl.dot(w, v1, input_precision="ieee")
            if D2:
                new2 = tl.dot(w, v2, input_precision="ieee")
            if PIXELS > 1:
                # 0 * NaN and 0 * inf: a pixel's numbers must not reach the others in its tile. It shows as NaN, and is
                # rare enough to be done again, pixel by pixel.
                bad = tl.max(tl.max((real[:, None] & (new1 != new1)).to(tl.int32), 1), 0)
                if D2:
                    bad += tl.max(tl.max((real[:, None] & (new2 != new2)).to(tl.int32), 1), 0)
                if bad > 0:
                    for i in range(PIXELS):
                        own = (pk == i)[:, None]
                        mine = (p == i)[:, None]
                        new1 = tl.where(mine, tl.dot(w, tl.where(own, v1, 0.0), input_precision="ieee"), new1)
                        if D2:
                            new2 = tl.where(mine, tl.dot(w, tl.where(own, v2, 0.0), input_precision="ieee"), new2)
            y1 = y1 * less[:, None] + new1
            if D2:
                y2 = y2 * less[:, None] + new2

        at = ((b * F + f) * pixels + p0 + p) * heads * D + h * D
        tl.store(Y + at[:, None] + d1[None, :], (y1 / total[:, None]).to(Y.dtype.element_ty), mask=mask1)
        if D2:
            tl.store(Y + at[:, None] + d2[None, :], (y2 / total[:, None]).to(Y.dtype.element_ty), mask=mask2)

    return temporal_attention_kernel


def split(head_dim: int) -> tuple[int, int]:
    """(D1, D2): powers of two of at least 16, which tl.dot asks for; D1 + D2 >= head_dim, with the least waste."""
    whole = max(16, 1 << (head_dim - 1).bit_length())
    d1 = max(16, whole // 2)
    d2 = max(16, 1 << (head_dim - d1 - 1).bit_length()) if head_dim > d1 else 0
    return (d1, d2) if d1 + d2 < whole else (whole, 0)


def tile(frames: int, head_dim: int) -> tuple[int, int]:
    """(PIXELS, BLOCK): 64 rows, as many whole pixels as they hold, or part of one."""
    block = 64 if head_dim <= 256 else 16
    return max(1, block // frames), block


def run_temporal_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> Tensor:
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        raise ValueError(f"temporal_attention: the kernel takes one of {DTYPES}, not {q.dtype}, {k.dtype}, {v.dtype}")
    b, f, p, h, d = q.shape
    if not (rows_of_heads(q) and strides(q) == strides(k) == strides(v)):
        q, k, v = (x.contiguous() for x in (q, k, v))
    y = torch.empty((b, f, p, h, d), dtype=q.dtype, device=q.device)
    if not y.numel():
        return y
    pixels, block = tile(f, d)
    d1, d2 = split(d)
    programs = b * -(-p // pixels) * -(-pixels * f // block) * h
    launch(
        temporal_attention_kernel(), (programs,), q, k, v, y, p, h, *strides(q)[:3], d**-0.5 * math.log2(math.e),
        num_warps=4, F=f, D=d, CAUSAL=causal, WINDOW=window, PIXELS=pixels, BLOCK=block, D1=d1, D2=d2,
    )  # fmt: skip
    return y


def strides(x: Tensor) -> tuple[int, ...]:
    """x's strides; 0 for an axis of one entry, where the number that is there means nothing."""
    return tuple(stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True))


def rows_of_heads(x: Tensor) -> bool:
    """Whether each (h d) of x (b f p h d) is one contiguous row."""
    h, d = x.shape[3:]
    return strides(x)[3:] == (d if h > 1 else 0, 1 if d > 1 else 0)


temporal_attention_triton = triton_op(run_temporal_attention, temporal_attention_ref)
