"""`minit2v train`: fine-tunes a model or trains a LoRA on clips."""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

from ..training.recipe import HINTS, Recipe, read_recipe
from .ends import importing
from .messages import say, tell


def run(args: argparse.Namespace) -> int:
    """Returns the exit code. Errors are raised."""
    given = {name: value for name, value in vars(args).items() if name in HINTS}
    config = args.config or _run_of(given)
    if config is None and "data" not in given:
        args.usage_error("give --data: a folder of clips with captions, a list, or one clip")
    recipe = read_recipe(config, given)
    with importing():
        from .. import parallel
        from ..training.layouts import read_layout
        from ..training.sources import as_sources
        from ..training.start import filled, make_data, train
        from .loading import find_device

    for source in as_sources(recipe.data, {}):  # a model can take minutes to load: wrong lists are named before
        read_layout(source.path, source.folder, warn=lambda line: None)
    world = parallel.world(find_device(recipe.device))
    pipe, guidance = load(recipe)
    if args.check:
        from ..training.sheet import look

        recipe = filled(recipe, pipe, guidance)
        path = Path(recipe.out) / "check.png"
        tell(*look(make_data(recipe, pipe), path, recipe.batch).splitlines())
        tell(f"a picture of the clips, with their captions: {path}")
        return 0
    if world.is_first:
        tell(*filled(recipe, pipe, guidance).lines())
    result = train(recipe, pipe, world, partial(reloaded, recipe), guidance, say, args.resume_anyway)
    if result is not None:
        tell(str(result))
    world.barrier("the end")
    world.close()
    return 0


def _run_of(given: dict[str, Any]) -> Path | None:
    """The recipe of a run that is there: `minit2v train --out RUN` without data goes on with it."""
    path = Path(given.get("out", "")) / "run.json"
    return path if "out" in given and "data" not in given and path.exists() else None


def load(recipe: Recipe, **settings: Any) -> tuple[Any, float]:
    """The pipeline of the recipe's model on its device, in float32, and its usual guidance scale.

    settings: further settings of `cli.loading.load`, such as a LoRA.
    """
    from ..files import embedded
    from . import loading
    from .videos import PRESETS

    adapter = recipe.adapter
    family, schedule = loading.family_of(recipe.model, {"revision": None})
    animates = family != "UNet3DConditionModel"
    if family == "UNet2DConditionModel":
        if adapter is None and recipe.model == "shapes-image":
            adapter = "shapes-motion"
        if adapter == "new" or adapter is None and recipe.train == "image":
            adapter = _new_adapter(recipe)
    given: dict[str, Any] = {"base" if animates else "model": recipe.model, "device": recipe.device,
                             "dtype": "float32", "optimize": False, "height": recipe.height, "width": recipe.width}
    given |= {"adapter": adapter} if adapter else {}
    given |= PRESETS[recipe.model] if embedded.find(recipe.model) else {}
    pipe, call = loading.load("animate" if animates else "generate", {**given, **settings}, None)
    if recipe.train == "image":  # with its own noise schedule, not that of motion modules
        from .. import schedulers

        pipe.scheduler = getattr(schedulers, schedule["_class_name"]).from_config(schedule)
    return pipe, call["guidance_scale"]


def _new_adapter(recipe: Recipe) -> str:
    """A folder with new motion modules, which change nothing yet. A run makes it once."""
    import torch

    from ..models.unet2d import UNet2DConditionModel
    from ..models.unet_motion import UNetMotionModel

    folder = Path(recipe.out) / "adapter-new"
    if not (folder / "config.json").exists():
        torch.manual_seed(recipe.seed)
        image = UNet2DConditionModel.from_pretrained(recipe.model, subfolder="unet")
        UNetMotionModel.from_unet2d(image, None).save_motion_modules(folder)
    return str(folder)


def reloaded(recipe: Recipe, path: Path) -> Any:
    """A new pipeline with the result of a run, loaded as `minit2v generate` and `animate` load it."""
    if path.is_file():
        lora = {"motion_lora" if recipe.train == "motion-lora" else "lora": [(str(path), 1.0)]}
        return load(recipe, **lora)[0]
    if recipe.train == "motion":
        return load(dataclasses.replace(recipe, adapter=str(path)))[0]
    if recipe.train == "image":
        pipe, _ = load(recipe)
        from ..models.unet2d import UNet2DConditionModel

        image = UNet2DConditionModel.from_pretrained(path, subfolder="unet").to(pipe.unet.device)
        pipe.unet.load_state_dict(image.state_dict(), strict=False)
        return pipe
    return load(dataclasses.replace(recipe, model=str(path), adapter=None))[0]
