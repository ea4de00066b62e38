"""minit2v beside diffusers on this machine's CPU: a step of each video UNet, a VAE decode, loading, importing.

    python benchmarks/unet_vs_diffusers.py [--rounds 15] [--only unet motion vae import load memory] [--threads 1|2]
                                           [--openvino] [--compiled] [--modes] [--huge-pages]
                                           [--out FILE]

    plain       our network as it is written
    fast        its fast path, as pipelines run it
    diffusers   eager
    openvino    diffusers' network converted by OpenVINO, in float32 (pip install openvino: of this benchmark alone)
    compiled    torch.compile of diffusers' network

All run in one process on the same weights, in turns, and a ratio is the median over the rounds of diffusers / other, so
that a noisy machine disturbs all alike. Loading, importing and memory need fresh processes: one per library and round,
also in turns. Above 1 in `ratio` means faster, or smaller, than diffusers. Memory of the fast path includes the copies
of weights that it packs at its first call.
"""

import argparse
import datetime
import gc
import gzip
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# Half of the published widths: 361 M parameters, so that both networks fit into a small machine.
HALF = {"block_out_channels": (160, 320, 640, 640)}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}


# With --huge-pages, the C library takes all memory from one heap in pages of 2 MiB, for every library in the process.
# In a virtual machine, pages of 4 KiB can cost most of the time, and a different time in each minute.
HUGE_PAGES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**32, "top_pad": 2**26}.items()
)
PEER = "diffusers"
OPTIONS = argparse.Namespace(openvino=False, compiled=False, modes=False)  # of the command line


def in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict:
    """Wall and CPU seconds of each, median and least, and the median ratio of the rounds, diffusers / other."""
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in runs} for kind in ("wall_s", "cpu_s")}
    gc.collect()
    gc.disable()  # a collection would count for the library that runs then
    for n in range(-2, rounds):  # the first two warm up
        for name in list(runs) if n % 2 else list(runs)[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            if n >= 0:
                seconds["wall_s"][name].append(time.perf_counter() - wall)
                seconds["cpu_s"][name].append(time.process_time() - cpu)
    gc.enable()
    return {"rounds": rounds, **{kind: summary(values) for kind, values in seconds.items()}}


def summary(values: dict[str, list[float]]) -> dict:
    """Of each its median and least, and for all but diffusers how many times faster, or smaller, than that it is."""
    out: dict = {n: {"median": round(statistics.median(v), 4), "min": round(min(v), 4)} for n, v in values.items()}
    for name, mine in values.items():
        if name != PEER and min(mine) > 0:
            pairs = zip(values[PEER], mine, strict=True)
            out[name]["ratio"] = round(statistics.median(reference / own for reference, own in pairs), 3)
            out[name]["ratio_of_minima"] = round(min(values[PEER]) / min(mine), 3)
    return out


def difference(ours, reference) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def openvino(module, inputs: list) -> Callable[[], object]:
    """A call of the module on these tensors, converted by OpenVINO, in float32 and with as many threads."""
    import openvino
    import torch

    model = openvino.convert_model(module, example_input=tuple(inputs))
    model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
    options = {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads(), "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = [x.numpy() for x in inputs]
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def side_by_side(rounds: int, network, plain, fast_run, module, inputs: list) -> dict:
    """ours as it is written and its fast path beside diffusers and, where asked for, what compilers make of that.

    plain, fast_run: calls without arguments; module(*inputs): diffusers', with one tensor as its result.
    """
    import torch

    runs = {"plain": plain, "fast": fast_run, PEER: lambda: module(*inputs)}
    if OPTIONS.openvino:
        runs["openvino"] = openvino(module, inputs)
    if OPTIONS.compiled:
        compiled = torch.compile(module, dynamic=False)
        runs["compiled"] = lambda: compiled(*inputs)
    with torch.no_grad():
        want = runs[PEER]()
        out = {"difference": {name: difference(run(), want) for name, run in runs.items() if name != PEER}}
        out |= in_turns(runs, rounds)
    out["parameters"] = sum(p.numel() for p in network.parameters())
    if (packed := packed_bytes(network)) is not None:
        out["packed_copies_of_weights"] = {
            "mib": round(packed / 2**20, 1),
            "of_the_weights": round(packed / sum(p.nbytes for p in network.parameters()), 3),
        }
    return out


def packed_bytes(network) -> int:
    """Of the copies of weights that the fast path keeps."""
    from minit2v import fast

    return fast.executors[network].ops.kept_bytes()


def twins(ours_class: type, peer_class: type, config: dict, **options):
    """(ours, diffusers'), random and of the same weights, in the same memory."""
    import torch

    torch.manual_seed(0)
    peer = peer_class(**config).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
        p.requires_grad_(False)
    with torch.device("meta"):
        ours = ours_class(**config, **options).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), assign=True)
    return ours, peer


def first(peer, method: str = "forward"):
    """diffusers' network as a module that returns one tensor."""
    import torch

    class First(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.peer = peer

        def forward(self, *inputs):
            return getattr(self.peer, method)(*inputs, return_dict=False)[0]

    return First().eval()


def unet(rounds: int) -> dict:
    import torch
    from diffusers import UNet3DConditionModel as Peer

    from minit2v import fast
    from minit2v.models.unet3d import UNet3DConditionModel

    ours, peer = twins(UNet3DConditionModel, Peer, HALF)
    given = torch.randn(1, 4, 4, 16, 16), torch.tensor(500), torch.randn(1, 77, 1024)
    found = side_by_side(rounds, ours, lambda: ours(*given), partial(fast.runner(ours), *given), first(peer), [*given])
    return {"what": "UNet3D forward, half width, float32, 4 frames, 16x16 latents", **found}


def motion(rounds: int) -> dict:
    """AnimateDiff's 16 frames, on which the motion modules' cost depends, at latents small enough for seconds.

    The reference is given the text once per frame, as its pipeline does; ours once per video, as our pipeline does.
    """
    import torch
    from diffusers import UNetMotionModel as Peer

    from minit2v import fast
    from minit2v.models.unet_motion import UNetMotionModel

    config = {**HALF, "cross_attention_dim": 768}
    x, t, context = torch.randn(1, 4, 16, 16, 16), torch.tensor(500), torch.randn(1, 77, 768)
    repeated = context.repeat_interleave(16, dim=0)
    out: dict = {"what": "UNetMotion forward, half width, float32, 16 frames, 16x16 latents"}
    # Outside of compat the two differ on purpose: the norms span other frames.
    modes = {'compat="diffusers"': {"compat": "diffusers"}, "default": {}, "version 1": {"resnet_norms": "video"}}
    for name, options in modes.items() if OPTIONS.modes else [*modes.items()][:1]:
        ours, peer = twins(UNetMotionModel, Peer, config, **options)
        run = partial(ours, x, t, context), partial(fast.runner(ours), x, t, context)
        out[name] = side_by_side(rounds, ours, *run, first(peer), [x, t, repeated])
    return out


def vae(rounds: int) -> dict:
    import torch
    from diffusers import AutoencoderKL as Peer

    from minit2v import fast
    from minit2v.models.vae import AutoencoderKL

    ours, peer = twins(AutoencoderKL, Peer, VAE)
    z = torch.randn(1, 4, 32, 32)
    run = partial(ours.decode, z), lambda: fast.runner(ours).decode(z)
    found = side_by_side(rounds, ours, *run, first(peer, "decode"), [z])
    return {"what": "VAE decode, float32, one frame of 256x256", **found}


# Prints {"wall_s", "cpu_s", "memory_mib"} of the timed lines; memory is how far they raise the resident set at most.
PROBE = """
import json, resource, sys, time
import torch
torch.set_num_threads({threads})
def memory():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) / 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
{before}
reset()
base, wall, cpu = memory(), time.perf_counter(), time.process_time()
{timed}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps(dict(wall_s=wall, cpu_s=cpu, memory_mib=memory() - base)))
"""
IMPORT = {
    "minit2v": "from minit2v import DiffusionPipeline, UNet3DConditionModel, TextToVideoSDPipeline",
    "diffusers": "from diffusers import DiffusionPipeline, UNet3DConditionModel, TextToVideoSDPipeline",
}
LOAD = "model = UNet3DConditionModel.from_pretrained({folder!r}, torch_dtype={dtype})"
FORWARD = {
    "plain": "y = model(x, 500, context)",
    "fast": "from minit2v import fast; y = fast.runner(model)(x, 500, context)",
    "diffusers": "y = model(x, 500, context).sample",
}
MAKE = """
torch.manual_seed(0)
model = UNet3DConditionModel(block_out_channels=(160, 320, 640, 640)).eval()
x, context = torch.randn(1, 4, {frames}, {size}, {size}), torch.randn(1, 77, 1024)
torch.set_grad_enabled(False)
"""


def fresh(before: dict[str, str], timed: dict[str, str], rounds: int) -> dict:
    """The probe in processes of their own, in turns; the file cache is warm from round -1."""
    import torch

    values: dict = {key: {name: [] for name in timed} for key in ("wall_s", "cpu_s", "memory_mib")}
    path = os.pathsep.join([str(REPO), str(REPO / "kernels"), str(REPO / "convert")])
    for n in range(-1, rounds):
        for name in values["wall_s"]:
            code = PROBE.format(threads=torch.get_num_threads(), before=before[name], timed=timed[name])
            env = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            if n >= 0:
                for key, value in json.loads(done.stdout.splitlines()[-1]).items():
                    values[key][name].append(value)
    return {"rounds": rounds, **{key: summary(v) for key, v in values.items()}}


def load(rounds: int) -> dict:
    """The published UNet's 1,480 tensors, 1.41 B parameters, from a file of zeros that takes no disk."""
    from minit2v_convert.sparse import write_sparse_safetensors

    manifests = json.loads(gzip.decompress((REPO / "tests/data/manifests.json.gz").read_bytes()))
    configs = json.loads((REPO / "tests/data/configs.json").read_text())
    out = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(configs["ms-1.7b"]["unet/config.json"]))
        for part, dtype in (("unet", "torch.float32"), ("unet.fp16", "torch.float16")):
            write_sparse_safetensors(Path(folder, "diffusion_pytorch_model.safetensors"), manifests[f"ms-1.7b/{part}"])
            timed = dict.fromkeys(IMPORT, LOAD.format(folder=folder, dtype=dtype))
            out[dtype] = fresh(IMPORT, timed, rounds)
            both = {name: f"{line}\n{timed[name]}" for name, line in IMPORT.items()}
            out[f"{dtype}, with the import"] = fresh(dict.fromkeys(IMPORT, ""), both, rounds)
    return {"what": "UNet3DConditionModel.from_pretrained, full size, dtype of the file, warm file cache", **out}


def imports(rounds: int) -> dict:
    return {"what": "import, above import torch", **fresh(dict.fromkeys(IMPORT, ""), IMPORT, rounds)}


def memory(rounds: int) -> dict:
    out = {}
    for frames, size in ((4, 16), (8, 32)):
        make = MAKE.format(frames=frames, size=size)
        before = {name: IMPORT["diffusers" if name == PEER else "minit2v"] + make for name in FORWARD}
        out[f"{frames} frames, {size}x{size} latents"] = fresh(before, FORWARD, rounds)["memory_mib"]
    return {"what": "peak memory of a UNet3D forward above weights and libraries, MiB, half width, float32", **out}


VERSIONS = ("torch", "diffusers", "transformers", "openvino")


def machine() -> dict:
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    import torch

    from minit2v_kernels import cpu as kernels

    versions = {name: importlib.metadata.version(name) for name in VERSIONS if find_spec(name)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads_may_use_cores": sorted(os.sched_getaffinity(0)),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "the default"),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "matrix_units": kernels.has_matrix_units(),
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions,
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *map(os.path.relpath, sys.argv[:1]), *sys.argv[1:]]),
    }


PARTS = {  # what it is, and for how many rounds of the others one of it stands
    "unet": (unet, 1),
    "motion": (motion, 2),
    "vae": (vae, 1),
    "import": (imports, 2),
    "load": (load, 4),
    "memory": (memory, 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks/results/cpu_vs_diffusers.json")
    parser.add_argument("--openvino", action="store_true", help="a column for OpenVINO, which must be installed")
    parser.add_argument("--compiled", action="store_true", help="a column for torch.compile of diffusers")
    parser.add_argument(
        "--modes", action="store_true", help="AnimateDiff also in the modes that diffusers does not have"
    )
    parser.add_argument("--huge-pages", action="store_true", help="all memory in pages of 2 MiB, for all libraries")
    args = parser.parse_args(namespace=OPTIONS)
    if args.huge_pages and os.environ.get("GLIBC_TUNABLES") != HUGE_PAGES:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES  # which the C library reads when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    sys.path[:0] = [str(REPO), str(REPO / "kernels"), str(REPO / "convert")]
    import torch

    torch.set_num_threads(args.threads)
    results = {"machine": machine()}
    for name in args.only:
        run, cost = PARTS[name]
        results[name] = run(max(1, args.rounds // cost))
        print(json.dumps({name: results[name]}, indent=2), flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
