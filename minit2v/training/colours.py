"""Fine-tunes the embedded autoencoder on twelve colours: `python -m minit2v.training.colours --out runs/colours`.

The autoencoder of `shapes` was trained on six colours, and turns every other colour into one of them. So no training of
the UNet can teach a seventh. Here the autoencoder learns six more beside the old ones. The UNet has learned the latents
of the old colours. So on old pictures the encoder's mean must stay that of the embedded encoder. Checkpoints are as in
`shapes.py`. The result is the whole model with the new autoencoder.
"""

import argparse
import copy
import json
import math
import random
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from minit2v_convert.stream import replacing

from ..models.vae import AutoencoderKL
from ..pipelines.text_to_video import TextToVideoSDPipeline
from . import world
from .checkpoints import load_state
from .objective import generators
from .shapes import Run, claim, cosine, stills

NEW = list(product(world.NEW_COLOURS, world.SHAPES, world.MOTIONS))


def train(
    out: Path, seed: int, embedded: AutoencoderKL, steps: int = 1700, batch: int = 32, rate: float = 1e-3
) -> AutoencoderKL:
    """Half of each batch has old colours and half new ones. Returns the moving average of the weights."""
    torch.manual_seed(seed)
    embedded = embedded.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    vae = copy.deepcopy(embedded).train().requires_grad_(True)
    average = copy.deepcopy(embedded)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(out, "vae", {"vae": vae, "average": average}, optimizer)
    old = batch // 2
    for step in run.steps(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        rng, noise = generators(seed, "colours", step)
        x = torch.cat([stills(rng, old), stills(rng, batch - old, NEW)]).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            anchor = embedded.encode(x[:old]).mean
        posterior = vae.encode(x)
        y = vae.decode(posterior.sample(noise))
        # As in `shapes.train_vae`: the object and its edges count as much as all the black.
        weight = 0.25 + 3.0 * F.max_pool2d((x > -1).amax(1, keepdim=True).float(), 5, 1, 2)
        error = (((y - x).abs() + (y - x).square()) * weight).mean()
        moved = F.mse_loss(posterior.mean[:old], anchor)
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
        optimizer.zero_grad(set_to_none=True)
        (error + moved + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        decay = min(0.995, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(vae.parameters()), 1 - decay)
        if step % 50 == 0:
            psnr = [-10 * math.log10(e.square().mean().item() / 4) for e in (y - x).detach().split(old)]
            run.write(error=error.item(), moved=moved.item(), old_psnr=psnr[0], new_psnr=psnr[1])
    return average


@torch.no_grad()
def round_trip(vae: AutoencoderKL, seed: int, new: bool, count: int = 216) -> dict[str, float]:
    """PSNR in dB (peak 1) of decoded stills, and how often their colour is read as what was drawn."""
    rng = random.Random(f"{seed} round trip")
    combinations = NEW if new else world.COMBINATIONS
    drawn = [combinations[n % len(combinations)] for n in range(count)]
    error, right = 0.0, 0
    for combination in drawn:
        x = stills(rng, 1, [combination])
        y = vae.decode(vae.encode(x).mode()).clamp(-1, 1)
        error += F.mse_loss(y, x).item() / 4 / count
        right += world.read_new_colour((y / 2 + 0.5).transpose(0, 1).expand(-1, world.FRAMES, -1, -1)) == combination[0]
    return {"psnr": -10 * math.log10(error), "colour": right / count}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    claim(args.out, trainer="colours", seed=args.seed)
    pipe = TextToVideoSDPipeline.from_pretrained("shapes")
    embedded = pipe.vae
    vae = train(args.out, args.seed, embedded)
    result: dict[str, Any] = {"minutes": load_state(args.out / "vae.ckpt")["seconds"] / 60}
    for name, network in (("before", embedded), ("after", vae)):
        result[name] = {f"{age} colours": round_trip(network, args.seed, age == "new") for age in ("old", "new")}
        print(name, result[name], flush=True)
    with replacing(args.out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    pipe.vae = vae
    pipe.to(torch.float16).save_pretrained(args.out / "shapes")
    print(f"the model is in {args.out / 'shapes'}")


if __name__ == "__main__":
    main()
