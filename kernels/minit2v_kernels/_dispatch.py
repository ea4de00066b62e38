"""Which implementation of an op runs: `impl=` of the call, else $MINIT2V_KERNELS, else "auto"."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLS = ("auto", "torch", "triton")

# Device families on which a result committed under benchmarks/results/ shows that the op's kernel beats PyTorch,
# e.g. {"group_norm_silu": {"sm_90"}}. Until such a result exists a family is not in here, and "auto" means PyTorch.
PROVEN: dict[str, frozenset[str]] = {"group_norm_silu": frozenset()}


@cache
def has_triton() -> bool:
    """Whether Triton is installed; found without importing it, which would cost seconds."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors: slow, and exact enough for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def family(device: torch.device) -> str:
    """The name PROVEN uses for a device: "sm_90" (NVIDIA), "gfx942" (AMD), else its type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def pick(op: str, impl: str | None, x: Tensor) -> str:
    """ "torch" or "triton" for `op` on the input `x`.

    "triton" never falls back: RuntimeError where it cannot run. ValueError on an unknown `impl`.
    """
    source = "impl" if impl else "MINIT2V_KERNELS"
    impl = impl or os.environ.get("MINIT2V_KERNELS") or "auto"
    if impl not in IMPLS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
    if impl == "auto":
        return "triton" if x.is_cuda and family(x.device) in PROVEN[op] and has_triton() else "torch"
    if impl == "triton" and not has_triton():
        raise RuntimeError(f"{op}: {source}='triton', but Triton is not installed (pip install 'minit2v[triton]')")
    if impl == "triton" and not (x.is_cuda or interpreting()):
        raise RuntimeError(f"{op}: {source}='triton' needs a GPU tensor, not one on {x.device}")
    return impl
