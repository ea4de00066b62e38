"""Does the embedded motion LoRA do what it was trained for? Every colour and shape, without it and with it.

    python benchmarks/orbit_accuracy.py                      # 18 prompts x 4 seeds, 25 DPM-Solver steps
    python benchmarks/orbit_accuracy.py --gifs docs/figures  # only the README's pictures, before and after

The prompts say no motion. Read off the pixels: colour, shape, and whether the middle of the shape goes once around,
clockwise (`read_orbit` of at least 0.8). The shares are printed and written to benchmarks/results/.
"""

import argparse
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minit2v import AnimateDiffPipeline, MotionAdapter, __version__
from minit2v.cli.videos import PRESETS
from minit2v.training import world
from minit2v.training.orbit import KINDS, read_orbit
from minit2v.utils import export_to_gif

LEAST = 0.8
SHOWN = [("red", "circle"), ("green", "triangle"), ("yellow", "square"), ("blue", "circle")]  # seeds 0, 1, 2, 3


def make_pipe() -> AnimateDiffPipeline:
    adapter = MotionAdapter.from_pretrained("shapes-motion")
    pipe = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_videos(pipe: AnimateDiffPipeline, kinds: list[tuple[str, str]], seeds: list[int], steps: int) -> Tensor:
    """(b c f h w) in [0, 1]"""
    videos = pipe(
        [f"a {colour} {shape}" for colour, shape in kinds],
        num_frames=world.FRAMES,
        num_inference_steps=steps,
        guidance_scale=PRESETS["shapes-image"]["guidance_scale"],
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="pt",
    ).frames
    return videos.transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", default="shapes-orbit")
    parser.add_argument("--gifs", type=Path, help="folder for the pictures")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=PRESETS["shapes-image"]["steps"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "orbit_accuracy.json")
    args = parser.parse_args()
    pipe, began, result = make_pipe(), time.monotonic(), {}
    for when in ("before", "after"):
        if when == "after":
            pipe.load_lora_weights(args.lora)
        if args.gifs:
            for (colour, shape), video in zip(SHOWN, make_videos(pipe, SHOWN, [0, 1, 2, 3], args.steps), strict=True):
                name = args.gifs / f"{when}-{colour}-{shape}.gif"
                print(export_to_gif(video.permute(1, 2, 3, 0).numpy(), name, fps=8))
            continue
        right, misses = dict.fromkeys(("orbit", "colour", "shape", "all"), 0), []
        for kind in tqdm(KINDS, when):
            for seed, video in enumerate(make_videos(pipe, [kind] * args.seeds, [*range(args.seeds)], args.steps)):
                colour, shape, _ = world.analyse(video)
                seen = {"orbit": read_orbit(video), "colour": colour, "shape": shape}
                fits = {"orbit": seen["orbit"] >= LEAST, "colour": colour == kind[0], "shape": shape == kind[1]}
                for name, fit in (fits | {"all": all(fits.values())}).items():
                    right[name] += fit
                if when == "after" and not all(fits.values()):
                    misses.append({"prompt": " ".join(kind), "seed": seed} | seen)
        count = len(KINDS) * args.seeds
        result[when] = {"videos": count, "right": {name: n / count for name, n in right.items()}, "misses": misses}
        print(f"{when:7} {count} videos   " + "   ".join(f"{name} {n / count:.1%}" for name, n in right.items()))
    if args.gifs:
        return
    about = {
        "command": "python benchmarks/orbit_accuracy.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "steps": args.steps,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(about | result, indent=1) + "\n")
    part.replace(args.out)


if __name__ == "__main__":
    main()
