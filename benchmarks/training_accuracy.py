"""What did fine-tuning teach the embedded models, and what did it take from them? Generates, and reads the pixels back.

    python benchmarks/training_accuracy.py diagonally --lora runs/diagonally          # LoRA of `shapes`
    python benchmarks/training_accuracy.py diagonally --model runs/full/shapes        # all its temporal layers
    python benchmarks/training_accuracy.py diagonally --animate --lora runs/motion    # motion LoRA of AnimateDiff
    python benchmarks/training_accuracy.py crimson --lora runs/crimson
    python benchmarks/training_accuracy.py orange --model runs/vae --lora runs/orange

48 new videos from prompts with the new word, before and after, each from its own seed, and `--old-seeds` videos of each
of the 108 old combinations; 25 DPM-Solver steps, guidance 1.5. New: does the new motion show, or the new colour, and
are the other words of the prompt right, too; of misses, how many pixels the middle goes right and down, and the
half-width grows. Old: colour, shape, motion, and all three; before, they are what shapes_accuracy.py found from the
same noise, whose results are read. The shares and all misses go into benchmarks/results/training_accuracy.json, one
entry for each name (`--name`).
"""

import argparse
import csv
import json
import platform
import random
import sys
import time
from datetime import date
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minit2v import AnimateDiffPipeline, AutoencoderKL, DiffusionPipeline, MotionAdapter, __version__
from minit2v.cli.videos import PRESETS
from minit2v.training import world
from minit2v_convert.stream import replacing

NAMES = ("colour", "shape", "motion")
NEW = 48
RESULTS = Path(__file__).parent / "results"
FIRST_SEED = 1000  # of new videos: no seed of the old ones

Combination = tuple[str, str, str]


def new_prompts(word: str) -> list[Combination]:
    """48 combinations with the new word, spread evenly over what else they say."""
    if word == world.NEW_MOTION:
        kinds = [(colour, shape, word) for colour, shape in product(world.COLOURS, world.SHAPES)]
    else:
        kinds = [(word, shape, motion) for shape, motion in product(world.SHAPES, world.MOTIONS)]
    return [kinds[n % len(kinds)] for n in range(NEW)]


def read(video: Tensor, wanted: Combination) -> tuple[bool, bool, tuple[str | None, ...]]:
    """video (c f h w) in [0, 1] -> is the new word shown, is the rest of the prompt, and what is seen."""
    colour, shape, motion = world.analyse(video)
    if wanted[2] == world.NEW_MOTION:
        diagonally = world.reads_diagonally(video)
        return diagonally, (colour, shape) == wanted[:2], (colour, shape, world.NEW_MOTION if diagonally else motion)
    colour = world.read_new_colour(video)
    return colour == world.SYNONYMS.get(wanted[0], wanted[0]), (shape, motion) == wanted[1:], (colour, shape, motion)


def validate(word: str, per_kind: int = 4) -> float:
    """Share of drawn clips that are read right, the new word and the rest, also under noise of sd 0.05."""
    rng, noise = random.Random("validation"), torch.Generator().manual_seed(0)
    right = total = 0
    for wanted in new_prompts(word) * per_kind:
        video = world.render([world.draw_clip(rng, *wanted)])[0]
        for shown in (video, (video + 0.05 * torch.randn(video.shape, generator=noise)).clamp(0, 1)):
            right += all(read(shown, wanted)[:2])
            total += 1
    return right / total


def make_pipe(args: argparse.Namespace, trained: bool) -> DiffusionPipeline:
    """The embedded model, or what has been made of it."""
    given = vars(args) if trained else {"model": None, "adapter": None, "vae": None, "lora": None}
    if args.animate:
        adapter = MotionAdapter.from_pretrained(given["adapter"] or "shapes-motion")
        pipe = AnimateDiffPipeline.from_pretrained(given["model"] or "shapes-image", motion_adapter=adapter)
    else:
        pipe = DiffusionPipeline.from_pretrained(given["model"] or "shapes")
    if given["vae"]:
        pipe.vae = AutoencoderKL.from_pretrained(given["vae"])
    for lora in given["lora"] or ():
        pipe.load_lora_weights(lora)
    if given["lora"]:
        pipe.fuse_lora(lora_scale=args.weight)
    pipe.set_progress_bar_config(disable=True)
    return pipe.optimize()


def make_videos(pipe: DiffusionPipeline, wanted: list[Combination], seeds: list[int], name: str) -> list[Tensor]:
    """Each (c f h w) in [0, 1]"""
    settings, videos, at_once = PRESETS["shapes"], [], 6
    for n in tqdm(range(0, len(wanted), at_once), name):
        videos += pipe(
            [world.captions(*c)[0] for c in wanted[n : n + at_once]],
            num_frames=settings["num_frames"],
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[n : n + at_once]],
            output_type="pt",
        ).frames.transpose(1, 2)
    return videos


def measure_new(pipe: DiffusionPipeline, word: str, count: int) -> dict:
    wanted, seeds = new_prompts(word)[:count], list(range(FIRST_SEED, FIRST_SEED + count))
    videos = make_videos(pipe, wanted, seeds, word)
    seen = [read(v, c) for v, c in zip(videos, wanted, strict=True)]
    misses = []
    for video, c, seed, (*right, said) in zip(videos, wanted, seeds, seen, strict=True):
        if not all(right):
            way = [round(d, 1) for d in world.travel(video) or ()]
            misses.append({"prompt": world.captions(*c)[0], "seed": seed, "seen": said, "travel": way})
    return {"videos": count, word: sum(s[0] for s in seen) / count, "the_rest": sum(s[1] for s in seen) / count,
            "all": sum(s[0] and s[1] for s in seen) / count, "misses": misses}  # fmt: skip


def old_prompts(seeds: int) -> list[tuple[Combination, int]]:
    return [(c, seed) for seed in range(seeds) for c in world.COMBINATIONS]


def measure_old(pipe: DiffusionPipeline, seeds: int) -> dict:
    asked = old_prompts(seeds)
    videos = make_videos(pipe, [c for c, _ in asked], [seed for _, seed in asked], "old prompts")
    return shares(asked, {(c, seed): world.analyse(v) for (c, seed), v in zip(asked, videos, strict=True)})


def read_old(seeds: int, animate: bool) -> dict:
    """What shapes_accuracy.py saw of the embedded model, from the same prompts and noise."""
    known = json.loads((RESULTS / ("animate_accuracy.json" if animate else "shapes_accuracy.json")).read_text())
    settings = (known["steps"], known["guidance_scale"], sum(known["videos"].values()) >= 108 * seeds)
    if settings != (PRESETS["shapes"]["steps"], PRESETS["shapes"]["guidance_scale"], True):
        raise SystemExit("the results of shapes_accuracy.py are of other settings")
    missed = {(row["prompt"], row["seed"]): tuple(row["seen"]) for row in known["misses"]}
    asked = old_prompts(seeds)
    return shares(asked, {(c, n): missed.get((world.captions(*c)[0], n), c) for c, n in asked})


def shares(asked: list[tuple[Combination, int]], seen: dict[tuple[Combination, int], tuple[str | None, ...]]) -> dict:
    right = {name: sum(seen[c, seed][n] == c[n] for c, seed in asked) for n, name in enumerate(NAMES)}
    right["all"] = sum(seen[c, seed] == c for c, seed in asked)
    misses = [{"prompt": world.captions(*c)[0], "seed": seed, "seen": seen[c, seed]}
              for c, seed in asked if seen[c, seed] != c]  # fmt: skip
    return {"videos": len(asked), **{name: n / len(asked) for name, n in right.items()}, "misses": misses}


def minutes(log: Path) -> float:
    """What the last row of a run's log.csv says."""
    with log.open() as file:
        return round(float(list(csv.DictReader(file))[-1]["minutes"]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=(world.NEW_MOTION, *world.SYNONYMS, *world.NEW_COLOURS))
    parser.add_argument("--animate", action="store_true", help="the image model with its motion adapter")
    parser.add_argument("--model", type=Path, help="folder of a trained model; default: the embedded one")
    parser.add_argument("--adapter", type=Path, help="folder of a trained motion adapter, with --animate")
    parser.add_argument("--vae", type=Path, help="folder of a trained autoencoder")
    parser.add_argument("--lora", action="append", help="file or folder of a LoRA; may be given more than once")
    parser.add_argument("--weight", type=float, default=1.0, help="of the LoRAs, as in --lora FILE:1.2 of minit2v")
    parser.add_argument("--name", help="of the entry in the result; default: the word, and -animate")
    parser.add_argument("--note", help="a sentence that is kept with the result: how it was trained")
    parser.add_argument("--log", type=Path, help="log.csv of the run: its minutes are kept with the result")
    parser.add_argument("--old-seeds", type=int, default=1, choices=(1, 2, 3, 4))
    parser.add_argument("--before", type=int, default=NEW, help="how many new videos the embedded model makes")
    parser.add_argument("--out", type=Path, default=RESULTS / "training_accuracy.json")
    args = parser.parse_args()
    name = args.name or args.word + ("-animate" if args.animate else "")
    drawn = validate(args.word)
    print(f"reader on drawn clips: {drawn:.1%}")
    if drawn < 1:
        raise SystemExit("the reader misreads drawn clips: nothing that it says of generated ones counts")

    began, entry = time.monotonic(), {}
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for when in ("before", "after"):
        pipe = make_pipe(args, when == "after")
        old = measure_old(pipe, args.old_seeds) if when == "after" else read_old(args.old_seeds, args.animate)
        entry[when] = {"new": measure_new(pipe, args.word, NEW if when == "after" else args.before), "old": old}
        for kind, row in entry[when].items():
            shares = "   ".join(f"{k} {v:.1%}" for k, v in row.items() if k not in ("videos", "misses"))
            print(f"{when:6} {kind} {row['videos']:4} videos   {shares}", flush=True)
    loss = {k: 100 * (entry["before"]["old"][k] - entry["after"]["old"][k]) for k in (*NAMES, "all")}
    print("points lost of the old: " + "   ".join(f"{k} {v:.1f}" for k, v in loss.items()))
    about = {
        "command": "python benchmarks/training_accuracy.py " + " ".join(sys.argv[1:]),
        "trained": args.note,
        "minutes_of_training": minutes(args.log) if args.log else None,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "minutes": round((time.monotonic() - began) / 60, 1),
        "reader_on_drawn_clips": drawn,
        "points_lost_of_the_old": loss,
    }
    with replacing(args.out) as temporary:
        temporary.write_text(json.dumps(results | {name: about | entry}, indent=1) + "\n")


if __name__ == "__main__":
    main()
