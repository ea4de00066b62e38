"""What training takes: counted for the published models, and beside what the trainer's own steps take on this CPU.

    PYTHONPATH=.:kernels:convert python benchmarks/training_memory.py [--save FILE]

Counted: one clip in a step on `meta` by minit2v/memory/training.py, as on CUDA, without EMA; of a GPU of 8 where it is
sharded. The LoRAs have rank 16. Measured: live tensor bytes of the second step of `Trainer` with the embedded models.
The table is that of docs/training.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Results

from minit2v.memory.live import GIB
from minit2v.memory.plan import twin
from minit2v.memory.training import Clips, Method, TrainingPlanner
from minit2v.training.planning import trained_of, training_planner_of_model
from minit2v.training.recipe import LORAS

MODELS = {"UNet3D (1.41 B)": ("ms-1.7b", ("full", "temporal", "lora")),
          "AnimateDiff v2": ("sd-1.5", ("motion", "motion-lora"))}  # fmt: skip
SIZES = ((16, 256, 256), (24, 320, 576))
METHODS = {"bf16": Method(), "checkpointing": Method(checkpointing=True),
           "and 8-bit Adam": Method(checkpointing=True, eight_bits=True),
           "checkpointing, sharded over 8": Method(checkpointing=True, shard=True)}  # fmt: skip


def count(model: str, train: str, size: tuple[int, int, int]) -> dict[str, dict[str, int]]:
    """Bytes at the peak of a step, by method and kind."""
    frames, height, width = size
    alone, of_8 = (training_planner_of_model(model, train, (), 16, batch=n, ema=False, processes=n, frames=frames,
                                             height=height, width=width) for n in (1, 8))  # fmt: skip
    return {name: dict((of_8 if method.shard else alone).plan(method).kinds) for name, method in METHODS.items()}


def rows(results: dict[str, Any]) -> list[str]:
    """The table of docs/training.md."""
    found = ["| trained | frames, size | weights | gradients | Adam | activations without / with checkpointing | "
             + " | ".join(METHODS) + " |",
             "|---|---|---|---|---|---|" + "---|" * len(METHODS)]  # fmt: skip
    for title, methods in results.items():
        plain, least = methods["bf16"], methods["checkpointing"]
        weights = plain.get("frozen weights", 0) + plain["trained weights"]
        activations = [m["activations"] + m.get("copies", 0) for m in (plain, least)]
        cells = [weights, plain["trained weights"], plain["optimizer"]]
        whole = [sum(m.values()) for m in methods.values()]
        found.append("| " + " | ".join([
            *title.split(": "), *(f"{n / GIB:.2f}" for n in cells),
            " / ".join(f"{n / GIB:.2f}" for n in activations), *(f"{n / GIB:.1f}" for n in whole),
        ]) + " |")  # fmt: skip
    return found


def compare() -> list[dict[str, Any]]:
    """Of the embedded models, what a step is planned to take beside what it takes, in bytes."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from test_training_plan import CASES, TOKENS, load, measured

    found = []
    for name, train, method in CASES:
        pipe, clips = load(name), Clips(8, 64, 64, method.accumulate)
        unet = twin(pipe.unet)
        planner = TrainingPlanner(unet, trained_of(unet, train, (), 8), clips, tokens=TOKENS, device="cpu",
                                  factor=pipe.vae_scale_factor, ema=train not in LORAS)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            real = measured(pipe, train, method, clips, folder)
        found.append({"model": name, "train": train, "method": str(method), "planned": planner.plan(method).peak,
                      "measured": real})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, default=RESULTS / "training_memory.json", help="a JSON file to write")
    args = parser.parse_args()
    results = Results(args.save, torch.device("cpu"), fresh=True)
    results.data["machine"].pop("dry_run", None)
    counted = results.part("counted on meta, in bytes")
    for title, (model, kinds) in MODELS.items():
        for train in kinds:
            for size in SIZES:
                frames, height, width = size
                name = f"{title}, {train}{' rank 16' * (train in LORAS)}: {frames} of {width}x{height}"
                counted[name] = count(model, train, size)
                results.save()
                print(name, flush=True)
    print(*rows(counted), sep="\n")
    results.data["embedded models on this CPU"] = compare()
    results.save()
    for row in results.data["embedded models on this CPU"]:
        print(row["model"], row["train"], row["method"], f"{row['planned'] / row['measured']:.3f}")


if __name__ == "__main__":
    main()
