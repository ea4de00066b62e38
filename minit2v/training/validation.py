"""Shows whether a run learns: a loss that can be compared, samples of fixed prompts, and how much moves in them.

The loss of a step is noisy, because its timesteps are random. Here clips, timesteps and noise are the same each time.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from minit2v_convert.rename import shown
from minit2v_convert.stream import replacing

from ..files.video import export_to_video
from ..parallel import is_sharded
from .checkpoints import forget_later
from .logs import append
from .sheet import COLUMNS, EMPTY, draw, spread
from .trainable import without_time

BINS, EACH = 4, 2  # ranges of timesteps, from nearly clean to nearly noise; timesteps in each range
FIXED = 2**31  # no run reaches this step: its batch is used for validation


class Validation:
    """Writes rows of `validation.csv`, and samples of the prompts: `samples/step-000200.mp4` and `.png`."""

    def __init__(self, trainer: Any):
        self.trainer, self.path = trainer, trainer.out / "validation.csv"
        if trainer.world.is_first:
            forget_later(self.path, trainer.done)
        recipe, data = trainer.recipe, trainer.data
        self.batch = data.load(data.batch(FIXED, min(recipe.validation_clips, max(1, len(data)))))

    def run(self) -> None:
        """Validate the current weights, unless this step was validated before."""
        trainer, step = self.trainer, self.trainer.done
        rows = self.rows()
        if is_sharded(trainer.unet) and trainer.world.from_first(lambda: step in rows) or step in rows:
            return
        with trainer.sampling():
            losses = self.losses()
            videos = self.sample()
        if not trainer.world.is_first:
            return
        motion = motion_of(videos)
        row = {"loss": sum(losses) / BINS, **{f"loss_t{k}": x for k, x in enumerate(losses)}, "motion": motion}
        self.keep(videos, trainer.out / "samples" / f"step-{step:06d}")
        append(self.path, {"step": step, **row})
        if trainer.log is not None:
            trainer.log.show("validation", step, row)
        start = next(iter(rows.values()), row)
        trainer.say(f"step {step}: validation loss {row['loss']:.4g} (at first {float(start['loss']):.4g}), "
                    f"motion {motion:.4g} (at first {float(start['motion']):.4g})")  # fmt: skip
        if row["loss"] > 2 * float(start["loss"]):
            trainer.say("warning: the validation loss is more than twice its first value: the rate is too high")

    def rows(self) -> dict[int, dict[str, Any]]:
        """{step: its row}."""
        import csv

        if not self.path.exists():
            return {}
        with self.path.open(newline="") as file:
            return {int(row["step"]): row for row in csv.DictReader(file)}

    def losses(self) -> list[float]:
        """The mean loss in each range of timesteps, at fixed clips, timesteps and noise."""
        trainer, objective = self.trainer, self.trainer.objective
        dtype = trainer.parameters[0].dtype
        latents = self.batch.latents.to(trainer.device, dtype)
        text = trainer.encoded(self.batch.captions, self.batch.text.to(trainer.device, dtype))
        total = objective.scheduler.config.num_train_timesteps
        found = []
        with trainer.layers_for(latents):
            for k in range(BINS * EACH):
                t = torch.full((len(latents),), int((k + 0.5) / (BINS * EACH) * total), device=trainer.device)
                eps = torch.stack([objective.draw_noise(trainer.recipe.seed, FIXED + k * len(latents) + n, x.shape)
                                   for n, x in enumerate(latents)]).to(latents)  # fmt: skip
                prediction = trainer.unet(objective.scheduler.add_noise(latents, eps, t), t, text)
                found.append(float(objective.loss(prediction, objective.target(latents, eps, t), t).mean()))
        return [sum(found[k * EACH : (k + 1) * EACH]) / EACH for k in range(BINS)]

    def sample(self) -> Tensor:
        """Videos (b f c h w) in [0, 1] of the prompts, float32 on the CPU. Each has its own fixed seed."""
        return sample(self.trainer.pipe, self.trainer.prompts, self.trainer.recipe)

    def keep(self, videos: Tensor, path: Path) -> None:
        """Write the videos side by side as `.mp4`, and up to eight frames of each as `.png`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if videos.shape[1] > 1:
            row = rearrange(videos, "b f c h w -> f h (b w) c").numpy()
            export_to_video(row, f"{path}.mp4", fps=8)
        save_grid(videos, self.trainer.prompts, path.with_name(path.name + ".png"))


def sample(pipe: Any, prompts: list[str], recipe: Any, seed: int | None = None, output_type: str = "pt") -> Tensor:
    """Videos (b f c h w) in [0, 1], or latents (b c f h w), float32 on the CPU.

    An image model is sampled without its motion modules. seed: of the first video; the next one has the next seed.
    None: the seed of the recipe.
    """
    pipe.set_progress_bar_config(disable=True)
    first = recipe.seed if seed is None else seed
    with without_time(pipe.unet) if recipe.train == "image" else nullcontext():
        made = pipe(prompts, height=recipe.height, width=recipe.width, num_frames=recipe.frames,
                    num_inference_steps=recipe.sample_steps, guidance_scale=recipe.guidance, output_type=output_type,
                    generator=[torch.Generator().manual_seed(first + n) for n in range(len(prompts))])  # fmt: skip
    return made.frames.float().cpu()


def motion_of(videos: Tensor) -> float:
    """The mean change of a pixel from frame to frame. It is 0 for stills. videos (b f c h w) in [0, 1]."""
    return float((videos[:, 1:] - videos[:, :-1]).abs().mean()) if videos.shape[1] > 1 else 0.0


def save_grid(videos: Tensor, prompts: Sequence[str], path: Path) -> None:
    """Write a picture of videos (b f c h w) in [0, 1]. Each has a row with its prompt and up to eight of its frames."""
    chosen = spread(videos.shape[1], COLUMNS)
    strips = [([shown(prompt) or EMPTY], 2 * video[chosen] - 1) for prompt, video in zip(prompts, videos, strict=True)]
    with replacing(path) as temporary:
        draw(strips).save(temporary, format="PNG")
