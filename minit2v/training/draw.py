"""Draws clips of the shapes world as a data set: `python -m minit2v.training.draw diagonally --out runs/diagonally`.

A clip is a GIF of 16 frames of 64x64 pixels, exact to the bit, with its caption in a `.txt` beside it. `old`: what the
embedded models were trained on. `diagonally`, or a word for a colour: clips of it alone. Each combination has the same
number of clips, each with one of its captions. The same seed draws the same files; files that are there are kept.
"""

import argparse
import random
from itertools import product
from pathlib import Path

from tqdm import tqdm

from minit2v_convert.stream import replacing

from ..files.video import export_to_gif
from . import world

WORDS = ("old", world.NEW_MOTION, *world.SYNONYMS, *world.NEW_COLOURS)


def combinations(word: str) -> list[tuple[str, str, str]]:
    """What clips of a word show: (colour, shape, motion)."""
    if word == "old":
        return world.TRAINED
    if word == world.NEW_MOTION:
        return list(product(world.COLOURS, world.SHAPES, (word,)))
    return list(product((word,), world.SHAPES, world.MOTIONS))


def draw(out: Path, word: str, per_combination: int, seed: int = 0) -> int:
    """Write the clips and captions into `out`, and return how many clips there are."""
    out.mkdir(parents=True, exist_ok=True)
    chosen = [(c, n) for c in combinations(word) for n in range(per_combination)]
    for combination, n in tqdm(chosen, "drawing clips"):
        name = "-".join((*combination, str(n)))
        rng = random.Random(f"{seed} {name}")
        clip, caption = world.draw_clip(rng, *combination), rng.choice(world.captions(*combination))
        with replacing(out / f"{name}.txt") as temporary:
            temporary.write_text(caption + "\n")
        if not (path := out / f"{name}.gif").exists():
            export_to_gif(world.render([clip])[0].permute(1, 2, 3, 0).numpy(), path, fps=8)
    return len(chosen)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=WORDS)
    parser.add_argument("--out", type=Path, required=True, help="folder of the clips")
    parser.add_argument("--clips", type=int, default=8, help="of each combination")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(f"{draw(args.out, args.word, args.clips, args.seed)} clips are in {args.out}")


if __name__ == "__main__":
    main()
