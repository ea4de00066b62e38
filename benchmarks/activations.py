"""Counts the memory that one denoising step holds at its peak, beside the weights: on `meta`, so without a GPU.

    PYTHONPATH=.:kernels:convert python benchmarks/activations.py [workload ...] [--save FILE]

Every tensor that PyTorch makes during a step is counted from its birth to its death. What an allocator adds to that
(rounding, fragments, cuDNN's workspaces, CUDA's own 0.5 GB) is not: benchmarks/step.py measures the whole on a GPU.
Attention is counted as what it reads and returns, as in all of PyTorch's fused backends. The kernels' scratch memory is
in. float16, batch 2 (guidance), 77 text tokens.
"""

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_resources import layouts_of_cuda
from kernel_shapes import TEXT, WORKLOADS, Workload
from measure import Results, table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minit2v import UNet3DConditionModel, UNetMotionModel, fast
from minit2v.fast.bisect import kernels
from minit2v.models.unet3d import UNet3DConfig
from minit2v_kernels import _dispatch

GIB = 2**30


class Live(TorchDispatchMode):
    """The bytes of all storages made under it that are alive, and the most there ever were."""

    def __init__(self, given: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self.known = {value.untyped_storage()._cdata for value in (*given.parameters(), *given.buffers())}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.born(value.untyped_storage())
        return result

    def born(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:  # a view, or changed in place
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.died, key, size)

    def died(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


class Forgotten(list):
    """For recorded launches: a list would keep their tensors alive."""

    def append(self, launch: Any) -> None:
        pass


@contextmanager
def recorded(impl: str) -> Iterator[None]:
    """The ops as references, or as kernels that allocate what they would and do not run."""
    with kernels(impl), _dispatch.record(), layouts_of_cuda():
        _dispatch.recorded = Forgotten()
        yield


@contextmanager
def fused_attention() -> Iterator[None]:
    """On `meta` PyTorch would take the attention apart, and store all pairs of pixels."""
    before = F.scaled_dot_product_attention

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kw: Any) -> Tensor:
        b, h, length, _ = q.shape
        return torch.empty(b, length, h, v.shape[-1], dtype=q.dtype, device=q.device).transpose(1, 2)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = before


def peak(network: nn.Module, call: Callable[[], Any]) -> int:
    """Bytes at the peak of a call, beyond the network's own."""
    with torch.no_grad(), fused_attention(), Live(network) as live:
        call()
    return live.peak


def size(network: nn.Module) -> int:
    return sum(value.nbytes for value in (*network.parameters(), *network.buffers()))


def half_on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make().half().eval()


def count(work: Workload, peer: bool = True) -> dict[str, Any]:
    """The peaks of a step in bytes: our fast path's without and with kernels, diffusers' where it is there."""
    network_class = UNet3DConditionModel if isinstance(work.config, UNet3DConfig) else UNetMotionModel
    network = half_on_meta(lambda: network_class(work.config))
    h, w = work.latents
    x = torch.empty(work.batch, 4, work.frames, h, w, dtype=torch.half, device="meta")
    t = torch.empty(1, device="meta")
    context = torch.empty(work.batch, TEXT, work.config.cross_attention_dim, dtype=torch.half, device="meta")
    found: dict[str, Any] = {"workload": work.title, "weights": size(network)}
    for name, impl in (("torch", "torch"), ("kernels", "triton")):
        with recorded(impl):
            found[name] = peak(network, lambda: fast.runner(network)(x, t, context))
    if not peer or find_spec("diffusers") is None:
        return found
    import diffusers

    peer_class = getattr(diffusers, network_class.__name__)
    theirs = half_on_meta(lambda: peer_class(cross_attention_dim=work.config.cross_attention_dim))
    if network_class is UNetMotionModel:  # the pipeline repeats the text for every frame
        context = context.repeat_interleave(work.frames, dim=0)
    found["diffusers"] = peak(theirs, lambda: theirs(x, t, context))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="workload", help=", ".join(WORKLOADS))
    parser.add_argument("--save", type=Path, help="a JSON file to write")
    args = parser.parse_args()
    if unknown := set(args.workloads) - set(WORKLOADS):
        parser.error(f"there is no workload {', '.join(sorted(unknown))}: {', '.join(WORKLOADS)}")
    rows = [count(WORKLOADS[name]) for name in args.workloads or WORKLOADS]
    print(table([
        ("GiB beside the weights", "weights", "torch", "kernels", "diffusers"),
        *([row["workload"], *(f"{row[k] / GIB:.2f}" if k in row else "-" for k in
                              ("weights", "torch", "kernels", "diffusers"))] for row in rows),
    ]))  # fmt: skip
    if args.save:
        results = Results(args.save, torch.device("cpu"), fresh=True)
        results.data["machine"].pop("dry_run", None)  # the count is of no device
        results.data["counted on meta, in bytes"] = rows
        results.save()


if __name__ == "__main__":
    main()
