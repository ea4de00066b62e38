"""What prior preservation keeps, and what it costs: `python docs/figures/draw_training.py`.

It shows two runs of the study (benchmarks/results/training_study.json), and two committed recipes before and after
training (training_accuracy.json). The study read motions by a script of its own, and had 18 and 24 videos.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent.parent / "benchmarks" / "results"
COLOURS = ("#e07b27", "#3b78b5")


def draw_training(path: Path = HERE / "forgetting.png") -> Path:
    study = json.loads((RESULTS / "training_study.json").read_text())
    results = json.loads((RESULTS / "training_accuracy.json").read_text())
    page = Figure(figsize=(9, 3.6), dpi=110, facecolor="white")
    for axes, kind, title in zip(page.subplots(1, 2, sharey=True), ("new", "old"), ("new motion", "old prompts"),
                                 strict=True):  # fmt: skip
        right, count = study["before"][kind]
        for run, colour in zip(study["runs"], COLOURS, strict=True):
            axes.plot([0, *run["minutes"]], [100 * n / count for n in (right, *run[kind])], "o-", color=colour, ms=4,
                      label=f"study, its own reader: {run['name']}")  # fmt: skip
        key = "diagonally" if kind == "new" else "all"
        for name, mark in (("diagonally", "D-"), ("diagonally-animate", "s-")):
            run = results[name]
            right = [100 * run[when][kind][key] for when in ("before", "after")]
            axes.plot([0, run["minutes_of_training"]], right, mark, color="#3c8f5c", ms=5,
                      label=f"recipe {name}: half of each batch old clips")  # fmt: skip
        axes.set(title=f"{title}: % of videos right", xlabel="minutes of training on one core", ylim=(0, 103))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#dde3e8", linewidth=0.8)
    axes.legend(loc="lower right", fontsize=7)
    page.tight_layout()
    page.savefig(path)
    return path


if __name__ == "__main__":
    print(draw_training())
