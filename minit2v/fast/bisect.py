"""`minit2v bisect`: which kernel is to blame? One prediction of a UNet, with each op in turn as its Triton kernel.

Functions of the user's own take their turn after the shipped kernels, each in the place of its op.

The errors are distances to the same prediction of the plain network in float64, relative and over all numbers. The fast
path without kernels has one, too, in the same dtype, and is the measure: a kernel may round in other places, and may
not be further away than that explains.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minit2v_kernels._dispatch import PROVEN, contender, own, record, register

from ..models.unet import UNet
from ..models.unet2d import UNet2DConditionModel
from ..pipelines.files import CLASSES, read_index
from . import runner

SLACK = 1.5  # times PyTorch's error: on a random input two ways of rounding differ by less
FACTOR = 8  # pixels per latent, in every published model
TOKENS = 77


@dataclass(frozen=True)
class Found:
    """What one run showed."""

    ops: str  # those that ran as kernels; "op=name" for a function of the user's own
    launches: int  # of kernels; of an own function, its calls; 0: the network has no place for the op
    error: float  # relative, to float64
    good: bool


def load(path: str, dtype: torch.dtype, device: torch.device) -> UNet:
    """The UNet of a pipeline's folder or hub id."""
    name = (read_index(path, None, {}).get("unet") or [None])[-1]
    cls = getattr(importlib.import_module(f"minit2v.{CLASSES[name]}"), name) if name in CLASSES else None
    if cls is None or not issubclass(cls, UNet):
        raise ValueError(f"{path} has no UNet of this package: its index names {name}")
    return cls.from_pretrained(path, subfolder="unet", dtype=dtype).to(device)


def inputs(unet: UNet, frames: int, height: int, width: int) -> tuple[Tensor, int, Tensor]:
    """Noise and a text as the UNet is used to them, for two videos, as under guidance; height and width in pixels."""
    generator = torch.Generator().manual_seed(0)
    axes = [frames] if not isinstance(unet, UNet2DConditionModel) else []
    x = torch.randn(2, unet.config.in_channels, *axes, height // FACTOR, width // FACTOR, generator=generator)
    context = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=generator)
    return x.to(unet.device, unet.dtype), 500, context.to(unet.device, unet.dtype)


@torch.no_grad()
def bisect(unet: UNet, x: Tensor, t: int, context: Tensor, setting: str = "") -> Iterator[Found]:
    """First PyTorch, then each op by itself as a kernel, then all of them, then the own functions in `setting`.

    setting: as $MINIT2V_KERNELS. ValueError where no kernel can run.
    """
    dtype, run = unet.dtype, runner(unet)
    if run is unet:
        raise ValueError("kernels run on the fast path alone, which MINIT2V_OPTIMIZE=0 or `restore` has turned off")
    want = unet.double()(x.double(), t, context.double())
    unet.to(dtype)  # and back, which loses nothing
    with kernels("torch"):
        plain = distance(run(x, t, context), want)
    yield Found("", 0, plain, plain < float("inf"))
    for ops, shipped in [*((op, f"torch,{op}=triton") for op in PROVEN), ("all", "triton")]:
        with kernels(shipped):
            with record() as launches:  # what would be launched
                run(x, t, context)
            error = distance(run(x, t, context), want) if launches else plain
        yield Found(ops, len(launches), error, error <= SLACK * plain < float("inf"))
    for op, name in own(setting).items():
        calls, function = [0], contender(op, name)

        def counted(*args: Any, calls: list[int] = calls, function: Any = function) -> Any:
            calls[0] += 1
            return function(*args)

        register(op, "bisected", counted)
        with kernels(f"torch,{op}=bisected"):
            error = distance(run(x, t, context), want)
        yield Found(f"{op}={name}", calls[0], error, error <= SLACK * plain < float("inf"))


def distance(y: Tensor, want: Tensor) -> float:
    """|y - want| / |want|; infinite where y is not finite."""
    return ((y.double() - want).norm() / want.norm()).nan_to_num(nan=float("inf")).item()


@contextmanager
def kernels(setting: str) -> Iterator[None]:
    before = os.environ.get("MINIT2V_KERNELS")
    os.environ["MINIT2V_KERNELS"] = setting
    try:
        yield
    finally:
        if before is None:
            del os.environ["MINIT2V_KERNELS"]
        else:
            os.environ["MINIT2V_KERNELS"] = before


def lines(found: Iterator[Found]) -> Iterator[tuple[str, bool]]:
    """The table's rows, each with whether it is good news."""
    yield f"{'as kernels':20}{'launches':>10}{'error':>12}", True
    for f in found:
        verdict = "" if not f.ops else "ok" if f.good else "WRONG"
        if f.ops and not f.launches:
            yield f"{f.ops:20}{0:>10}{'-':>12}  not in this network", True
        else:
            yield f"{f.ops or 'none: PyTorch':20}{f.launches:>10}{f.error:>12.2e}  {verdict}".rstrip(), f.good
