"""minit2v beside diffusers on this machine's CPU: a step of each video UNet, a VAE decode, loading, importing.

    python benchmarks/unet_vs_diffusers.py [--rounds 15] [--only unet motion vae import load memory] [--threads 2]
                                           [--out FILE]

Both libraries run in one process on the same weights, in turns, and the ratio is the median over the rounds of
reference / ours, so that a noisy machine disturbs both alike. Loading, importing and memory need fresh processes: one
per library and round, also in turns. Above 1 in `ratio` means that ours is faster or smaller.
"""

import argparse
import datetime
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
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
# Threads that wait sleep. The default is to spin, and on a machine that others use too, spinning is what one measures.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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


def in_turns(ours: Callable[[], object], reference: Callable[[], object], rounds: int) -> dict:
    """Wall and CPU seconds of both, median and least, and the median ratio of the rounds."""
    seconds = {name: {"minit2v": [], "diffusers": []} for name in ("wall_s", "cpu_s")}
    pairs = [("minit2v", ours), ("diffusers", reference)]
    for n in range(-1, rounds):  # round -1 warms up
        for name, run in pairs if n % 2 else pairs[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            if n >= 0:
                seconds["wall_s"][name].append(time.perf_counter() - wall)
                seconds["cpu_s"][name].append(time.process_time() - cpu)
    return {"rounds": rounds, **{name: summary(values) for name, values in seconds.items()}}


def summary(values: dict[str, list[float]]) -> dict:
    ours, reference = values["minit2v"], values["diffusers"]
    out = {name: {"median": round(statistics.median(v), 4), "min": round(min(v), 4)} for name, v in values.items()}
    out["ratio"] = round(statistics.median(r / o for r, o in zip(reference, ours, strict=True)), 3)
    out["ratio_of_minima"] = round(min(reference) / min(ours), 3)
    return out


def difference(ours, reference) -> float:
    return ((ours - reference).abs().max() / reference.abs().max()).item()


def unet(rounds: int) -> dict:
    import torch
    from diffusers import UNet3DConditionModel as Peer

    from minit2v.models.unet3d import UNet3DConditionModel

    torch.manual_seed(0)
    peer = Peer(**HALF).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
    with torch.device("meta"):
        ours = UNet3DConditionModel(**HALF).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), assign=True)  # the same memory: no second copy
    x, context = torch.randn(1, 4, 4, 16, 16), torch.randn(1, 77, 1024)
    with torch.no_grad():
        error = difference(ours(x, 500, context), peer(x, 500, context).sample)
        times = in_turns(lambda: ours(x, 500, context), lambda: peer(x, 500, context).sample, rounds)
    parameters = sum(p.numel() for p in ours.parameters())
    what = "UNet3D forward, half width, float32, 4 frames, 16x16 latents"
    return {"what": what, "parameters": parameters, "error": error, **times}


def motion(rounds: int) -> dict:
    """AnimateDiff's 16 frames, on which the motion modules' cost depends, at latents small enough for seconds.

    The reference is given the text once per frame, as its pipeline does; ours once per video, as our pipeline does.
    """
    import torch
    from diffusers import UNetMotionModel as Peer

    from minit2v.models.unet_motion import UNetMotionModel

    torch.manual_seed(0)
    config = {**HALF, "cross_attention_dim": 768}
    peer = Peer(**config).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
    out = {"what": "UNetMotion forward, half width, float32, 16 frames, 16x16 latents"}
    x, context = torch.randn(1, 4, 16, 16, 16), torch.randn(1, 77, 768)
    repeated = context.repeat_interleave(16, dim=0)
    modes = {'compat="diffusers"': {"compat": "diffusers"}, "default": {}, "version 1": {"resnet_norms": "clip"}}
    for name, options in modes.items():
        with torch.device("meta"):
            ours = UNetMotionModel(**config, **options).eval()
        ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), assign=True)
        out["parameters"] = sum(p.numel() for p in ours.parameters())
        with torch.no_grad():
            run, run_peer = partial(ours, x, 500, context), partial(peer, x, 500, repeated)
            # Outside of compat the two differ on purpose: the norms span other frames.
            error = difference(run(), run_peer().sample)
            out[name] = {"difference": error, **in_turns(run, run_peer, rounds)}
    return out


def vae(rounds: int) -> dict:
    import torch
    from diffusers import AutoencoderKL as Peer

    from minit2v.models.vae import AutoencoderKL

    torch.manual_seed(0)
    peer = Peer(**VAE).eval()
    for p in peer.parameters():
        torch.nn.init.normal_(p, std=0.02 if p.ndim > 1 else 0.1)
    with torch.device("meta"):
        ours = AutoencoderKL(**VAE).eval()
    ours.load_state_dict(ours.layout.to_ours(peer.state_dict()), assign=True)
    z = torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        error = difference(ours.decode(z), peer.decode(z).sample)
        times = in_turns(lambda: ours.decode(z), lambda: peer.decode(z).sample, rounds)
    return {"what": "VAE decode, float32, one frame of 256x256", "error": error, **times}


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
    "minit2v": "y = model(x, 500, context)",
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

    values = {key: {"minit2v": [], "diffusers": []} for key in ("wall_s", "cpu_s", "memory_mib")}
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
        before = {name: line + MAKE.format(frames=frames, size=size) for name, line in IMPORT.items()}
        out[f"{frames} frames, {size}x{size} latents"] = fresh(before, FORWARD, rounds)["memory_mib"]
    return {"what": "peak memory of a UNet3D forward above weights and libraries, MiB, half width, float32", **out}


def machine() -> dict:
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    import torch

    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "threads_may_use_cores": sorted(os.sched_getaffinity(0)),
        "OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"],
        "capability": torch.backends.cpu.get_cpu_capability(),
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
    args = parser.parse_args()
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
