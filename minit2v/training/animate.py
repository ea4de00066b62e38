"""Trains the embedded AnimateDiff: `python -m minit2v.training.animate --out runs/animate`.

It has two stages, with checkpoints as in `shapes.py`. World, autoencoder and loss are those of `shapes.py`, too:
1. `image`: a text-to-image UNet and its text encoder learn single frames of the clips. The UNet begins as the spatial
   half of the video model `shapes`.
2. `motion`: the image model is frozen. Motion modules are trained on the clips, first on four frames, then on sixteen.
"""

import argparse
import copy
import hashlib
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.hub import DIFFUSERS_VERSION, write_json
from ..files.saving import filling
from ..models.tokenizer import CLIPTokenizer
from ..models.unet2d import UNet2DConditionModel
from ..models.unet_motion import MotionAdapter, UNetMotionModel
from ..models.vae import AutoencoderKL
from ..pipelines.animatediff import AnimateDiffPipeline
from ..pipelines.text_to_video import TextToVideoSDPipeline
from . import world
from .shapes import (
    Painter,
    claim,
    draw_batch,
    draw_curves,
    latents_of_world,
    make_scheduler,
    make_tokenizer,
    still_captions,
    train_diffusion,
)

SHAPES = Path(__file__).parent.parent / "assets" / "shapes"

IMAGE = {  # the spatial half of shapes.UNET
    "sample_size": 8,
    "block_out_channels": (48, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 64,
    "attention_head_dim": 6,  # heads, of a width of 16 where there is attention
}
MOTION = {
    "block_out_channels": (48, 96),
    "motion_layers_per_block": 1,
    "motion_norm_num_groups": 8,
    "motion_num_attention_heads": 6,
    "motion_max_seq_length": world.FRAMES,
    "resnet_norms": "frame",
}
COURSE = ((4, 24, 2150), (16, 8, 1850))  # of the motion modules: (frames, clips a batch, steps)


class ImagePainter(Painter):
    """The image model on clips of one frame."""

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x (b c 1 h w), t (b,), ids (b l) -> predicted v (b c 1 h w)."""
        return self.unet(x[:, :, 0], t, self.text_encoder(ids))[:, :, None]


class MotionPainter(Painter):
    """The motion UNet on clips of fewer frames than it numbers, spread over the whole clip: each keeps its number."""

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """x (b c f h w), t (b,), ids (b l) -> predicted v (b c f h w)."""
        chosen = torch.linspace(0, world.FRAMES - 1, x.shape[2]).round().long()
        blocks = [m for m in self.unet.modules() if getattr(m, "positions", None) is not None]
        whole = [block.positions for block in blocks]
        try:
            for block in blocks:
                block.positions = block.positions[:, chosen]
            return super().forward(x, t, ids)
        finally:
            for block, positions in zip(blocks, whole, strict=True):
                block.positions = positions


def draw_images(rng: random.Random, latents: Tensor, batch: int) -> tuple[Tensor, list[str]]:
    """Single frames x (b c 1 h w) and their captions; one in ten is empty, for guidance.

    Most captions name the motion, and most of their frames are from the end of the clip, which shows where the shape
    has gone. So words for motions keep a meaning for the image model, and motion modules find it in the features. An
    image model that was trained from nothing learned to draw in 4,000 steps, but its features did not tell left from
    right. Motion modules behind it did not learn directions.
    """
    rows, texts = [], []
    for _ in range(batch):
        i, j, k = rng.randrange(len(world.TRAINED)), rng.randrange(latents.shape[1]), rng.randrange(world.FRAMES)
        colour, shape, motion = world.TRAINED[i]
        pool = still_captions(colour, shape)
        if rng.random() < 0.8:
            pool = world.captions(colour, shape, motion)
            if rng.random() < 0.75:
                k = rng.randrange(world.FRAMES - 3, world.FRAMES)
        rows.append(latents[i, j][:, [k]])
        texts.append("" if rng.random() < 0.1 else rng.choice(pool))
    return torch.stack(rows).float(), texts


def train_image(
    out: Path, seed: int, vae: AutoencoderKL, video: TextToVideoSDPipeline, steps: int = 6500, batch: int = 64
) -> Painter:
    """video: the model of which the image model gets the text encoder and the spatial half."""
    torch.manual_seed(seed)
    latents = latents_of_world(vae, out, seed)
    unet = UNet2DConditionModel(**IMAGE)
    theirs = video.unet.state_dict()
    unet.load_state_dict({name: theirs[name] for name in unet.state_dict()})
    painter = ImagePainter(unet, video.text_encoder.train())
    return train_diffusion(out, "image", seed, painter, make_tokenizer(), ((1, batch, steps),), 1e-3,
                           lambda rng, _, batch: draw_images(rng, latents, batch))  # fmt: skip


def train_motion(
    out: Path,
    seed: int,
    vae: AutoencoderKL,
    image: Painter,
    course: tuple[tuple[int, int, int], ...] = COURSE,
    panel: int = 500,
) -> Painter:
    """course: (frames, clips a batch, steps)."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    latents = latents_of_world(vae, out, seed)
    unet = UNetMotionModel.from_unet2d(image.unet, MotionAdapter(**MOTION)).train()
    unet.freeze_unet2d_params()
    painter = MotionPainter(unet, image.text_encoder.requires_grad_(False))
    # At low noise the frozen image model suffices. What all frames share is decided at high noise.
    return train_diffusion(
        out, "motion", seed, painter, tokenizer, course, 1.5e-3,
        lambda rng, frames, batch: draw_batch(rng, latents, frames, batch),
        lambda average: make_pipeline(vae, average, tokenizer), panel, noisy=0.8,
    )  # fmt: skip


def make_pipeline(vae: AutoencoderKL, painter: Painter, tokenizer: CLIPTokenizer) -> AnimateDiffPipeline:
    return AnimateDiffPipeline(vae, painter.text_encoder, tokenizer, painter.unet, None, make_scheduler())


def digest(video: TextToVideoSDPipeline) -> str:
    """The SHA-256 of all weights of a video model, which identifies it."""
    networks = (video.unet, video.vae, video.text_encoder)
    return hashlib.sha256(b"".join(x.numpy().tobytes() for n in networks for x in n.state_dict().values())).hexdigest()


def save_models(out: Path, vae: AutoencoderKL, painter: Painter) -> None:
    """`shapes-image`, a folder as Stable Diffusion's, and `shapes-motion`, a motion adapter; both in float16."""
    image = UNet2DConditionModel(**IMAGE)
    image.load_state_dict({name: v for name, v in painter.unet.state_dict().items() if ".motion." not in name})
    networks = {"unet": image, "vae": vae, "text_encoder": painter.text_encoder}
    others = {"tokenizer": make_tokenizer(), "scheduler": make_scheduler()}
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": DIFFUSERS_VERSION}
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    with filling(out / "shapes-image") as new:
        for name, component in (networks | others).items():
            if name in networks:
                component = copy.deepcopy(component).half()
            component.save_pretrained(new / name)
            library = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
            index[name] = [library, type(component).__name__]
        write_json(new / "model_index.json", index)
    copy.deepcopy(painter.unet).half().save_motion_modules(out / "shapes-motion")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints, curves and the finished models")
    parser.add_argument("--video", type=Path, default=SHAPES, help="folder of the video model to begin with")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    video = TextToVideoSDPipeline.from_pretrained(args.video)
    claim(args.out, trainer="animate", seed=args.seed, video=digest(video))
    image = train_image(args.out, args.seed, video.vae, video)
    save_models(args.out, video.vae, train_motion(args.out, args.seed, video.vae, image))
    draw_curves(args.out, {"image": (), "motion": COURSE})
    print(f"the models are in {args.out / 'shapes-image'} and {args.out / 'shapes-motion'}")


if __name__ == "__main__":
    main()
