"""Counts the memory that one denoising step holds at its peak, beside the weights: on `meta`, so without a GPU.

    PYTHONPATH=.:kernels:convert python benchmarks/activations.py [workload ...] [--save FILE]

minit2v/memory/live.py says what is counted; benchmarks/step.py measures the whole on a GPU. The kernels' scratch memory
is in. float16, batch 2 (guidance), 77 text tokens.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kernel_shapes import TEXT, WORKLOADS, Workload
from measure import Results, table
from torch import nn

from minit2v import UNet3DConditionModel, UNetMotionModel, fast
from minit2v.fast.bisect import kernels
from minit2v.memory.live import GIB, peak, size
from minit2v.models.unet3d import UNet3DConfig
from minit2v_kernels import _dispatch


class Forgotten(list):
    """For recorded launches: a list would keep their tensors alive."""

    def append(self, launch: Any) -> None:
        pass


@contextmanager
def recorded(impl: str) -> Iterator[None]:
    """The ops as references, or as kernels that allocate what they would and do not run."""
    with kernels(impl), _dispatch.record(launches=Forgotten()):
        yield


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
