"""What a `torch.save` file has around its tensors: trainers' dictionaries, and names with a prefix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .rename import nearest

WRAPPERS = ("state_dict", "module", "controlnet")  # one inside the other, in any order
GROUPS = ("image_proj", "ip_adapter")  # IP-Adapter's two dictionaries, which are one file with dots elsewhere
TRAINERS = {
    "epoch": "how far the training was",
    "global_step": "how far the training was",
    "loops": "how far the training was",
    "optimizer_states": "the optimizer's, with which training goes on",
    "optimizer": "the optimizer's, with which training goes on",
    "lr_schedulers": "the optimizer's, with which training goes on",
    "native_amp_scaling_state": "the optimizer's, with which training goes on",
    "callbacks": "the trainer's",
    "hyper_parameters": "the trainer's",
    "hparams_name": "the trainer's",
    "hparams_type": "the trainer's",
    "datamodule_hparams_name": "the trainer's",
    "datamodule_hparams_type": "the trainer's",
    "datamodule_hyper_parameters": "the trainer's",
    "checkpoint_callback_best_model_score": "the trainer's",
    "checkpoint_callback_best_model_path": "the trainer's",
    "early_stop_callback_wait": "the trainer's",
    "early_stop_callback_patience": "the trainer's",
    "MixedPrecision": "the optimizer's, with which training goes on",
    "MixedPrecisionPlugin": "the optimizer's, with which training goes on",
    "pytorch-lightning_version": "the trainer's",
    "animatediff_config": "a copy of the training's configuration",
}


@dataclass(frozen=True)
class Contents:
    """The tensors under their names; the dictionaries they were in, outermost first; what else was there, and why not.

    None of `ignored` can come back: a file converted to a folder and back is the tensors alone.
    """

    tensors: dict[str, Tensor]
    path: tuple[str, ...]
    ignored: dict[str, str]


def unwrap(content: Any) -> Contents:
    """The tensors of what `torch.load` returned. Raises ValueError where it is not tensors by name."""
    path: list[str] = []
    ignored: dict[str, str] = {}
    while True:
        if not isinstance(content, Mapping):
            raise ValueError(f"{'.'.join(path) or 'it'} is a {type(content).__name__}, not tensors by name")
        inner = [w for w in WRAPPERS if isinstance(content.get(w), Mapping)]
        groups = [g for g in GROUPS if isinstance(content.get(g), Mapping)]
        tensors = {n: x for n, x in content.items() if isinstance(x, Tensor)} if not inner else {}
        for name, value in content.items():
            if name in inner[:1] or name in groups and not inner or name in tensors:
                continue
            where = ".".join([*path, str(name)])
            if name not in TRAINERS:
                known = [*WRAPPERS, *GROUPS, *TRAINERS]
                raise ValueError(f"{where!r} is a {type(value).__name__}: nothing is known of it"
                                 f"{nearest(str(name), known)}")  # fmt: skip
            ignored[where] = TRAINERS[name]
        if not inner:
            break
        path.append(inner[0])
        content = content[inner[0]]
        if len(path) > 4:
            raise ValueError(f"{'.'.join(path)}: dictionaries without end")
    for group in groups:
        for name, value in content[group].items():
            if not isinstance(value, Tensor):
                raise ValueError(f"'{group}.{name}' is a {type(value).__name__}, not a tensor")
            tensors[f"{group}.{name}"] = value
    for name in tensors:
        if not isinstance(name, str):
            raise ValueError(f"a tensor has the name {name!r}, which is not text")
    return Contents(tensors, tuple(path), ignored)
