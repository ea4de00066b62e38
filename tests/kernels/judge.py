"""How a kernel is judged: by its distance from float64, beside PyTorch's own in the same dtype.

The files accuracy_*.py import this. test_kernels.py runs each in a process of its own: Triton decides at its import
whether it interprets.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from minit2v_kernels._dispatch import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Parameters = type(pytest.param())


def pairwise(first: Iterable[Any], second: Iterable[Any], third: Iterable[Any]) -> list[Any]:
    """Parameters of a test: each value meets each value of the two other axes, in as few combinations as can be.

    For axes that do not interact. Neither of the first two may be shorter than the third. A value may be a
    `pytest.param` of several.
    """
    axes = [[x if isinstance(x, Parameters) else pytest.param(x, id=str(x)) for x in axis]
            for axis in (first, second, third)]  # fmt: skip
    assert len(axes[0]) >= len(axes[2]) <= len(axes[1])
    triples = [(a, b, axes[2][(i + j) % len(axes[2])]) for i, a in enumerate(axes[0]) for j, b in enumerate(axes[1])]
    return [pytest.param(*(x for p in ps for x in p.values), id="-".join(p.id for p in ps)) for ps in triples]


def randn(*shape: int, mean: float = 0, std: float = 1, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """The same numbers for every device and, up to rounding, for every dtype."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (mean + std * x).to(DEVICE, dtype)


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) else value


def relative(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| (Frobenius norms), in float64."""
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is full of NaN: what a kernel does not write, or reads before it wrote, shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(x: Tensor) -> Tensor:
        return x.fill_(float("nan")) if x.is_floating_point() else x

    torch.empty = lambda *args, **kw: poison(empty(*args, **kw))
    torch.empty_like = lambda *args, **kw: poison(empty_like(*args, **kw))
    try:
        yield
    finally:
        torch.empty, torch.empty_like = empty, empty_like


@contextmanager
def new_plans(module: Any) -> Iterator[None]:
    """For tests that change how an op's tiles are chosen: a plan is made once for a shape."""
    module.plan.cache_clear()
    yield
    module.plan.cache_clear()


fenced_only = pytest.mark.skipif(not interpreting() or sys.platform != "linux", reason="fences memory as Linux does")


def fenced(x: Tensor) -> Tensor:
    """A contiguous copy of x, behind which lies a page that nobody may read: who does ends the process."""
    size, page = x.numel() * x.element_size(), mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = mmap.mmap(-1, whole + page)
    behind = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + whole
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(behind), page, 0) == 0
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=whole - size).view(x.shape).copy_(x)


def check(op: Callable[..., Any], reference: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """op(*args, impl="triton", **kw), which must be at most twice as far from float64 as `reference` in its dtype.

    Plus one rounding of the result: where PyTorch happens to be exact, a kernel need not be.
    """
    exact = [{k: cast(v, torch.float64) for k, v in kw.items()}, [cast(v, torch.float64) for v in args]]
    want = reference(*exact[1], **exact[0])
    # Contiguous: in channels-last memory PyTorch's GroupNorm on the CPU loses the digits that a large mean costs.
    theirs = reference(*map(contiguous, args), **{k: contiguous(v) for k, v in kw.items()})
    with poisoned():
        got = op(*args, **kw, impl="triton")
    for ours, torchs, right in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, theirs, want)), strict=True):
        assert ours.shape == torchs.shape and ours.dtype == torchs.dtype
        assert not (ours.isnan() & ~torchs.isnan()).any(), "NaN where PyTorch has none"
        error, limit = relative(ours, right), 2 * relative(torchs, right) + torch.finfo(ours.dtype).eps / 2
        assert error <= limit, f"relative error {error:.2e}, and PyTorch's is {relative(torchs, right):.2e}"
    return got
