"""Do the embedded models show what they are told? Generates every combination and reads the pixels back.

    python benchmarks/shapes_accuracy.py            # 108 combinations x 4 seeds, 25 DPM-Solver steps
    python benchmarks/shapes_accuracy.py --animate  # the same of the image model with its motion adapter

First the analyser is held against drawn clips, where it must score 100 %. Then, for each combination of colour, shape
and motion, four videos are generated from the plain caption and analysed; the shares that are right are printed and
written to benchmarks/results/, apart for the combinations that were trained and those that never were.
"""

import argparse
import json
import platform
import random
import sys
import time
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from minit2v import AnimateDiffPipeline, DiffusionPipeline, MotionAdapter, __version__
from minit2v.cli.videos import PRESETS
from minit2v.training import world

NAMES = ("colour", "shape", "motion")
ASSETS = Path(sys.modules["minit2v"].__file__).parent / "assets"


def validate(per_combination: int = 4) -> float:
    """Share of drawn clips of which colour, shape and motion are all read right, also under noise of sd 0.05."""
    rng = random.Random("validation")
    noise = torch.Generator().manual_seed(0)
    right = total = 0
    for combination in world.COMBINATIONS * per_combination:
        video = world.render([world.draw_clip(rng, *combination)])[0]
        noisy = (video + 0.05 * torch.randn(video.shape, generator=noise)).clamp(0, 1)
        right += (world.analyse(video) == combination) + (world.analyse(noisy) == combination)
        total += 2
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--animate", action="store_true", help="an image model with a motion adapter")
    parser.add_argument("--model", type=Path, help="folder, with --animate of the image model")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "shapes-motion", help="with --animate")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    embedded = "shapes-image" if args.animate else "shapes"
    args.model = args.model or ASSETS / embedded
    args.steps = args.steps or PRESETS[embedded]["steps"]
    args.guidance_scale = args.guidance_scale or PRESETS[embedded]["guidance_scale"]
    name = "animate_accuracy.json" if args.animate else "shapes_accuracy.json"
    args.out = args.out or Path(__file__).parent / "results" / name

    drawn = validate()
    print(f"analyser on drawn clips: {drawn:.1%}")
    if drawn < 1:
        raise SystemExit("the analyser misreads drawn clips: nothing that it says of generated ones counts")

    if args.animate:
        adapter = MotionAdapter.from_pretrained(args.adapter)
        pipe = AnimateDiffPipeline.from_pretrained(args.model, motion_adapter=adapter)
    else:
        pipe = DiffusionPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    began, misses = time.monotonic(), []
    right = {"trained": dict.fromkeys((*NAMES, "all"), 0), "unseen": dict.fromkeys((*NAMES, "all"), 0)}
    counts = dict.fromkeys(right, 0)
    for combination in tqdm(world.COMBINATIONS, "combinations"):
        kind = "unseen" if combination in world.UNSEEN else "trained"
        prompt = world.captions(*combination)[0]
        videos = pipe(
            [prompt] * args.seeds,
            num_frames=world.FRAMES,
            num_inference_steps=args.steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(args.seeds)],
            guidance_scale=args.guidance_scale,
            output_type="pt",
        ).frames  # (b f c h w)
        for seed, video in enumerate(videos):
            seen = world.analyse(video.transpose(0, 1))
            counts[kind] += 1
            for name, s, c in zip(NAMES, seen, combination, strict=True):
                right[kind][name] += s == c
            right[kind]["all"] += seen == combination
            if seen != combination:
                misses.append({"prompt": prompt, "seed": seed, "kind": kind, "seen": seen})
    shares = {kind: {name: n / counts[kind] for name, n in row.items()} for kind, row in right.items()}
    for kind, row in shares.items():
        print(f"{kind:8} {counts[kind]:4} videos   " + "   ".join(f"{name} {share:.1%}" for name, share in row.items()))
    result = {
        "command": "python benchmarks/shapes_accuracy.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "analyser_on_drawn_clips": drawn,
        "videos": counts,
        "right": shares,
        "misses": misses,
    }
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(args.out)


if __name__ == "__main__":
    main()
