"""Trains the embedded motion LoRA: `python -m minit2v.training.orbit --out runs/orbit`.

Low-rank factors (Hu et al. 2021, arXiv:2106.09685) in the attentions and feed-forwards of the motion modules of
`shapes-motion` learn a motion that it does not know: what the words name goes once around a circle, clockwise from the
top. All else is frozen, as for AnimateDiff's motion LoRAs. Captions say no motion; the adapter is the motion.
Checkpointed and resumed as the stages of `shapes.py`.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from ..models.vae import AutoencoderKL
from ..pipelines.animatediff import AnimateDiffPipeline
from . import world
from .animate import MotionPainter
from .shapes import claim, generators, load_state, make_tokenizer, still_captions, train_diffusion

RANK = 8
KINDS = [(colour, shape) for colour in world.COLOURS for shape in world.SHAPES]


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def orbits(rng: random.Random, count: int) -> Tensor:
    """Places (b f 3) on random circles, once around, from the top clockwise; the last frame is before the first."""
    rows = []
    for _ in range(count):
        r, way = rng.uniform(7.0, 10.0), rng.uniform(13.0, 17.0)
        x, y = (rng.uniform(way + r + 1, world.SIZE - way - r - 1) for _ in range(2))
        rows.append((x, y, r, way))
    x, y, r, way = torch.tensor(rows)[:, :, None].unbind(1)  # each (b 1)
    angle = 2 * math.pi * torch.arange(world.FRAMES) / world.FRAMES
    return torch.stack([x + way * angle.sin(), y - way * angle.cos(), r.expand(-1, world.FRAMES)], -1)


def read_orbit(video: Tensor) -> float:
    """video (c f h w) in [0, 1] -> how much of the movement of what is seen is one clockwise turn: 0 to 1.

    0 where less moves than 5 pixels from the middle: the share that one harmonic has of the variance of the centre.
    """
    x, y, area = world.centres(video)
    if (area < 30).any():
        return 0.0
    z = torch.complex(x - x.mean(), y - y.mean())  # y points down: clockwise is the positive sense
    turn = torch.polar(torch.ones(len(z)), -2 * math.pi * torch.arange(len(z)) / len(z))
    along = float((z * turn).mean().abs())
    return along**2 / float(z.abs().square().mean()) if along >= 5 else 0.0


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
    torch.save(latents, path)
    return latents


def draw_batch(rng: random.Random, latents: Tensor, frames: int, batch: int) -> tuple[Tensor, list[str]]:
    """x (b c f h w) and a caption for each; one in ten is empty, for guidance. The frames span the clip."""
    rows, texts = [], []
    for _ in range(batch):
        i, j = rng.randrange(len(KINDS)), rng.randrange(latents.shape[1])
        rows.append(latents[i, j][:, torch.linspace(0, world.FRAMES - 1, frames).round().long()])
        texts.append("" if rng.random() < 0.1 else rng.choice(still_captions(*KINDS[i])))
    return torch.stack(rows).float(), texts


def train(out: Path, seed: int, pipe: AnimateDiffPipeline, course=((4, 24, 900), (16, 8, 700)), rate: float = 3e-3):
    torch.manual_seed(seed)
    latents = latents_of_orbits(pipe.vae, out, seed)
    unet = pipe.unet.requires_grad_(False)
    for name, module in list(unet.named_modules()):
        if ".motion." in name and isinstance(module, nn.Linear) and ".blocks." in name:
            parent, _, leaf = name.rpartition(".")
            setattr(unet.get_submodule(parent), leaf, LowRank(module, RANK))
    painter = MotionPainter(unet, pipe.text_encoder.requires_grad_(False))
    tokenizer = make_tokenizer()
    n = sum(p.numel() for p in painter.parameters() if p.requires_grad)
    print(n, "parameters", flush=True)
    return train_diffusion(
        out,
        "orbit",
        seed,
        painter,
        tokenizer,
        course,
        rate,
        lambda rng, frames, batch: draw_batch(rng, latents, frames, batch),
        noisy=0.8,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curve and the finished adapter")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    claim(args.out, trainer="orbit", seed=args.seed)
    from ..models.unet_motion import MotionAdapter

    pipe = AnimateDiffPipeline.from_pretrained(
        "shapes-image", motion_adapter=MotionAdapter.from_pretrained("shapes-motion")
    )
    painter = train(args.out, args.seed, pipe)
    torch.save(
        {k: v for k, v in painter.state_dict().items() if ".down.weight" in k or ".up.weight" in k},
        args.out / "factors.pt",
    )


if __name__ == "__main__":
    main()
