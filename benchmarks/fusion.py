"""What more of a step could be fused, counted: the bytes that would not move, what that would cost, and the verdict.

    PYTHONPATH=.:kernels:convert python benchmarks/fusion.py       # writes results/fusion.csv and prints it

Nothing is measured. Bytes are those of float16 tensors, each once for each kernel that reads or writes it. Times are
bytes at 4.8 TB/s, products at 989 TFLOP/s, and exponentials and divisions at 16 a clock and multiprocessor, where the
matrix units compute 4,096 operations: the data sheet of an H200.
"""

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from kernel_shapes import CACHE, WORKLOADS, GroupNorm, LinearAdd, Shape, TemporalAttention, unet_calls, unique
from kernel_waves import BANDWIDTH, PRODUCTS
from torch import nn

from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v.models.unet_motion import UNetMotionModel
from minit2v_kernels.feed_forward import product_tile
from minit2v_kernels.norm import power_of_2

TABLE = Path(__file__).parent / "results" / "fusion.csv"
NAMES = ("zeroscope", "animatediff")
SPECIAL = PRODUCTS / 256  # exponentials or divisions per second
ROWS = 128  # of a tile of a matrix product


@dataclass(frozen=True)
class Line:
    what: str
    workload: str
    gb: float  # saved in a step
    us: float  # the time of these bytes
    cost: str
    verdict: str


def of(shapes: list[Shape], kind: type, *parts: str) -> list[Any]:
    """Those of this kind; parts: the last word of the part of the network that they belong to."""
    return [s for s in shapes if type(s) is kind and (not parts or s.part.split()[-1] in parts)]


def size(norm: GroupNorm) -> int:
    return norm.n * (norm.c + norm.c2) * norm.h * norm.w * 2


def norm_in_input(norms: list[GroupNorm]) -> int:
    """Bytes that are saved where a convolution reads x, not its norm: y is not written, x not read for it."""
    return sum(s.calls * size(s) * (2 if size(s) > CACHE and s.launches() == 3 else 1) for s in norms)


def again(norms: list[GroupNorm]) -> float:
    """Seconds in which a temporal convolution computes SiLU again, for each tap and each tile of columns."""
    total = 0.0
    for s in norms:
        tile = product_tile(s.n * s.h * s.w, s.c, s.c, 2, "sm_90")
        times = 3 * -(-s.c // tile["BLOCK_N"]) - 1  # the norm's own kernel computes it once
        total += s.calls * times * (size(s) / 2) * 2 / SPECIAL  # an exponential and a division
    return total


def weights_of_heads(calls: list[TemporalAttention]) -> tuple[float, float]:
    """(bytes of weights that programs of 128 rows read from L2, matrix work over what is asked for)."""
    read, work, asked = 0.0, 0.0, 0.0
    for s in calls:
        pixels = max(1, ROWS // power_of_2(s.f))
        programs = s.b * -(-s.p // pixels) * s.h
        read += s.calls * programs * 3 * s.d * (s.h * s.d) * 2
        work += s.calls * programs * ROWS * s.d * s.h * s.d
        asked += s.calls * s.b * s.f * s.p * s.h * s.d * s.h * s.d
    return read, work / asked


def weights(config: Any) -> int:
    """Bytes of all weights of convolutions and linear layers, in 16 bits."""
    kind = UNet3DConditionModel if isinstance(config, UNet3DConfig) else UNetMotionModel
    with torch.device("meta"):
        network = kind(config)
    layers = (m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    return sum(2 * m.weight.numel() for m in layers)


def rounding(dtype: torch.dtype) -> float:
    """Relative error of random weights in this dtype, with a scale for each row."""
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    scale = x.abs().amax(1, keepdim=True) / min(torch.finfo(dtype).max, 448)
    return (((x / scale).to(dtype).float() * scale - x).norm() / x.norm()).item()


def lines() -> Iterator[Line]:
    for name in NAMES:
        shapes = unique(unet_calls(WORKLOADS[name]))
        convs, res = of(shapes, GroupNorm, "conv"), of(shapes, GroupNorm, "res", "out")
        sums = [s for s in res if s.emb]  # each ResBlock has one norm with the timestep
        attentions = of(shapes, TemporalAttention)
        read, padded = weights_of_heads(attentions)
        folded, half = norm_in_input(convs), weights(WORKLOADS[name].config) / 2
        wrong = rounding(torch.float8_e4m3fn) / rounding(torch.float16)
        found = {
            "a residual in the epilogue of a linear layer, `linear_add`": (
                sum(s.calls * 2 * s.rows * s.m * 2 for s in of(shapes, LinearAdd)),
                "128 rows of the residual pass through registers that the sums leave free", "built",
            ),
            "a norm and SiLU in the input of the temporal convolution": (
                folded, f"{again(convs) * 1e3:.1f} ms of exponentials, for each tap and tile again",
                "no: costs more than it saves",
            ),
            "a norm and SiLU in the input of the 3x3 convolution": (
                norm_in_input(res), "a convolution in place of cuDNN's", "no: cuDNN's is hard to reach",
            ),
            "the sum after a ResBlock in the next norm, `add_group_norm_silu`": (
                sum(s.calls * size(s) for s in sums), "none; the kernel exists", "later: the smallest gain",
            ),
            "q, k, v and temporal attention in one": (
                sum(s.calls * 6 * s.bytes() // 4 for s in attentions),
                f"{read / 1e9:.0f} GB of weights from L2, {padded:.2f} times the products",
                "no: it reads more from L2 than it saves",
            ),
            "weights in 8 bits": (half, f"{wrong:.0f} times the rounding of float16", "no: the judge would refuse it"),
        }  # fmt: skip
        for what, (saved, cost, verdict) in found.items():
            if saved:
                yield Line(what, name, round(saved / 1e9, 2), round(saved / BANDWIDTH * 1e6), cost, verdict)


def read(path: Path = TABLE) -> list[Line]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = {f.name: f.type for f in fields(Line)}
    return [Line(**{k: kinds[k](v) for k, v in row.items()}) for row in rows]


def write(found: list[Line], path: Path = TABLE) -> None:
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(f.name for f in fields(Line))
    out.writerows(map(astuple, found))
    temporary = path.with_suffix(".part")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)


if __name__ == "__main__":
    write(list(lines()))
    print(TABLE.read_text(), end="")
