"""Plans for training models that are not loaded: what their configs say is enough, and weights are on `meta`.

    training_planner_of_model("ms-1.7b", "lora", frames=16, height=256, width=256).choose("8GiB")
"""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from minit2v_convert.rename import nearest

from ..memory.plan import TEXT
from ..memory.training import Clips, TrainingPlanner
from ..models.blocks import TemporalConv
from ..pipelines.planning import check_size, networks_of_model, own_size
from .recipe import LORAS
from .trainable import KINDS, add_lora, add_motion_director, choose, without_time

PUBLISHED_DROPOUT = 0.1  # of ModelScope's temporal convolutions, where they are trained


def training_planner_of_model(
    name: str, train: str = "lora", targets: str | Sequence[str] = (), rank: int = 8, device: str = "cuda",
    batch: int = 4, ema: bool | None = None, processes: int = 1, adapter: str | None = None, **size: Any,
) -> TrainingPlanner:
    """Of the same names. train, targets, rank, batch: as in training/recipe.py. ema: a moving average; None: as there.

    size: frames, height, width, of which those that are not given are the model's own. Raises ValueError.
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
    """Makes trainable in a UNet what `minit2v train` would, in training mode. Raises ValueError."""
    unet.train()
    if train in LORAS:
        if targets and train != "lora":
            raise ValueError(f"targets belongs to train 'lora' or 'patterns', not to {train!r}")
        if train == "motiondirector":  # of its two paths, that of the clips needs more: the other one rests meanwhile
            spatial, temporal = add_motion_director(unet, rank)
            spatial.use(trained=False)
            return [*spatial.parameters(), *temporal.parameters()]
        return add_lora(unet, "motion" if train == "motion-lora" else targets or "both", rank).parameters()
    if targets and train != "patterns":
        raise ValueError(f"targets belongs to train 'lora' or 'patterns', not to {train!r}")
    if train not in (*KINDS, "image"):
        raise ValueError(f"train must be one of {', '.join((*LORAS, *KINDS, 'image'))}, not {train!r}"
                         f"{nearest(train, (*LORAS, *KINDS, 'image'))}")  # fmt: skip
    chosen = choose(unet, "spatial" if train == "image" else train, targets)
    if train in ("full", "temporal", "patterns"):
        for module in unet.modules():
            if isinstance(module, TemporalConv):
                module.dropout = PUBLISHED_DROPOUT
    return [p for _, p in chosen]
