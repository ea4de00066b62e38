"""A whole run from a recipe and a model: data, prior set, trainer, and at the end the result.

    pipe = TextToVideoSDPipeline.from_pretrained("shapes")
    train(Recipe(data=("clips",), out="runs/mine", steps=500), pipe)
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ..files.saving import locked
from ..memory.training import binary
from ..parallel import World
from ..pipelines.checks import check_size
from .data import Data
from .prior import make_prior
from .recipe import Recipe
from .result import finish
from .trainable import check_targets
from .trainer import Trainer


def filled(recipe: Recipe, pipe: Any, guidance: float | None = None) -> Recipe:
    """The recipe with the usual values for this model. `text_dropout` stays None, because it depends on the data.

    ValueError where the recipe does not fit the model.
    """
    usual = inspect.signature(type(pipe).__call__).parameters["guidance_scale"].default
    recipe = recipe.filled(type(pipe.unet).__name__, cuda=pipe.unet.device.type == "cuda", guidance=guidance or usual)
    height, width = check_size(recipe.height, recipe.width, pipe.unet, pipe.vae_scale_factor)
    check_targets(pipe.unet, recipe)  # before data are read and videos of the prior are made
    return dataclasses.replace(recipe, height=height, width=width)


def make_data(
    recipe: Recipe, pipe: Any, world: World | None = None, sources: Sequence[Any] | None = None, seed: int | None = None
) -> Data:
    """The clips of a filled recipe, for this model. sources, seed: in place of the recipe's."""
    names = ("frames", "height", "width", "fps", "stride", "clips", "short", "flip", "prompt", "prefix")
    options = {name: getattr(recipe, name) for name in names}
    return Data.of(pipe, list(recipe.data if sources is None else sources), cache=recipe.cache,
                   seed=recipe.seed if seed is None else seed, text_dropout=recipe.text_dropout, progress=True,
                   world=world, **options)  # fmt: skip


def prepare(
    recipe: Recipe,
    pipe: Any,
    world: World | None = None,
    guidance: float | None = None,
    say: Callable[[str], None] = print,
    resume_anyway: bool = False,
) -> Trainer:
    """A trainer that is ready to run. All is checked, clips of the model itself are made, and the cache is filled.

    guidance: the guidance scale that suits the model. Errors as of `Data`, `Recipe` and `Trainer`.
    """
    world = world or World()
    recipe = filled(recipe, pipe, guidance)
    data = make_data(recipe, pipe, world)
    recipe = dataclasses.replace(recipe, text_dropout=data.text_dropout)
    if data.skipped and world.is_first:
        say(f"skipped files: {len(data.skipped)}; --check says which and why")
    prior = make_prior(recipe, pipe, make_data, world)
    trainer = Trainer(pipe, data, recipe, world, prior, say, resume_anyway)
    sets = [(data, recipe.batch - recipe.prior_rows), (prior, recipe.prior_rows)]
    for found, rows in ((found, rows) for found, rows in sets if isinstance(found, Data)):
        if world.is_first and found.cache.folder is not None:
            say(f"cache {found.cache.folder}: {binary(found.cache.size())} now; the clips of this run take about "
                f"{binary(found.cache_bytes(recipe.steps * rows))}")  # fmt: skip
        if trainer.done < recipe.steps:
            found.fill(recipe.steps, rows)
    return trainer


def train(
    recipe: Recipe,
    pipe: Any,
    world: World | None = None,
    reload: Callable[[Path], Any] | None = None,
    guidance: float | None = None,
    say: Callable[[str], None] = print,
    resume_anyway: bool = False,
) -> Path | None:
    """A whole run: data, training, result. Returns the path of the result, and None on processes but the first.

    reload: makes a new pipeline from the result, which is compared with the trained one. None: no comparison.
    Errors as of `Data`, `Recipe` and `Trainer`. ValueError, too, where another process trains in the same folder.
    """
    world = world or World()
    with ExitStack() as stack:
        world.from_first(lambda: stack.enter_context(alone(Path(recipe.out))))
        trainer = prepare(recipe, pipe, world, guidance, say, resume_anyway)
        trainer.run()
        return finish(trainer, reload)


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """In the block, no other process trains in this folder: their logs and checkpoints would mix.

    ValueError where another process is there. A folder that stays empty is removed.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with locked(out, f"another process is training in {out}: wait for it, or give another folder as --out"):
            yield
    finally:
        if new:
            with suppress(OSError):  # it is not empty
                out.rmdir()
