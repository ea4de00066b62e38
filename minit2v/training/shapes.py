"""Trains the embedded model from nothing: `python -m minit2v.training.shapes --out runs/shapes`.

It has three stages. Each writes a checkpoint into `--out` every minute and resumes from it. A batch is a function of
seed and step, so a run that was killed continues exactly:
1. `vae`: from pictures to 8x8x4 latents and back, until `world.analyse` reads every colour and shape from the result.
2. `text`: the text encoder learns to name colour, shape and motion of a caption. CLIP's is trained before, too.
3. `unet`: v-prediction on the latents of clips: stills first, then 4 frames, then 16.
"""

import argparse
import copy
import csv
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from minit2v_convert.stream import first_line, parse_json, replacing

from ..files.hub import write_json
from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from ..models.unet3d import UNet3DConditionModel
from ..models.vae import AutoencoderKL
from ..pipelines.base import DiffusionPipeline
from ..pipelines.text_to_video import TextToVideoSDPipeline
from ..schedulers.dpm_multistep import DPMSolverMultistepScheduler
from . import world
from .checkpoints import forget_later, load_state
from .objective import generators

VAE = {
    "block_out_channels": (16, 32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,  # with one channel in a group, the norm would remove the colours
    "sample_size": world.SIZE,
    "scaling_factor": 1.0,  # `whiten` folds mean and scale of the latents into the 1x1 convolutions
}

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (48, 96),
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 16,
}
NAMES = ("colour", "shape", "motion")
COURSE = ((1, 64, 2500), (4, 24, 9300), (16, 8, 4200))  # of the UNet: (frames, clips a batch, steps)
GUIDANCE = 1.5  # a higher scale makes squares round and circles edged


def claim(out: Path, **of: Any) -> None:
    """Makes the folder of a training and writes the name of the training into it. ValueError if another has it.

    Checkpoints and latents in it are taken up as they are: with another seed they would be those of the old one.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "training.json"
    if not path.exists():
        return write_json(path, of)
    for name, value in parse_json(path).items():
        if of.get(name) != value:
            raise ValueError(f"{path}: a training with {name} {value!r}, not {of.get(name)!r}: give another folder as "
                             "--out, or remove this one")  # fmt: skip


class Run:
    """Steps of one stage: checkpoint, resume, log. The state is everything that the next step depends on."""

    def __init__(self, out: Path, stage: str, modules: dict[str, nn.Module], optimizer, seconds: float = 60.0):
        self.path, self.log = out / f"{stage}.ckpt", out / f"{stage}.csv"
        self.modules, self.optimizer, self.every = modules, optimizer, seconds
        self.step, self.spent, self.saved = 0, 0.0, time.monotonic()
        if self.path.exists():
            state = load_state(self.path)
            try:
                for name, module in modules.items():
                    module.load_state_dict(state[name])
                optimizer.load_state_dict(state["optimizer"])
                self.step, self.spent = state["step"], state["seconds"]
            except (KeyError, TypeError, RuntimeError, ValueError) as error:
                raise ValueError(f"{self.path} is not a checkpoint of this stage ({first_line(error)}): remove it to "
                                 "begin anew") from None  # fmt: skip
        forget_later(self.log, self.step - 1)
        self.began = time.monotonic() - self.spent

    def save(self) -> None:
        state = {name: module.state_dict() for name, module in self.modules.items()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step, "seconds": time.monotonic() - self.began}
        with replacing(self.path) as temporary:
            torch.save(state, temporary)
        self.saved = time.monotonic()

    def steps(self, total: int) -> Iterator[int]:
        while self.step < total:
            yield self.step
            self.step += 1
            if self.step == total or time.monotonic() - self.saved > self.every:
                self.save()

    def write(self, **values: float) -> None:
        new = not self.log.exists()
        with self.log.open("a", newline="") as file:
            row = {"step": self.step, "minutes": round((time.monotonic() - self.began) / 60, 2), **values}
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)
        print("  ".join(f"{k} {v:.4g}" for k, v in row.items()), flush=True)


def cosine(step: int, total: int, warmup: int = 100) -> float:
    """Learning rate factor: linear warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


def trapezoid(step: int, total: int, warmup: int = 200) -> float:
    """Learning rate factor: linear warm-up, flat, linear to 0 over the last fifth."""
    return min(1.0, (step + 1) / warmup, (total - step) / (0.2 * total))


def stills(rng: random.Random, count: int, combinations: Sequence[tuple[str, str, str]] = world.COMBINATIONS) -> Tensor:
    """Random moments of random clips, (b c h w) in [-1, 1].

    Of all combinations: a still of an unseen one is a still of trained ones too, and the autoencoder knows no words.
    """
    clips = []
    for _ in range(count):
        clip = world.draw_clip(rng, *rng.choice(combinations))
        s = rng.random()
        place = tuple(a + s * (b - a) for a, b in zip(clip.start, clip.end, strict=True))
        clips.append(world.Clip(clip.colour, clip.shape, clip.motion, place, place))
    return world.render(clips, frames=1)[:, :, 0] * 2 - 1


# --------------------------------------------------------------------------------------------------- the autoencoder


def train_vae(out: Path, seed: int, steps: int = 2500, batch: int = 32, rate: float = 2e-3) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-4)
    run = Run(out, "vae", {"vae": vae}, optimizer)
    for step in run.steps(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        rng, noise = generators(seed, "vae", step)
        x = stills(rng, batch).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x)
        y = vae.decode(posterior.sample(noise))
        # Most of a picture is background: the object and its edges count as much as all the black.
        weight = 0.25 + 3.0 * F.max_pool2d((x > -1).amax(1, keepdim=True).float(), 5, 1, 2)
        error = ((y - x).abs() + (y - x).square()) * weight
        kl = 0.5 * (posterior.mean.square() + posterior.logvar.exp() - 1 - posterior.logvar).mean()
        loss = error.mean() + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = -10 * math.log10((y - x).detach().square().mean().item() / 4)
            run.write(loss=loss.item(), kl=kl.item(), psnr=psnr)
    whiten(vae.eval(), seed)
    return vae


@torch.no_grad()
def whiten(vae: AutoencoderKL, seed: int) -> None:
    """Change the 1x1 convolutions around the latents so that every channel has mean 0 and deviation 1 exactly."""
    rng, _ = generators(seed, "whiten", 0)
    z = torch.cat([vae.encode(stills(rng, 64)).mean for _ in range(16)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    c = len(mean)
    vae.quant_conv.weight[:c] /= std[:, None, None, None]
    vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
    vae.quant_conv.bias[c:] -= 2 * std.log()
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


@torch.no_grad()
def vae_accuracy(vae: AutoencoderKL, seed: int, per_combination: int = 1) -> dict[str, float]:
    """How often `analyse` reads the right colour, shape and motion after clips were encoded and decoded."""
    rng, _ = generators(seed, "vae accuracy", 0)
    right, count = [0, 0, 0], 0
    for combination in world.COMBINATIONS * per_combination:
        video = world.render([world.draw_clip(rng, *combination)])[0]
        frames = vae.decode(vae.encode(video.transpose(0, 1) * 2 - 1).mode())
        got = world.analyse((frames.transpose(0, 1) / 2 + 0.5).clamp(0, 1))
        right = [r + (g == w) for r, g, w in zip(right, got, combination, strict=True)]
        count += 1
    return dict(zip(NAMES, (r / count for r in right), strict=True))


# ------------------------------------------------------------------------------------------------- the text encoder


class Reader(nn.Module):
    """The text encoder and three linear layers that name colour, shape and motion from its last token."""

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        dim = text_encoder.config.hidden_size
        self.text_encoder = text_encoder
        self.heads = nn.ModuleList(nn.Linear(dim, n) for n in (len(world.COLOURS), len(world.SHAPES), len(MOTIONS)))

    def forward(self, ids: Tensor) -> list[Tensor]:
        """ids (b l) -> logits (b classes) of colour, shape, motion."""
        return [head(self.text_encoder(ids)[:, -1]) for head in self.heads]


MOTIONS = (*world.MOTIONS, "still")
LABELS = (list(world.COLOURS), list(world.SHAPES), list(MOTIONS))


def make_tokenizer() -> CLIPTokenizer:
    texts = [c for combination in world.COMBINATIONS for c in world.captions(*combination)]
    return CLIPTokenizer.train(texts, 640, model_max_length=16)


def still_captions(colour: str, shape: str) -> list[str]:
    return [f"a {colour} {shape}", f"{colour} {shape}", f"the {colour} {shape}", f"a {shape} in {colour}"]


def train_text(out: Path, seed: int, steps: int = 1500, batch: int = 64, rate: float = 2e-3) -> CLIPTextModel:
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    reader = Reader(CLIPTextModel(vocab_size=tokenizer.vocab_size, **TEXT))
    optimizer = torch.optim.AdamW(reader.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-2)
    run = Run(out, "text", {"reader": reader}, optimizer)
    for step in run.steps(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        rng, _ = generators(seed, "text", step)
        texts, labels = [], []
        for _ in range(batch):
            colour, shape, motion = rng.choice(world.TRAINED)
            if rng.random() < 0.25:
                motion = "still"
            pool = still_captions(colour, shape) if motion == "still" else world.captions(colour, shape, motion)
            texts.append(rng.choice(pool))
            labels.append([names.index(n) for names, n in zip(LABELS, (colour, shape, motion), strict=True)])
        logits = reader(tokenizer(texts))
        loss = sum(F.cross_entropy(g, w) for g, w in zip(logits, torch.tensor(labels).unbind(1), strict=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            run.write(loss=loss.item())
    return reader.text_encoder.eval()


# --------------------------------------------------------------------------------------------------------- the UNet


@torch.no_grad()
def latents_of_world(vae: AutoencoderKL, out: Path, seed: int, per_combination: int = 96) -> Tensor:
    """Latents of drawn clips of the trained combinations, (combination clip c f h w) in float16; cached in `out`."""
    path = out / "latents.pt"
    if path.exists():
        return load_state(path)
    rng, _ = generators(seed, "latents", 0)
    rows = []
    for combination in tqdm(world.TRAINED, "encoding clips"):
        video = world.render([world.draw_clip(rng, *combination) for _ in range(per_combination)])
        frames = rearrange(video, "b c f h w -> (b f) c h w") * 2 - 1
        z = torch.cat([vae.encode(x.contiguous(memory_format=torch.channels_last)).mode() for x in frames.split(128)])
        rows.append(rearrange(z, "(b f) c h w -> b c f h w", f=world.FRAMES).half())
    latents = torch.stack(rows)
    with replacing(path) as temporary:
        torch.save(latents, temporary)
    return latents


class Painter(nn.Module):
    """What the last stage trains, together: the UNet and the text encoder."""

    def __init__(self, unet: UNet3DConditionModel, text_encoder: CLIPTextModel):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x (b c f h w), t (b,), ids (b l) -> predicted v (b c f h w)."""
        return self.unet(x, t, self.text_encoder(ids))


def train_unet(
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    course: tuple[tuple[int, int, int], ...] = COURSE,
    rate: float = 1.5e-3,
    panel: int = 500,
) -> Painter:
    """v-prediction (Salimans and Ho 2022, arXiv:2202.00512) on latents.

    course: (frames, clips a batch, steps). Stills teach colour and shape, and cost a sixteenth of a clip. Four
    frames spread over the clip teach the direction of motion, and cost a quarter. All sixteen make motion smooth.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    latents = latents_of_world(vae, out, seed)
    painter = Painter(UNet3DConditionModel(**UNET), text_encoder.train())
    return train_diffusion(
        out, "unet", seed, painter, tokenizer, course, rate,
        lambda rng, frames, batch: draw_batch(rng, latents, frames, batch),
        lambda average: make_pipeline(vae, average, tokenizer), panel,
    )  # fmt: skip


def train_diffusion(
    out: Path,
    stage: str,
    seed: int,
    painter: Painter,
    tokenizer: CLIPTokenizer,
    course: tuple[tuple[int, int, int], ...],
    rate: float,
    draw: Callable[[random.Random, int, int], tuple[Tensor, list[str]]],
    pipeline: Callable[[Painter], DiffusionPipeline] | None = None,
    panel: int = 500,
    noisy: float = 0.5,
) -> Painter:
    """Trains the parameters of `painter` that require gradients. Returns the moving average of `painter`.

    course: (frames, clips in a batch, steps) of each part. draw(rng, frames, clips): makes a batch of clips
    (b c f h w) and captions. pipeline: the pipeline of the moving average, which makes a panel of videos every `panel`
    steps and at the end; None: no panel. noisy: the share of clips with t from the noisiest 30 %, where places are
    decided.
    """
    average = copy.deepcopy(painter).eval().requires_grad_(False)
    trained = [p for p in painter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.99), weight_decay=1e-2)
    run = Run(out, stage, {"painter": painter, "average": average}, optimizer)
    if pipeline:
        forget_later(out / "panel.csv", run.step)
    alpha_bar = make_scheduler().alphas_cumprod.float()
    total, losses = sum(steps for *_, steps in course), []
    for step in run.steps(total):
        for group in optimizer.param_groups:
            group["lr"] = rate * trapezoid(step, total)
        rng, noise = generators(seed, stage, step)
        frames, batch = stage_at(course, step)
        x, texts = draw(rng, frames, batch)
        high = torch.rand(len(x), generator=noise) < noisy
        t = 1 - torch.rand(len(x), generator=noise) * torch.where(high, 0.3, 1.0)
        t = (t * 1000).long().clamp(0, 999)
        eps = torch.randn(x.shape, generator=noise)
        alpha, sigma = (a.sqrt()[:, None, None, None, None] for a in (alpha_bar[t], 1 - alpha_bar[t]))
        v = painter(alpha * x + sigma * eps, t, tokenizer(texts))
        loss = F.mse_loss(v, alpha * eps - sigma * x)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(painter.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 50 == 49:
            run.write(loss=sum(losses) / len(losses))
            losses.clear()
        if pipeline and (step % panel == panel - 1 and frames == world.FRAMES or step == total - 1):
            report_panel(out, run, pipeline(average), step + 1)
    return average


def stage_at(course: tuple[tuple[int, int, int], ...], step: int) -> tuple[int, int]:
    """(frames, clips a batch) of one step."""
    for frames, batch, steps in course:
        if step < steps:
            return frames, batch
        step -= steps
    raise ValueError("the course is over")


def draw_batch(rng: random.Random, latents: Tensor, frames: int, batch: int) -> tuple[Tensor, list[str]]:
    """x (b c f h w) and a caption for each; one in ten is empty, for guidance. One frame is any, more span the clip."""
    rows, texts = [], []
    for _ in range(batch):
        i, j, k = rng.randrange(len(world.TRAINED)), rng.randrange(latents.shape[1]), rng.randrange(world.FRAMES)
        colour, shape, motion = world.TRAINED[i]
        chosen = [k] if frames == 1 else torch.linspace(0, world.FRAMES - 1, frames).round().long()
        rows.append(latents[i, j][:, chosen])
        pool = still_captions(colour, shape) if frames == 1 else world.captions(colour, shape, motion)
        texts.append("" if rng.random() < 0.1 else rng.choice(pool))
    return torch.stack(rows).float(), texts


def make_scheduler() -> DPMSolverMultistepScheduler:
    """SD's schedule, brought to zero SNR at its end (Lin et al. 2023, arXiv:2305.08891)."""
    # Solvers that clip would clip latents, as if they were pixels, if the file did not say otherwise.
    return DPMSolverMultistepScheduler.from_config(
        {"clip_sample": False},
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def make_pipeline(vae: AutoencoderKL, painter: Painter, tokenizer: CLIPTokenizer) -> TextToVideoSDPipeline:
    return TextToVideoSDPipeline(vae, painter.text_encoder, tokenizer, painter.unet, make_scheduler())


def report_panel(out: Path, run: Run, pipe: DiffusionPipeline, step: int, count: int = 18) -> None:
    """Makes videos of a fixed panel of combinations, reads them, and saves a picture with a row for each video."""
    from PIL import Image

    pipe.set_progress_bar_config(disable=True)
    chosen = [world.TRAINED[17 * n % len(world.TRAINED)] for n in range(count)]  # evenly through all three
    prompts = [world.captions(*c)[0] for c in chosen]
    noise = [torch.Generator().manual_seed(n) for n in range(count)]
    videos = pipe(
        prompts,
        num_frames=world.FRAMES,
        num_inference_steps=25,
        guidance_scale=GUIDANCE,
        generator=noise,
        output_type="pt",
    ).frames  # (b f c h w)
    seen = [world.analyse(v.transpose(0, 1)) for v in videos]
    right = {name: sum(s[n] == c[n] for s, c in zip(seen, chosen, strict=True)) / count for n, name in enumerate(NAMES)}
    with (out / "panel.csv").open("a") as file:
        file.write(",".join(map(str, (step, round((time.monotonic() - run.began) / 60, 2), *right.values()))) + "\n")
    print(f"step {step} panel:", right, flush=True)
    strip = rearrange(videos[:, ::2], "b f c h w -> (b h) (f w) c")
    Image.fromarray((strip * 255).round().byte().numpy()).save(out / f"panel-{step:05d}.png")


def draw_curves(out: Path, courses: dict[str, tuple[tuple[int, int, int], ...]]) -> None:
    """What the stages logged and the panel's accuracy against minutes, as one picture.

    courses: name of a stage -> its (frames, clips a batch, steps); the picture marks where each of them begins.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(courses) + 1, figsize=(4 * len(courses) + 4, 3.6))
    for n, (axis, (stage, course)) in enumerate(zip(axes, courses.items(), strict=False), 1):
        with (out / f"{stage}.csv").open() as file:
            rows = list(csv.DictReader(file))
        column = "psnr" if "psnr" in rows[0] else "loss"
        axis.plot([float(r["minutes"]) for r in rows], [float(r[column]) for r in rows], lw=1)
        unit = "dB" if column == "psnr" else "log scale"
        steps = "; steps: " * bool(course) + " + ".join(f"{count:,}" for *_, count in course)
        axis.set(title=f"stage {n}, {stage}: {column} ({unit})", xlabel=f"minutes of this stage{steps}")
        axis.set_yscale("log" if column == "loss" else "linear")
        begin = 0
        for frames, _, count in course:
            minutes = next((float(r["minutes"]) for r in rows if int(r["step"]) > begin), None)
            if minutes is not None:
                axis.axvline(minutes, color="#555555", ls="--", lw=1)
                words = "stills" if frames == 1 else f"{frames} frames"
                axis.text(minutes, 0.02, words, transform=axis.get_xaxis_transform(), fontsize=8, rotation=90)
            begin += count
    if (out / "panel.csv").exists():
        rows = [list(map(float, line.split(","))) for line in (out / "panel.csv").read_text().split()]
        # The first is the widest, so that of lines with the same values all are seen.
        for n, (name, style, width) in enumerate(zip(NAMES, ("o-", "s--", "^:"), (7, 3.5, 1.6), strict=True)):
            values = [100 * r[2 + n] for r in rows]
            axes[-1].plot([r[1] for r in rows], values, style, lw=width, ms=3 + width, label=name)
        axes[-1].legend(handlelength=4)
    axes[-1].set(title="panel of 18 videos: % right", xlabel=f"minutes of stage {len(courses)}", ylim=(0, 104))
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the finished model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    claim(args.out, trainer="shapes", seed=args.seed)

    vae = train_vae(args.out, args.seed)
    print("round trip:", json.dumps(vae_accuracy(vae, args.seed)), flush=True)
    text_encoder = train_text(args.out, args.seed)
    painter = train_unet(args.out, args.seed, vae, text_encoder)
    make_pipeline(vae, painter, make_tokenizer()).to(torch.float16).save_pretrained(args.out / "shapes")
    draw_curves(args.out, {"vae": (), "text": (), "unet": COURSE})
    print(f"the model is in {args.out / 'shapes'}")


if __name__ == "__main__":
    main()
