"""Prior preservation: every batch also has clips of what the model can do already, so that it does not forget.

The idea is from DreamBooth (Ruiz et al. 2022, arXiv:2208.12242). A prior set is a data set, or clips that the model
itself makes before it is trained.
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from tqdm import tqdm

from minit2v_convert.stream import replacing

from ..parallel import WEEK, World
from .cache import digest, digest_of
from .data import Batch
from .objective import drop_text
from .recipe import Recipe
from .validation import sample


class Item(NamedTuple):
    """One row of a batch: the number of the sample, and the clip."""

    number: int
    clip: int


class SelfMade:
    """Clips that a pipeline makes of prompts, as latents. It is used like a `Data`.

    prompts: they take turns. count: how many clips. folder: where they are files. Each clip has its own seed and is
    made once. Files appear whole or not at all, so an interrupted run makes only the missing ones.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str], count: int, folder: Path, recipe: Recipe, world: World):
        self.count, self.recipe = count, recipe
        self.prompts = [prompts[n % len(prompts)] for n in range(count)]
        how = [recipe.frames, recipe.height, recipe.width, recipe.sample_steps, recipe.guidance, recipe.seed]
        self.fingerprint = digest(digest_of(pipe.unet), dict(pipe.scheduler.config), how, self.prompts)
        self.folder = folder / self.fingerprint[:16]
        with torch.no_grad():
            self._make(pipe, world)
            states = {text: pipe.encode_prompt([text], pipe.device, 1, False)[0][0].float().cpu()
                      for text in dict.fromkeys([*self.prompts, ""])}  # fmt: skip
        self.text = states
        self.latents = [load(self._path(n).read_bytes())["latents"] for n in range(count)]

    def _path(self, n: int) -> Path:
        return self.folder / f"{n:05d}.safetensors"

    def _make(self, pipe: Any, world: World) -> None:
        left = [n for n in range(world.rank, self.count, world.size) if not self._path(n).exists()]
        for n in tqdm(left, "clips of the model itself", disable=not left or not world.is_first):
            latents = sample(pipe, [self.prompts[n]], self.recipe, self.recipe.seed + n, "latent")[0]
            with replacing(self._path(n)) as temporary:
                temporary.write_bytes(save({"latents": latents.contiguous()}))
        world.barrier("clips of the model itself", WEEK)

    def __len__(self) -> int:
        return self.count

    def batch(self, step: int, batch: int) -> list[Item]:
        """What a step uses. All clips come in a random order, then in another one, and so on."""
        found = []
        for number in range(step * batch, (step + 1) * batch):
            epoch, place = divmod(number, self.count)
            order = random.Random(f"{self.recipe.seed} prior {epoch}").sample(range(self.count), self.count)
            found.append(Item(number, order[place]))
        return found

    def load(self, items: Sequence[Item]) -> Batch:
        share = self.recipe.text_dropout or 0.0
        captions = ["" if drop_text(self.recipe.seed, i.number, share) else self.prompts[i.clip] for i in items]
        return Batch(torch.stack([self.latents[i.clip] for i in items]), torch.stack([self.text[c] for c in captions]),
                     captions, [str(self._path(i.clip)) for i in items], [i.number for i in items])  # fmt: skip


def read_prompts(given: Sequence[str]) -> list[str]:
    """All prompts. A text that ends in .txt is a file with a prompt on each line. ValueError where there is none."""
    found: list[str] = []
    for text in given:
        if text.endswith(".txt"):
            text_of = Path(text).read_text(encoding="utf-8")
            found += [line.strip() for line in text_of.splitlines() if line.strip()]
        else:
            found.append(text)
    if not found:
        raise ValueError(f"prior_prompts: there is no prompt in {', '.join(given)}")
    return found


def make_prior(recipe: Recipe, pipe: Any, make_data: Callable[..., Any], world: World) -> Any:
    """The prior set of a recipe, or None. pipe: the model before training."""
    if not recipe.prior_rows:
        return None
    if recipe.prior == "self":
        prompts = read_prompts(recipe.prior_prompts)
        return SelfMade(pipe, prompts, recipe.prior_clips, Path(recipe.cache or recipe.out) / "prior", recipe,
                        world)  # fmt: skip
    return make_data(recipe, pipe, world, (recipe.prior,), recipe.seed + 1)
