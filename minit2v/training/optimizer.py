"""The optimizer of a training run, and the moving average of the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..parallel import local
from .recipe import Recipe


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101). groups: each has its own learning `rate`.

    ValueError where 8-bit AdamW is not installed, or cannot run on the device.
    """
    values = {"lr": recipe.learning_rate, "betas": (0.9, recipe.beta2), "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("optimizer 'adamw8bit' needs bitsandbytes: pip install 'minit2v[train-8bit]'") from None
        if device.type != "cuda":
            raise ValueError(f"optimizer 'adamw8bit' runs on CUDA, not on {device.type}")
        return AdamW8bit(groups, **values)
    return torch.optim.AdamW(groups, fused=True, **values)


class Average:
    """A moving average of the weights, which makes better samples than the weights themselves.

    decay: the share of the old average that a step keeps. It is smaller at the beginning: (1 + n) / (10 + n) after n
        steps. 0: there is no average.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float):
        self.parameters, self.decay, self.count = list(parameters), decay, 0
        self.values = [p.detach().clone() for p in self.parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        if self.decay:
            decay = min(self.decay, (1 + self.count) / (10 + self.count))
            # Only the local parts of sharded weights: with DTensors the first step would take minutes.
            torch._foreach_lerp_(*(list(map(local, xs)) for xs in (self.values, self.parameters)), 1 - decay)
            self.count += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the parameters have the values of the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for p, value in zip(self.parameters, self.values, strict=False):
            kept = p.detach().clone()
            p.copy_(value)
            value.copy_(kept)
