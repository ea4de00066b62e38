"""One naive kernel for each op, right, and wrong in more than fifty ways.

test_contender.py has each of them judged, in one process in which Triton interprets. A constant says what is wrong, so
that all faults of an op are one kernel.
"""

import functools

import torch
import triton
import triton.language as tl

NEVER, OUTSIDE, CHANGES, ERROR = (
    "NaN, infinite, or never written", "reads or writes outside", "changes its arguments", "relative error"
)  # fmt: skip
FAULTS = {  # op: {name: how it shows}
    "temporal_attention": {
        "unscaled": ERROR,
        "half": ERROR,  # sums in float16
        "shuffled": ERROR,  # believes that q, k and v are contiguous
        "overflows": NEVER,  # exp without the largest score taken off
        "unwritten": NEVER,  # leaves the last frame out
        "accumulates": NEVER,  # adds to memory that nobody cleared
        "leaks": NEVER,  # a NaN of one pixel reaches the others
        "sees": ERROR,  # ignores the mask
        "remembers": ERROR,  # gives the first result of a shape for ever
        "destroys": CHANGES,
        "reads": OUTSIDE,  # beyond the last tensor
        "writes": OUTSIDE,
        "wide": "returns torch.float64",
        "squeezed": "returns torch.float",  # another shape
        "raises": "raises ZeroDivisionError: division by zero \\(faulty.py:",
    },
    "temporal_conv": {
        "tail": ERROR,  # leaves the last channel out
        "half": ERROR,  # rounds the sums to float16 after each tap
        "circular": ERROR,  # the first frame sees the last one
        "mirrored": ERROR,  # the taps in reverse
        "shuffled": ERROR,  # believes that the weight is contiguous
        "unbiased": ERROR,  # forgets the bias
        "forgets": ERROR,  # the residual
        "unwritten": NEVER,  # leaves the last frame out
        "destroys": CHANGES,  # adds into the residual
        "reads": OUTSIDE,
        "writes": OUTSIDE,
    },
    "group_norm_silu": {
        "eps": ERROR,  # leaves it out
        "outer": ERROR,  # adds it to the deviation
        "cancels": ERROR,  # the mean of the squares less the square of the mean
        "sample": ERROR,  # divides by one less
        "half": ERROR,  # rounds the numbers less their mean to float16
        "frames": ERROR,  # always normalises each frame by itself
        "silu": ERROR,  # always applies it
        "forgets": ERROR,  # the timestep
        "skips": ERROR,  # reads zeros for the skip connection
        "unwritten": NEVER,  # leaves the last position out
        "destroys": CHANGES,  # adds the timestep into x
        "reads": OUTSIDE,
        "writes": OUTSIDE,
    },
    "add_group_norm_silu": {
        "stale": ERROR,  # normalises x alone
        "swapped": ERROR,  # the norm first, then the sum
        "unwritten": NEVER,
        "destroys": CHANGES,  # the sum lies in x's memory
        "single": "returns 1 tensors, not 2",
        "cancels": ERROR,
        "reads": OUTSIDE,
    },
    "geglu": {
        "swapped": ERROR,  # the gate comes first
        "tanh": ERROR,  # the approximation of GELU
        "tail": ERROR,  # leaves the last number of a row out
        "half": ERROR,
        "unwritten": NEVER,
        "reads": OUTSIDE,
    },
    "linear_add": {
        "forgets": ERROR,  # the residual
        "unbiased": ERROR,
        "tail": ERROR,
        "half": ERROR,  # rounds the product to float16
        "unwritten": NEVER,
        "destroys": CHANGES,  # the sum lies in the residual's memory
        "reads": OUTSIDE,
        "writes": OUTSIDE,
    },
    "layer_norm": {
        "eps": ERROR,
        "cancels": ERROR,  # the mean of the squares less the square of the mean
        "sample": ERROR,
        "forgets": ERROR,  # the positions
        "unwritten": NEVER,
        "reads": OUTSIDE,
    },
    "add_layer_norm": {
        "stale": ERROR,
        "swapped": ERROR,
        "destroys": CHANGES,
        "unwritten": NEVER,
    },
}


def tile(size, least=1):
    return max(least, triton.next_power_of_2(size))


@triton.jit
def attention_kernel(
    Q, K, V, Y, pixels, heads, stride_b, stride_f, stride_p, scale, F: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """One program for all frames of one pixel and head."""
    pid = tl.program_id(0)
    h, p, b = pid % heads, pid // heads % pixels, pid // heads // pixels
    f, d = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_D)
    inside = (f < F)[:, None] & (d < D)[None, :]
    at = b * stride_b + f[:, None] * stride_f + p * stride_p + h * D + d[None, :]
    q = tl.load(Q + at, mask=inside, other=0.0)
    k = tl.load(K + at, mask=inside, other=0.0)
    if FAULT == "reads":
        v = tl.where(inside, tl.load(V + at), 0.0)
    else:
        v = tl.load(V + at, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if FAULT == "half":
        scores = scores.to(tl.float16).to(tl.float32)
    if FAULT != "unscaled":
        scores = scores * scale
    ago = f[:, None] - f[None, :]
    seen = (f < F)[None, :]
    if FAULT != "sees":
        seen = seen & (tl.abs(ago) < WINDOW)
        if CAUSAL:
            seen = seen & (ago >= 0)
    scores = tl.where(seen, scores, float("-inf"))
    if FAULT != "overflows":
        scores = scores - tl.max(scores, 1)[:, None]
    weights = tl.exp(scores)
    weights = weights / tl.sum(weights, 1)[:, None]
    y = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
    to = ((b * F + f[:, None]) * pixels + p) * heads * D + h * D + d[None, :]
    if FAULT == "unwritten":
        inside = inside & (f < F - 1)[:, None]
    if FAULT == "writes":
        inside = (f <= F)[:, None] & (d < D)[None, :]
    if FAULT == "accumulates":
        y += tl.load(Y + to, mask=inside, other=0.0)
    tl.store(Y + to, y.to(v.dtype), mask=inside)


def temporal_attention(q, k, v, causal, window, fault=""):
    b, f, p, h, d = q.shape
    y = torch.empty((b, f, p, h, d), dtype=q.dtype, device=q.device)
    strides = y.stride() if fault == "shuffled" else q.stride()
    attention_kernel[(b * p * h,)](
        q, k, v, y, p, h, *strides[:3], d**-0.5, f, d, causal, window, tile(f, 16), tile(d, 16), fault
    )
    if fault == "destroys":
        q.mul_(2)
    if fault == "leaks":
        y += 0 * y.sum(2, keepdim=True)
    if fault == "remembers":
        return remembered.setdefault((q.shape, q.dtype), y)
    if fault == "raises":
        return 1 / 0
    return y.double() if fault == "wide" else y[0] if fault == "squeezed" else y


remembered: dict = {}


def no_masks(q, k, v, causal, window):
    if causal or window < q.shape[1]:
        raise NotImplementedError("no masks")
    return temporal_attention(q, k, v, causal, window)


def nothing(q, k, v, causal, window):
    raise NotImplementedError("not yet")


@triton.jit
def conv_kernel(
    X, W, B, R, Y, stride_n, stride_c, stride_tap, C, N, F, P, RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """One program for one row of channels."""
    row = tl.program_id(0)
    frame, last = row // P % F, tl.num_programs(0) - 1
    c, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_N)
    real = c < C - 1 if FAULT == "tail" else c < C
    y = tl.load(B + n, mask=n < N, other=0.0).to(tl.float32)
    if FAULT == "unbiased":
        y = y * 0
    for tap in tl.static_range(3):
        from_frame = frame + tap - 1
        if FAULT == "mirrored":
            from_frame = frame - tap + 1
        if FAULT == "circular":
            from_frame = (from_frame + F) % F
        source = from_frame + 0 * c  # as a block: a mask that is a number and one that is a block do not mix
        inside = (source >= 0) & (source < F)
        x = tl.load(X + (row + (from_frame - frame) * P) * C + c, mask=real & inside, other=0.0)
        w = W + n[:, None] * stride_n + c[None, :] * stride_c + tap * stride_tap
        if FAULT == "reads":
            w = tl.load(w + 2 * stride_tap)
        else:
            w = tl.load(w, mask=real[None, :] & (n < N)[:, None], other=0.0)
        y += tl.sum(x.to(tl.float32)[None, :] * w.to(tl.float32), 1)
        if FAULT == "half":
            y = y.to(tl.float16).to(tl.float32)
    if RESIDUAL and FAULT != "forgets":
        y += tl.load(R + row * N + n, mask=n < N, other=0.0).to(tl.float32)
    write = n < N
    if FAULT == "unwritten":
        write = write & (frame + 0 * n < F - 1)
    if FAULT == "writes":
        n = tl.where((row + 0 * n == last) & (n == 0), N, n)
        write = n <= N
    tl.store(Y + row * N + n, y.to(Y.dtype.element_ty), mask=write)


def temporal_conv(x, weight, bias, residual, fault=""):
    (b, c, f, p), n = x.shape, len(weight)
    y = torch.empty((b, f, p, n), dtype=x.dtype, device=x.device)
    to = residual.permute(0, 2, 3, 1) if fault == "destroys" and residual is not None else y
    strides = (3 * c, 3, 1) if fault == "shuffled" else weight.stride()[:3]
    conv_kernel[(b * f * p,)](
        x, weight, bias, x if residual is None else residual, to, *strides, c, n, f, p, residual is not None, tile(c),
        tile(n), fault,
    )  # fmt: skip
    return to.permute(0, 3, 1, 2)


@triton.jit
def norm_kernel(
    X, R, W, B, P, S, Y, T, C, G, eps, SILU: tl.constexpr, ADD: tl.constexpr, PLACE: tl.constexpr, inner,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """One program for T rows of the channels of one group, which it normalises together."""
    pid, width = tl.program_id(0), C // G
    t, c = tl.arange(0, BLOCK_T)[:, None], tl.arange(0, BLOCK_C)[None, :]
    inside = (t < T) & (c < width)
    at = (pid // G * T + t) * C + pid % G * width + c
    if FAULT == "reads":
        x = tl.where(inside, tl.load(X + at + C), tl.load(X + at)).to(tl.float32)
    else:
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(R + at, mask=inside, other=0.0).to(tl.float32)).to(S.dtype.element_ty)
        tl.store(S + at, total, mask=inside & (t < T - 1) if FAULT == "unwritten" else inside)
        x = x if FAULT == "stale" else total.to(tl.float32)
    size = T * width
    mean = tl.sum(x) / size
    d = tl.where(inside, x - mean, 0.0)
    if FAULT == "half":
        d = d.to(tl.float16).to(tl.float32)
    variance = tl.sum(d * d) / (size - 1 if FAULT == "sample" else size)
    if FAULT == "cancels":
        variance = tl.sum(x * x) / size - mean * mean
    rstd = 1 / tl.sqrt(variance + eps)
    if FAULT == "eps":
        rstd = 1 / tl.sqrt(variance)
    if FAULT == "outer":
        rstd = 1 / (tl.sqrt(variance) + eps)
    channel = pid % G * width + c
    y = d * rstd * tl.load(W + channel, mask=c < width, other=0.0) + tl.load(B + channel, mask=c < width, other=0.0)
    if PLACE and FAULT != "forgets":
        y += tl.load(P + pid // inner * C + channel, mask=c < width, other=0.0)
    if SILU or FAULT == "silu":
        y = y / (1 + tl.exp(-y))
    if FAULT == "unwritten":
        inside = inside & (pid + 0 * c < tl.num_programs(0) - 1)
    if FAULT == "writes":
        inside = inside | (t == T)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)


def group_norm_silu(x, weight, bias, groups, eps, silu, frames, skip, emb, fault=""):
    if emb is not None and fault != "forgets":
        rows = emb.repeat_interleave(len(x) // len(emb), 0)[:, :, None, None]
        x = x.add_(rows) if fault == "destroys" else x + rows
    if skip is not None:
        x = torch.cat((x, skip * 0 if fault == "skips" else skip), 1)
    frames = 1 if fault == "frames" else frames
    return normed(x, None, weight, bias, groups, eps, silu, frames, fault)[1]


def add_group_norm_silu(x, residual, weight, bias, groups, eps, silu, frames, fault=""):
    total, y = normed(x, residual, weight, bias, groups, eps, silu, frames, fault)
    return (y,) if fault == "single" else (y, total) if fault == "swapped" else (total, y)


def normed(x, residual, weight, bias, groups, eps, silu, frames, fault):
    n, c, h, w = x.shape
    x = x.permute(0, 2, 3, 1).contiguous()
    y, t = torch.empty(x.shape, dtype=x.dtype, device=x.device), frames * h * w
    total = x if fault == "destroys" or residual is None else torch.empty_like(y)
    more = x if residual is None else residual.permute(0, 2, 3, 1).contiguous()
    norm_kernel[(n // frames * groups,)](
        x, more, weight, bias, x, total, y, t, c, groups, eps, silu, residual is not None, False, 1,
        tile(t + (fault == "writes")), tile(c // groups), fault,
    )  # fmt: skip
    return total.permute(0, 3, 1, 2), y.permute(0, 3, 1, 2)


def layer_norm(x, weight, bias, eps, positions, fault=""):
    return rows_normed(x, None, weight, bias, eps, positions, fault)[1]


def add_layer_norm(x, residual, weight, bias, eps, positions, fault=""):
    total, y = rows_normed(x, residual, weight, bias, eps, positions, fault)
    return (y, total) if fault == "swapped" else (total, y)


def rows_normed(x, residual, weight, bias, eps, positions, fault):
    *_, f, p, d = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = x if fault == "destroys" or residual is None else torch.empty_like(y)
    place = x if positions is None else positions.repeat(x.numel() // (f * p * d), 1)
    norm_kernel[(x.numel() // d,)](
        x, x if residual is None else residual, weight, bias, place, total, y, 1, d, 1, eps, False,
        residual is not None, positions is not None, p, 1, tile(d), fault,
    )  # fmt: skip
    return total, y


@triton.jit
def geglu_kernel(X, W, B, Y, D, M, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FAULT: tl.constexpr):
    """One program for one row."""
    row = tl.program_id(0)
    d, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = d < D - 1 if FAULT == "tail" else d < D
    x = tl.load(X + row * D + d, mask=real, other=0.0).to(tl.float32)
    inside = real[None, :] & (m < M)[:, None]
    w = W + m[:, None] * D + d[None, :]
    value = tl.sum(x[None, :] * tl.load(w, mask=inside, other=0.0).to(tl.float32), 1)
    if FAULT == "reads":
        gates = tl.load(w + M * D)
    else:
        gates = tl.load(w + M * D, mask=inside, other=0.0)
    gate = tl.sum(x[None, :] * gates.to(tl.float32), 1)
    value += tl.load(B + m, mask=m < M, other=0.0)
    gate += tl.load(B + M + m, mask=m < M, other=0.0)
    if FAULT == "half":
        gate = gate.to(tl.float16).to(tl.float32)
    if FAULT == "swapped":
        value, gate = gate, value
    y = value * gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
    if FAULT == "tanh":
        z = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        y = value * gate / (1 + tl.exp(-2 * z))
    tl.store(Y + row * M + m, y.to(Y.dtype.element_ty), mask=m < (M - 1 if FAULT == "unwritten" else M))


def geglu(x, weight, bias, fault=""):
    d, m = x.shape[-1], len(bias) // 2
    y = torch.empty((*x.shape[:-1], m), dtype=x.dtype, device=x.device)
    geglu_kernel[(x.numel() // d,)](x, weight, bias, y, d, m, tile(d), tile(m), fault)
    return y


def linear_add(x, weight, bias, residual, fault=""):
    (*shape, d), m = x.shape, len(bias)
    y = residual if fault == "destroys" else torch.empty((*shape, m), dtype=x.dtype, device=x.device)
    linear_kernel[(x.numel() // d,)](x, weight, bias, residual, y, d, m, tile(d), tile(m), fault)
    return y


@triton.jit
def linear_kernel(X, W, B, R, Y, D, M, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, FAULT: tl.constexpr):
    """One program for one row."""
    row = tl.program_id(0)
    d, m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    real = d < D - 1 if FAULT == "tail" else d < D
    x = tl.load(X + row * D + d, mask=real, other=0.0).to(tl.float32)
    w = W + m[:, None] * D + d[None, :]
    if FAULT == "reads":
        w = tl.where(m[:, None] < M, tl.load(w), 0.0)
    else:
        w = tl.load(w, mask=real[None, :] & (m < M)[:, None], other=0.0)
    y = tl.sum(x[None, :] * w.to(tl.float32), 1)
    if FAULT == "half":
        y = y.to(tl.float16).to(tl.float32)
    if FAULT != "unbiased":
        y += tl.load(B + m, mask=m < M, other=0.0)
    if FAULT != "forgets":
        y += tl.load(R + row * M + m, mask=m < M, other=0.0)
    inside = m < (M - 1 if FAULT == "unwritten" else M)
    if FAULT == "writes":
        inside = m <= M
    tl.store(Y + row * M + m, y.to(Y.dtype.element_ty), mask=inside)


for op, faults in FAULTS.items():
    for name in faults:
        globals()[f"{op}_{name}"] = functools.partial(globals()[op], fault=name)
