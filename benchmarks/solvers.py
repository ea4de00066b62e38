"""Every solver on data whose score is known: error against calls of the network, and the figures of docs/samplers.md.

python benchmarks/solvers.py                 measure, write results/solvers.json, draw docs/figures/solvers.png
python benchmarks/solvers.py --shapes        the embedded models: right videos against calls of the network
python benchmarks/solvers.py --draw          draw what was measured, and print the table of docs/samplers.md

The data is a mixture of Gaussians in the shape of latents. What a perfect network says of it is known in closed form,
at every noise level, so that all that a solver gets wrong is its own.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import minit2v
from minit2v.schedulers.base import Scheduler
from minit2v.schedulers.names import scheduler_of

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "solvers.json"
SHAPES = HERE / "results" / "solvers_shapes.json"
FIGURES = HERE.parent / "docs" / "figures"
COUNTS = (5, 7, 10, 14, 20, 28, 40, 56, 80, 113, 160, 200)
# Stable Diffusion's and ModelScope's schedule, whose solvers on the table end in the noise of timestep 0.
MODEL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False,
         "skip_prk_steps": True, "set_alpha_to_one": False}  # fmt: skip
DETERMINISTIC = ("ddim", "plms", "euler", "lms", "heun", "dpm2", "dpm++-2s", "dpm++-2m", "dpm++-3m", "unipc", "deis")
STOCHASTIC = ("ddpm", "euler-a", "dpm2-a", "dpm++-sde", "dpm++-2m-sde", "dpm++-3m-sde", "sa", "lcm", "tcd")


class Mixture:
    """Gaussians of one width about a few means, with equal weights: x_0 (b, *shape)."""

    def __init__(self, shape: Sequence[int] = (4, 2, 2, 2), modes: int = 3, width: float = 0.5, spread: float = 0.5,
                 seed: int = 0):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.shape, self.width = tuple(shape), width
        self.means = spread * torch.randn(modes, math.prod(shape), generator=g, dtype=torch.float64)

    def x0(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x] for x = alpha x_0 + sigma eps."""
        flat, spread = x.flatten(1), (alpha * self.width) ** 2 + sigma**2
        away = flat[:, None] - alpha * self.means  # (b, modes, d)
        belongs = torch.softmax(-(away**2).sum(2) / (2 * spread), 1)
        each = self.means + alpha * self.width**2 / spread * away
        return torch.einsum("bk,bkd->bd", belongs, each).reshape(x.shape)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """(n, *shape) of the data."""
        which = torch.randint(len(self.means), (n,), generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return (self.means[which] + self.width * noise).reshape(n, *self.shape)

    def flow(self, x: Tensor, start: float, end: float, steps: int = 2000) -> Tensor:
        """x = x_0 + sigma eps at sigma = start, carried along the probability-flow ODE to `end`.

        Runge and Kutta's method of order 4 in log sigma: dx / dlog(sigma) = x - E[x_0 | x], to about 1e-12.
        """

        def slope(x: Tensor, log: float) -> Tensor:
            alpha = 1 / math.hypot(1, math.exp(log))
            return x - self.x0(alpha * x, alpha, alpha * math.exp(log))

        log, h = math.log(start), math.log(end / start) / steps
        for _ in range(steps):
            a = slope(x, log)
            b = slope(x + h / 2 * a, log + h / 2)
            c = slope(x + h / 2 * b, log + h / 2)
            x = x + h / 6 * (a + 2 * b + 2 * c + slope(x + h * c, log + h))
            log += h
        return x


def level(scheduler: Scheduler, i: int) -> tuple[float, float]:
    """(alpha, sigma) of what the network sees at place i of the grid; at -1, where the last step ends."""
    if hasattr(scheduler, "sigmas"):
        ratio = scheduler.sigmas[i].item()
        return 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)
    if i < 0:
        bar = scheduler.final_alpha_cumprod.item()
    else:
        bar = scheduler.alphas_cumprod[int(scheduler.timesteps[i])].item()
    return math.sqrt(bar), math.sqrt(1 - bar)


def run(scheduler: Scheduler, x0_of: Callable[..., Tensor], x: Tensor, dtype: torch.dtype = torch.float64,
        start: int = 0, **step: Any) -> Tensor:  # fmt: skip
    """From x = x_0 + sigma eps (b ...) at the first level down the grid that is set; of that kind is what comes out.

    x0_of(x, alpha, sigma) says E[x_0 | x]; it is told to the solver as its prediction_type wants it.
    """
    scheduler.set_begin_index(start) if hasattr(scheduler, "set_begin_index") else None
    exploding = hasattr(scheduler, "_begin")
    x = (x if exploding else x * level(scheduler, start)[0]).to(dtype)
    for i, t in enumerate(scheduler.timesteps[start:], start):
        alpha, sigma = level(scheduler, i)
        seen = scheduler.scale_model_input(x, t)
        x0 = x0_of(seen.double(), alpha, sigma)
        eps = (seen - alpha * x0) / sigma
        kinds = {"epsilon": eps, "sample": x0, "v_prediction": alpha * eps - sigma * x0}
        x = scheduler.step(kinds[scheduler.config.prediction_type].to(dtype), t, x, **step)[0]
    last = level(scheduler, -1)[0]
    return x if exploding else x / last


def ready(name: str, n: int, **fields: Any) -> Scheduler:
    """A solver as it is used, whose grid makes about n calls of the network and ends clean."""
    scheduler = scheduler_of(name, MODEL | {"set_alpha_to_one": True})
    scheduler = type(scheduler).from_config(scheduler.config, **fields)
    scheduler.set_timesteps(steps_of(name, n, scheduler))
    return scheduler


def steps_of(name: str, n: int, scheduler: Scheduler) -> int:
    """The steps for which a solver makes about n calls of the network."""
    steps = round((n + 1) / 2) if scheduler.order == 2 else n - (name == "plms")  # PLMS asks once more
    return max(1, min(steps, scheduler.config.get("original_inference_steps", steps)))


class Measured:
    """What the solvers get wrong on a mixture."""

    def __init__(self, mixture: Mixture, videos: int = 16):
        self.mixture = mixture
        g = torch.Generator().manual_seed(1)
        self.noise = torch.randn(videos, *mixture.shape, generator=g, dtype=torch.float64)
        self._truths: dict[tuple[float, float], Tensor] = {}

    def truth(self, start: float, end: float) -> Tensor:
        """Where the exact flow from our noise at sigma = start has come at sigma = end."""
        if (start, end) not in self._truths:
            self._truths[start, end] = self.mixture.flow(start * self.noise, start, end)
        return self._truths[start, end]

    def error(self, scheduler: Scheduler, **step: Any) -> float:
        """Root of the mean square of what a deterministic solver misses."""
        ends = [sigma / alpha for alpha, sigma in (level(scheduler, 0), level(scheduler, -1))]
        if ends[1] == 0:  # a step to no noise at all is exact, but where the flow ends is not known to more than this
            ends[1] = 1e-4
        found = run(scheduler, self.mixture.x0, ends[0] * self.noise, **step)
        return (found - self.truth(*ends)).square().mean().sqrt().item()

    @cached_property
    def data(self) -> Tensor:
        return self.mixture.sample(100_000, torch.Generator().manual_seed(2))

    def distance(self, scheduler: Scheduler, seed: int = 3, **step: Any) -> float:
        """How far the samples of a stochastic solver are from the data: the quantiles along 64 directions (sliced
        Wasserstein distance), relative to the width of the data."""
        g = torch.Generator().manual_seed(seed)
        start = level(scheduler, 0)[1] / level(scheduler, 0)[0]
        noise = torch.randn(2000, *self.mixture.shape, generator=g, dtype=torch.float64)
        found = run(scheduler, self.mixture.x0, start * noise, generator=g, **step).flatten(1)
        directions = torch.randn(found.shape[1], 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        directions = directions / directions.norm(dim=0)
        at = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
        a, b = (torch.quantile(v @ directions, at, dim=0) for v in (found, self.data[:20_000].flatten(1)))
        return ((a - b).square().mean().sqrt() / (self.data.flatten(1) @ directions).std()).item()


def measure() -> dict[str, Any]:
    measured, curves = Measured(Mixture()), {"deterministic": {}, "stochastic": {}}
    for kind, names in (("deterministic", DETERMINISTIC), ("stochastic", STOCHASTIC)):
        for name in names:
            points = []
            for n in COUNTS:
                scheduler = ready(name, n)
                value = (measured.error if kind == "deterministic" else measured.distance)(scheduler)
                if not points or len(scheduler.timesteps) > points[-1][0]:
                    points.append((len(scheduler.timesteps), value))
            curves[kind][name] = points
            print(f"{name:14}" + "  ".join(f"{calls}: {value:.1e}" for calls, value in points), flush=True)
    return curves


def about() -> dict[str, Any]:
    versions = {"minit2v": minit2v.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"command": "python benchmarks/solvers.py " + " ".join(sys.argv[1:]), "date": date.today().isoformat(),
            "machine": platform.machine(), "versions": versions}  # fmt: skip


def write(path: Path, result: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)


# --------------------------------------------------------------------------------------------- the embedded models


def embedded_models() -> dict[str, Any]:
    """The pipelines of the package's own models, by name."""
    from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter

    assets = Path(minit2v.__file__).parent / "assets"
    adapter = MotionAdapter.from_pretrained(assets / "shapes-motion")
    pipes = {
        "shapes": DiffusionPipeline.from_pretrained(assets / "shapes"),
        "shapes-image": AnimateDiffPipeline.from_pretrained(assets / "shapes-image", motion_adapter=adapter),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


def shapes(counts: Sequence[int], videos: int) -> None:
    """Right videos of the embedded models, as training/world.py reads them, by model, solver and calls.

    The file is written after every point, and points that it has are not measured again.
    """
    from minit2v.cli.videos import PRESETS
    from minit2v.training import world

    order = torch.randperm(len(world.COMBINATIONS), generator=torch.Generator().manual_seed(0)).tolist()
    asked = [world.COMBINATIONS[i] for i in order[:videos]]
    result = about() | {"videos": videos, "right": {}}
    if SHAPES.exists() and (old := json.loads(SHAPES.read_text()))["videos"] == videos:
        result = old
    for model, pipe in embedded_models().items():
        config, rows = pipe.scheduler.config, result["right"].setdefault(model, {})
        for n, name in ((n, name) for n in counts for name in (*DETERMINISTIC, *STOCHASTIC)):
            pipe.scheduler = scheduler_of(name, config)
            steps = steps_of(name, n, pipe.scheduler)
            pipe.scheduler.set_timesteps(steps)
            calls, points = len(pipe.scheduler.timesteps), rows.get(name, [])
            if calls in (known for known, _ in points):
                continue
            began = time.monotonic()
            clips = pipe(
                [world.captions(*a)[0] for a in asked],
                num_frames=world.FRAMES,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in range(videos)],
                guidance_scale=PRESETS[model]["guidance_scale"],
                output_type="pt",
            ).frames  # (b f c h w)
            right = sum(world.analyse(clip.transpose(0, 1)) == a for clip, a in zip(clips, asked, strict=True))
            rows[name] = sorted([*points, (calls, right)], key=lambda point: point[0])
            write(SHAPES, result)
            seconds = time.monotonic() - began
            print(f"{model:13} {name:13} {calls:3} calls: {right}/{videos}  {seconds:.0f} s", flush=True)


# -------------------------------------------------------------------------------------------------------- the figures

INK, SOFT, GRID = "#1f2933", "#5a6672", "#dde3e8"
COLOURS = ("#3b78b5", "#e07b27", "#3c8f5c", "#b3423a", "#8c6bb1", "#8a6d3b", "#d873b0", "#5a6672", "#b8a31f", "#2aa1b3",
           "#1f2933")  # fmt: skip


def draw(curves: dict[str, Any], titles: dict[str, tuple], path: Path, footer: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    page = Figure(figsize=(11, 4.8), dpi=110, facecolor="white")
    for axes, (kind, lines) in zip(page.subplots(1, 2), curves.items(), strict=True):
        title, label = titles[kind]
        for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linewidth=1.6, marker="o", markersize=3, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ticks := [5, 10, 20, 50, 100, 200], [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("calls of the network", fontsize=9, color=INK)
        axes.set_ylabel(label, fontsize=9, color=INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.legend(fontsize=7.5, frameon=False, ncol=2)
    page.text(0.01, 0.01, footer, fontsize=7, color=SOFT)
    page.tight_layout(rect=(0, 0.02, 1, 1))
    page.savefig(path)


def table(curves: dict[str, Any]) -> str:
    """The curves at a few counts of calls, as docs/samplers.md shows them."""
    counts = (10, 20, 40, 80, 200)
    rows = ["| solver | " + " | ".join(f"{n} calls" for n in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for kind, form in (("deterministic", "{:.1e}"), ("stochastic", "{:.3f}")):
        for name, points in curves[kind].items():
            near = [min((abs(calls - n), value) for calls, value in points)[1] for n in counts]
            rows.append(f"| `{name}` | " + " | ".join(map(form.format, near)) + " |")
    return "\n".join(rows)


def draw_all() -> None:
    if RESULT.exists():
        result = json.loads(RESULT.read_text())
        footer = f"{result['command']} · {result['date']}"
        titles = {"deterministic": ("A mixture of Gaussians, exact score: the ODE", "error (root of the mean square)"),
                  "stochastic": ("The same, with noise in the steps", "distance of the distributions / width")}
        draw(result["curves"], titles, FIGURES / "solvers.png", footer)
        print(table(result["curves"]))
    if SHAPES.exists():
        result = json.loads(SHAPES.read_text())
        footer = f"{result['command']} · {result['date']}"
        draw_right(result["right"], result["videos"], FIGURES / "solvers_shapes.png", footer)


def draw_right(right: dict[str, dict[str, list]], videos: int, path: Path, footer: str) -> None:
    """A panel for each model: a row for each solver, and in its columns how many videos are right."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    names = [*DETERMINISTIC, *STOCHASTIC]
    page = Figure(figsize=(9, 7), dpi=110, facecolor="white")
    for axes, (model, rows) in zip(page.subplots(1, len(right)), right.items(), strict=True):
        columns = max(len(points) for points in rows.values())
        for y, name in enumerate(names):
            for x, (calls, n) in enumerate(rows[name]):
                axes.add_patch(Rectangle((x, y), 0.94, 0.9, color=COLOURS[0], alpha=0.08 + 0.82 * n / videos))
                dark = n > 0.6 * videos
                axes.text(x + 0.47, y + 0.45, f"{n}", fontsize=9, ha="center", va="center",
                          color="white" if dark else INK)  # fmt: skip
                axes.text(x + 0.91, y + 0.82, f"{calls}", fontsize=5.5, ha="right", va="bottom",
                          color="white" if dark else SOFT)  # fmt: skip
        axes.set(xlim=(0, columns), ylim=(len(names), 0), xticks=[], xlabel="calls of the network in small figures")
        axes.set_yticks([y + 0.45 for y in range(len(names))], names)
        axes.set_title(f"{model}: right videos of {videos}", loc="left", fontsize=11, color=INK)
        axes.tick_params(length=0, labelsize=8.5, colors=INK)
        axes.spines[:].set_visible(False)
    page.text(0.01, 0.01, footer, fontsize=7, color=SOFT)
    page.tight_layout(rect=(0, 0.02, 1, 1))
    page.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", action="store_true", help="measure the embedded models, not the mixture")
    parser.add_argument("--counts", type=int, nargs="+", default=[3, 5, 7, 10, 20], help="calls, of --shapes")
    parser.add_argument("--videos", type=int, default=8, help="for every solver and count, of --shapes")
    parser.add_argument("--draw", action="store_true", help="draw, and measure nothing")
    args = parser.parse_args()
    if args.shapes:
        shapes(args.counts, args.videos)
    elif not args.draw:
        write(RESULT, about() | {"counts": COUNTS, "curves": measure()})
    draw_all()


if __name__ == "__main__":
    main()
