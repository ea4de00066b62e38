"""Trains the embedded motion LoRA, `shapes-orbit`: `python -m minit2v.training.orbit --out runs/orbit`.

Low-rank factors (Hu et al. 2021, arXiv:2106.09685) beside the layers of `shapes-motion` learn a new motion: the shape
goes once around a circle, clockwise from the top. All other weights are frozen, as in AnimateDiff's motion LoRAs. The
captions name no motion, because the adapter stands for it. Checkpoints are as in `shapes.py`. The result is saved in
peft's names, as by other trainers of LoRAs.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from minit2v_convert.stream import replacing

from ..adapters.low_rank import TrainedBranch
from ..models.unet_motion import MotionAdapter
from ..models.vae import AutoencoderKL
from ..pipelines.animatediff import AnimateDiffPipeline
from . import world
from .animate import MotionPainter
from .checkpoints import load_state
from .objective import generators
from .shapes import Painter, claim, make_tokenizer, still_captions, train_diffusion
from .trainable import add_lora, lora_targets

RANK = 8
# Four frames of a clip teach the path at a quarter of the cost. Then all frames make it smooth.
COURSES = {"orbit": ((4, 16, 300), (16, 4, 400)), "smooth": ((16, 4, 500),)}
KINDS = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]


def orbits(rng: random.Random, count: int) -> Tensor:
    """Places (b f 3) on random circles, once around, clockwise from the top; after the last frame comes the first."""
    rows = []
    for _ in range(count):
        r, way = rng.uniform(7.0, 10.0), rng.uniform(13.0, 17.0)  # half-width, and radius of the circle
        x, y = (rng.uniform(way + r + 1, world.SIZE - way - r - 1) for _ in range(2))
        rows.append((x, y, r, way))
    x, y, r, way = torch.tensor(rows)[:, :, None].unbind(1)  # each (b 1)
    angle = 2 * math.pi * torch.arange(world.FRAMES) / world.FRAMES
    return torch.stack([x + way * angle.sin(), y - way * angle.cos(), r.expand(-1, world.FRAMES)], -1)


def read_orbit(video: Tensor) -> float:
    """video (c f h w) in [0, 1] -> which share of what the middle of the shape moves is one turn, clockwise: 0 to 1.

    Of the place of the middle, as a complex number over time, the share that one harmonic has in the variance. 0 where
    the circle's radius is below 5 pixels, or a frame shows nothing.
    """
    x, y, area = world.centres(video)
    if (area < 30).any():
        return 0.0
    z = torch.complex(x - x.mean(), y - y.mean())  # y points down: clockwise is the positive sense
    turn = torch.polar(torch.ones(len(z)), -2 * math.pi * torch.arange(len(z)) / len(z))
    radius = float((z * turn).mean().abs())
    return radius**2 / float(z.abs().square().mean()) if radius >= 5 else 0.0


@torch.no_grad()
def latents_of_orbits(vae: AutoencoderKL, out: Path, seed: int, per_kind: int = 96) -> Tensor:
    """(kind clip c f h w) in float16; cached in `out`."""
    path = out / "latents.pt"
    if path.exists():
        return load_state(path)
    rng, _ = generators(seed, "latents", 0)
    rows = []
    for kind in KINDS:
        video = world.paint([kind] * per_kind, orbits(rng, per_kind))
        z = [vae.encode(x * 2 - 1).mode() for x in rearrange(video, "b c f h w -> (b f) c h w").split(128)]
        rows.append(rearrange(torch.cat(z), "(b f) c h w -> b c f h w", f=world.FRAMES).half())
    latents = torch.stack(rows)
    with replacing(path) as temporary:
        torch.save(latents, temporary)
    return latents


def draw_orbits(rng: random.Random, latents: Tensor, frames: int, batch: int) -> tuple[Tensor, list[str]]:
    """x (b c f h w) and a caption for each; one in ten is empty, for guidance. The frames span the clip."""
    rows, texts = [], []
    for _ in range(batch):
        i, j = rng.randrange(len(KINDS)), rng.randrange(latents.shape[1])
        rows.append(latents[i, j][:, torch.linspace(0, world.FRAMES - 1, frames).round().long()])
        texts.append("" if rng.random() < 0.1 else rng.choice(still_captions(*KINDS[i])))
    return torch.stack(rows).float(), texts


def train(
    out: Path,
    seed: int,
    pipe: AnimateDiffPipeline,
    courses: dict[str, tuple[tuple[int, int, int], ...]] = COURSES,
    rate: float = 4e-3,
) -> Painter:
    """The pipeline's networks with trained factors beside the layers of its motion modules.

    courses: stage -> (frames, clips a batch, steps), one after the other, at three quarters of the rate of the last.
    """
    torch.manual_seed(seed)
    latents = latents_of_orbits(pipe.vae, out, seed)
    painter: Painter = MotionPainter(pipe.unet, pipe.text_encoder).requires_grad_(False)
    add_lora(pipe.unet, [*targets(pipe)], RANK)
    for n, (stage, course) in enumerate(courses.items()):
        for module in painter.modules():
            if isinstance(module, TrainedBranch):
                module.requires_grad_(True)
        # As for motion modules: what all frames share is decided at high noise.
        painter = train_diffusion(out, stage, seed, painter, make_tokenizer(), course, rate * 0.75**n,
                                  lambda rng, frames, batch: draw_orbits(rng, latents, frames, batch), noisy=0.8)
    return painter


def targets(pipe: AnimateDiffPipeline) -> dict[str, str]:
    """diffusers' name of a layer -> ours: the attentions and feed-forwards of the motion modules.

    Not their first and last layers, which diffusers cannot run with a LoRA.
    """
    return lora_targets(pipe.unet, "motion_modules.*.transformer_blocks")


def save(folder: Path, painter: Painter, names: dict[str, str]) -> None:
    """The trained factors in peft's names and in float16. names: `targets` of the pipeline, before `train`."""
    state, layers = painter.unet.state_dict(), {}
    for theirs, ours in names.items():
        layers[f"{theirs}.lora_A.weight"] = state[f"{ours}.branches.0.down"].half()
        layers[f"{theirs}.lora_B.weight"] = state[f"{ours}.branches.0.up"].half()
    AnimateDiffPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the finished adapter")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    claim(args.out, trainer="orbit", seed=args.seed)
    adapter = MotionAdapter.from_pretrained("shapes-motion")
    pipe = AnimateDiffPipeline.from_pretrained("shapes-image", motion_adapter=adapter)
    names = targets(pipe)
    save(args.out / "shapes-orbit", train(args.out, args.seed, pipe), names)
    print(f"the adapter is in {args.out / 'shapes-orbit'}")


if __name__ == "__main__":
    main()
