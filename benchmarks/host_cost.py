"""What a step of the fast path costs its host, op by op: Python and PyTorch's bookkeeping, before a GPU does anything.

    PYTHONPATH=.:kernels:convert python benchmarks/host_cost.py [--workload modelscope] [--rounds 15] [--save FILE]

A step of the full-size UNet runs on `meta`, in float16, with all ops as kernels, whose launches are recorded and not
run. Each fused op is timed from the executor's call to its return, in every round; a call's time is its median over the
rounds. Counted: reading the module's fields, choosing the tile, making the result and the scratch memory (tensors
without numbers: CUDA's allocator would add about a microsecond to each), and recording. Not counted: Triton's launch of
the kernels (with CUDA graphs there is none), products and convolutions, which are PyTorch's.

outside_ops is the same step with the recorded result handed out in place of every op, also of PyTorch's: the executor
alone, its views and sums. refresh looks whether anybody has changed the network, once per step.
"""

import argparse
import gc
import os
import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from kernel_resources import layouts_of_cuda
from kernel_shapes import TEXT, WORKLOADS, Workload
from measure import RESULTS, Results, digits, table

from minit2v import fast
from minit2v.fast.bisect import kernels
from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v.models.unet_motion import UNetMotionModel
from minit2v_kernels import _dispatch

FUSED = ("group_norm", "layer_norm", "add_layer_norm", "frame_attention", "geglu", "temporal_conv")
OTHERS = ("linear", "queries_keys_values", "conv", "double_and_conv")
GOAL = 15  # microseconds, the median of all fused ops


def prepare(work: Workload) -> tuple[Any, Callable[[], Any]]:
    """(the executor of a UNet on `meta`, a call of one step). Only while launches are recorded."""
    unet_class = UNet3DConditionModel if isinstance(work.config, UNet3DConfig) else UNetMotionModel
    with torch.device("meta"):
        unet = unet_class(work.config).half().eval()
    x = torch.empty(work.batch, 4, work.frames, *work.latents, dtype=torch.half, device="meta")
    t = torch.ones(1, device="meta")
    text = torch.empty(work.batch, TEXT, work.config.cross_attention_dim, dtype=torch.half, device="meta")
    executor = fast.optimize(unet)
    executor.kept = unet  # which it knows weakly
    return executor, lambda: executor(x, t, text)


def watched(ops: Any, call: Callable[[], Any], rounds: int) -> dict[str, list[float]]:
    """Microseconds of every fused op of a call, each the median of its rounds."""
    spent: list[tuple[str, float]] = []
    clock = time.perf_counter

    def watch(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            start = clock()
            y = op(*args, **kw)
            spent.append((name, clock() - start))
            return y

        return timed

    for name in FUSED:
        setattr(ops, name, watch(name, getattr(ops, name)))
    call()  # plans are made at the first call
    found = []
    for _ in range(rounds):
        spent.clear()
        call()
        found.append(list(spent))
    for name in FUSED:
        delattr(ops, name)
    out: dict[str, list[float]] = {}
    for same in zip(*found, strict=True):
        assert len({name for name, _ in same}) == 1
        out.setdefault(same[0][0], []).append(1e6 * statistics.median(seconds for _, seconds in same))
    return out


def outside(ops: Any, call: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of a call in which every op returns at once what it returned before."""
    results: list[Any] = []
    attention = F.scaled_dot_product_attention

    def keep(op: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kw: Any) -> Any:
            before = len(results)
            y = op(*args, **kw)
            results[before:] = [y]  # not what an op asks of others
            return y

        return kept

    def replace(by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        for name in FUSED + OTHERS:
            setattr(ops, name, by(getattr(type(ops), name).__get__(ops)))
        F.scaled_dot_product_attention = by(attention)

    try:
        replace(keep)
        call()
        found = []
        for _ in range(rounds):
            left = iter(results)
            replace(lambda _: lambda *args, **kw: next(left))  # noqa: B023  they are called before the next round
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    finally:
        F.scaled_dot_product_attention = attention
        for name in FUSED + OTHERS:
            delattr(ops, name)
    return 1e3 * statistics.median(found)


def yardstick() -> float:
    """Microseconds of F.layer_norm on 16 numbers, the least of many: how fast, and how quiet, this host is."""
    x, w = torch.zeros(2, 8), torch.ones(8)
    with torch.no_grad():
        return 1e6 * min(timeit.repeat(lambda: F.layer_norm(x, (8,), w, w), number=100, repeat=50)) / 100


def summary(us: list[float]) -> dict[str, Any]:
    ordered = sorted(us)
    return {
        "calls": len(us),
        "median_us": digits(statistics.median(us), 3),
        "p90_us": digits(ordered[len(us) * 9 // 10], 3),
        "sum_ms": digits(sum(us) / 1e3, 3),
    }


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """All of it, for one step."""
    with ExitStack() as stack:
        for context in (kernels("triton"), _dispatch.record("sm_90"), layouts_of_cuda(), torch.no_grad()):
            stack.enter_context(context)
        executor, call = prepare(work)
        gc.disable()
        try:
            us = watched(executor.ops, call, rounds)
            ms = outside(executor.ops, call, rounds)
            refresh = []
            for _ in range(rounds):
                start = time.perf_counter()
                executor.refresh()
                refresh.append(1e3 * (time.perf_counter() - start))
        finally:
            gc.enable()
    every = [value for values in us.values() for value in values]
    return {
        "workload": work.title,
        "rounds": rounds,
        "all": summary(every),
        "ops": {name: summary(values) for name, values in us.items()},
        "outside_ops_ms": digits(ms, 3),
        "one_F.layer_norm_us": digits(yardstick(), 3),
        "refresh_ms": digits(statistics.median(refresh), 3),
    }


def report(found: dict[str, Any]) -> str:
    rows = [(found["workload"], "calls", "median us", "p90 us", "sum ms")]
    rows += [(name, *of.values()) for name, of in {**found["ops"], "all": found["all"]}.items()]
    reached = "reached" if found["all"]["median_us"] <= GOAL else "missed"
    return "\n".join([
        table(rows),
        f"outside of ops {found['outside_ops_ms']} ms, of which refresh {found['refresh_ms']} ms",
        f"one F.layer_norm of 16 numbers on this host: {found['one_F.layer_norm_us']} us",
        f"goal: a median of at most {GOAL} us: {reached}",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["modelscope"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--save", type=Path, nargs="?", const=RESULTS / "host_cost.json", help="a JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(WORKLOADS[name], args.rounds) for name in args.workload]
    for each in found:
        print(report(each))
    if args.save:
        results = Results(args.save, torch.device("cpu"), fresh=True)
        results.data["machine"].pop("dry_run", None)  # what a host costs is measured on a host
        results.data["machine"]["load"] = digits(os.getloadavg()[0], 3)
        results.data["steps"] = found
        results.save()


if __name__ == "__main__":
    main()
