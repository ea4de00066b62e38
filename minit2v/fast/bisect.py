"""`minit2v bisect`: which kernel is wrong? It makes one prediction of a UNet for each op, with this op as a kernel.

First come the Triton kernels of this package, then the user's own functions.

An error is the relative distance to the prediction of the plain network in float64, over all numbers. The fast path
without kernels has an error, too, in the same dtype. It is the reference: a kernel may round differently, so its error
may be a little larger, but not much.
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

SLACK = 1.5  # the highest ratio to PyTorch's error; other rounding changes the error by less
FACTOR = 8  # pixels per latent, in every published model
TOKENS = 77


@dataclass(frozen=True)
class Found:
    """The result of one run."""

    ops: str  # the ops that ran as kernels; "op=name" for a function of the user
    launches: int  # of kernels, or calls of the user's function; 0: the network does not use the op
    error: float  # relative, compared with float64
    good: bool


def load(path: str, dtype: torch.dtype, device: torch.device) -> UNet:
    """The UNet of a pipeline's folder or hub id. Raises ValueError if it is not a UNet of this package."""
    name = (read_index(path, None, {}).get("unet") or [None])[-1]
    cls = getattr(importlib.import_module(f"minit2v.{CLASSES[name]}"), name) if name in CLASSES else None
    if cls is None or not issubclass(cls, UNet):
        raise ValueError(f"{path} has no UNet of this package: its model_index.json names {name}")
    return cls.from_pretrained(path, subfolder="unet", dtype=dtype).to(device)


def inputs(unet: UNet, frames: int, height: int, width: int) -> tuple[Tensor, int, Tensor]:
    """Random inputs (x, t, context) for two videos, as with guidance. height, width: in pixels."""
    generator = torch.Generator().manual_seed(0)
    axes = [frames] if not isinstance(unet, UNet2DConditionModel) else []
    x = torch.randn(2, unet.config.in_channels, *axes, height // FACTOR, width // FACTOR, generator=generator)
    context = torch.randn(2, TOKENS, unet.config.cross_attention_dim, generator=generator)
    return x.to(unet.device, unet.dtype), 500, context.to(unet.device, unet.dtype)


@torch.no_grad()
def bisect(unet: UNet, x: Tensor, t: int, context: Tensor, setting: str = "") -> Iterator[Found]:
    """Runs first PyTorch, then each op alone as a kernel, then all of them, then the user's functions in `setting`.

    x (2 c f h w), context (2 l d). setting: as in $MINIT2V_KERNELS.
    Raises ValueError if the fast path is off.
    """
    dtype, run = unet.dtype, runner(unet)
    if run is unet:
        raise ValueError("kernels run only on the fast path, which is off: set MINIT2V_OPTIMIZE=1, and do not call "
                         "restore()")  # fmt: skip
    want = unet.double()(x.double(), t, context.double())
    unet.to(dtype)  # back from float64, without loss
    with kernels("torch"):
        plain = distance(run(x, t, context), want)
    yield Found("", 0, plain, plain < float("inf"))
    for ops, shipped in [*((op, f"torch,{op}=triton") for op in PROVEN), ("all", "triton")]:
        with kernels(shipped):
            with record() as launches:  # record the kernels without running them
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
    """|y - want| / |want|. It is infinite if y has NaN or infinity."""
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
    """The rows of the table, each with whether it is free of errors."""
    yield f"{'as kernels':20}{'launches':>10}{'error':>12}", True
    for f in found:
        verdict = "" if not f.ops else "ok" if f.good else "WRONG"
        if f.ops and not f.launches:
            yield f"{f.ops:20}{0:>10}{'-':>12}  not in this network", True
        else:
            yield f"{f.ops or 'none: PyTorch':20}{f.launches:>10}{f.error:>12.2e}  {verdict}".rstrip(), f.good
