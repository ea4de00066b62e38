"""Where files come from, what a config may say, and strict loading: weights are made on `meta` and filled once."""

import json
from collections.abc import Mapping
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from minit2v_convert.rename import Layout, nearest
from torch import Tensor, nn

# Fields that describe a file's history, not a network.
HISTORY = ("_class_name", "_diffusers_version", "_name_or_path", "architectures", "transformers_version", "torch_dtype",
           "dtype", "model_type")


def make_config(cls: type, values: Mapping[str, Any]) -> Any:
    """An instance of the frozen dataclass `cls` from the fields of a config file. Raises ValueError on unknown ones."""
    known = [f.name for f in dataclass_fields(cls)]
    kept = {}
    for name, value in values.items():
        if name in known:
            kept[name] = tuple(value) if isinstance(value, list) else value
        elif name in cls.FIXED:
            if value != cls.FIXED[name]:
                raise ValueError(f"{cls.__name__}: only {name}={cls.FIXED[name]!r} is supported, not {value!r}")
        elif name not in cls.IGNORED and name not in HISTORY:
            raise ValueError(f"{cls.__name__} has no field {name!r}{nearest(name, known)}")
    return cls(**kept)


class Network(nn.Module):
    """Base of the networks: configuration, strict loading, saving."""

    Config: ClassVar[type]
    layout: ClassVar[Layout]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"

    def __init__(self, config: Any = None, **fields: Any):
        super().__init__()
        self.config = make_config(self.Config, fields) if config is None else config

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def published_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of the published checkpoints."""
        return self.layout.to_published(self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, subfolder: str | None = None, dtype=None, **kw) -> Self:
        from safetensors.torch import load_file

        folder = Path(folder) / (subfolder or "")
        with torch.device("meta"):
            model = cls(**json.loads((folder / "config.json").read_text()))
        state = cls.layout.to_ours(load_file(folder / f"{cls.weights_name}.safetensors"))
        model.load_state_dict(state, strict=True, assign=True)
        return model.to(dtype or torch.float32).eval()
