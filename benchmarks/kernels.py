"""The fused ops at every shape of the networks, beside eager PyTorch, torch.compile and PyTorch's attention backends.

    PYTHONPATH=.:kernels:convert python benchmarks/kernels.py [--budget SECONDS] [--only OP ...] [--out FILE]
    ... --cpu        a dry run without a GPU: tiny shapes, the kernels in Triton's interpreter
    ... --contender temporal_attention=package.module:function      a kernel of your own

For each shape of kernel_shapes.py: milliseconds; GB/s of the bytes that must move at least, and their share of what a
copy reaches in the same run; TFLOP/s where there are matrix products; the distance from float64. A contender that is
further from it than PyTorch's own, twice over, is wrong and wins nothing. The order is that of importance; what the
budget leaves out is listed. A second run adds to the file of the first.

Two times of each: `ms`, the GPU's alone, as when a CUDA graph launches it; for our kernels and what they replace also
`eager_ms`, call by call, the host's time included. PROVEN names a device for each of the two by itself.

A kernel of your own is judged first, by contender.py: one that is wrong is not timed, and the exit code is 1. On the
CPU it is judged and not timed. Python finds its module in the current folder or in PYTHONPATH.

Contenders, each on the memory layout that suits it:
    OP=...    what --contender names, as impl=... calls it
    kernel    minit2v_kernels, impl="triton"
    torch     minit2v_kernels, impl="torch": what the networks do without the kernels
    eager     the calls that diffusers makes, channels first; of attention, on q, k, v that are permuted already
    compiled  torch.compile of the op's definition, channels last
    sdpa ...  PyTorch's attention backends by name, as in eager, which takes PyTorch's choice
    permuted  attention from our layout and back to it, four copies counted
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import contender as own_kernels
import torch
import torch.nn.functional as F
from kernel_shapes import (
    TINY,
    AddLayerNorm,
    Geglu,
    GroupNorm,
    LayerNorm,
    LinearAdd,
    Shape,
    SpatialAttention,
    TemporalAttention,
    TemporalConv,
    shapes,
)
from measure import (
    Budget,
    Results,
    Timed,
    begin,
    ceilings,
    default_folder,
    digits,
    in_turns,
    matrix_ceiling,
    number_of_sets,
    one_line,
    poisoned,
    relative,
    synchronize,
    table,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import minit2v_kernels
from minit2v_kernels._dispatch import LAUNCHES, PROVEN, choices, family, own

OPS = tuple(PROVEN)  # the families of kernels; beside them PyTorch's attention is measured
TIMES = {"graph": "ms", "eager": "eager_ms"}  # where an entry has the time of each way to launch
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
LARGE = 1_500_000_000  # bytes: above, a shape is not compiled ahead, beside others that need memory
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Contender:
    """run(*args, **kw) on arguments that `prepare` has brought into its layout; `restore` brings the result back."""

    run: Callable[..., Any]
    prepare: Callable[[Shape, tuple, dict], Arguments] = lambda shape, args, kw: (args, kw)
    restore: Callable[[Shape, Any], Any] = lambda shape, y: y


def outputs(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


# ---- definitions: what torch.compile is given, and, on channels-first arguments, what diffusers calls


def norm(x, weight, bias, groups, eps, *, silu=True, frames=1, skip=None, emb=None):
    """As the op, on ((n frames) c h w)."""
    if frames > 1:
        clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
        return norm_of_clip(clip, weight, bias, groups, eps, silu=silu).transpose(1, 2).flatten(0, 1)
    return norm_of_clip(x, weight, bias, groups, eps, silu=silu, skip=skip, emb=emb)


def norm_of_clip(x, weight, bias, groups, eps, *, silu=True, skip=None, emb=None):
    """As the op, on (n c *spatial)."""
    if emb is not None:
        x = x + emb.repeat_interleave(len(x) // len(emb), 0)[:, :, None, None]
    if skip is not None:
        x = torch.cat((x, skip), 1)
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def added(definition: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """definition(x + residual, ...), and the sum."""

    def add(x, residual, *args, **kw):
        total = x + residual
        return total, definition(total, *args, **kw)

    return add


def layer_norm(x, weight, bias, eps=1e-5, *, positions=None):
    y = F.layer_norm(x, weight.shape, weight, bias, eps)
    return y if positions is None else y + positions[:, None]


def geglu(x, weight, bias):
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_add(x, weight, bias, residual):
    return F.linear(x, weight, bias) + residual


def temporal_conv(x, weight, bias, *, residual=None):
    """As the op: an image of f rows and p columns."""
    y = F.conv2d(x, weight.squeeze(-1), bias, padding=(1, 0))
    return y if residual is None else residual + y


def temporal_conv_3d(x, weight, bias, *, residual=None):
    """As diffusers: x (b c f h w)."""
    y = F.conv3d(x, weight, bias, padding=(1, 0, 0))
    return y if residual is None else residual + y


def mask(f: int, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    if window is None:
        return None
    i, j = torch.arange(f, device=device)[:, None], torch.arange(f, device=device)[None]
    return (j <= i) & (j > i - window) if causal else (i - j).abs() < window


def attention(q, k, v, *, causal=False, window=None):
    """As the op, on (b f p h d): heads and pixels are independent of each other."""
    near = mask(q.shape[1], causal, window, q.device)
    q, k, v = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=causal and window is None)
    return y.permute(0, 3, 1, 2, 4)


def permuted_attention(q, k, v, *, causal=False, window=None):
    """From frames of pixels to pixels of frames and back, three copies in and one out."""
    b, f, p, h, d = q.shape
    near = mask(f, causal, window, q.device)
    q, k, v = (x.permute(0, 2, 1, 3, 4).reshape(b * p, f, h, d).transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=causal and window is None)
    return y.transpose(1, 2).reshape(b, p, f, h, d).transpose(1, 2).contiguous()


def sequences(shape: Shape, args: tuple, kw: dict) -> Arguments:
    """q, k, v (b f p h d) -> ((b p) h f d), views of ((b p) f h d): as diffusers has them, which permutes before."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous().transpose(1, 2) for x in args)
    return (q, k, v), kw


def from_sequences(shape: TemporalAttention, y: Tensor) -> Tensor:
    return y.unflatten(0, (shape.b, shape.p)).permute(0, 3, 1, 2, 4)


def sdpa(q, k, v, *, causal=False, window=None, backend: SDPBackend | None = None):
    near = mask(q.shape[-2], causal, window, q.device)
    with sdpa_kernel(backend) if backend is not None else sdpa_kernel(list(BACKENDS.values())):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near, is_causal=causal and window is None)


def channels_first(shape: GroupNorm, args: tuple, kw: dict) -> Arguments:
    """x contiguous: (n c h w), or (n c frames h w) where frames share statistics, as diffusers holds them."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim != 4:
            return x
        return x.unflatten(0, (-1, shape.frames)).transpose(1, 2).contiguous() if shape.frames > 1 else x.contiguous()

    return tuple(map(move, args)), {name: move(value) for name, value in kw.items() if name != "frames"}


def frames_first(shape: GroupNorm, y: Any) -> Any:
    moved = tuple(x.transpose(1, 2).flatten(0, 1) if shape.frames > 1 else x for x in outputs(y))
    return moved if isinstance(y, tuple) else moved[0]


def clip_first(shape: TemporalConv, args: tuple, kw: dict) -> Arguments:
    """x (b c f p) -> (b c f p 1), contiguous."""
    x, weight, bias = args
    return (x[..., None].contiguous(), weight.contiguous(), bias), {
        name: value[..., None].contiguous() for name, value in kw.items()
    }


def contenders(shape: Shape, compiled: bool, owned: dict[str, str] | None = None) -> dict[str, Contender]:
    """Those of this shape; ours first. owned: {op: "package.module:function"}."""
    found: dict[str, Contender] = {}
    op = getattr(minit2v_kernels, shape.op, None)
    if owned and shape.op in owned:
        found[owned[shape.op]] = Contender(partial(op, impl=owned[shape.op]))
    if op is not None:
        found["kernel"] = Contender(partial(op, impl="triton"))
        found["torch"] = Contender(partial(op, impl="torch"))
    definition: Callable[..., Any]
    match shape:
        case GroupNorm():
            add = added if shape.op.startswith("add") else lambda f: f
            definition = add(norm)
            found["eager"] = Contender(add(norm_of_clip), channels_first, frames_first)
        case LayerNorm():
            definition = added(layer_norm) if isinstance(shape, AddLayerNorm) else layer_norm
            found["eager"] = Contender(definition)
        case Geglu():
            definition = geglu
            found["eager"] = Contender(geglu)
        case LinearAdd():
            definition = linear_add
            found["eager"] = Contender(linear_add)
        case TemporalConv():
            definition = temporal_conv
            found["eager"] = Contender(temporal_conv_3d, clip_first, lambda shape, y: y.squeeze(-1))
        case TemporalAttention():
            definition = attention
            found["permuted"] = Contender(permuted_attention)
            for name, backend in {"eager": None, **BACKENDS}.items():
                found[name] = Contender(partial(sdpa, backend=backend), sequences, from_sequences)
        case SpatialAttention():
            definition = F.scaled_dot_product_attention
            for name, backend in {"eager": None, **BACKENDS}.items():
                found[name] = Contender(partial(sdpa, backend=backend))
    if compiled and not isinstance(shape, SpatialAttention):
        torch._dynamo.reset()  # else the ninth shape is refused as one recompilation too many
        found["compiled"] = Contender(torch.compile(definition, dynamic=False))
    return found


def leaves(args: tuple, kw: dict) -> tuple[tuple, dict, list[Tensor]]:
    """The arguments with a gradient wanted for each floating-point tensor."""
    wanted: list[Tensor] = []

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        wanted.append(x.detach().requires_grad_())
        return wanted[-1]

    return tuple(map(leaf, args)), {name: leaf(value) for name, value in kw.items()}, wanted


def upstream(y: Any) -> list[Tensor]:
    """A gradient for each output, the same wherever an output is cut along its first axis; not constant, as a norm's
    derivative of a constant is all cancellation."""
    return [torch.linspace(-1, 1.5, x.shape[-1], device=x.device).to(x).expand_as(x).contiguous() for x in outputs(y)]


def gradients(run: Callable[..., Any], args: tuple, kw: dict, grads: list[Tensor]) -> tuple[Tensor, ...]:
    """Forward, and backward to all tensors of the call."""
    args, kw, wanted = leaves(args, kw)
    return torch.autograd.grad(outputs(run(*args, **kw)), wanted, grads)


# ---- one shape


def wide(args: tuple, kw: dict) -> Arguments:
    def cast(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) else x

    return tuple(map(cast, args)), {name: cast(value) for name, value in kw.items()}


def judge(shape: Shape, contender: Contender, args: tuple, kw: dict, exact: tuple[Tensor, ...], whole: Any) -> dict:
    """How far its end is from float64, and all of it from PyTorch's own result in the same dtype."""
    with poisoned(), torch.no_grad():
        got = contender.restore(shape, contender.run(*args, **kw))
    out = {"error": 0.0, "apart": 0.0}
    for mine, want, theirs in zip(outputs(got), exact, whole, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype, f"{mine.shape} {mine.dtype}"
        out["error"] = max(out["error"], relative(mine[-len(want) :], want))
        out["apart"] = max(out["apart"], relative(mine, theirs))
    return out


def right(found: dict, theirs: float, dtype: torch.dtype) -> bool:
    """At most twice as far from float64 as PyTorch's eager definition, plus one rounding; and nowhere else broken."""
    limit = 2 * theirs + torch.finfo(dtype).eps / 2
    return found["error"] <= limit and found["apart"] <= 2 * (limit + theirs)


def definition(shape: Shape) -> Callable[..., Any]:
    op = getattr(minit2v_kernels, shape.op, None)
    return F.scaled_dot_product_attention if op is None else partial(op, impl="torch")


def about(shape: Shape) -> dict[str, Any]:
    names = ("op", "family", "workload", "part", "calls", "sizes")
    return {name: getattr(shape, name) for name in names}


def measure(
    shape: Shape, device: torch.device, dtype: torch.dtype, options: argparse.Namespace, compiled: bool
) -> dict:
    """One shape's entry of the results."""
    moved = shape.bytes(dtype.itemsize)
    sets = number_of_sets(moved, device) if device.type == "cuda" else 2
    inputs = [shape.make(device, dtype, seed) for seed in range(sets)]
    tail = shape.tail(*inputs[0])
    exact_args, exact_kw = wide(*tail)
    with torch.no_grad():
        exact = outputs(definition(shape)(*exact_args, **exact_kw))
        plain = outputs(definition(shape)(*inputs[0][0], **inputs[0][1]))
    theirs = max(relative(x[-len(want) :], want) for x, want in zip(plain, exact, strict=True))
    del exact_args, exact_kw
    entry: dict[str, Any] = {
        **about(shape),
        "bytes": moved,
        "flops": shape.flops(),
        "sets": sets,
        "torch_error": digits(theirs, 3),
        "contenders": {},
    }
    timed: dict[str, Timed] = {}
    eagerly: dict[str, Timed] = {}
    found = entry["contenders"]
    for name, contender in contenders(shape, compiled, options.contender).items():
        if options.contenders and name not in options.contenders:
            continue
        try:
            prepared = [contender.prepare(shape, *given) for given in inputs]
            verdict = judge(shape, contender, *prepared[0], exact, plain)
            found[name] = {"error": digits(verdict["error"], 3), "apart": digits(verdict["apart"], 3)}
            found[name]["right"] = right(verdict, theirs, dtype)

            def run(i: int, contender: Contender = contender, prepared: list = prepared) -> Any:
                args, kw = prepared[i]
                return contender.run(*args, **kw)

            with torch.no_grad():
                timed[name] = Timed(run, sets, device)
                if name in ("kernel", "torch", "eager", *options.contender.values()):
                    eagerly[name] = Timed(run, sets, device, graph=False, host=True)
        except Exception as error:
            if name == "kernel" and isinstance(error, torch.cuda.OutOfMemoryError):
                raise  # not wrong: the shape is left out
            found[name] = {"unavailable": one_line(error)}
            synchronize(device)  # raises where the device is lost, and then nothing more can be measured
    del exact, plain
    with torch.no_grad():
        in_turns(timed, options.seconds, least=options.least)
        in_turns(eagerly, options.seconds / 4, least=options.least)
    for name, clock in timed.items():
        found[name] |= clock.summary()
    for name, clock in eagerly.items():
        found[name]["eager_ms"] = clock.summary()["ms"]
    return entry


def measure_backward(shape: Shape, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> dict:
    """Forward and backward together: `kernel`, `torch` and `eager`."""
    sets = min(8, number_of_sets(3 * shape.bytes(dtype.itemsize), device)) if device.type == "cuda" else 2
    inputs = [shape.make(device, dtype, seed) for seed in range(sets)]
    tail_args, tail_kw = wide(*shape.tail(*inputs[0]))
    # The gradient of what comes first in the call, at the end of its first axis: of the weights it would take the rest.
    run_tail = definition(shape)
    exact = gradients(run_tail, tail_args, tail_kw, upstream(run_tail(*tail_args, **tail_kw)))[0]
    entry = about(shape)
    timed: dict[str, Timed] = {}
    found = entry["contenders"] = {}
    for name, contender in contenders(shape, False).items():
        if name not in ("kernel", "torch", "eager") or options.contenders and name not in options.contenders:
            continue
        try:
            prepared = [contender.prepare(shape, *given) for given in inputs]
            with torch.no_grad():
                grads = upstream(contender.run(*prepared[0][0], **prepared[0][1]))
            got = gradients(contender.run, *prepared[0], grads)[0]
            if name != "eager":  # its layout is another one, its derivative PyTorch's own
                found[name] = {"error": digits(relative(got[-len(exact) :], exact), 3)}

            def run(i: int, contender: Contender = contender, prepared: list = prepared, grads: Any = grads) -> Any:
                return gradients(contender.run, *prepared[i], grads)

            timed[name] = Timed(run, sets, device, graph=False)
        except Exception as error:
            if name == "kernel" and isinstance(error, torch.cuda.OutOfMemoryError):
                raise  # not wrong: the shape is left out
            found[name] = {"unavailable": one_line(error)}
            synchronize(device)
    in_turns(timed, options.seconds, least=options.least)
    limit = 2 * found.get("torch", {}).get("error", 0.0) + torch.finfo(dtype).eps / 2
    for name, clock in timed.items():
        found.setdefault(name, {}).update(clock.summary())
        if "error" in found[name]:
            found[name]["right"] = found[name]["error"] <= limit
    return entry


# ---- all shapes


def is_goal(shape: Shape) -> bool:
    """Whether a goal is set for it: norms of 80 MB and more, attention of 150 MB and more."""
    if shape.part == "vae" or shape.calls == 0:
        return False
    if isinstance(shape, GroupNorm):
        return 2 * shape.n * (shape.c + shape.c2) * shape.h * shape.w >= 80e6
    return isinstance(shape, TemporalAttention) and shape.bytes() >= 150e6


def rank(shape: Shape) -> int:
    """0: goals are set for it; 1: a step calls it; 2: the VAE does; 3: beyond the workloads."""
    return 0 if is_goal(shape) else 3 if shape.calls == 0 else 2 if shape.part == "vae" else 1


def in_order(names: list[str], only: list[str]) -> list[Shape]:
    """Each distinct call once, by importance; among equals, of every op the costliest first, in turns."""
    merged: dict[str, Shape] = {}
    for shape in shapes(*names):
        if not only or shape.family in only:
            merged.setdefault(shape.name, shape)
    cost = {name: shape.calls * max(shape.bytes() / 4e12, shape.flops() / 7e14) for name, shape in merged.items()}
    place: dict[str, int] = {}
    by_family: dict[str, int] = {}
    for name in sorted(merged, key=lambda name: -cost[name]):
        place[name] = by_family[merged[name].family] = by_family.get(merged[name].family, -1) + 1
    return sorted(merged.values(), key=lambda shape: (rank(shape), place[shape.name]))


def wants_compile(shape: Shape, mode: str, seen: set[tuple[str, str]]) -> bool:
    """torch.compile takes seconds a shape: by default where goals are set, and once per op and workload."""
    first = (shape.op, shape.workload) not in seen
    seen.add((shape.op, shape.workload))
    return mode == "all" or mode == "some" and (is_goal(shape) or rank(shape) == 1 and first)


def derive(entry: dict, ceiling: dict, dtype: torch.dtype) -> None:
    """GB/s, TFLOP/s and shares, of every contender that was timed."""
    copy, product = ceiling["copy_gb_s"], matrix_ceiling(ceiling, dtype)
    floor = entry["bytes"] / copy / 1e6
    if product and entry["flops"]:
        floor = max(floor, entry["flops"] / product / 1e9)
    entry["floor_ms"] = digits(floor)
    for found in entry["contenders"].values():
        if "ms" not in found:
            continue
        found["gb_s"] = digits(entry["bytes"] / found["ms"] / 1e6)
        found["of_copy"] = digits(found["gb_s"] / copy, 3)
        found["of_floor"] = digits(floor / found["ms"], 3)
        if entry["flops"]:
            found["tflop_s"] = digits(entry["flops"] / found["ms"] / 1e9)
            if product:
                found["of_products"] = digits(found["tflop_s"] / product, 3)


def names_in(entry: dict) -> set[str]:
    """Which contenders were tried."""
    return set(entry.get("contenders", ()))


def recommend(entries: dict[str, dict], wanted: dict[str, Shape], launched: str) -> dict[str, dict]:
    """Per family of ops: whether `PROVEN` may name this device for kernels that are launched so, "eager" or "graph".

    The kernel must be right everywhere, and over the calls of a step of every workload take less time than the faster
    of `torch` and `eager`, whose layouts differ. "yes" takes every shape of these workloads.
    """
    out: dict[str, dict] = {}
    ms = TIMES[launched]
    for op in OPS:
        mine = {name: shape for name, shape in wanted.items() if shape.family == op and shape.calls}
        done = {
            n: entries[n] for n in mine if n in entries and ("lost" in entries[n] or "kernel" in names_in(entries[n]))
        }
        wrong = [n for n, e in done.items() if not e.get("contenders", {}).get("kernel", {}).get("right", False)]
        lost, sums = [], {}
        for name in (name for name in done if name not in wrong):
            entry, found = done[name], done[name]["contenders"]
            others = [found[n][ms] for n in ("torch", "eager") if found.get(n, {}).get("right") and ms in found[n]]
            if not others or ms not in found["kernel"]:
                continue
            kernel, other = found["kernel"][ms], min(others)
            if kernel > other:
                lost.append([name, digits(other / kernel, 3)])
            for workload, calls in entry["calls_in"].items():
                total = sums.setdefault(workload, [0.0, 0.0])
                total[0] += calls * kernel
                total[1] += calls * other
        ratios = {workload: digits(other / kernel, 3) for workload, (kernel, other) in sums.items()}
        wins = bool(ratios) and all(ratio > 1 for ratio in ratios.values())
        if not done:
            verdict = "not measured"
        elif wrong:
            verdict = "no: wrong or not running at some shape"
        elif not wins:
            verdict = "no: slower over a step"
        else:
            verdict = "yes" if len(done) == len(mine) else f"so far: {len(done)} of {len(mine)} shapes measured"
        out[op] = {"verdict": verdict, "faster": ratios, "measured": len(done), "of": len(mine),
                   "wrong": wrong, "slower_at": lost}  # fmt: skip
    return out


def report(results: dict, wanted: dict[str, Shape], device: torch.device) -> str:
    """The recommendation and the goals, in words."""
    rows = [("op", "launched", "verdict", "times faster over a step", "slower at")]
    for launched in LAUNCHES:
        for op, found in recommend(results["kernels"], wanted, launched).items():
            faster = ", ".join(f"{workload} {ratio}" for workload, ratio in found["faster"].items())
            rows.append((op, launched, found["verdict"], faster, f"{len(found['slower_at'])} of {found['measured']}"))
    lines = [table(rows)]
    name = family(device)
    if device.type != "cuda":
        return "\n".join([*lines, "A dry run proves nothing for PROVEN."])
    for launched in LAUNCHES:
        proven = [op for op, how, verdict, *_ in rows[1:] if (how, verdict) == (launched, "yes")]
        may = f'may name "{name}" for: {", ".join(proven)}' if proven else f'may not name "{name}" for any op yet'
        lines.append(f'PROVEN in _dispatch.py, "{launched}", {may}.')
    return "\n".join(lines)


def over_a_step(entries: dict[str, dict], names: list[str]) -> str:
    """Milliseconds that the calls of a step take, per workload and contender; "-": not right at every shape."""
    steps: dict[str, dict[str, float | None]] = {}
    for entry in entries.values():
        for workload, calls in entry.get("calls_in", {}).items():
            sums = steps.setdefault(workload, dict.fromkeys(names, 0.0))
            for name in names:
                found = entry["contenders"].get(name, {})
                fine = sums[name] is not None and found.get("right") and "ms" in found
                sums[name] = sums[name] + calls * found["ms"] if fine else None
    rows = [("ms of a step", *names)]
    for workload, sums in steps.items():
        rows.append((workload, *("-" if ms is None else digits(ms, 3) for ms in sums.values())))
    return table(rows)


def named(text: str) -> tuple[str, str]:
    """ "op=package.module:function" -> (op, the rest). It is imported later: Triton asks then whether to interpret."""
    op, _, name = text.partition("=")
    try:
        choices(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("MINIT2V_KERNELS ")) from None
    if ":" not in name:
        raise argparse.ArgumentTypeError(f"must be OP=package.module:function, not {text!r}")
    return op, name


def judged(options: argparse.Namespace, device: torch.device) -> bool:
    """Whether the functions of --contender may be timed: none of them is wrong."""
    fine = True
    for op, name in options.contender.items():
        verdicts = []
        for wanted, dtypes in own_kernels.cases(op, device, *options.workloads):
            verdicts += own_kernels.judge_all(wanted, name, dtypes, device, progress=True)
            if any(verdict.fault for verdict in verdicts):
                break
        said, good = own_kernels.report(op, name, verdicts)
        print(said, flush=True)
        fine &= good
    return fine


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds; what does not fit is listed")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/gpu/<device>/kernels.json")
    parser.add_argument("--only", nargs="+", default=[], choices=[*OPS, SpatialAttention.family])
    parser.add_argument("--workloads", nargs="+", default=[])
    parser.add_argument("--goals", action="store_true", help="only the shapes for which goals are set")
    parser.add_argument("--contenders", nargs="+", default=[], help="only these")
    parser.add_argument("--contender", nargs="+", type=named, default=[], metavar="OP=MODULE:FUNCTION",
                        help="kernels of your own: judged, then timed beside the others")  # fmt: skip
    parser.add_argument("--compile", choices=("all", "some", "none"), help="default: some; with --cpu none")
    parser.add_argument("--backward", choices=("yes", "no"), default="yes")
    parser.add_argument("--seconds", type=float, default=0.1, help="of samples per contender and shape")
    parser.add_argument("--least", type=int, default=3, help="samples per contender and round")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="default: float16; CPU float32")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the file already")
    parser.add_argument("--warm", metavar="I/N", help="compile every N-th shape's kernels into the caches, and end")
    parser.add_argument("--cpu", action="store_true", help="dry run: tiny shapes, kernels interpreted")
    options = parser.parse_args(arguments)
    options.compile = options.compile or ("none" if options.cpu else "some")
    options.contender = dict(options.contender)
    if options.contender:  # on the CPU too at the published shapes, cut
        options.backward, options.only = "no", [shape.family for shape in shapes() if shape.op in options.contender]
    else:
        options.workloads = options.workloads or (list(TINY) if options.cpu else [])
    return options


def warm(wanted: list[Shape], options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> None:
    """Run each contender that is compiled once, so that its code is on the disk when it is measured."""
    i, n = map(int, options.warm.split("/"))
    budget, seen = Budget(options.budget), set()
    for number, shape in enumerate(wanted):
        compiled = wants_compile(shape, options.compile, seen)
        if number % n != i or budget.left < 0 or shape.bytes() > LARGE:
            continue
        args, kw = shape.make(device, dtype)
        for name, contender in contenders(shape, compiled).items():
            if name not in ("kernel", "compiled"):
                continue
            try:
                with torch.no_grad():
                    contender.run(*args, **kw)
                synchronize(device)
            except Exception as error:  # it is reported where it is measured
                print(f"{shape.name}: {name}: {one_line(error)}", file=sys.stderr)
                synchronize(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the memory is shared with others that prepare themselves


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device, dtype = begin(options.cpu, options.dtype)
    if options.contender:
        sys.path.insert(0, os.getcwd())  # as `python -m` does
        try:
            own(",".join(f"{op}={name}" for op, name in options.contender.items()))
        except ValueError as error:
            raise SystemExit(f"kernels.py: error: {error}") from None
        if not judged(options, device):
            raise SystemExit(1)
        if options.cpu:
            print("No times: on a CPU they would be those of Triton's interpreter.")
            return
    order = in_order(options.workloads, options.only)
    if options.contender:
        order = [shape for shape in order if shape.op in options.contender]
    wanted = {shape.name: shape for shape in order}  # what PROVEN asks for: the goals alone prove nothing
    if options.goals:
        order = [shape for shape in order if is_goal(shape)]
    if options.warm:
        return warm(order, options, device, dtype)
    budget = Budget(options.budget)
    file = "contender.json" if options.contender else "kernels.json"
    results = Results(options.out or default_folder(device) / file, device, options.fresh or bool(options.contender))
    results.data["dtype"] = str(dtype).removeprefix("torch.")
    entries, running = results.part("kernels"), results.path.with_suffix(".running")
    if running.exists():  # the process that measured this did not live to say how it went
        part, name = running.read_text().split(": ", 1)
        results.part(part)[name] = {"lost": "the process ended while this was measured"}
    if "ceilings" not in results.data:
        results.data["ceilings"] = ceilings(device)
    results.save()
    print(f"copy {results.data['ceilings']['copy_gb_s']} GB/s", flush=True)
    everywhere = shapes(*options.workloads)
    calls_in = {
        shape.name: {other.workload: other.calls for other in everywhere if other.name == shape.name and other.calls}
        for shape in order
    }
    seen: set[tuple[str, str]] = set()
    todo = [("kernels", shape, wants_compile(shape, options.compile, seen)) for shape in order]
    if options.backward == "yes":  # at the sizes that one trains at
        trained = {"modelscope", "animatediff", *TINY}
        todo += [
            ("backward", shape, False)
            for shape in order
            if shape.workload in trained and rank(shape) < 2 and shape.family != SpatialAttention.family
        ]
    left_out: list[str] = []
    for part, shape, compiled in todo:
        done = results.part(part)
        entry = done.get(shape.name)
        if entry is not None and ("lost" in entry or names_in(entry) >= {*options.contenders}):
            continue
        if budget.left < 0:
            left_out.append(f"{part}: {shape.name}")
            continue
        running.parent.mkdir(parents=True, exist_ok=True)
        running.write_text(f"{part}: {shape.name}")
        try:
            if part == "kernels":
                entry = measure(shape, device, dtype, options, compiled)
                entry["calls_in"] = calls_in[shape.name]
                derive(entry, results.data["ceilings"], dtype)
            else:
                entry = measure_backward(shape, device, dtype, options)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            left_out.append(f"{part}: {shape.name}: {one_line(error)}")
            continue
        done[shape.name] = entry
        results.save(at_most_every=2.0)
        print(line(part, shape, entry), flush=True)
    running.unlink(missing_ok=True)
    results.data["left_out"] = left_out
    results.data["recommendation"] = {launched: recommend(entries, wanted, launched) for launched in LAUNCHES}
    results.save()
    if options.contender:
        names = [*options.contender.values(), "kernel", "torch", "eager", "compiled"]
        print(over_a_step(entries, names))
    else:
        print(report(results.data, wanted, device))
    print(f"left out, over the budget: {len(left_out)} of {len(todo)}", *left_out, sep="\n  ")
    print(results.path)


def line(part: str, shape: Shape, entry: dict) -> str:
    """One shape on one line: microseconds of each, ours first."""
    times = []
    for name, found in entry.get("contenders", {}).items():
        flag = "" if found.get("right", True) else " WRONG"
        times.append(f"{name} {1e3 * found['ms']:.1f}{flag}" if "ms" in found else f"{name} -")
    return f"{part} {shape.workload} {shape.name}: us: {', '.join(times) or entry}"


if __name__ == "__main__":
    main()
