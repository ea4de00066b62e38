"""`minit2v plan`: how much memory a video takes, with and without each technique, and the fastest plan that fits.

With `--train` it plans a training run.
"""

import argparse

import torch

from ..memory.plan import gib, parse_memory
from ..memory.training import KINDS, binary
from ..pipelines.planning import planner_of_model
from ..training.planning import training_planner_of_model
from .messages import say, tell

TRAINING = ("targets", "rank", "batch", "ema", "accumulate", "processes")  # options that go with --train


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if nothing fits."""
    only = [name for name in TRAINING if name in args]
    if "train" in args:
        return plan_training(args)
    if only:
        args.usage_error(f"--{only[0]} needs --train")
    memory = parse_memory(args.memory) if "memory" in args else None
    dtype = getattr(args, "dtype", "float16" if args.device == "cuda" else "float32")
    size = {"frames": getattr(args, "num_frames", None), "height": getattr(args, "height", None),
            "width": getattr(args, "width", None), "adapter": getattr(args, "adapter", None)}  # fmt: skip
    planner = planner_of_model(args.model, dtype=getattr(torch, dtype), device=args.device, **size)
    say(f"{args.model}, {planner.video}, guidance, {dtype}: counted without running it; the allocator and CUDA need "
        "some more")
    weights = ", ".join(f"{name.replace('_', ' ')} {gib(n)}" for name, n in planner.weights.items())
    tell(f"weights: {weights}; together {gib(sum(planner.weights.values()))}")
    rows = planner.rows()
    parts = [*rows[0][1]]
    tell("".join([f"{'peak in GiB':22}", *(f"{part:>14}" for part in (*parts, "whole"))]))
    for name, peaks in rows:
        tell(f"{name:22}" + "".join(f"{n / 2**30:>14.2f}" for n in (*peaks.values(), max(peaks.values()))))
    if memory is None:
        tell(f"the smallest plan: {planner.least()}")
        return 0
    if (plan := planner.choose(memory)) is None:
        tell(f"nothing fits into {gib(memory)}; the smallest plan: {planner.least()}")
        return 1
    tell(f"the fastest plan that fits into {gib(memory)}: {gib(plan.peak)} with {plan.techniques}")
    tell(*plan.calls)
    return 0


def plan_training(args: argparse.Namespace) -> int:
    """Print a row for each method: the memory at the peak of a step, by kind."""
    if "dtype" in args:
        args.usage_error("--dtype cannot be used with --train, which shows every precision in a row of its own")
    memory = parse_memory(args.memory) if "memory" in args else None
    names = ("adapter", "num_frames", "height", "width", "targets", "rank", "batch", "ema", "processes")
    given = {{"num_frames": "frames"}.get(name, name): getattr(args, name) for name in names if name in args}
    planner = training_planner_of_model(args.model, args.train, device=args.device, **given)
    trained, frozen = (sum(p.numel() for p in ps) / 1e6 for ps in (planner.trained, planner.frozen()))
    say(f"{args.model}, {planner.clips} in a step, {trained:.2f} M parameters trained, {frozen:.2f} M frozen: counted "
        "without running it; the allocator and CUDA need some more; the text encoder and the VAE are not included, "
        "because their results are cached")
    pieces = getattr(args, "accumulate", 1)
    if planner.clips.clips % pieces:
        raise ValueError(f"--accumulate {pieces} must divide the {planner.clips.clips} clips of a process")
    rows = planner.rows(pieces)
    kinds = [kind for kind in KINDS if any(kind in row.kinds for row in rows)]
    unit, name = (2**30, "GiB") if rows[0].peak >= 2**30 else (2**20, "MiB")
    tell("".join([f"{name + ' at the peak':38}", *(f"{kind:>17}" for kind in (*kinds, "whole"))]))
    for row in rows:
        sizes = (*(row.kinds.get(kind, 0) for kind in kinds), row.peak)
        tell(f"{row.method!s:38}" + "".join(f"{n / unit:>17.2f}" for n in sizes))
    if memory is None:
        tell(f"the smallest plan: {planner.least()}")
        return 0
    if (plan := planner.choose(memory)) is None:
        tell(f"nothing fits into {binary(memory)}; the smallest plan: {planner.least()}")
        return 1
    tell(f"the fastest plan that fits into {binary(memory)}: {plan}")
    return 0
