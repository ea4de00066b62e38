"""Charts of what benchmarks/gpu.py measured: `python benchmarks/charts.py FOLDER`, by default all under results/gpu.

kernels.png    of each op's largest shapes: what share of its floor's speed each contender reaches
roofline.png   TFLOP/s over FLOP per byte, under the ceilings measured in the same run
steps.png      a step and a decode of each workload: milliseconds and peak memory
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INK, SOFT, GRID = "#1f2933", "#5a6672", "#dde3e8"
COLOURS = {
    "kernel": "#e07b27", "torch": "#9cc3e6", "eager": "#3b78b5", "compiled": "#3c8f5c", "permuted": "#8c6bb1",
    "ours, optimized": "#e07b27", "ours, kernels": "#f0a868", "ours, optimized, torch": "#f6c08d", "ours": "#fbe3cc",
    "ours, optimized, compiled": "#b35c12", "ours, frame by frame": "#c9d0d8",
    "diffusers": "#3b78b5", "diffusers, compiled": "#3c8f5c",
}  # fmt: skip
SHOWN = 2  # shapes of each op and workload


def figure(width: float, height: float, title: str, about: str) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    page = Figure(figsize=(width, height), dpi=110, facecolor="white")
    page.text(0.012, 1 - 0.12 / height, title, fontsize=14, color=INK, va="top", weight="bold")
    page.text(0.012, 1 - 0.42 / height, about, fontsize=9, color=SOFT, va="top")
    return page


def about(data: dict[str, Any]) -> str:
    """What the numbers are of, in one line: first of all, that they are none."""
    machine = data["machine"]
    if "dry_run" in machine:
        return f"DRY RUN ON A CPU, NOT A MEASUREMENT OF A GPU · {machine['date'][:10]}"
    versions = " · ".join(f"{name} {machine[name]}" for name in ("torch", "triton", "diffusers") if machine.get(name))
    return f"{machine['device']} · {data.get('dtype', '')} · {versions} · {machine['date'][:10]}"


def clean(axes: Any, grid: str = "x") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(True, axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def timed(entry: dict[str, Any]) -> dict[str, dict]:
    return {name: found for name, found in entry.get("contenders", {}).items() if "ms" in found}


def short(name: str) -> str:
    """op(a=1, b=2) -> a=1 b=2."""
    return name.partition("(")[2].rstrip(")").replace(",", "")


def largest(entries: dict[str, dict], op: str) -> list[tuple[str, dict]]:
    """Of each workload the few shapes that move most, largest first."""
    found: list[tuple[str, dict]] = []
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].get("bytes", 0)):
        same = [other for _, other in found if other["workload"] == entry.get("workload")]
        if entry.get("op") == op and entry["calls"] and timed(entry) and len(same) < SHOWN:
            found.append((name, entry))
    return found


def draw_op(data: dict[str, Any], op: str, path: Path) -> Path | None:
    found = largest(data.get("kernels", {}), op)
    if not found:
        return None
    lines = sum(len(timed(entry)) + 1.2 for _, entry in found)
    height = 0.16 * lines + 1.4
    page = figure(10, height, f"{op} beside PyTorch", about(data))
    axes = page.add_axes((0.33, 0.55 / height, 0.64, 1 - 1.4 / height))
    y, ticks = 0.0, []
    for name, entry in found:
        first = y
        for contender, value in timed(entry).items():
            colour, wrong = COLOURS.get(contender, "#bcaad0"), not value.get("right", True)
            axes.barh(y, value["of_floor"], 0.85, color="none" if wrong else colour, edgecolor=colour,
                      hatch="////" if wrong else None)  # fmt: skip
            label = f" {contender}  {1e3 * value['ms']:.4g} µs{'  WRONG' if wrong else ''}"
            axes.text(value["of_floor"], y, label, fontsize=7, va="center", color=INK)
            y += 1
        ticks.append(((first + y - 1) / 2, f"{entry['workload']}\n{short(name)}"))
        y += 1.2
    axes.set_yticks([place for place, _ in ticks], [label for _, label in ticks])
    axes.set_ylim(y - 1, -0.8)
    axes.set_xlim(0, 1.3 * max(1.0, *(value["of_floor"] for _, entry in found for value in timed(entry).values())))
    axes.axvline(1, color=SOFT, linewidth=1)
    axes.set_xlabel("share of the floor's speed: bytes at the copy's rate, or operations at the product's, as measured",
                    color=INK, fontsize=8)  # fmt: skip
    clean(axes)
    axes.tick_params(axis="y", labelsize=7)
    page.savefig(path)
    return path


def draw_roofline(data: dict[str, Any], path: Path) -> Path | None:
    entries = [(name, e) for name, e in data.get("kernels", {}).items() if e.get("flops") and timed(e)]
    if not entries:
        return None
    ceilings = data["ceilings"]
    copy = ceilings["copy_gb_s"] / 1e3  # TB/s
    products = {name.removesuffix("_tflop_s"): v for name, v in ceilings.items() if name.endswith("_tflop_s")}
    page = figure(10, 6.4, "Under the roof: what bounds each op, and how near it comes", about(data))
    axes = page.add_axes((0.08, 0.1, 0.89, 0.75))
    points = []
    markers = {"temporal_attention": "o", "geglu": "s", "temporal_conv": "^", "linear_add": "P",
               "scaled_dot_product_attention": "D"}  # fmt: skip
    labelled = set()
    for _, entry in entries:
        x = entry["flops"] / entry["bytes"]
        for contender, found in timed(entry).items():
            if not found.get("right", True) or contender.startswith("sdpa ") or contender in ("torch", "compiled"):
                continue
            y = entry["flops"] / found["ms"] / 1e9
            label = f"{entry['op']}: {contender}"
            axes.scatter(x, y, s=26, marker=markers.get(entry["op"], "o"), color=COLOURS.get(contender, "#bcaad0"),
                         alpha=0.8, linewidths=0, label=None if label in labelled else label)  # fmt: skip
            labelled.add(label)
            points.append((x, y))
    left = min(x for x, _ in points) / 2
    right = max(max(x for x, _ in points), max(products.values()) / copy) * 2
    for name, top in products.items():
        ridge = top / copy
        axes.plot([left, ridge, right], [left * copy, top, top], color=INK, linewidth=1.5)
        axes.text(right, top * 1.03, f"{name} {top:.4g} TFLOP/s", fontsize=8, ha="right", va="bottom", color=INK)
    axes.text(left * 1.15, left * copy * 0.8, f"copy {1e3 * copy:.4g} GB/s", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOP per byte that must move", color=INK, fontsize=9)
    axes.set_ylabel("TFLOP/s", color=INK, fontsize=9)
    axes.legend(fontsize=7, loc="lower right", frameon=False)
    clean(axes, "both")
    page.savefig(path)
    return path


def draw_steps(steps: dict[str, dict], path: Path) -> Path | None:
    panels = [(step, part) for step in steps.values() for part in ("unet", "vae") if timed(step.get(part, {}))]
    if not panels:
        return None
    rows = [len(timed(step[part])) for step, part in panels]
    lines = [max(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    height = 0.24 * sum(lines) + 0.85 * len(lines) + 0.9
    first = panels[0][0]
    what = "medians, in turns; beside them the peak of memory with this contender's weights"
    page = figure(12, height, "One denoising step and one decode", f"{about(first)} · {what}")
    between = 0.95 * len(lines) / (0.24 * sum(lines))
    grid = page.add_gridspec(len(lines), 2, height_ratios=lines, left=0.15, right=0.98, top=1 - 1.05 / height,
                             bottom=0.4 / height, hspace=between, wspace=0.42)  # fmt: skip
    for cell, (step, part) in zip(grid, panels, strict=False):
        axes, found = page.add_subplot(cell), timed(step[part])
        widest = max(value["ms"] for value in found.values())
        for y, (name, value) in enumerate(found.items()):
            wrong = not value.get("right", True)
            axes.barh(y, value["ms"], 0.78, color="none" if wrong else COLOURS.get(name, SOFT),
                      edgecolor=COLOURS.get(name, SOFT), hatch="////" if wrong else None)  # fmt: skip
            reach = min(max(value["high"], value["ms"]), 1.1 * widest)
            axes.plot([value["low"], reach], [y, y], color=INK, linewidth=0.8)
            gib = f" · {value['peak_gib']:.3g} GiB" if "peak_gib" in value else ""
            axes.text(reach, y, f"  {value['ms']:.4g} ms{gib}{' · WRONG' if wrong else ''}", fontsize=7.5,
                      va="center", color=INK)  # fmt: skip
        axes.set_yticks(range(len(found)), list(found))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.5 * widest)
        axes.set_title(
            f"{step['workload']}: {'one step' if part == 'unet' else 'decode'}", loc="left", fontsize=10, color=INK
        )
        clean(axes)
    page.savefig(path)
    return path


def draw_all(folder: Path) -> list[Path]:
    """The charts that the folder's files have numbers for."""
    kernels = folder / "kernels.json"
    data = json.loads(kernels.read_text()) if kernels.exists() else {}
    steps = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("step-*.json"))}
    ops = dict.fromkeys(entry["op"] for entry in data.get("kernels", {}).values() if "op" in entry)
    drawn = [
        *(draw_op(data, op, folder / f"{op}.png") for op in ops),
        draw_roofline(data, folder / "roofline.png"),
        draw_steps(steps, folder / "steps.png"),
    ]
    return [path for path in drawn if path]


def main() -> None:
    folders = [Path(word) for word in sys.argv[1:]] or sorted((HERE / "results" / "gpu").glob("*/"))
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SystemExit("matplotlib is not installed: the JSON files are complete, draw them elsewhere") from None
    for folder in folders:
        print(", ".join(map(str, draw_all(folder))) or f"{folder}: nothing to draw")


if __name__ == "__main__":
    main()
