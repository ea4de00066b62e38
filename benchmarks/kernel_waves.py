"""How evenly each launch fills a GPU, counted: programs, blocks at once, what the last wave and the padding lose.

    PYTHONPATH=.:kernels:convert python benchmarks/kernel_waves.py          # writes the table, prints the worst first

For every call of the workloads in float16, on three GPUs: an A100 (108 multiprocessors), an H100 or H200 (132), and a
B200 (148, whose tiles are those of sm_80, see minit2v_kernels/_tiles.py). Nothing is measured.
The table, results/kernel_waves.csv, has these columns:

programs   the blocks of the launch
blocks     that a multiprocessor holds at once (of results/kernel_resources.csv; 0 where it is not there)
last       time over what it would be if the blocks divided evenly: the multiprocessor with the most has this much more
           than the mean. 1.24 means that 24 % are lost. Blocks on one multiprocessor share its units, so only their
           number counts, not how many are resident
padding    work of the tiles over work of the shape, for matrix products and attention; 1 elsewhere
bytes      of the tensors that the launch reads and writes, each once, MB
share      of the counted time of all launches of the workload, per cent. The time of a launch is that of its bytes at
           4.8 TB/s or of its operations at 989 TFLOP/s, whichever is longer: the data sheet of an H200
"""

import csv
import io
import os
import sys
from dataclasses import astuple, dataclass, fields, replace
from math import prod
from pathlib import Path
from typing import Any

import kernel_resources
import kernel_shapes
import torch
from kernel_shapes import Shape

import minit2v_kernels
from minit2v_kernels._dispatch import record
from minit2v_kernels._tiles import like, processors

TABLE = Path(__file__).parent / "results" / "kernel_waves.csv"
BANDWIDTH, PRODUCTS = 4.8e12, 989e12
GPUS = {"A100": "sm_80", "H200": "sm_90", "B200": "sm_100"}
LOST = 1.15  # what the last wave and the padding together may take
# Why a kernel's launches may lose more.
REASONS = {
    "group_norm_coefficients": "one program for each group of each video; more programs would need a fourth launch "
    "to merge them, and the losses of all of them are less than 1 % of the counted time of a step",
    "group_norm_whole": "one program for one group or a few, which must stay together; two launches are saved",
    "group_norm_moments": "the split is chosen so that programs end together; small inputs have few positions to split",
    "group_norm_apply": "inputs of a few hundred kB, with fewer tiles than a wave",
    "layer_norm_kernel": "inputs of a few hundred kB, with fewer tiles than a wave",
    "temporal_attention_kernel": "a tile is a power of two: 24 frames take 32 rows. It waits for memory, and the "
    "padding costs arithmetic alone",
    "geglu_kernel": "no other tile loses a tenth less",
    "linear_add_kernel": "no other tile loses a tenth less",
    "temporal_conv_kernel": "no other tile loses a tenth less",
}


@dataclass(frozen=True)
class Line:
    gpu: str
    workload: str
    shape: str
    kernel: str
    tile: str
    programs: int
    blocks: int
    last: float
    padding: float
    bytes: float
    share: float

    @property
    def lost(self) -> float:
        return self.last * self.padding


def last_wave(programs: int, count: int) -> float:
    """The blocks of the fullest multiprocessor over the mean of all."""
    return -(-programs // count) * count / programs


def padding(shape: Shape, launch: Any) -> float:
    """What the tiles of a matrix product or of attention compute, over what the shape asks for."""
    sizes = launch.constexprs
    if {"BLOCK_M", "BLOCK_N"} <= sizes.keys():
        m, n = [x for x in launch.args if isinstance(x, int)][:2]
        return prod(-(-size // block) * block / size for size, block in ((m, sizes["BLOCK_M"]), (n, sizes["BLOCK_N"])))
    if {"PIXELS", "F", "D"} <= sizes.keys():
        f, pixels, block = sizes["F"], sizes["PIXELS"], sizes["BLOCK"]
        rows = -(-pixels * f // block) * block
        width = (sizes["D1"] + sizes["D2"]) / sizes["D"]
        return rows * rows / (pixels * f * f) * width if pixels * f <= block else (rows / f) ** 2 * width
    return 1.0


def tile_of(launch: Any) -> str:
    kept = {k: v for k, v in launch.constexprs.items() if k.startswith(("BLOCK", "PIXELS"))}
    return " ".join(f"{k.removeprefix('BLOCK_')}={v}" for k, v in kept.items()) + f" warps={launch.num_warps}"


def moved(launch: Any) -> int:
    """Bytes of the tensors of a launch, each once."""
    tensors = {id(x): x for x in launch.args if isinstance(x, torch.Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def lines() -> list[Line]:
    """A line for every launch of every call."""
    table = {row.key: row for row in kernel_resources.read()}
    found = []
    for work in kernel_shapes.WORKLOADS.values():
        shapes = [s for s in kernel_shapes.unique(kernel_shapes.unet_calls(work)) if hasattr(minit2v_kernels, s.op)]
        for gpu, target in GPUS.items():
            rows: list[tuple[Line, float]] = []
            for shape in shapes:
                args, kw = shape.make("meta", torch.float16)
                with record(target) as launches:
                    getattr(minit2v_kernels, shape.op)(*args, **kw, impl="triton")
                for launch in launches:
                    row = table.get(kernel_resources.specialise(launch, like(target)).row.key)
                    programs, size = prod(launch.grid), moved(launch)
                    flops = shape.flops() if shape.matrix else 0
                    time = shape.calls * max(size / BANDWIDTH, flops / PRODUCTS)
                    rows.append((Line(
                        gpu, work.name, shape.name, launch.kernel.__name__, tile_of(launch), programs,
                        row.blocks if row else 0, round(last_wave(programs, processors(target)), 3),
                        round(padding(shape, launch), 3), round(size / 1e6, 2), 0.0,
                    ), time))  # fmt: skip
            total = sum(time for _, time in rows)
            found += [replace(line, share=round(100 * time / total, 2)) for line, time in rows]
    return found


@dataclass(frozen=True)
class Split:
    """A convolution along the frames that loses much, now and with its sum split between programs."""

    gpu: str
    m: int  # rows
    c: int  # channels in and out
    lost: float
    us: float  # of its arithmetic, with what is lost
    parts: int  # the best number of parts
    split_lost: float
    split_us: float  # of arithmetic, and of the parts' sums in float32, written and read


def splits(found: list[Line]) -> list[Split]:
    """For each shape of `temporal_conv` that loses more than LOST: what the best split would take, counted.

    The parts of a sum are tiles of float32 that a second kernel adds. Their bytes pass at the bandwidth of memory.
    """
    made = {}
    sizes = {
        s.name: (s.b * s.f * s.p, s.c) for work in kernel_shapes.WORKLOADS.values()
        for s in kernel_shapes.unet_calls(work) if s.op == "temporal_conv" and not s.residual
    }  # fmt: skip
    for line in found:
        if line.kernel != "temporal_conv_kernel" or line.lost <= LOST or line.shape not in sizes:
            continue
        (m, c), target = sizes[line.shape], GPUS[line.gpu]
        count, whole = processors(target), 2 * m * 3 * c * c / PRODUCTS * 1e6

        def cost(rows: int, columns: int, parts: int, m=m, c=c, count=count, whole=whole) -> tuple[float, float]:
            programs = -(-m // rows) * -(-c // columns) * parts
            lost = -(-programs // count) * count * rows * columns / (m * c * parts)
            return lost * whole + 2 * parts * m * c * 4 / BANDWIDTH * 1e6, lost

        tiles = [(256, 128), (256, 64)] * (like(target) == "sm_90") + [(128, 128), (128, 64), (64, 64), (64, 32)]
        tries = [(*cost(*tile, parts), parts) for tile in tiles for parts in (2, 3, 4, 6)]
        us, lost, parts = min(tries)
        made[line.gpu, m, c] = Split(line.gpu, m, c, line.lost, round(line.lost * whole, 1), parts,
                                     round(lost, 3), round(us, 1))  # fmt: skip
    return list(made.values())


def write(found: list[Line], path: Path = TABLE) -> None:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(f.name for f in fields(Line))
    out.writerows(map(astuple, found))
    temporary = path.with_suffix(".part")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


def read(path: Path = TABLE) -> list[Line]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {f.name: f.type for f in fields(Line)}
    return [Line(**{k: kinds[k](v) for k, v in row.items()}) for row in rows]


def main() -> None:
    found = sorted(lines(), key=lambda line: -(line.lost - 1) * line.share)
    write(found)
    print("lost  last  padding  share  programs  gpu   workload  kernel  tile  shape")
    for line in found[:40]:
        numbers = f"{line.lost:.2f}  {line.last:.2f}  {line.padding:.2f}  {line.share:5.2f} %  {line.programs:7d}"
        print(f"{numbers}  {line.gpu}  {line.workload}  {line.kernel}  {line.tile}  {line.shape}")
    bad = [line for line in found if line.lost > LOST]
    print(f"{len(bad)} of {len(found)} launches lose more than {LOST - 1:.0%}", file=sys.stderr)


if __name__ == "__main__":
    main()
