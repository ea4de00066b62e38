"""Can the trainer learn one clip by heart? The loss at fixed timesteps and noise, before and after.

    python benchmarks/training_overfit.py [--out FILE]

The clip has 16 frames of a red circle that moves diagonally, which the embedded model `shapes` does not know. A LoRA of
rank 8 has 200 steps, all weights have 300, and a LoRA with a learning rate of zero has 20. Each run is `minit2v train`
with the options that are in the result. It takes about eight minutes on one core. The exit code is 1 if a goal is
missed.
"""

import argparse
import csv
import json
import platform
import sys
import tempfile
from datetime import date
from pathlib import Path

import torch

from minit2v import __version__
from minit2v.cli import main as minit2v
from minit2v.training.draw import draw
from minit2v_convert.stream import replacing

RESULT = Path(__file__).parent / "results" / "training_overfit.json"
EVERYWHERE = "--model shapes --batch 2 --schedule linear --warmup 10 --text-dropout 0 --seed 0"
LORA = "--train lora --targets conv --rank 8 --learning-rate 5e-3 --steps 200 --validate-every 100"
FULL = "--train full --learning-rate 1e-3 --steps 300 --validate-every 150"
STILL = "--train lora --targets conv --rank 8 --learning-rate 0 --steps 20 --validate-every 20"
RUNS = {  # name -> options, and what the loss may be at the end, as a share of the loss at the start
    "LoRA of rank 8": (LORA, (0, 0.5)),
    "all weights": (FULL, (0, 0.25)),
    "LoRA, learning rate zero": (STILL, (1, 1)),
}


def losses(folder: Path) -> dict[int, float]:
    """Step -> validation loss."""
    with (folder / "validation.csv").open(newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    results, missed = {}, []
    with tempfile.TemporaryDirectory() as folder:
        clips = Path(folder) / "clips"
        draw(clips, "diagonally", 1)
        clip = clips / "red-circle-diagonally-0.gif"
        for number, (name, (options, (low, high))) in enumerate(RUNS.items()):
            out = Path(folder) / f"run-{number}"
            if minit2v(["train", "--data", str(clip), "--out", str(out), *EVERYWHERE.split(), *options.split()]):
                raise SystemExit(f"the training of {name} failed")
            found = losses(out)
            share = found[max(found)] / found[0]
            results[name] = {"options": f"{EVERYWHERE} {options}", "loss": found, "share_left": share}
            if not low <= share <= high:
                missed.append(name)
            print(f"{name}: {found}, {share:.3f} of the start is left", flush=True)
    about = {
        "command": "python benchmarks/training_overfit.py",
        "caption": "a red circle that moves diagonally",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps({**about, "runs": results}, indent=1) + "\n")
    if missed:
        print(f"missed: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
