"""One denoising step and one VAE decode of the published networks at full size, beside diffusers.

    PYTHONPATH=.:kernels:convert python benchmarks/step.py [--workloads NAME ...] [--budget SECONDS] [--out FOLDER]
    ... --cpu        a dry run without a GPU: tiny networks, the kernels in Triton's interpreter

Random weights, the same for all contenders; float16, batch 2 (guidance). All run in one process, in turns, on one
input; medians. Before anything is timed, each one's result is compared with that of float32 (a dry run's: float64).

    ours                     the networks as they are written
    ours, kernels            the fast path, MINIT2V_KERNELS=triton (--kernels)
    ours, optimized          pipe.optimize(graphs=True), with the kernels
    ours, optimized, torch   the same without them
    ours, frame by frame     the VAE alone, optimized, with slicing: what it takes where memory is short
    diffusers                eager
    ours, optimized, compiled   pipe.optimize(graphs=True, compile=True), with --compile all
    diffusers, compiled      channels-last, torch.compile: of the UNet with mode="reduce-overhead"

A step is one call of the UNet on noise, a timestep and a text, the same one in every call, as in a pipeline: our fast
path then has its keys and values. diffusers' AnimateDiff gets the text once per frame, as its pipeline does. Memory is
a contender's weights and what its calls have allocated at most (torch.cuda.max_memory_allocated, less what was there).
AnimateDiff runs in compat="diffusers", so that both compute the same.
"""

import argparse
import gc
import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kernel_shapes import TEXT, TINY, WORKLOADS, Workload
from measure import (
    Budget,
    Results,
    Timed,
    begin,
    default_folder,
    digits,
    in_turns,
    one_line,
    relative,
    synchronize,
    table,
)
from torch import Tensor, nn

from minit2v import fast
from minit2v.fast.bisect import kernels
from minit2v.files.config import config_fields
from minit2v.models.unet3d import UNet3DConditionModel, UNet3DConfig
from minit2v.models.unet_motion import UNetMotionModel
from minit2v.models.vae import AutoencoderKL

GIB = 2**30
NO_PEER = "diffusers is not installed: its columns are left out"


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises TimeoutError within after so long: a compilation cannot be asked to stop."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"not compiled within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def fill(network: nn.Module, seed: int) -> nn.Module:
    """Random weights under which numbers stay of the size they have: not zero anywhere, and no norm the identity."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, device=device, generator=generator)
        if p.ndim > 1:
            p.copy_(noise * p[0].numel() ** -0.5)
        else:
            p.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return network


@dataclass
class Part:
    """What is compared: a network of ours, diffusers' twin, and how each is called."""

    ours: Callable[[], nn.Module]  # new, with random weights
    peer: Callable[[], type]  # the twin's class; imports diffusers
    call: Callable[[Any, torch.dtype], Callable[[], Tensor]]  # ours, or its executor -> a call without arguments
    call_peer: Callable[[nn.Module], Callable[[], Tensor]]
    input_name: str
    sliced: bool = False  # whether it can also run frame by frame


def networks(work: Workload, device: torch.device, dtype: torch.dtype, seed: int = 0) -> dict[str, Part]:
    """ "unet": a step; "vae": a decode."""
    generator = torch.Generator(device).manual_seed(seed + 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    config = work.config
    x = randn(work.batch, config.in_channels, work.frames, *work.latents)
    context = randn(work.batch, TEXT, config.cross_attention_dim)
    z = randn(work.frames, work.vae.latent_channels, *work.latents)
    t = torch.tensor(500, device=device)
    motion = not isinstance(config, UNet3DConfig)

    def unet() -> nn.Module:
        with torch.device(device):
            network = UNetMotionModel(config, compat="diffusers") if motion else UNet3DConditionModel(config)
        return fill(network, seed).to(dtype).eval()

    def vae() -> nn.Module:
        with torch.device(device):
            return fill(AutoencoderKL(work.vae), seed).to(dtype).eval()

    def step(run: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        given = (x.to(dtype), t, context.to(dtype))
        return lambda: run(*given)

    def step_peer(network: nn.Module) -> Callable[[], Tensor]:
        text = context.to(network.dtype)
        given = (x.to(network.dtype), t, text.repeat_interleave(work.frames, 0) if motion else text)
        return lambda: network(*given, return_dict=False)[0]

    def decode(run: Any, dtype: torch.dtype) -> Callable[[], Tensor]:
        given = z.to(dtype)
        return lambda: run.decode(given)

    def decode_peer(network: nn.Module) -> Callable[[], Tensor]:
        given = z.to(network.dtype)
        return lambda: network.decode(given, return_dict=False)[0]

    def unet_class() -> type:
        import diffusers

        return diffusers.UNetMotionModel if motion else diffusers.UNet3DConditionModel

    def vae_class() -> type:
        import diffusers

        return diffusers.AutoencoderKL

    return {
        "unet": Part(unet, unet_class, step, step_peer, f"x {tuple(x.shape)}, text {tuple(context.shape)}"),
        "vae": Part(vae, vae_class, decode, decode_peer, f"z {tuple(z.shape)}, all frames at once", True),
    }


def twin(part: Part, ours: nn.Module) -> nn.Module:
    """diffusers' network with the weights of ours."""
    peer_class = part.peer()
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # fields of ours that it does not have
    with torch.device(ours.device):
        peer = peer_class.from_config(config_fields(ours.config))
    peer.to(ours.dtype).load_state_dict(ours.diffusers_state_dict(), strict=True)
    return peer.eval()


class Ours:
    """`call()` with the ops as `choice` says. It keeps the network, which its executor knows weakly."""

    def __init__(self, call: Callable[[], Tensor], choice: str, network: nn.Module):
        self.call, self.choice, self.network = call, choice, network

    def __call__(self) -> Tensor:
        with kernels(self.choice):
            return self.call()


@dataclass
class Built:
    """A contender's call, and the bytes of the weights it works with."""

    call: Callable[[], Tensor]
    weights: int


def contenders(part: Part, options: argparse.Namespace) -> dict[str, Callable[[], Built]]:
    """Name -> what builds its call. Two contenders that differ in their kernels only share a network."""
    made: dict[Any, nn.Module] = {}

    def ours(choice: str | None, slicing: bool = False, **optimize: Any) -> Built:
        """choice: None for the network as it is written, else the kernels of its fast path."""
        key = (slicing, *optimize.items())
        with kernels(choice or "torch"):
            if key not in made:
                made[key] = part.ours()
                if slicing:
                    made[key].enable_slicing()
                if optimize:
                    fast.optimize(made[key], **optimize)
            network = made[key]
            run = network if choice is None else fast.runner(network)
            return Built(Ours(part.call(run, network.dtype), choice or "torch", network), size_of(network))

    def peer(compiled: bool) -> Built:
        network = twin(part, part.ours())
        if compiled:
            channels_last(network)
            if part.sliced:  # the decoder: long enough for its launches, and its graph would hold gigabytes
                network.decoder = torch.compile(network.decoder, dynamic=False)
            else:
                network.forward = torch.compile(network.forward, mode=options.compile_mode, dynamic=False)
        return Built(part.call_peer(network), size_of(network))

    graphs = not options.cpu
    found: dict[str, Callable[[], Built]] = {
        "ours, optimized": lambda: ours(options.kernels, graphs=graphs, compile=False),
        "diffusers": lambda: peer(False),
        "ours": lambda: ours(None),
        "ours, kernels": lambda: ours(options.kernels),
        "ours, optimized, torch": lambda: ours("torch", graphs=graphs, compile=False),
    }
    if part.sliced:
        found["ours, frame by frame"] = lambda: ours(options.kernels, slicing=True, graphs=graphs, compile=False)
    if options.compile != "no":
        found["diffusers, compiled"] = lambda: peer(True)
    if options.compile == "all" and not part.sliced:
        found["ours, optimized, compiled"] = lambda: ours(options.kernels, graphs=graphs, compile=True)
    if options.contenders:
        found = {name: build for name, build in found.items() if name in options.contenders}
    return found


def channels_last(network: nn.Module) -> None:
    """Of convolutions in two and in three dimensions; `network.to(memory_format=...)` knows one kind at a time."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for p in network.parameters():
        if p.ndim in formats:
            p.data = p.data.contiguous(memory_format=formats[p.ndim])


def size_of(network: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*network.parameters(), *network.buffers()))


def allocated(device: torch.device) -> tuple[int, int]:
    """Bytes that tensors have, and those that PyTorch has taken from the device for them."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)


def empty(device: torch.device) -> None:
    """Give back what is not in use: others prepare themselves on the same device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_of(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """The most that was allocated during the call, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    y = call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else 0), y


@torch.no_grad()
def prepare(
    part: Part,
    device: torch.device,
    options: argparse.Namespace,
    entry: dict[str, Any],
    budget: Budget,
    save: Callable[[], None],
) -> dict[str, Callable[[], Tensor]]:
    """Build every contender, and judge and weigh it: `entry` gets what was found."""
    exact_dtype = torch.float64 if options.cpu else torch.float32
    with kernels("torch"):
        network = part.ours().to(exact_dtype)
        if part.sliced:
            network.enable_slicing()
        exact = part.call(network, exact_dtype)()
    del network
    empty(device)
    entry |= {"input": part.input_name, "error_from": str(exact_dtype).removeprefix("torch."), "contenders": {}}
    ready: dict[str, Callable[[], Tensor]] = {}
    for name, build in contenders(part, options).items():
        found: dict[str, Any] = {}
        entry["contenders"][name] = found
        if name.startswith("diffusers") and find_spec("diffusers") is None:
            found["unavailable"] = NO_PEER
            continue
        compiled, start = "compiled" in name, time.monotonic()
        try:
            with alarm(budget.left if compiled else 3600):
                built = build()
                empty(device)
                base, reserved = allocated(device)
                peaks = []
                for _ in range(1 if options.cpu else 3):
                    y = None  # the last result would count as the next call's
                    peak, y = peak_of(built.call, device)
                    peaks.append(peak)
        except Exception as error:
            late = "TimeoutError: " if compiled and budget.left <= 0 and not isinstance(error, TimeoutError) else ""
            found["unavailable"] = late + one_line(error)  # a compiler wraps what interrupts it
            synchronize(device)  # raises where the device is lost
            empty(device)
            continue
        ready[name] = built.call
        found["ready_after_s"] = digits(time.monotonic() - start, 3)
        found["error"] = digits(relative(y, exact), 3)
        if device.type == "cuda":
            # Capture, if any, is in the first call. A compiler's trials are too, and are not the step's.
            found["weights_gib"] = digits(built.weights / GIB)
            found["peak_gib"] = digits((max(peaks[1 if compiled else 0 :]) - base + built.weights) / GIB)
            found["reserved_gib"] = digits((allocated(device)[1] - reserved + built.weights) / GIB)
        del y
        empty(device)
        save()
        print(f"  {name}: error {found['error']}, ready after {found['ready_after_s']} s", flush=True)
    limit = 2 * entry["contenders"].get("ours", {}).get("error", 0.0) + 1e-6
    for found in entry["contenders"].values():
        if "error" in found:
            found["right"] = found["error"] < 0.5 and (found["error"] <= limit or "ours" not in ready)
    return ready


@torch.no_grad()
def time_all(ready: dict[str, Callable[[], Tensor]], device: torch.device, seconds: float, entry: dict) -> None:
    """Medians of all, in turns."""
    timed = {
        name: Timed(lambda _, call=call: call(), 1, device, graph=False, host=True) for name, call in ready.items()
    }
    # On a CPU, where kernels are interpreted, once is enough: it is a dry run.
    in_turns(timed, seconds, *((3, 2) if device.type == "cuda" else (1, 1)))
    for name, clock in timed.items():
        entry["contenders"][name] |= clock.summary()
        entry["contenders"][name].pop("graph")


def ratios(entry: dict) -> dict[str, float]:
    """How many times faster ours, optimized, is than each other one that is right."""
    found = entry["contenders"]
    mine = found.get("ours, optimized", {})
    if "ms" not in mine or not mine["right"]:
        return {}
    return {
        name: digits(other["ms"] / mine["ms"], 3)
        for name, other in found.items()
        if "ms" in other and other["right"] and name != "ours, optimized"
    }


def resident(entry: dict) -> float | None:
    """GiB: UNet and VAE both there, a step with guidance in one batch, then one frame after the other decoded.

    From the parts as measured: the larger of (step + the VAE's weights) and (decode + what the UNet keeps): beside its
    weights that is the memory of its graph, which nothing else may use.
    """
    step = entry.get("unet", {}).get("contenders", {}).get("ours, optimized", {})
    decode = entry.get("vae", {}).get("contenders", {}).get("ours, frame by frame", {})
    if "peak_gib" not in step or "peak_gib" not in decode:
        return None
    kept = max(step["weights_gib"], step.get("reserved_gib", 0.0))
    return digits(max(step["peak_gib"] + decode["weights_gib"], decode["peak_gib"] + kept))


@torch.no_grad()
def warm(work: Workload, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> None:
    """Compile what is compiled, so that it is on the disk when it is measured."""
    budget = Budget(options.prepare)
    for name, part in networks(work, device, dtype).items():
        builds = contenders(part, options) if name in options.parts else {}
        for contender, build in builds.items():
            if "compiled" in contender and (find_spec("diffusers") or not contender.startswith("diffusers")):
                try:
                    with alarm(budget.left):
                        build().call()
                except Exception as error:
                    print(f"{name}: {contender}: {one_line(error)}", flush=True)
                empty(device)


def wait_for(turn: Path | None, ready: Path | None) -> None:
    """Say that everything is prepared, and wait until it is this process's turn on the device."""
    if ready:
        ready.touch()
    while turn and not turn.exists():
        time.sleep(0.1)


def measure(work: Workload, device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> dict[str, Any]:
    """One workload's file."""
    results = Results((options.out or default_folder(device)) / f"step-{work.name}.json", device, options.fresh)
    if results.data.get("done") and not options.fresh:
        wait_for(None, options.ready)
        return results.data
    results.data |= {"workload": work.title, "batch": work.batch, "dtype": str(dtype).removeprefix("torch.")}
    results.data["kernels"] = options.kernels
    results.data["compile_mode"] = options.compile_mode if options.compile != "no" else None
    print(work.title, flush=True)
    if find_spec("diffusers") is None:
        print(f"  {NO_PEER}", flush=True)
    budget = Budget(options.prepare)
    prepared = {}
    for name, part in networks(work, device, dtype).items():
        if name in options.parts:
            print(f" {name}", flush=True)
            prepared[name] = prepare(part, device, options, results.part(name), budget, results.save)
            results.save()
    wait_for(options.turn, options.ready)
    left = Budget(options.budget)
    for name, ready in prepared.items():
        seconds = options.seconds or max(0.5, left.left / len(prepared) / max(1, len(ready)) / 1.5)
        time_all(ready, device, min(seconds, 4.0), results.part(name))
        results.part(name)["ours_optimized_is_faster"] = ratios(results.part(name))
        results.save()
    results.data["resident_gib"] = resident(results.data)
    results.data["left_out"] = left_out(results.data)
    results.data["done"] = not any("TimeoutError" in line for line in results.data["left_out"])  # else: once more
    results.save()
    return results.data


def left_out(data: dict) -> list[str]:
    return [
        f"{part}: {name}: {found['unavailable']}"
        for part in ("unet", "vae")
        for name, found in data.get(part, {}).get("contenders", {}).items()
        if "unavailable" in found
    ]


def report(data: dict) -> str:
    lines = [data["workload"]]
    for part in ("unet", "vae"):
        if part not in data:
            continue
        rows = [(part, "ms", "low", "high", "error", "right", "peak GiB", "ours, optimized, is x faster")]
        faster = data[part].get("ours_optimized_is_faster", {})
        for name, found in data[part]["contenders"].items():
            cells = (found.get(key, "-") for key in ("ms", "low", "high", "error", "right", "peak_gib"))
            rows.append((name, *cells, faster.get(name, "")))
        lines.append(table(rows))
    if data.get("resident_gib"):
        lines.append(f"UNet and VAE resident, one frame decoded at a time: {data['resident_gib']} GiB at most")
    lines += [f"left out: {line}" for line in data.get("left_out", [])]
    return "\n".join(lines)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=[*WORKLOADS, *TINY])
    parser.add_argument("--parts", nargs="+", choices=("unet", "vae"), default=["unet", "vae"])
    parser.add_argument("--contenders", nargs="+", default=[])
    parser.add_argument("--kernels", help="as in $MINIT2V_KERNELS; default: triton; with --cpu one op, as it is slow")
    parser.add_argument("--prepare", type=float, default=300, help="seconds for what is compiled, per workload")
    parser.add_argument("--budget", type=float, default=45, help="seconds of timing, per workload")
    parser.add_argument("--seconds", type=float, help="of timing per contender, in place of what the budget gives")
    parser.add_argument("--compile", choices=("all", "yes", "no"), help="default: yes, diffusers; with --cpu no")
    parser.add_argument("--warm", action="store_true", help="only compile what is compiled, into the caches, and end")
    parser.add_argument("--compile-mode", default="reduce-overhead", help='of diffusers; or "max-autotune"')
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), help="default: float16; CPU float32")
    parser.add_argument("--out", type=Path, help="folder; default: benchmarks/results/gpu/<device>")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the files already")
    parser.add_argument("--turn", type=Path, help="measure only once this file exists")
    parser.add_argument("--ready", type=Path, help="make this file when everything is prepared")
    parser.add_argument("--cpu", action="store_true", help="dry run: tiny networks, kernels interpreted")
    options = parser.parse_args(arguments)
    options.compile = options.compile or ("no" if options.cpu else "yes")
    options.kernels = options.kernels or ("torch,geglu=triton" if options.cpu else "triton")
    options.workloads = options.workloads or list(TINY if options.cpu else WORKLOADS)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    device, dtype = begin(options.cpu, options.dtype)
    for name in options.workloads:
        if options.warm:
            warm((WORKLOADS | TINY)[name], device, dtype, options)
            continue
        print(report(measure((WORKLOADS | TINY)[name], device, dtype, options)), flush=True)


if __name__ == "__main__":
    main()
