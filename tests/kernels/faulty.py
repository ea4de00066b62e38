"""Temporal attention in one program per pixel and head, right, and wrong in more than ten ways.

test_contender.py has each of them judged, in a process of its own in which Triton interprets. What is wrong is said by
a constant, so that all of them are one kernel.
"""

import functools

import torch
import triton
import triton.language as tl

FAULTS = {  # name: how it shows
    "unscaled": "relative error",
    "half": "relative error",  # sums in float16
    "shuffled": "relative error",  # believes that q, k and v are contiguous
    "overflows": "NaN, infinite, or never written",  # exp without the largest score taken off
    "unwritten": "NaN, infinite, or never written",  # leaves the last frame out
    "accumulates": "NaN, infinite, or never written",  # adds to memory that nobody cleared
    "leaks": "NaN, infinite, or never written",  # a NaN of one pixel reaches the others
    "sees": "relative error",  # ignores the mask
    "remembers": "relative error",  # gives the first result of a shape for ever
    "destroys": "changes its arguments",
    "reads": "reads or writes outside",  # beyond the last tensor
    "writes": "reads or writes outside",
    "wide": "returns torch.float64",
    "squeezed": "returns torch.float",  # another shape
    "raises": "raises ZeroDivisionError: division by zero \\(faulty.py:",
}


@triton.jit
def kernel(
    Q, K, V, Y, pixels, heads, stride_b, stride_f, stride_p, scale, F: tl.constexpr, D: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
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


def attend(q, k, v, causal, window, fault=""):
    b, f, p, h, d = q.shape
    y = torch.empty((b, f, p, h, d), dtype=q.dtype, device=q.device)
    strides = y.stride() if fault == "shuffled" else q.stride()
    kernel[(b * p * h,)](
        q, k, v, y, p, h, *strides[:3], d**-0.5, f, d, causal, window, max(16, triton.next_power_of_2(f)),
        max(16, triton.next_power_of_2(d)), fault,
    )  # fmt: skip
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
for name in FAULTS:
    globals()[name] = functools.partial(attend, fault=name)


def no_masks(q, k, v, causal, window):
    if causal or window < q.shape[1]:
        raise NotImplementedError("no masks")
    return attend(q, k, v, causal, window)


def nothing(q, k, v, causal, window):
    raise NotImplementedError("not yet")
