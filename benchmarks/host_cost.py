"""What a step of the fast path costs its host, op by op: Python and PyTorch's bookkeeping, before a GPU does anything.

    PYTHONPATH=.:kernels:convert python benchmarks/host_cost.py [--workload modelscope] [--rounds 15] [--save FILE]

A step of the full-size UNet runs on `meta`, in float16, with all ops as kernels, whose launches are recorded and not
run. Each fused op is timed from the executor's call to its return, in every round; a call's time is the least of its
rounds, which is that of a quiet core (all_rounds_median_us is of all of them). Counted: reading the module's fields,
choosing the tile, making the result and the scratch memory (tensors without numbers: CUDA's allocator would add about a
microsecond to each), and describing the launch. Not counted: Triton's launch of the kernels (with CUDA graphs there is
none); products, convolutions and attention in space, which are PyTorch's: their results are those of a step before, as
on `meta` they are programs in Python, which no GPU would run.

outside_ops is a step in which all ops, ours too, return at once: the executor alone, its views and sums. refresh looks
whether anybody has changed the network, once per step.
"""

import argparse
import gc
import os
import statistics
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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

FUSED = ("group_norm", "layer_norm", "add_layer_norm", "frame_attention", "geglu", "temporal_conv", "linear_add")
OTHERS = ("linear", "queries_keys_values", "conv", "double_and_conv")
GOAL = 15  # microseconds, the median of all fused ops
BEFORE = (
    "At 2bd7dc3, where an op chose and checked at every call: a median of 62 us in a loop of nothing else, on the same "
    "host (of the 420 calls of a ModelScope step, from the public op's call to its return, without torch.library)."
)


class Forgotten(list):
    """For recorded launches: a list would keep their tensors alive, and every new one would be made in new memory."""

    def append(self, launch: Any) -> None:
        pass


def prepare(work: Workload) -> tuple[Any, Callable[[], Any]]:
    """(the executor of a UNet on `meta`, a call of one step). Only while launches are recorded."""
    unet_class = UNet3DConditionModel if isinstance(work.config, UNet3DConfig) else UNetMotionModel
    with torch.device("meta"):
        unet = unet_class(work.config).half().eval()
    for m in unet.modules():  # as `optimize` lays them out on CUDA
        if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d):
            layout = torch.channels_last if m.weight.ndim == 4 else torch.channels_last_3d
            m.weight.data = m.weight.data.contiguous(memory_format=layout)
    x = torch.empty(work.batch, 4, work.frames, *work.latents, dtype=torch.half, device="meta")
    t = torch.ones(1, device="meta")
    text = torch.empty(work.batch, TEXT, work.config.cross_attention_dim, dtype=torch.half, device="meta")
    runner = fast.optimize(unet)  # which keeps the network
    return runner.executor, lambda: runner(x, t, text)


@contextmanager
def handed_out(ops: Any, names: tuple[str, ...], call: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """A step like `call`, in which these ops and PyTorch's attention return at once what they returned in a first."""
    results: list[Any] = []
    left = iter(results)
    attention = F.scaled_dot_product_attention

    def keep(op: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*args: Any, **kw: Any) -> Any:
            before = len(results)
            y = op(*args, **kw)
            results[before:] = [y]  # not what an op asks of others
            return y

        return kept

    def replace(by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        for name in names:
            setattr(ops, name, by(getattr(type(ops), name).__get__(ops)))
        F.scaled_dot_product_attention = by(attention)

    def again() -> None:
        nonlocal left
        left = iter(results)
        call()

    try:
        replace(keep)
        call()
        replace(lambda _: lambda *args, **kw: next(left))
        yield again
    finally:
        F.scaled_dot_product_attention = attention
        for name in names:
            delattr(ops, name)


def watched(ops: Any, call: Callable[[], Any], rounds: int) -> dict[str, list[list[float]]]:
    """Of each op's calls in a step the microseconds, round by round."""
    spent: list[tuple[str, float]] = []
    clock = time.perf_counter

    def watch(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kw: Any) -> Any:
            start = clock()
            y = op(*args, **kw)
            spent.append((name, clock() - start))
            return y

        return timed

    call()  # plans are made at the first call
    with handed_out(ops, OTHERS, call) as again:
        for name in FUSED:
            setattr(ops, name, watch(name, getattr(ops, name)))
        found = []
        for _ in range(rounds):
            spent.clear()
            again()
            found.append(list(spent))
        for name in FUSED:
            delattr(ops, name)
    out: dict[str, list[list[float]]] = {}
    for same in zip(*found, strict=True):
        assert len({name for name, _ in same}) == 1
        out.setdefault(same[0][0], []).append([1e6 * seconds for _, seconds in same])
    return out


def outside(ops: Any, call: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of a step in which every op returns at once."""
    with handed_out(ops, FUSED + OTHERS, call) as again:
        return least(again, rounds)


def least(call: Callable[[], Any], rounds: int) -> float:
    """Milliseconds of the fastest of so many calls."""
    return 1e3 * min(timeit.repeat(call, number=1, repeat=rounds))


def yardstick() -> float:
    """Microseconds of F.layer_norm on 16 numbers, the least of many: how fast, and how quiet, this host is."""
    x, w = torch.zeros(2, 8), torch.ones(8)
    with torch.no_grad():
        return 1e6 * min(timeit.repeat(lambda: F.layer_norm(x, (8,), w, w), number=100, repeat=50)) / 100


def summary(calls: list[list[float]]) -> dict[str, Any]:
    us = [min(rounds) for rounds in calls]
    ordered = sorted(us)
    return {
        "calls": len(us),
        "median_us": digits(statistics.median(us), 3),
        "p90_us": digits(ordered[len(us) * 9 // 10], 3),
        "sum_ms": digits(sum(us) / 1e3, 3),
        "all_rounds_median_us": digits(statistics.median(value for rounds in calls for value in rounds), 3),
    }


def measure(work: Workload, rounds: int) -> dict[str, Any]:
    """All of it, for one step."""
    with ExitStack() as stack:
        for context in (kernels("triton"), _dispatch.record("sm_90", Forgotten()), layouts_of_cuda(), torch.no_grad()):
            stack.enter_context(context)
        executor, call = prepare(work)
        gc.disable()
        try:
            us = watched(executor.ops, call, rounds)
            ms = outside(executor.ops, call, rounds)
            refresh = least(executor.refresh, rounds)
        finally:
            gc.enable()
    every = [call for calls in us.values() for call in calls]
    return {
        "workload": work.title,
        "rounds": rounds,
        "all": summary(every),
        "ops": {name: summary(calls) for name, calls in us.items()},
        "outside_ops_ms": digits(ms, 3),
        "one_F.layer_norm_us": digits(yardstick(), 3),
        "refresh_ms": digits(refresh, 3),
    }


def report(found: dict[str, Any]) -> str:
    rows = [(found["workload"], "calls", "median us", "p90 us", "sum ms", "all rounds")]
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
        results.data["before"] = BEFORE
        results.data["steps"] = found
        results.save()


if __name__ == "__main__":
    main()
