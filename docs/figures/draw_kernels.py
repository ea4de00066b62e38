"""Draws the figures of docs/kernels.md, by default beside this file, and prints its tables.

    PYTHONPATH=.:kernels:convert:benchmarks python docs/figures/draw_kernels.py [folder]

Nothing here is measured. Bytes are counted: of plain PyTorch by running diffusers' calls on `meta` and adding up what
each one reads and writes, of the fused ops by their formula in benchmarks/kernel_shapes.py.
"""

import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import fusion
import kernel_shapes
import kernel_waves
import torch
from draw import INK, LINE, MIST, PAPER, PLAIN, SOFT, SPACE, SPACE2, TIME, TIME2, Page
from kernel_shapes import Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from minit2v_kernels import attention, norm

HERE = Path(__file__).resolve().parent
# NVIDIA's data sheet of the H200 SXM: memory bandwidth, and dense bfloat16 products. No program reaches them. A
# figure with them is a model, and says so.
COPY, PRODUCT = 4.8e12, 989e12
WORKLOAD = "zeroscope"


class Traffic(TorchDispatchMode):
    """(op, bytes) of every op that moves any: each input read once, each output written once, on `meta`.

    GroupNorm reads its input twice, for the statistics and for the output. The second time counts where the input is
    larger than a cache, as in `kernel_shapes.GroupNorm.bytes`. What cuDNN does below an op is not seen: transforms of
    the layout for convolutions on channels-first tensors, a kernel of its own for their bias.
    """

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        ins = [x for x in flat((args, kwargs)) if isinstance(x, Tensor)]
        outs = [x for x in flat(out) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        memory = {x.untyped_storage()._cdata for x in ins}
        in_place = name.endswith("_") and not name.endswith("__")
        if any(x.untyped_storage()._cdata in memory for x in outs) and not in_place:
            return out  # a view
        written = outs[:1] if "norm" in name else outs  # not the statistics
        moved = sum(map(size, ins + written))
        if name == "native_group_norm" and size(ins[0]) > kernel_shapes.CACHE:
            moved += size(ins[0])
        if moved and name not in ("empty", "empty_like", "empty_strided"):
            self.found.append((name, moved))
        return out


def flat(x: Any) -> list[Any]:
    if isinstance(x, dict):
        x = list(x.values())
    return [y for part in x for y in flat(part)] if isinstance(x, list | tuple) else [x]


def size(x: Tensor) -> int:
    return x.numel() * x.element_size()


@cache
def plain(shape: Shape) -> tuple[tuple[str, int], ...]:
    """What diffusers' calls move for this op, kernel by kernel."""
    if isinstance(shape, kernel_shapes.TemporalAttention):
        # It permutes a temporal transformer's tokens, not q, k and v: three copies around two attentions. The first
        # makes the video contiguous for GroupNorm, the others turn frames of pixels into pixels of frames and back.
        return ("copies", 3 * shape.bytes() // 4), ("attention", shape.bytes())
    contender = kernels.contenders(shape, compiled=False)["eager"]
    args, kw = contender.prepare(shape, *shape.make("meta"))
    traffic = Traffic()
    with torch.no_grad(), traffic:
        contender.run(*args, **kw)
    return tuple(traffic.found)


def moved(shape: Shape) -> int:
    return sum(size for _, size in plain(shape))


@cache
def calls(workload: str) -> tuple[Shape, ...]:
    """Those of one step that an op of ours serves."""
    found = kernel_shapes.unique(kernel_shapes.unet_calls(kernel_shapes.WORKLOADS[workload]))
    return tuple(shape for shape in found if shape.family != kernel_shapes.SpatialAttention.family)


def examples(workload: str = WORKLOAD) -> dict[str, Shape]:
    """The largest call of each kind, at the finest level, under the words by which the text knows it."""
    shapes = calls(workload)

    def first(op: str, **sizes: Any) -> Shape:
        fits = [s for s in shapes if s.op == op and all(getattr(s, name) == value for name, value in sizes.items())]
        return max(fits, key=lambda s: (s.calls > 5, s.bytes()))

    motion = calls("animatediff")
    norm = first("group_norm_silu", emb=1, c=320)
    return {
        "norm over the video": first("group_norm_silu", frames=24, c=320, silu=True),
        "norm with the timestep": norm,
        "norm of x and skip": replace(norm, emb=0, c2=320, calls=2),
        "temporal attention": first("temporal_attention", h=5),
        "GEGLU": first("geglu", d=320),
        "residual and LayerNorm": first("add_layer_norm", d=320),
        "+ positions (AnimateDiff)": next(s for s in motion if s.op == "add_layer_norm" and s.positions),
        "linear layer and residual": first("linear_add", d=1280),
        "temporal convolution": first("temporal_conv", c=320, residual=False),
        "... and residual": first("temporal_conv", c=320, residual=True),
    }


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def mb(x: float) -> str:
    return f"{x / 1e6:,.0f}"


def example_rows() -> list[str]:
    rows = [row("call", "plain launches", "fused launches", "plain MB", "fused MB", "plain / fused")]
    rows.append(row(*["---"] * 6))
    for what, shape in examples().items():
        steps, whole = plain(shape), moved(shape)
        fused = shape.launches() if isinstance(shape, kernel_shapes.GroupNorm) else 1
        rows.append(row(what, len(steps), fused, mb(whole), mb(shape.bytes()), f"{whole / shape.bytes():.1f}"))
    return rows


def step_rows() -> list[str]:
    """GB per denoising step and op, plain -> fused."""
    titles = [work.title for name, work in kernel_shapes.WORKLOADS.items() if name != "modelscope-64"]
    rows = [row("op", *titles), row(*["---"] * (len(titles) + 1))]
    totals: dict[str, dict[str, list[int]]] = {}
    for name in kernel_shapes.WORKLOADS:
        for shape in calls(name):
            both = totals.setdefault(shape.family, {}).setdefault(name, [0, 0])
            both[0] += shape.calls * moved(shape)
            both[1] += shape.calls * shape.bytes()
    names = [name for name in kernel_shapes.WORKLOADS if name != "modelscope-64"]
    for op, found in totals.items():
        cells = (found.get(name) for name in names)
        rows.append(row(f"`{op}`", *("" if c is None else f"{c[0] / 1e9:.1f} to {c[1] / 1e9:.1f}" for c in cells)))
    sums = [[sum(found.get(name, [0, 0])[i] for found in totals.values()) / 1e9 for i in (0, 1)] for name in names]
    rows.append(row("**all**", *(f"**{a:.0f} to {b:.0f}**" for a, b in sums)))
    rows.append(row("in addition: moments and coefficients of the norms", *(f"{moments(n) / 1e9:.2f}" for n in names)))
    return rows


def moments(workload: str, target: str = "sm_90") -> int:
    """Bytes that the norms of a step write and read again between their three kernels, in float32."""
    norms = [s for s in calls(workload) if s.family == "group_norm_silu"]
    return three_bytes([s for s in norms if s.launches(target=target) == 3], target)


def three_bytes(norms: list[Shape], target: str) -> int:
    """The same of these norms in three launches, also where one would do."""
    total = 0
    for s in norms:
        span = norm.segment_frames(s.n, s.frames, s.emb or None)
        unroll, block = norm.moments_tile(torch.float16, s.op == "add_group_norm_silu", target)
        splits, _ = norm.split(s.n // span, s.h * s.w * span, s.c + s.c2, unroll * block, target)
        total += s.calls * 2 * 4 * (s.n // span) * (splits + 1) * 3 * (s.c + s.c2)
    return total


def launch_rows(target: str = "sm_90") -> list[str]:
    """The norms of a step: how many are one launch, and what that saves beside three launches for each."""
    names = [name for name in kernel_shapes.WORKLOADS if name != "modelscope-64"]
    rows = [row("norms of a step", *(kernel_shapes.WORKLOADS[name].title for name in names))]
    rows.append(row(*["---"] * (len(names) + 1)))
    counted: dict[str, list[str]] = {}
    for name in names:
        norms = [s for s in calls(name) if s.family == "group_norm_silu"]
        ones = [s for s in norms if s.launches(target=target) == 1]
        alone = three_bytes(norms, target) - three_bytes([s for s in norms if s not in ones], target)
        of_x = [(s.calls, s.n * (s.c + s.c2) * s.h * s.w * 2) for s in ones]
        again = sum(times * moved for times, moved in of_x if moved > kernel_shapes.CACHE)
        many = sum(s.calls for s in norms)
        for what, value in {
            "in one launch": f"{sum(s.calls for s in ones)} of {many}",
            "launches": f"{3 * many} to {sum(s.calls * s.launches(target=target) for s in norms)}",
            "GB that are not read again": f"{again / 1e9:.2f}",
            "GB of moments and coefficients that are not made": f"{alone / 1e9:.2f}",
        }.items():
            counted.setdefault(what, []).append(value)
    return rows + [row(what, *values) for what, values in counted.items()]


def call_rows() -> list[str]:
    """How often a step calls each op, and at how many different shapes."""
    names = [name for name in kernel_shapes.WORKLOADS if name != "modelscope-64"]
    rows = [row("op", *(kernel_shapes.WORKLOADS[name].title for name in names)), row(*["---"] * (len(names) + 1))]
    counts = {name: Counter() for name in names}
    kinds = {name: Counter() for name in names}
    for name in names:
        for shape in calls(name):
            counts[name][shape.op] += shape.calls
            kinds[name][shape.op] += 1
    for op in dict.fromkeys(op for name in names for op in counts[name]):
        cells = (f"{counts[n][op]} ({kinds[n][op]})" if counts[n][op] else "" for n in names)
        rows.append(row(f"`{op}`", *cells))
    return rows


def wave_rows() -> list[str]:
    """Of benchmarks/results/kernel_waves.csv: how many launches lose much, and what is lost on average."""
    found = kernel_waves.read()
    gpus = list(kernel_waves.GPUS)
    heads = (f"{gpu}: over 15 %, mean loss, of all time" for gpu in gpus)
    rows = [row("kernel", *heads), row(*["---"] * (len(gpus) + 1))]
    for kernel in sorted({line.kernel for line in found}):
        cells = []
        for gpu in gpus:
            lines = [line for line in found if (line.kernel, line.gpu) == (kernel, gpu)]
            many = sum(line.lost > kernel_waves.LOST for line in lines)
            share = sum(line.share for line in lines)
            lost = sum(line.share * (line.lost - 1) for line in lines) / share
            whole = share * lost / 100 / len(kernel_shapes.WORKLOADS)
            cells.append(f"{many} of {len(lines)}, {lost:.0%}, {whole:.1%}")
        rows.append(row(f"`{kernel}`", *cells))
    return rows


def split_rows() -> list[str]:
    """Convolutions along the frames that lose much, and the best split of their sums, counted."""
    rows = [row("GPU", "rows, channels", "lost now", "us now", "best split", "lost", "us"), row(*["---"] * 7)]
    for s in kernel_waves.splits(kernel_waves.read()):
        now = f"{s.lost - 1:.0%}", f"{s.us:.1f}"
        rows.append(row(s.gpu, f"{s.m:,}, {s.c:,}", *now, s.parts, f"{s.split_lost - 1:.0%}", f"{s.split_us:.1f}"))
    return rows


def fusion_rows() -> list[str]:
    """Of benchmarks/results/fusion.csv: what more could be fused."""
    found = fusion.read()
    rows = [row("what", *(f"{name}, GB" for name in fusion.NAMES), f"cost, {fusion.NAMES[0]}", "verdict")]
    rows.append(row(*["---"] * 5))
    for what in dict.fromkeys(line.what for line in found):
        of = {line.workload: line for line in found if line.what == what}
        first = next(iter(of.values()))
        saved = (f"{of[name].gb:.1f}" if name in of else "" for name in fusion.NAMES)
        rows.append(row(what, *saved, first.cost, first.verdict))
    return rows


def tables() -> list[list[str]]:
    return [call_rows(), example_rows(), step_rows(), launch_rows(), wave_rows(), split_rows(), fusion_rows()]


NAMES = {  # ATen's names -> words
    "native_group_norm": "GroupNorm", "silu": "SiLU", "add": "add", "cat": "cat", "repeat_interleave": "repeat",
     "addmm": "Linear", "linear": "Linear", "mul": "mul",
    "gelu": "GELU", "native_layer_norm": "norm", "convolution": "conv", "mm": "Linear",
    "index_select": "repeat",
}  # fmt: skip


def draw_traffic(path: Path) -> Path:
    """One bar per kernel that plain PyTorch launches, as long as what it moves; below it the fused one."""
    found = examples()
    page = Page(1400, 190 + 92 * len(found))
    page.text(30, 40, "What moves through memory", 20, weight="bold")
    work = kernel_shapes.WORKLOADS[WORKLOAD]
    about = (
        f"{work.title} at its finest level, float16, batch 2. Above: the kernels of plain PyTorch, each as long as "
        "what it reads and\nwrites. Below: the fused op. Bytes are counted, not measured; what cuDNN does inside an op "
        "is not seen."
    )
    page.text(30, 88, about, 12.5, color=SOFT)
    left, width = 300, 960
    most = max(moved(shape) for shape in found.values())
    for i, (what, shape) in enumerate(found.items()):
        y, x = 150 + 92 * i, float(left)
        if i % 2 == 0:
            page.box(18, y - 12, 1364, 86, MIST, round_=8, z=0)
        words = what.replace("and positions", "positions (AnimateDiff)")  # no other model has them
        page.text(left - 18, y + 14, words, 12.5, ha="right", weight="bold")
        page.text(left - 18, y + 42, f"{shape.op}, {shape.calls} x a step", 10.5, ha="right", color=SOFT)
        for j, (name, size) in enumerate(plain(shape)):
            w = width * size / most
            page.box(x, y, w - 2, 28, SPACE if j % 2 == 0 else SPACE2)
            word = NAMES.get(name, name)
            if w > 7.2 * len(word):
                page.text(x + w / 2 - 1, y + 14, word, 10.5, ha="center", color=PAPER if j % 2 == 0 else INK, zorder=3)
            x += w
        page.text(x + 8, y + 14, f"{mb(moved(shape))} MB", 11, color=INK)
        w = width * shape.bytes() / most
        page.box(left, y + 32, w - 2, 28, TIME)
        page.text(left + w + 6, y + 46, f"{mb(shape.bytes())} MB", 11, color=INK)
    return page.save(path)


def draw_roofline(path: Path) -> Path:
    """Where the ops lie under the roof by counted bytes and operations: as plain kernels, and fused."""
    figure = Page(1200, 760).figure
    figure.clf()
    title = "Under the roof: a model, not a measurement"
    figure.text(0.025, 0.955, title, fontsize=18, weight="bold", color=INK, va="top")
    about = (
        "The roof is the data sheet of an H200: 4.8 TB/s, and 989 TFLOP/s for bfloat16 products. Dotted lines lead to\n"
        "the most that an op could reach if only its counted bytes, or its operations, took time. Arrows go from\n"
        "plain PyTorch (hollow, all kernels together) to the fused op (full). Numbers: FLOP per byte; heights are free."
    )
    figure.text(0.025, 0.895, about, fontsize=11, color=SOFT, va="top", linespacing=1.5)
    axes = figure.add_axes((0.075, 0.09, 0.9, 0.66))
    ridge = PRODUCT / COPY
    axes.plot([1, ridge, 6000], [COPY / 1e12, PRODUCT / 1e12, PRODUCT / 1e12], color=INK, lw=2, zorder=2)
    axes.text(1.15, 1.45 * COPY / 1e12, "4.8 TB/s", fontsize=11, color=INK, rotation=33)
    axes.text(1.04 * ridge, 1.14 * PRODUCT / 1e12, "989 TFLOP/s", fontsize=11, color=INK)
    axes.axvline(ridge, color=LINE, lw=1, ls=":")
    words = f"{ridge:.0f} FLOP per byte: left of\nit an op waits for memory"
    axes.text(ridge * 1.04, 2.3, words, fontsize=10, color=SOFT)
    green = "#3c8f5c"

    def widest(workload: str, op: str, **sizes: int) -> Shape:
        fits = (s for s in calls(workload) if s.op == op)
        return next(s for s in fits if all(getattr(s, name) == value for name, value in sizes.items()))

    points = [  # name, colour, shape, height of its arrow
        ("temporal attention,\n16 frames", TIME, widest("modelscope", "temporal_attention", h=5), 7),
        ("temporal attention,\n64 frames", TIME, widest("modelscope-64", "temporal_attention", h=5), 30),
        ("temporal convolution\nand residual,\n320 channels", SPACE,
         widest(WORKLOAD, "temporal_conv", residual=True), 36),
        ("GEGLU,\nwidth 320", green, widest(WORKLOAD, "geglu", d=320), 95),
        ("temporal convolution\nand residual,\n1280 channels", SPACE,
         widest(WORKLOAD, "temporal_conv", c=1280, residual=True), 210),
        ("GEGLU,\nwidth 1280", green, widest(WORKLOAD, "geglu", d=1280), 470),
    ]  # fmt: skip
    for name, colour, shape, y in points:
        left, right = (shape.flops() / size for size in (moved(shape), shape.bytes()))
        arrow = dict(arrowstyle="-|>", color=colour, lw=2.2, shrinkA=5, shrinkB=5)
        axes.annotate("", (right, y), (left, y), arrowprops=arrow, zorder=3)
        for x, full in ((left, PAPER), (right, colour)):
            roof = min(PRODUCT, x * COPY) / 1e12
            axes.plot([x, x], [y, roof], color=colour, lw=1.2, ls=":", zorder=1)
            axes.plot([x], [y], "o", ms=9, mfc=full, mec=colour, mew=2, zorder=4)
            style = dict(textcoords="offset points", fontsize=9.5, color=SOFT, ha="center", va="center")
            style["bbox"] = dict(facecolor=PAPER, edgecolor="none", pad=0.5)
            axes.annotate(f"{x:.0f}", (x, y), (0, -15), zorder=2, **style)
        axes.annotate(name, (right, y), (22, 0), textcoords="offset points", fontsize=10.5, color=INK, va="center")
    axes.set(xscale="log", yscale="log", xlim=(1, 6000), ylim=(2, 2500))
    axes.set_xlabel("FLOP per byte moved", fontsize=11, color=INK)
    axes.set_ylabel("TFLOP/s, at most", fontsize=11, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e4e8ec", lw=0.8)
    axes.set_axisbelow(True)
    figure.savefig(path, facecolor=PAPER, metadata={"Software": None})
    return path


def draw_tile(path: Path) -> Path:
    """Temporal attention: which rows of memory one program gathers, and which of its scores count."""
    d, frames, pixels = 64, 16, 12
    width = sum(attention.split(d))
    per_tile, block, _ = attention.tile(frames, width, 2)
    page = Page(1400, 830)
    page.text(30, 40, "Temporal attention without moving a byte", 20, weight="bold")
    what = f"one pixel, {frames} rows" if per_tile == 1 else f"{per_tile} pixels, {per_tile * frames} rows"
    about = (
        "Tokens stay (b f p h d), as the projections wrote them: a pixel's frames lie p rows apart, and in a row the d "
        f"numbers of a head\nlie together. A program takes all {frames} frames of {what}, of one head, by their "
        "strides: nothing is permuted, in or out."
    )
    page.text(30, 88, about, 12.5, color=SOFT)
    colours = [TIME, SPACE, TIME2, SPACE2]
    x0, y0, cell = 110, 200, 34
    page.text(x0, y0 - 44, "In memory: a row for each frame and pixel", 13, weight="bold")
    for f in range(frames):
        page.text(x0 - 12, y0 + (f + 0.5) * cell, f"frame {f}", 10, ha="right", color=SOFT)
        for p in range(pixels):
            mine = 4 <= p < 4 + per_tile
            page.box(x0 + p * cell, y0 + f * cell, cell - 3, cell - 3, colours[(p - 4) % 4] if mine else PLAIN)
    for p in range(pixels):
        page.text(x0 + (p + 0.5) * cell - 1, y0 - 14, str(p), 10, ha="center", color=SOFT)
    page.text(x0 + pixels * cell / 2, y0 + frames * cell + 22, "pixels of a frame, p", 11, ha="center", color=SOFT)

    words = "In the program: scores of its rows; grey ones are masked"
    page.text(690, y0 - 44, words, 13, weight="bold")
    for i, f in enumerate((5, 16, 24, 64)):
        per_tile, block, _ = attention.tile(f, width, 2)
        x, y, unit = 690 + 350 * (i % 2), y0 - 4 + 310 * (i // 2), 224 / block
        page.box(x, y, 224, 224, "#dfe4e9", z=1)
        for n in range(per_tile):
            page.box(x + n * f * unit, y + n * f * unit, f * unit, f * unit, colours[n % 4])
        for k in range(block + 1):
            for ends in (((x + k * unit, y), (x + k * unit, y + 224)), ((x, y + k * unit), (x + 224, y + k * unit))):
                page.line(*ends, colour=PAPER, width=0.6, arrow=False, z=3)
        share = per_tile * f * f / block**2
        many = "one pixel" if per_tile == 1 else f"{per_tile} pixels"
        words = f"{f} frames: {many} in a tile of {block} x {block};\n{share:.0%} of its scores count"
        page.text(x, y + 254, words, 11, color=INK)
    return page.save(path)


FIGURES = {"traffic.png": draw_traffic, "roofline.png": draw_roofline, "tile.png": draw_tile}


def draw_all(folder: Path) -> list[Path]:
    return [draw_(folder / name) for name, draw_ in FIGURES.items()]


if __name__ == "__main__":
    for drawn in draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE):
        print(drawn)
    for table in tables():
        print("", *table, sep="\n")
