"""The result of a run in files that others load. A sample of the loaded file must be that of the trainer."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.unet2d import UNet2DConditionModel
from ..parallel import is_sharded
from .export import save_lora, save_model
from .trainer import Trainer
from .validation import sample, save_grid

ALIKE = 1e-4  # the largest mean difference of pixels in [0, 1]; in 16 bits ten times as much


def export(trainer: Trainer) -> Path:
    """Write the result into the run's folder, and return its path: the file of a LoRA, or a folder.

    The result of MotionDirector is its temporal LoRA. The spatial one is written beside it. Where weights are averaged,
    call it in `trainer.averaged()`: then the average is the result.
    """
    recipe, out = trainer.recipe, trainer.out
    about = {"minit2v_recipe": str(recipe.train), "minit2v_base": recipe.model, "minit2v_steps": str(trainer.done)}
    if recipe.train == "motiondirector":
        save_lora(out / "spatial.safetensors", [trainer.loras["spatial"]], metadata=about)
        return save_lora(out / "motion.safetensors", [trainer.loras["temporal"]], metadata=about)
    if recipe.train == "motion-lora":
        save_lora(out / "lora-animatediff.safetensors", [trainer.loras["lora"]], format="guoyww", metadata=about)
    if trainer.loras:
        loras = [*trainer.loras.values()]
        if recipe.kohya:
            save_lora(out / "lora-kohya.safetensors", loras, format="kohya", metadata=about)
        return save_lora(out / "lora.safetensors", loras, metadata=about)
    folder = out / "model"
    if recipe.train == "image":
        return save_image_model(trainer, folder)
    save_model(folder, trainer.pipe, None, motion=recipe.train == "motion")
    return folder


def save_image_model(trainer: Trainer, folder: Path) -> Path:
    """Write the image model without its motion modules, as the folder of a UNet."""
    unet = trainer.unet
    names = [f.name for f in dataclasses.fields(UNet2DConditionModel.Config)]
    fields = {name: getattr(unet.config, name) for name in names if hasattr(unet.config, name)}
    fields["attention_head_dim"] = unet.config.num_attention_heads
    for name in ("down_block_types", "up_block_types"):
        fields[name] = tuple(kind.replace("Motion", "2D") for kind in fields[name])
    image = UNet2DConditionModel(**fields)
    image.load_state_dict({name: v for name, v in unet.state_dict().items() if ".motion." not in name})
    image.save_pretrained(folder / "unet")
    return folder


def finish(trainer: Trainer, reload: Callable[[Path], Any] | None = None) -> Path | None:
    """Export the result, load it, and compare the videos of both for the same noise. Returns the result's path.

    `result.png` gets a row for each prompt. ValueError where the loaded result makes other videos. Of several processes
    the first returns the path, and the others return None.
    """
    first, prompts, mine = trainer.world.is_first, trainer.prompts, None
    if first or is_sharded(trainer.unet):
        with trainer.sampling():
            mine = sample(trainer.pipe, prompts, trainer.recipe)
    with trainer.averaged():
        if is_sharded(trainer.unet):
            trainer.world.make_whole(trainer.unet)
        path = export(trainer) if first else None
    if path is None or mine is None:
        return None
    save_grid(mine, prompts, trainer.out / "result.png")
    trainer.say(f"the result is {path}")
    if reload is not None:
        theirs = sample(reload(path), prompts, trainer.recipe)
        difference = float((mine - theirs).abs().mean())
        bound = ALIKE * (1 if trainer.recipe.precision == "float32" else 10)
        if not difference <= bound:
            raise ValueError(f"{path} makes other videos than the trained model: the mean difference of pixels is "
                             f"{difference:.2g}, and at most {bound:g} is rounding")  # fmt: skip
        trainer.say(f"loaded from the file it makes the same videos: the mean difference of pixels is {difference:.1g}")
    return path
