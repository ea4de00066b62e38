"""What every technique saves: predicted for the published models, measured where a CPU can, with times.

    PYTHONPATH=.:kernels:convert python benchmarks/memory.py [--full-size] [--save FILE]

Predicted: counted on `meta` by minit2v/memory/plan.py, in float16, with guidance, with PyTorch's own operations (our
kernels need less: benchmarks/activations.py). Measured: live tensor bytes of real calls of the embedded model on this
CPU, with their time. --full-size also runs a step of the 1.41 B UNet3D in float32 from a sparse folder (of `minit2v
blank`: its weights are zeros): as it is written, on the fast path, and streamed from its file. Each runs in a process
of its own, and its peak of resident memory is measured. That takes minutes.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import RESULTS, Results, table

from minit2v import DiffusionPipeline, UNet3DConditionModel, fast
from minit2v.memory.heap import return_freed_memory
from minit2v.memory.live import GIB, Live
from minit2v.memory.plan import Planner, Techniques, Video, gib, planner_of
from minit2v.memory.stream import stream
from minit2v.pipelines import memory
from minit2v.pipelines.blank import write_blank
from minit2v.pipelines.planning import planner_of_model

WORKLOADS = {
    "ModelScope 256x256, 64 frames": ("ms-1.7b", Video(64, 256, 256), ("4.2GiB", "2.0GiB")),
    "Zeroscope XL 1024x576, 24 frames": ("zeroscope-v2-xl", Video(24, 576, 1024), ("7.2GiB", "3.0GiB")),
    "AnimateDiff 512x512, 16 frames": ("sd-1.5", Video(16, 512, 512, chunk=16), ("5GiB", "2.5GiB")),
}
# How a full-size step runs: as the network is written ("plain"), on the fast path, and there block by block. With a
# budget, `pipe.plan(memory=)` has the process give freed memory back.
WAYS = ("plain", "plain within a budget", "fast", "fast within a budget", "streamed")
FRAMES = (4, 16)


def predict(name: str, video: Video, budgets: tuple[str, ...]) -> dict[str, Any]:
    """Peaks in bytes of each technique alone, and the plans that were chosen for each budget."""
    planner = planner_of_model(name, video)
    rows = {title: {**peaks, "whole": max(peaks.values())} for title, peaks in planner.rows()}
    plans = {}
    for budget in budgets:
        plan = planner.choose(budget)
        plans[budget] = None if plan is None else {"peak": plan.peak, "techniques": str(plan.techniques),
                                                   "calls": plan.calls, "parts": dict(plan.peaks)}  # fmt: skip
    return {"weights": planner.weights, "alone": rows, "plans": plans}


def measure() -> list[dict[str, Any]]:
    """Of the embedded model: predicted beside measured for each technique, and seconds of a call."""
    pipe = DiffusionPipeline.from_pretrained("shapes")
    pipe.set_progress_bar_config(disable=True)
    planner = planner_of(pipe, Video(16, 64, 64))
    hows = [Techniques(), Techniques(vae_slicing=True), Techniques(forward_chunking=True),
            Techniques(sequential_guidance=True), Techniques(offload="group"), Techniques(offload="sequential"),
            Techniques(store="int8")]  # fmt: skip
    weights = [v for n in pipe._networks.values() for v in (*n.parameters(), *n.buffers())]
    found = []
    for how in hows:
        memory.set_up(pipe, planner.plan(how))
        for network in (pipe.unet, pipe.vae):
            fast.executors.pop(network, None)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
            seconds.append(time.perf_counter() - start)
        for network in (pipe.unet, pipe.vae):
            fast.executors.pop(network, None)
        with Live(weights) as live:
            pipe("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        peaks = planner.peaks(how)
        # Weights that come and go are made in a buffer: they are among what is measured. Those at home are not.
        beside = max(n - planner.resident(how, part) + coming(planner, how, part)
                     for n, part in zip(peaks.values(), ("text_encoder", "unet", "vae"), strict=True))  # fmt: skip
        found.append({"technique": str(how), "predicted": beside, "measured": live.peak, "seconds": min(seconds)})
        for off in (pipe.disable_offload, pipe.disable_narrow_weights, pipe.disable_sequential_guidance,
                    pipe.disable_vae_slicing, pipe.unet.disable_forward_chunking):  # fmt: skip
            off()
    return found


def coming(planner: Planner, how: Techniques, part: str) -> int:
    """Bytes of buffers in which weights come, while this part works. What is kept in 8 bits is there before."""
    from minit2v.memory.stream import room, split

    network = planner.networks[part]
    if how.offload == "sequential":
        return max(map(room, split(network, "leaf")[1]))
    if how.store is not None:
        return max(map(room, split(network)[1])) if part == "unet" else 0
    return max(map(room, split(network)[1])) if how.offload == "group" and part == "unet" else 0


def status(field: str) -> int:
    """Bytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def full_size(folder: str, how: str, frames: int) -> dict[str, Any]:
    """In this process: the resident memory at the peak of a step. how: one of WAYS."""
    torch.set_num_threads(2)
    if how.endswith("within a budget"):
        return_freed_memory()
    plain = how.startswith("plain")
    small = UNet3DConditionModel(block_out_channels=(64, 64, 64, 64)).eval()
    with torch.no_grad():  # a small step loads what every size needs: libraries and their code
        (small if plain else fast.runner(small))(torch.ones(1, 4, 2, 16, 16), 500, torch.ones(1, 77, 1024))
    del small
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the small network leaves free in the heap is not taken as used
    before = status("VmRSS")
    unet = UNet3DConditionModel.from_pretrained(folder, subfolder="unet")
    if how == "streamed":
        stream(unet)
    x, t, text = torch.ones(1, 4, frames, 32, 32), torch.tensor([500]), torch.ones(1, 77, 1024)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    with torch.no_grad():
        (unet if plain else fast.runner(unet))(x, t, text)
    seconds = time.perf_counter() - start
    with torch.device("meta"):
        planner = Planner({"unet": UNet3DConditionModel(unet.config).eval()}, Video(frames, 256, 256, 1, False), "cpu")
    offload = "sequential" if plain else "group" if how == "streamed" else None  # "sequential": the plain network
    return {"resident": status("VmHWM"), "before": before, "seconds": seconds, "weights": planner.weights["unet"],
            "activations": planner.beside(Techniques(offload=offload), "unet")}  # fmt: skip


def run_full_size() -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_blank("ms-1.7b", Path(temporary) / "model")
        for frames in FRAMES:
            for how in WAYS:
                child = [sys.executable, __file__, "--child", str(folder), how, str(frames)]
                done = subprocess.run(child, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                found.setdefault(f"{frames} frames", {})[how] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full-size", action="store_true", help="also run the 1.41 B UNet, which takes minutes")
    parser.add_argument("--save", type=Path, default=RESULTS / "memory.json", help="a JSON file to write")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(full_size(*args.child[:2], int(args.child[2]))))
        return
    results = Results(args.save, torch.device("cpu"), fresh=True)
    results.data["machine"].pop("dry_run", None)
    predicted = results.part("predicted on meta, in bytes")
    for title, work in WORKLOADS.items():
        predicted[title] = predict(*work)
        results.save()
        alone = predicted[title]["alone"]
        print(title)
        print(table([("GiB", *next(iter(alone.values()))),
                     *([name, *(f"{n / GIB:.2f}" for n in row.values())] for name, row in alone.items())]))  # fmt: skip
        for budget, plan in predicted[title]["plans"].items():
            print(f"{budget}: {'none' if plan is None else gib(plan['peak']) + ' ' + plan['techniques']}")
    results.data["embedded model on this CPU"] = measure()
    results.save()
    print(table([("bytes beside the weights", "predicted", "measured", "seconds"),
                 *([r["technique"], r["predicted"], r["measured"], f"{r['seconds']:.2f}"]
                   for r in results.data["embedded model on this CPU"])]))  # fmt: skip
    if args.full_size:
        results.data["a step of the full-size UNet3D in float32, bytes"] = run_full_size()
        results.save()
        print(json.dumps(results.data["a step of the full-size UNet3D in float32, bytes"], indent=1))


if __name__ == "__main__":
    main()
