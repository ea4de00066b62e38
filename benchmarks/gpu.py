"""Everything that is to be measured on a GPU, in one command, in under nine minutes.

    PYTHONPATH=.:kernels:convert python benchmarks/gpu.py [--minutes 8.8] [--out FOLDER] [--fresh]
    ... --cpu        a dry run without a GPU: tiny networks, the kernels in Triton's interpreter

What the goals ask for comes first:
    1  in parallel, nothing timed: every network built, compiled, judged and weighed; kernels compiled into the caches
    2  a step and a decode of each workload, one after the other
    3  the kernels at the shapes that have goals
    4  the kernels at all other shapes, forward and backward, as far as time goes
    5  goals.json, summary.md, and charts where matplotlib is installed
Each part is a process of its own, so that one that is lost leaves the others; each adds to a JSON file of its own that
is whole at any moment. What did not fit is listed in `left_out`. The same command again measures only what is missing.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_shapes import TINY, WORKLOADS
from measure import REPO, Budget, command, default_folder, digits

HERE = Path(__file__).resolve().parent
# Of each workload: its share of the time for steps, and what its contenders hold when all are prepared, in GiB. In this
# order they are prepared, side by side, as far as memory goes; for the others the compiler's work is done ahead.
STEPS = {"modelscope": (1, 22), "zeroscope": (1, 28), "animatediff": (1, 26), "modelscope-64": (1, 28),
         "zeroscope-xl": (2, 70)}  # fmt: skip
WARM, FREE = 25, 0.85  # GiB while compiling alone; the share of the device's memory that may be used
# Goals: at least, stretch. Norms and attention: share of the copy's bandwidth, times faster than PyTorch.
NORM, ATTENTION = {"of_copy": (0.8, 0.9), "faster": (8.0, None)}, {"of_copy": (0.8, 0.88), "faster": (3.0, None)}
EAGER = {
    "modelscope": (1.7, 2.0), "zeroscope": (1.7, 1.9), "zeroscope-xl": (1.6, 1.8), "animatediff": (1.5, 1.7),
}  # fmt: skip
COMPILED = (1.15, 1.3)
MEMORY = {"modelscope-64": (4.2, 2.0), "zeroscope-xl": (7.2, 3.0)}  # GiB at most; the second with streamed weights


class Part:
    """A process of its own, and its log."""

    def __init__(self, name: str, words: list[str], log: Path):
        self.name, self.log = name, log
        path = os.pathsep.join([str(REPO / folder) for folder in ("", "kernels", "convert")])
        path = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        env = {**os.environ, "PYTHONPATH": path, "BENCHMARK_COMMAND": command(), "PYTHONUNBUFFERED": "1"}
        env.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / words[0]), *words[1:]],
                cwd=REPO, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, seconds: float) -> int | None:
        """The exit status; None if it was stopped because it took longer."""
        try:
            return self.process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            self.stop()
            return None

    def stop(self) -> None:
        """It and what it started: the compiler's workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Run:
    """The whole run: its time, its folder, what went wrong."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device("cpu" if options.cpu else "cuda")
        self.folder = options.out or default_folder(self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.logs = Path(tempfile.mkdtemp(prefix="minit2v-benchmark-"))
        self.total = 60 * options.minutes
        self.budget = Budget(self.total)
        self.common = ["--cpu"] if options.cpu else []
        self.fresh = ["--fresh"] if options.fresh else []
        self.quick = ["--seconds", "0.002", "--least", "1"] if options.cpu else []
        self.notes: list[str] = []
        self.parts: list[Part] = []
        self.workloads = options.workloads or (list(TINY) if options.cpu else list(STEPS))

    def say(self, text: str) -> None:
        print(f"[{self.total - self.budget.left:5.0f} s] {text}", flush=True)

    def part(self, name: str, *words: str) -> Part:
        self.parts.append(Part(name, [*words, *self.common], self.logs / f"{name}.log"))
        return self.parts[-1]

    def prepare(self) -> dict[str, Part]:
        """All networks at once, as far as memory goes, and the kernels' code; ends with nothing running."""
        until = Budget(0.4 * self.total)
        room = FREE * torch.cuda.get_device_properties(0).total_memory / 2**30 if self.device.type == "cuda" else 1e9
        beside, lanes = side_by_side(self.workloads, room)
        waiting = {name: self.start_step(name, until.left) for name in beside}
        for i, names in enumerate(lanes if self.options.compile != "none" else ()):
            seconds = str(until.left / len(names))  # for each, one after the other
            words = ("step.py", "--workloads", *names, "--warm", "--prepare", seconds)
            waiting[f"warm-steps-{i}"] = self.part(f"warm-steps-{i}", *words)
        count = max(1, min(6, (os.cpu_count() or 1) // 3))
        if not self.options.cpu:
            for i in range(count):
                seconds = str(until.left)
                mode = self.options.compile
                words = ("kernels.py", "--warm", f"{i}/{count}", "--budget", seconds, "--compile", mode)
                waiting[f"warm-{i}"] = self.part(f"warm-{i}", *words)
        self.say(f"preparing: {', '.join(waiting)}")
        steps = {name: part for name, part in waiting.items() if name in self.workloads}
        while until.left > -20 and any(
            part.process.poll() is None and not self.ready(name) for name, part in waiting.items()
        ):
            time.sleep(0.2)
        for name, part in waiting.items():
            if name not in steps and part.wait(0) is None:
                self.note(f"{name}: not everything was compiled ahead")
            elif name in steps and not self.ready(name):
                self.note(f"{name}: not prepared within {0.4 * self.total:.0f} s; see what it left out")
        return steps

    def ready(self, name: str) -> bool:
        return (self.logs / f"{name}.ready").exists()

    def start_step(self, name: str, seconds: float) -> Part:
        budget = 0.055 * STEPS.get(name, (1, 1))[0] * self.total
        words = ["step.py", "--workloads", name, "--prepare", str(max(seconds - 15, 1)), "--budget", str(budget)]
        words += ["--out", str(self.folder), "--compile", "yes" if self.options.compile != "none" else "no"]
        words += ["--ready", str(self.logs / f"{name}.ready"), "--turn", str(self.logs / f"{name}.turn")]
        if self.options.cpu:
            words += ["--seconds", "0.02"]
        if self.options.contenders:
            words += ["--contenders", *self.options.contenders]
        return self.part(name, *words, *self.fresh)

    def kernels(self, name: str, seconds: float, *words: str) -> None:
        """kernels.py, again after it was lost: what it was at when that happened is left alone."""
        until = Budget(seconds)
        for attempt in range(4):
            if until.left < 5:
                return
            arguments = ["--budget", str(until.left - 5), "--out", str(self.folder / "kernels.json"), *self.quick]
            arguments += ["--compile", self.options.compile]
            if self.options.workloads:
                arguments += ["--workloads", *self.options.workloads]
            fresh = self.fresh if name == "kernels-goals" and attempt == 0 else []  # from there on, add
            status = self.part(name, "kernels.py", *arguments, *words, *fresh).wait(until.left + 10)
            if status == 0:
                return
            if status is None:  # stopped by the clock: what it was at is not to blame
                (self.folder / "kernels.running").unlink(missing_ok=True)
            self.note(f"{name}: ended with {status} at attempt {attempt + 1}: {self.last_line(name)}")

    def last_line(self, name: str) -> str:
        lines = (self.logs / f"{name}.log").read_text(errors="replace").split("\n")
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")

    def note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def step(self, name: str, part: Part | None) -> None:
        self.say(f"step and decode: {name}")
        limit = max(20.0, 0.055 * STEPS.get(name, (1, 1))[0] * self.total * 2.5)
        if part is None:  # there was no memory for it before
            part = self.start_step(name, 0.16 * self.total)
            limit += 0.16 * self.total
        (self.logs / f"{name}.turn").touch()
        status = part.wait(min(limit, self.budget.left - 20))
        if status != 0:
            self.note(f"{name}: {'stopped' if status is None else f'ended with {status}'}: {self.last_line(name)}")

    def everything(self) -> None:
        only = self.options.only
        steps: dict[str, Part] = {}
        try:
            if "steps" in only:
                steps = self.prepare()
            for name in steps:
                self.step(name, steps[name])
            if "kernels" in only:
                self.say("kernels: the shapes that have goals")
                self.kernels("kernels-goals", 0.13 * self.total, "--goals", "--backward", "no")
            for name in self.workloads if "steps" in only else ():
                if name not in steps:
                    self.step(name, None)
            if "kernels" in only:
                self.say("kernels: all shapes")
                self.kernels("kernels", self.budget.left - 0.04 * self.total)
        finally:
            for part in self.parts:  # also those of a run that was ended from outside
                part.stop()
        self.finish()

    def finish(self) -> None:
        found = goals(self.folder)
        found["notes"] = self.notes
        found["seconds"] = round(self.total - self.budget.left)
        (self.folder / "goals.json").write_text(json.dumps(found, indent=1) + "\n")
        (self.folder / "summary.md").write_text(summary(found))
        print(summary(found))
        drawn = Part("charts", ["charts.py", str(self.folder)], self.logs / "charts.log")
        drawn_status = drawn.wait(max(self.budget.left, 30))
        print(self.last_line("charts") if drawn_status == 0 else f"no charts: {self.last_line('charts')}")
        self.say(f"{self.folder}; logs of the parts: {self.logs}")

    def pack(self) -> None:
        """The folder of the results and the logs in one file."""
        self.options.archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(self.options.archive, "w:gz") as out:
            out.add(self.logs, "logs")
            for path in sorted(self.folder.iterdir()):
                if path.resolve() != self.options.archive.resolve():
                    out.add(path, f"results/{path.name}")


def side_by_side(workloads: list[str], room: float) -> tuple[list[str], list[list[str]]]:
    """Which are prepared at the same time in `room` GiB; the others, in lanes of processes that compile ahead."""
    beside: list[str] = []
    for name in workloads:
        need = STEPS.get(name, (1, 1))[1]
        if need < room:
            beside.append(name)
            room -= need
    while beside and len(beside) < len(workloads) and room <= WARM:  # room for compiling the others comes first
        room += STEPS.get(beside.pop(), (1, 1))[1]
    others = [name for name in workloads if name not in beside]
    count = min(len(others), int(room // WARM))
    return beside, [others[i::count] for i in range(count)]


def read(folder: Path) -> dict[str, Any]:
    """All results of a run: {"kernels": ..., "steps": {workload: ...}}."""
    kernels = folder / "kernels.json"
    steps = {name: folder / f"step-{name}.json" for name in [*WORKLOADS, *TINY]}
    return {
        "kernels": json.loads(kernels.read_text()) if kernels.exists() else {},
        "steps": {name: json.loads(path.read_text()) for name, path in steps.items() if path.exists()},
    }


def verdict(value: float, least: float, stretch: float | None, smaller: bool = False) -> str:
    reached = (lambda goal: value <= goal) if smaller else (lambda goal: value >= goal)
    return "stretch" if stretch is not None and reached(stretch) else "reached" if reached(least) else "missed"


def row(what: str, unit: str, value: float | None, goal: tuple, smaller: bool = False, about: str = "") -> dict:
    out = {"goal": what, "unit": unit, "at_least": goal[0], "stretch": goal[1], "measured": value, "about": about}
    out["verdict"] = "not measured" if value is None else verdict(value, *goal, smaller=smaller)
    return out


def kernel_goals(
    entries: dict[str, dict], what: str, op: str, goal: dict, size: int, rival: str, which: Callable[[dict], bool]
) -> list[dict]:
    """Medians over a step's shapes that move at least `size` bytes and are of `which` sizes; `rival`: compared with."""
    shares, ratios = [], []
    for entry in entries.values():
        found = entry.get("contenders", {})
        mine = found.get("kernel", {})
        if entry.get("op") != op or not entry.get("calls") or entry["part"] == "vae" or "ms" not in mine:
            continue
        if entry["bytes"] < size or not which(entry["sizes"]):
            continue
        value = mine["of_copy"] if mine["right"] else 0.0
        shares.append(value)
        if "ms" in found.get(rival, {}):
            ratios.append(found[rival]["ms"] / mine["ms"] if mine["right"] else 0.0)
    out = []
    for key, values in (("of_copy", shares), ("faster", ratios)):
        value = digits(statistics.median(values), 3) if values else None
        about = f"median of {len(values)} shapes, from {min(values):.3g} to {max(values):.3g}" if values else ""
        unit = "of a copy's bandwidth" if key == "of_copy" else f"x {rival}"
        out.append(row(what, unit, value, goal[key], about=about))
    return out


def goals(folder: Path) -> dict[str, Any]:
    """The goals beside what was measured."""
    found = read(folder)
    entries = found["kernels"].get("kernels", {})
    # A norm of 80 MB is read twice and written: 240 MB and more.
    op = "group_norm_silu"
    rows = kernel_goals(entries, "norms of clips, 80 MB", op, NORM, 240_000_000, "eager", lambda s: "frames" in s)
    rows += kernel_goals(entries, "norms of frames, 80 MB", op, NORM, 240_000_000, "eager", lambda s: "frames" not in s)
    op = "temporal_attention"
    rows += kernel_goals(
        entries, "temporal attention, 150 MB", op, ATTENTION, 150_000_000, "eager", lambda s: s["f"] <= 32
    )
    for name, goal in EAGER.items():
        faster = found["steps"].get(name, {}).get("unet", {}).get("ours_optimized_is_faster", {})
        rows.append(row(f"step, {name}", "x diffusers", faster.get("diffusers"), goal))
        rows.append(row(f"step, {name}", "x diffusers compiled", faster.get("diffusers, compiled"), COMPILED))
    for name, goal in MEMORY.items():
        value = found["steps"].get(name, {}).get("resident_gib")
        rows.append(row(f"memory, {name}", "GiB", value, goal, smaller=True, about="UNet and VAE resident"))
    machines = [found["kernels"].get("machine"), *(step.get("machine") for step in found["steps"].values())]
    return {
        "machine": next((machine for machine in machines if machine), {}),
        "ceilings": found["kernels"].get("ceilings"),
        "goals": rows,
        "recommendation": found["kernels"].get("recommendation", {}),
        "left_out": [
            *found["kernels"].get("left_out", []),
            *(f"{name}: {line}" for name, step in found["steps"].items() for line in step.get("left_out", [])),
        ],
    }


def summary(found: dict[str, Any]) -> str:
    """A page for people."""
    machine = found["machine"]
    lines = [f"# Measured on {machine.get('device', 'nothing')}, {machine.get('date', '')}", ""]
    if "dry_run" in machine:
        lines += [f"**{machine['dry_run']}.**", ""]
    lines += [", ".join(f"{k} {machine[k]}" for k in ("torch", "triton", "diffusers", "driver") if machine.get(k)), ""]
    lines += ["| goal | at least | stretch | measured | |", "|---|---|---|---|---|"]
    for r in found["goals"]:
        cells = [f"{r['goal']} ({r['unit']})", r["at_least"], r["stretch"] or "", r["measured"] or "", r["verdict"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| op | launched | may PROVEN name it? | times faster over a step |", "|---|---|---|---|"]
    for launched, ops in found["recommendation"].items():
        for op, r in ops.items():
            faster = ", ".join(f"{n} {x}" for n, x in r["faster"].items())
            lines.append(f"| {op} | {launched} | {r['verdict']} | {faster} |")
    shown = found["left_out"][:30]
    lines += ["", f"Left out: {len(found['left_out'])}", *(f"- {line}" for line in shown)]
    if len(shown) < len(found["left_out"]):
        lines.append("- ... (all of them: goals.json)")
    lines += [*(f"- {note}" for note in found.get("notes", [])), ""]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.8)
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/gpu/<device>")
    parser.add_argument("--archive", type=Path, metavar="FILE.tgz", help="at the end, pack the results and the logs")
    parser.add_argument("--only", nargs="+", choices=("kernels", "steps"), default=["kernels", "steps"])
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, *TINY])
    parser.add_argument("--contenders", nargs="+", default=[], help="of the steps, only these")
    parser.add_argument("--compile", choices=("all", "some", "none"), help="default: some; with --cpu none")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the folder already")
    parser.add_argument("--cpu", action="store_true", help="dry run: tiny networks, kernels interpreted")
    options = parser.parse_args(arguments)
    options.compile = options.compile or ("none" if options.cpu else "some")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if not options.cpu and not torch.cuda.is_available():
        raise SystemExit("no GPU is visible: --cpu makes a dry run without one")
    run = Run(options)
    try:
        run.everything()
    finally:
        if options.archive:
            run.pack()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that parts are stopped and results packed
    main()
