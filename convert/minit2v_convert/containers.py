"""Finds the tensors in the content of a `torch.save` file, inside the dictionaries of trainers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .rename import nearest

WRAPPERS = ("state_dict", "module", "controlnet")  # dictionaries around the tensors, nested in any order
GROUPS = ("image_proj", "ip_adapter")  # IP-Adapter's two dictionaries; other files have them as prefixes with a dot
TRAINERS = {
    "epoch": "the progress of the training",
    "global_step": "the progress of the training",
    "loops": "the progress of the training",
    "optimizer_states": "the state of the optimizer, only needed to resume training",
    "optimizer": "the state of the optimizer, only needed to resume training",
    "lr_schedulers": "the state of the optimizer, only needed to resume training",
    "native_amp_scaling_state": "the state of the optimizer, only needed to resume training",
    "callbacks": "settings of the trainer",
    "hyper_parameters": "settings of the trainer",
    "hparams_name": "settings of the trainer",
    "hparams_type": "settings of the trainer",
    "datamodule_hparams_name": "settings of the trainer",
    "datamodule_hparams_type": "settings of the trainer",
    "datamodule_hyper_parameters": "settings of the trainer",
    "checkpoint_callback_best_model_score": "settings of the trainer",
    "checkpoint_callback_best_model_path": "settings of the trainer",
    "early_stop_callback_wait": "settings of the trainer",
    "early_stop_callback_patience": "settings of the trainer",
    "MixedPrecision": "the state of the optimizer, only needed to resume training",
    "MixedPrecisionPlugin": "the state of the optimizer, only needed to resume training",
    "pytorch-lightning_version": "settings of the trainer",
    "animatediff_config": "a copy of the training settings",
}


@dataclass(frozen=True)
class Contents:
    """The content of a file. tensors: {name: tensor}. path: the dictionaries around them, the outermost first.

    ignored: {other content: reason}. It is lost if the file is converted to a folder and back.
    """

    tensors: dict[str, Tensor]
    path: tuple[str, ...]
    ignored: dict[str, str]


def unwrap(content: Any) -> Contents:
    """The tensors in the result of `torch.load`. Raises ValueError if it is not a dictionary of tensors."""
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
                raise ValueError(f"{where!r} is an unknown {type(value).__name__}"
                                 f"{nearest(str(name), known)}")  # fmt: skip
            ignored[where] = TRAINERS[name]
        if not inner:
            break
        path.append(inner[0])
        content = content[inner[0]]
        if len(path) > 4:
            raise ValueError(f"{'.'.join(path)}: too many nested dictionaries")
    for group in groups:
        for name, value in content[group].items():
            if not isinstance(value, Tensor):
                raise ValueError(f"'{group}.{name}' is a {type(value).__name__}, not a tensor")
            tensors[f"{group}.{name}"] = value
    for name in tensors:
        if not isinstance(name, str):
            raise ValueError(f"a tensor has the name {name!r}, which is not text")
    return Contents(tensors, tuple(path), ignored)
