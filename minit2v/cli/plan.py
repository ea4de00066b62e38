"""`minit2v plan`: how much memory a video takes, with and without each technique, and the fastest way that fits."""

import argparse

import torch

from ..memory.plan import gib, parse_memory
from ..pipelines.planning import planner_of_model
from .messages import say, tell


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 where nothing fits."""
    memory = parse_memory(args.memory) if "memory" in args else None
    dtype = getattr(args, "dtype", "float16" if args.device == "cuda" else "float32")
    size = {"frames": getattr(args, "num_frames", None), "height": getattr(args, "height", None),
            "width": getattr(args, "width", None)}  # fmt: skip
    planner = planner_of_model(args.model, dtype=getattr(torch, dtype), device=args.device, **size)
    say(f"{args.model}, {planner.video}, guidance, {dtype}: counted, not run; what an allocator and CUDA add is not in")
    weights = ", ".join(f"{name.replace('_', ' ')} {gib(n)}" for name, n in planner.weights.items())
    tell(f"weights: {weights}; together {gib(sum(planner.weights.values()))}")
    rows = planner.rows()
    parts = [*rows[0][1]]
    tell("".join([f"{'peak in GiB':22}", *(f"{part:>14}" for part in (*parts, "whole"))]))
    for name, peaks in rows:
        tell(f"{name:22}" + "".join(f"{n / 2**30:>14.2f}" for n in (*peaks.values(), max(peaks.values()))))
    if memory is None:
        tell(f"the least: {planner.least()}")
        return 0
    if (plan := planner.choose(memory)) is None:
        tell(f"nothing fits into {gib(memory)}; the least: {planner.least()}")
        return 1
    tell(f"the fastest that fits into {gib(memory)}: {gib(plan.peak)} with {plan.techniques}")
    tell(*plan.calls)
    return 0
