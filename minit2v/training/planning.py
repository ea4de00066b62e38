"""Plans for training models that are not loaded. Only configs are read, and the weights are on `meta`.

    training_planner_of_model("ms-1.7b", "lora", frames=16, height=256, width=256).choose("8GiB")
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from ..memory.plan import TEXT
from ..memory.training import Clips, TrainingPlanner
from ..pipelines.planning import check_size, networks_of_model, own_size
from .recipe import LORAS, Recipe
from .trainable import prepare, without_time


def training_planner_of_model(
    name: str, train: str = "lora", targets: str | Sequence[str] = (), rank: int = 8, device: str = "cuda",
    batch: int = 4, ema: bool | None = None, processes: int = 1, adapter: str | None = None, **size: Any,
) -> TrainingPlanner:
    """A planner for a training of a model. name: a folder or a hub id.

    train, targets, rank, batch: as in a `Recipe`. ema: whether there is a moving average. None: as in a `Recipe`.
    size: frames, height, width (pixels). Those that are not given are the model's own. Raises ValueError.
    """
    _, networks = networks_of_model(name, torch.float32, adapter)
    unet, encoder, factor = networks["unet"], networks.get("text_encoder"), networks["vae"].config.factor
    given = {k: v for k, v in size.items() if v is not None}
    if train == "image" and given.setdefault("frames", 1) > 1:
        raise ValueError(f"train 'image' sees one frame at a time, not {given['frames']}")
    if batch % processes:
        raise ValueError(f"batch {batch} does not divide among {processes} processes")
    video = Clips(**own_size(networks) | given | {"clips": batch // processes})
    check_size(networks, video)
    return TrainingPlanner(
        unet, trained_of(unet, train, targets, rank), video, factor=factor, processes=processes, device=device,
        tokens=TEXT if encoder is None else encoder.config.max_position_embeddings,
        ema=train not in LORAS if ema is None else ema,
        around=partial(without_time, unet) if train == "image" else nullcontext,
    )  # fmt: skip


def trained_of(unet: Any, train: str, targets: str | Sequence[str], rank: int) -> list[torch.Tensor]:
    """Make trainable in a UNet what `minit2v train` would train, and return it. Raises ValueError."""
    recipe = Recipe(train=train, targets=targets, rank=rank).filled(type(unet).__name__)  # type: ignore[arg-type]
    loras, named = prepare(unet, recipe)
    if train == "motiondirector":
        loras["spatial"].use(trained=False)  # of the two paths, the one of whole clips needs more memory
    return [p for _, p in named]
