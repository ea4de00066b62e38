"""Attention across the frames of a video, each pixel and head by itself: many very short sequences.

    y[b, i, p, h] = sum_j softmax_j(q[b, i, p, h] . k[b, j, p, h] / sqrt(d)) v[b, j, p, h]        i, j: frames

Vaswani et al. 2017, arXiv:1706.03762, section 3.2. The kernel reads q, k and v where the projections wrote them. A
pixel's frames lie far apart, but each frame is one contiguous row per head. So nothing is permuted.
"""

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import autocast, family, interpreting, launch, pick, sizes, triton_op
from ._tiles import given, planned

MAX_HEADS = 65535  # what one axis of a CUDA grid may count; a video of 1024x576 has 9,216 x 8 in its first layer
MOST_HEAD_DIM = 256  # of the kernel: wider heads leave a multiprocessor's shared memory


def temporal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, window: int | None = None, impl: str | None = None
) -> Tensor:
    """q, k, v (b f p h d) -> (b f p h d), contiguous: attention along f, scale d^-0.5, softmax in float32 or wider.

    q, k and v may be views of one fused projection, (b f p 3 h d). The kernel copies none of them if h and d lie
    together and all three tensors have the same strides.
    window: frame i sees the frames j with |i - j| < window; causal: only those with j <= i. A frame always sees itself.
    impl: "torch", "triton" or "auto", see `_dispatch.pick`. Raises ValueError on other shapes, and window < 1.
    """
    if q.ndim != 5 or not q.shape == k.shape == v.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"temporal_attention: q, k and v must have one shape (b f p h d), not {shapes}")
    if window is not None and window < 1:
        raise ValueError(f"temporal_attention: window must be at least 1, the frame itself, not {window}")
    window = q.shape[1] if window is None else min(window, q.shape[1])
    picked = pick("temporal_attention", impl, q, k, v)
    if picked == "torch":
        return temporal_attention_ref(q, k, v, causal, window)
    if callable(picked):
        return picked(q, k, v, causal, window)
    q, k, v = autocast(q, k, v, product=True)
    expect(q, k, v)
    return temporal_attention_triton(q, k, v, causal, window)


def temporal_attention_ref(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, window: int | None = None) -> Tensor:
    """The definition, in PyTorch. Pixels are independent of each other, as heads are and as batch is."""
    b, f, p, h, _ = q.shape
    mask = None
    if causal or (window is not None and window < f):
        ago = torch.arange(f, device=q.device)[:, None] - torch.arange(f, device=q.device)  # i - j
        mask = (ago >= (0 if causal else -f)) & (ago.abs() < (f if window is None else window))
    if all(x.stride(2) == h * x.stride(3) for x in (q, k, v)) or not q.numel():
        # As heads: not one byte moves.
        y = attend(*(x.flatten(2, 3).transpose(1, 2) for x in (q, k, v)), mask, 1).transpose(1, 2).unflatten(2, (p, h))
    else:
        # Views of a fused projection. As batch, each video by itself: only the result moves.
        videos = (attend(*(x.permute(1, 2, 0, 3) for x in video), mask, 0) for video in zip(q, k, v, strict=True))
        y = torch.stack([video.permute(2, 0, 1, 3) for video in videos])
    return y.contiguous()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, axis: int) -> Tensor:
    """q, k, v (n h l d) -> (n h l d), in as few calls as have at most MAX_HEADS of that axis."""
    pieces = zip(*(x.split(MAX_HEADS, axis) for x in (q, k, v)), strict=True)
    found = [F.scaled_dot_product_attention(*piece, attn_mask=mask) for piece in pieces]
    return found[0] if len(found) == 1 else torch.cat(found, axis)


@cache
def temporal_attention_kernel() -> Any:
    """The kernel; Triton is imported here, at the first use."""
    global tl, attend_tile, store_tile  # Triton 3.2 and the interpreter look names up in the module alone
    import triton
    import triton.language as tl

    @triton.jit
    def attend_tile(
        Q, K, V, start, p0, end, stride_f, stride_p, scale, ROWS: tl.constexpr,
        F: tl.constexpr, D: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
        BLOCK: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    ):  # fmt: skip
        """BLOCK queries of the pixels p0 <= p < end, the frames of one after those of another, from row `start` on.

        -> their results (BLOCK D1) and (BLOCK D2), their pixels (BLOCK) and frames (BLOCK). There are ROWS keys:
        FlashAttention's loop (Dao et al. 2022, arXiv:2205.14135), which the compiler undoes where BLOCK holds them all.
        """
        d1 = tl.arange(0, D1)
        d2 = D1 + tl.arange(0, D2 if D2 else 1)
        rows = start + tl.arange(0, BLOCK)
        p, f = p0 + rows // F, rows % F
        at = f.to(tl.int64) * stride_f + p.to(tl.int64) * stride_p
        real = (p < end)[:, None]
        q1 = tl.load(Q + at[:, None] + d1[None, :], mask=real & (d1 < D)[None, :], other=0.0)
        if D2:
            q2 = tl.load(Q + at[:, None] + d2[None, :], mask=real & (d2 < D)[None, :], other=0.0)

        top = tl.full((BLOCK,), float("-inf"), tl.float32)  # the largest score so far
        total = tl.zeros((BLOCK,), tl.float32)
        y1 = tl.zeros((BLOCK, D1), tl.float32)
        y2 = tl.zeros((BLOCK, D2 if D2 else 1), tl.float32)
        first, last = 0, ROWS  # of the keys that are seen
        if ROWS > BLOCK:
            if CAUSAL:
                last = tl.minimum(last, start + BLOCK)
            if WINDOW < F:
                first = tl.maximum(0, start - WINDOW + 1) // BLOCK * BLOCK
                last = tl.minimum(last, start + BLOCK - 1 + WINDOW)
        for key in range(first, last, BLOCK):
            keys = key + tl.arange(0, BLOCK)
            pk, fk = p0 + keys // F, keys % F
            at = fk.to(tl.int64) * stride_f + pk.to(tl.int64) * stride_p
            real = (pk < end)[:, None]
            k1 = tl.load(K + at[:, None] + d1[None, :], mask=real & (d1 < D)[None, :], other=0.0)
            v1 = tl.load(V + at[:, None] + d1[None, :], mask=real & (d1 < D)[None, :], other=0.0)
            s = tl.dot(q1, tl.trans(k1), input_precision="ieee")
            if D2:
                k2 = tl.load(K + at[:, None] + d2[None, :], mask=real & (d2 < D)[None, :], other=0.0)
                v2 = tl.load(V + at[:, None] + d2[None, :], mask=real & (d2 < D)[None, :], other=0.0)
                s = tl.dot(q2, tl.trans(k2), s, input_precision="ieee")

            seen = (p[:, None] == pk[None, :]) & (pk < end)[None, :]
            if CAUSAL:
                seen = seen & (fk[None, :] <= f[:, None])
            if WINDOW < F:
                seen = seen & (tl.abs(fk[None, :] - f[:, None]) < WINDOW)
            s = tl.where(seen, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)  # a row that sees none of these keys
            weights = tl.exp2((s - shift[:, None]) * scale)
            less = tl.exp2((top - shift) * scale)
            total = total * less + tl.sum(weights, 1)
            top = higher
            weights = weights.to(V.dtype.element_ty)
            y1 = tl.dot(weights, v1, y1 * less[:, None], input_precision="ieee")
            if D2:
                y2 = tl.dot(weights, v2, y2 * less[:, None], input_precision="ieee")
        total = tl.where(total == 0.0, 1.0, total)  # rows of no frame; and, as in PyTorch, of scores all -inf
        return y1 / total[:, None], y2 / total[:, None]

    @triton.jit
    def store_tile(
        Y,
        y1,
        y2,
        start,
        p0,
        end,
        pixels,
        row,
        F: tl.constexpr,
        BLOCK: tl.constexpr,
        D: tl.constexpr,
        D1: tl.constexpr,
        D2: tl.constexpr,
    ):
        """What `attend_tile` returned, to its places in Y (F, pixels, row).

        The places are computed anew: where they came from a function that was given Q, K and V, torch.compile would
        believe that these are written to, and copy them.
        """
        d1 = tl.arange(0, D1)
        d2 = D1 + tl.arange(0, D2 if D2 else 1)
        rows = start + tl.arange(0, BLOCK)
        p, f = p0 + rows // F, rows % F
        at = (f.to(tl.int64) * pixels + p) * row
        real = (p < end)[:, None]
        tl.store(Y + at[:, None] + d1[None, :], y1.to(Y.dtype.element_ty), mask=real & (d1 < D)[None, :])
        if D2:
            tl.store(Y + at[:, None] + d2[None, :], y2.to(Y.dtype.element_ty), mask=real & (d2 < D)[None, :])

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
        PIXELS: tl.constexpr,  # per program; more than one only where all their frames are at most BLOCK
        BLOCK: tl.constexpr,  # rows of a tile
        D1: tl.constexpr,  # D = D1 + D2, powers of two (the last is masked); D2 may be 0
        D2: tl.constexpr,
    ):
        """One program per (batch, PIXELS pixels, BLOCK queries, head), heads fastest: they share cache lines.

        Scores of PIXELS pixels are masked to diagonal blocks, where query and key are of one pixel.
        """
        ROWS: tl.constexpr = PIXELS * F
        BLOCKS: tl.constexpr = (ROWS + BLOCK - 1) // BLOCK
        pid = tl.program_id(0)
        h, pid = pid % heads, pid // heads
        start, pid = pid % BLOCKS * BLOCK, pid // BLOCKS
        groups = tl.cdiv(pixels, PIXELS)
        p0, b = pid % groups * PIXELS, (pid // groups).to(tl.int64)
        end = tl.minimum(p0 + PIXELS, pixels)
        Q += b * stride_b + h * D
        K += b * stride_b + h * D
        V += b * stride_b + h * D
        Y += (b * F * pixels * heads + h) * D

        y1, y2 = attend_tile(
            Q, K, V, start, p0, end, stride_f, stride_p, scale, ROWS, F, D, CAUSAL, WINDOW, BLOCK, D1, D2
        )
        if PIXELS == 1:
            store_tile(Y, y1, y2, start, p0, end, pixels, heads * D, F, BLOCK, D, D1, D2)
        else:
            # Weights of zero times a NaN or inf are NaN, which must not reach the tile's other pixels: then, which is
            # rare, once more, each pixel by itself.
            nan = tl.max((y1 != y1).to(tl.int32), 1)
            if D2:
                nan = tl.maximum(nan, tl.max((y2 != y2).to(tl.int32), 1))
            if tl.max(nan, 0) == 0:
                store_tile(Y, y1, y2, start, p0, end, pixels, heads * D, F, BLOCK, D, D1, D2)
            else:
                for one in range(p0, end):
                    y1, y2 = attend_tile(
                        Q, K, V, 0, one, one + 1, stride_f, stride_p, scale, F, F, D, CAUSAL, WINDOW, BLOCK, D1, D2
                    )
                    store_tile(Y, y1, y2, 0, one, one + 1, pixels, heads * D, F, BLOCK, D, D1, D2)

    return temporal_attention_kernel


def split(head_dim: int) -> tuple[int, int]:
    """(D1, D2): powers of two of at least 16, which tl.dot asks for; D1 + D2 >= head_dim, with the least waste."""
    whole = max(16, 1 << (head_dim - 1).bit_length())
    d1 = max(16, whole // 2)
    d2 = max(16, 1 << (head_dim - d1 - 1).bit_length()) if head_dim > d1 else 0
    return (d1, d2) if d1 + d2 < whole else (whole, 0)


def tile(frames: int, width: int, size: int) -> tuple[int, int, int]:
    """(PIXELS, BLOCK, num_warps) for heads of `width` = D1 + D2 elements of `size` bytes.

    The tile is the smallest that holds one pixel's frames, and takes as many more pixels as fit. Beyond 64 frames it
    holds only part of a pixel (beyond 32 in float32, which has no matrix units here). The same holds where it would be
    more than 10 KB. There is a warp for every 16 rows and every 2.5 KB. So no GPU needs to spill, and sm_90 keeps 32
    programs of 16 frames and 64 channels at once.
    """
    block = 64 if size == 2 else 32
    while block > 16 and (block >= 2 * frames or block * width * size > 10240):
        block //= 2
    warps = max(block // 16, -(-block * width * size // 2560))
    return max(1, block // frames), block, min(16, 1 << (warps - 1).bit_length())


def expect(q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where the kernel cannot take q, k and v of one shape."""
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"temporal_attention: q {q.dtype}, k {k.dtype}, v {v.dtype}: not one 16- or 32-bit dtype")
    if q.shape[-1] > MOST_HEAD_DIM:
        raise ValueError(
            f"temporal_attention: the kernel takes heads of at most {MOST_HEAD_DIM} numbers, not {q.shape[-1]}"
        )


@planned
def plan(
    shape: tuple[int, ...], steps: tuple[tuple[int, ...], ...], dtype: torch.dtype, causal: bool, window: int,
    target: str,
) -> tuple[Any, ...]:  # fmt: skip
    """How q, k, v of this shape and of these strides attend: whether they are copied, grid, sizes, constants."""
    b, f, p, h, d = shape
    first, *others = (strides(shape, each) for each in steps)
    copied = first[3:] != (d if h > 1 else 0, 1 if d > 1 else 0) or any(other != first for other in others)
    if copied:
        first = strides(shape, (f * p * h * d, p * h * d, h * d, d, 1))
    d1, d2 = split(d)
    pixels, block, warps = tile(f, d1 + d2, dtype.itemsize)
    chosen = {"PIXELS": pixels, "BLOCK": block, "num_warps": warps, "num_stages": 2 if f > block else 1}
    chosen |= given("temporal_attention", target, f, d1 + d2, dtype.itemsize)
    pixels, block = chosen["PIXELS"], chosen["BLOCK"]
    if pixels > 1 and pixels * f > block:
        raise ValueError(f"temporal_attention: {pixels} pixels of {f} frames are more than a tile's {block} rows")
    programs = b * -(-p // pixels) * -(-pixels * f // block) * h
    constants = {
        "F": f, "D": d, "CAUSAL": causal, "WINDOW": window, "PIXELS": pixels, "BLOCK": block, "D1": d1, "D2": d2,
        "num_warps": chosen["num_warps"], "num_stages": chosen["num_stages"],
    }  # fmt: skip
    return copied, (programs,), (p, h, *first[:3], d**-0.5 * math.log2(math.e)), constants


def run_temporal_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int) -> Tensor:
    dtype = q.dtype
    if dtype == torch.bfloat16 and interpreting():  # which multiplies the bits of bfloat16 as if they were integers
        return run_temporal_attention(q.float(), k.float(), v.float(), causal, window).to(dtype)
    shape = sizes(q)
    if not q.numel():
        return torch.empty(shape, dtype=dtype, device=q.device)
    of_steps = steps(q), steps(k), steps(v)
    copied, grid, numbers, constants = plan(shape, of_steps, dtype, causal, window, family(q.device))
    if copied:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    y = torch.empty(shape, dtype=dtype, device=q.device)
    launch(temporal_attention_kernel(), grid, q, k, v, y, *numbers, **constants)
    return y


def steps(x: Tensor) -> tuple[int, ...]:
    """x's strides, as numbers also where they are symbols."""
    return x.stride() if type(x) is Tensor else tuple(map(int, x.stride()))


def strides(shape: tuple[int, ...], steps: tuple[int, ...]) -> tuple[int, ...]:
    """The strides, but 0 for an axis of one entry, where the number that is there means nothing."""
    return tuple(step if size > 1 else 0 for size, step in zip(shape, steps, strict=True))


temporal_attention_triton = triton_op(run_temporal_attention, temporal_attention_ref)
