"""The base class of all networks: config, strict loading, saving under diffusers' names."""

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from minit2v_convert import families
from minit2v_convert.folders import is_authors_layout
from minit2v_convert.rename import Layout, nearest
from minit2v_convert.stream import parse_json, replacing

from ..adapters.low_rank import has_branches
from ..compat import compat_fields
from ..files.config import config_fields, make_config, one_dtype, quoted, read_from
from ..files.hub import DIFFUSERS_VERSION, choose_weights, find_config, find_folder, local, local_file, write_json
from ..files.saving import filling
from ..files.weights import Weightless, fill, fill_from, open_weights

logger = logging.getLogger(__name__)


class Network(nn.Module):
    """Base of the networks: configuration, strict loading, saving."""

    Config: ClassVar[type]
    config: Any  # in every class: an object of its Config
    layout: ClassVar[Layout]
    weights_name: ClassVar[str] = "diffusion_pytorch_model"  # "model" for transformers' file names
    # The first fields of config.json. None means diffusers' `_class_name` and `_diffusers_version`.
    head: ClassVar[dict[str, Any] | None] = None

    def __init__(self, config: Any = None, *, compat: str | None = None, **fields: Any):
        """`config` is a Config object. Keywords are fields of a config.json, and win over it.

        compat: a mode, see `set_compat`.
        Raises ValueError if a field does not exist, has a wrong value, or if `config` belongs to another network.
        """
        super().__init__()
        if config is not None and not self._is_config(config):
            raise ValueError(f"config must be a {self.Config.__name__}, not a {type(config).__name__}: "
                             "from_config takes a dict")  # fmt: skip
        values = {f.name: getattr(config, f.name) for f in dataclass_fields(config)} if config is not None else {}
        whole = not fields and isinstance(config, self.Config)
        self.config = config if whole else make_config(self.Config, {**values, **fields})
        self.explicit = frozenset(fields)  # passed in code, so `set_compat` does not change them
        self.compat: str | None = None
        self.set_compat(compat)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    if not TYPE_CHECKING:  # otherwise a type checker would accept every name

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith("_") or hasattr(type(self), name):  # the error of a property says more
                    raise
                near = nearest(name, [n for n in dir(self) if not n.startswith("_")])
                raise AttributeError(f"{type(self).__name__} has no {name!r}{near}", name=name) from None

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        say_unneeded("enable_xformers_memory_efficient_attention", "PyTorch's own attention needs as little memory")

    def disable_xformers_memory_efficient_attention(self) -> None:
        say_unneeded("disable_xformers_memory_efficient_attention", "xformers is never used")

    def fuse_qkv_projections(self) -> None:
        say_unneeded("fuse_qkv_projections", "the pipeline's optimize() fuses q, k and v")

    def unfuse_qkv_projections(self) -> None:
        say_unneeded("unfuse_qkv_projections", "the pipeline's restore() undoes what optimize() did")

    def set_compat(self, compat: str | None) -> Self:
        """Set the fields in which this package deviates from diffusers to the values of a mode (see compat.py).

        Fields that were passed in code keep their values. None changes nothing.
        Raises ValueError if the mode is unknown.
        """
        if compat is not None:
            forced: dict[str, Any] = {}
            for name in self.class_names():  # a user's subclass deviates like its base class
                forced |= compat_fields(name, compat)
            self.config = replace(self.config, **{n: v for n, v in forced.items() if n not in self.explicit})
            self.compat = compat
        return self

    @classmethod
    def class_names(cls) -> list[str]:
        """The class names that a file may have for this class: its own and those of its base networks."""
        return [c.__name__ for c in cls.__mro__ if issubclass(c, Network)]

    @classmethod
    def _is_config(cls, config: Any) -> bool:
        """Whether this is a Config of the class or of one of its base classes."""
        return isinstance(config, tuple(c.Config for c in cls.__mro__ if "Config" in vars(c)))

    def diffusers_state_dict(self) -> dict[str, Tensor]:
        """The parameters under diffusers' names (CLIP: transformers' names).

        Parameters that diffusers does not have keep our names.
        """
        state = self.state_dict()
        return self.layout.to_diffusers(state, self.layout.own(state))

    @classmethod
    def from_config(cls, config: Any, *, compat: str | None = None, **overrides: Any) -> Self:
        """A network with random weights.

        config: the content of a config.json as a dict, or a Config. Other keywords change fields of it.
        compat: a mode, see `set_compat`.
        Raises ValueError if the config belongs to another class, or if a field is unknown or wrong.
        """
        if cls._is_config(config):
            return cls(config, compat=compat, **overrides)
        if not isinstance(config, Mapping):
            raise ValueError(f"config must be a dict or a {cls.Config.__name__}, not a {type(config).__name__}")
        named = config.get("architectures")
        if named is not None and not (isinstance(named, list | tuple) and named):
            raise ValueError(f"architectures must be a list of names, not {quoted(named)}")
        class_name = config.get("_class_name")
        class_name = (named or [cls.__name__])[0] if class_name is None else class_name
        if reserved := [name for name in ("self", "config", "compat") if name in config]:
            raise ValueError(f"{cls.Config.__name__} has no field {reserved[0]!r}: remove it from the config")
        if class_name not in cls.class_names():
            wanted = f"the config belongs to a {str(class_name)[:100]}, not to a {cls.__name__}"
            raise ValueError(f"{wanted}: load it with the class {str(class_name)[:100]}")
        try:
            network = cls(**{**config, **overrides})
        except ValueError:
            families.refuse(families.of_unet({"_class_name": class_name, **config}))
            raise
        network.explicit = frozenset(overrides)
        return network.set_compat(compat)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        revision: str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_safetensors: bool | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        compat: str | None = None,
        strict: bool = True,
        mmap: bool = True,
        **config_overrides: Any,
    ) -> Self:
        """Loads a network from a local folder or a hub id. It is ready to run (in `eval` mode).

        path_or_id: a single file and a folder of ModelScope's original files work, too, as with `from_single_file`.
        variant: "fp16" reads the files with that infix.
        torch_dtype: the dtype of the weights, float32 by default. `dtype` is another name for it. Weights that have
        this dtype in the file stay memory-mapped.
        compat: a mode, see `set_compat`.
        strict: with False, parameters that the file lacks keep their initial values, and their names are logged. The
        network then needs twice its memory while it is loaded.
        mmap: with False, the weights are copied into memory. Later changes of the files do not affect them then.
        Other keywords change fields of the config. A subclass reads the files of its base classes. Fields that only the
        subclass has keep their defaults then.

        Raises FileNotFoundError if something is missing, ValueError if the weights do not fit, and TypeError if an
        argument is unknown.
        """
        cls._check_fields("from_pretrained", config_overrides)
        dtype = one_dtype(torch_dtype, dtype)
        path_or_id = local(path_or_id, revision=revision, local_files_only=local_files_only, token=token,
                           cache_dir=cache_dir, force_download=force_download)
        if subfolder is None and is_authors_layout(path_or_id):
            if variant is not None:
                raise ValueError(f"{path_or_id} is a checkpoint in the authors' layout, which has no variants: "
                                 f"leave variant={variant!r} out")  # fmt: skip
            return cls.from_single_file(path_or_id, dtype=dtype, compat=compat, strict=strict, mmap=mmap,
                                        **config_overrides)
        folder, names = find_folder(
            path_or_id,
            subfolder,
            choose_weights(cls.weights_name, variant, use_safetensors),
            revision=revision,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
            force_download=force_download,
        )
        files = [folder / name for name in names if name != "config.json"]
        with read_from(folder / "config.json"):
            config = cls.config_of(parse_json(folder / "config.json"), (open_weights(path, mmap) for path in files))
            model = cls._empty(config, compat, config_overrides, strict)
        fill(model, cls.layout, files, dtype, strict, mmap)
        return model.eval()

    @classmethod
    def from_single_file(
        cls,
        path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        ema: bool = False,
        config: str | Path | Mapping[str, Any] | None = None,
        compat: str | None = None,
        strict: bool = True,
        mmap: bool = True,
        **config_overrides: Any,
    ) -> Self:
        """Loads a network from one `.safetensors`, `.ckpt`, `.pth` or `.bin` file in any known layout.

        path: the file, or its address on huggingface.co, from where it is downloaded.
        config: a config.json, its content as a dict, or a folder or hub id that contains one. Without it, fields that
        the shapes do not tell (heads, groups) are those of the published model. Other keywords change fields.
        ema: use the exponential moving average of the UNet's weights, if the file has one.
        The other arguments and the errors are those of `from_pretrained`. No converted file is written.
        """
        from minit2v_convert.convert import components

        cls._check_fields("from_single_file", config_overrides)
        dtype = one_dtype(torch_dtype, dtype)
        path = local_file(path)
        found = components(path, ema, mmap=mmap)
        name, part = next(((n, p) for n, p in found.items() if p.cls in cls.class_names()), ("", None))
        if part is None:
            there = ", ".join(part.cls or name for name, part in found.items())
            raise ValueError(f"{path} is {next(iter(found.values())).title}. It contains {there}, no {cls.__name__}")
        if config is not None:
            part = part.configured(*find_config(config, name))
        return cls.from_component(part, str(path), dtype, compat, config_overrides, strict)

    @classmethod
    def from_component(
        cls, part: Any, label: str, dtype: torch.dtype, compat: str | None, overrides: Mapping[str, Any],
        strict: bool = True,
    ) -> Self:
        """The network from one part of a file (`minit2v_convert.convert.components`). label: the file's name."""
        from minit2v_convert.convert import UNSAID

        config = cls.config_of(dict(part.config), [part.tensors()])
        try:
            model = cls._empty(config, compat, overrides, strict)
        except ValueError as error:
            hint = f"; {UNSAID}, or the fields" if part.guessed else ""
            raise ValueError(f"{label}: {error}{hint}") from None
        fill_from(model, cls.layout, label, part.tensors, dtype, strict)
        return model.eval()

    @classmethod
    def _empty(cls, config: Any, compat: str | None, overrides: Mapping[str, Any], strict: bool) -> Self:
        """A network to be filled: on `meta`, without values. If not `strict`, on the CPU with initial values."""
        if not strict:
            with torch.device("cpu"):
                return cls.from_config(config, compat=compat, **overrides)
        with torch.device("meta"), Weightless():
            return cls.from_config(config, compat=compat, **overrides)

    @classmethod
    def _check_fields(cls, method: str, names: Iterable[str]) -> None:
        fields = [f.name for f in dataclass_fields(cls.Config)] + [*cls.Config.FIXED]
        for name in names:
            if name not in fields:
                known = [*inspect.signature(getattr(cls, method)).parameters, *fields]
                raise TypeError(f"{cls.__name__}.{method}() has no argument {name!r}{nearest(name, known)}")

    @classmethod
    def config_of(cls, config: dict[str, Any], states: Iterable[Mapping[str, Tensor]]) -> dict[str, Any]:
        """The content of config.json, corrected where the weights tell something else. states: one for each file."""
        return config

    def save_pretrained(
        self, folder: str | Path, *, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        """Writes config.json and the weights. This package, diffusers and transformers can load them.

        safe_serialization: write `.safetensors`; with False, `.bin`.
        variant: the infix of the weights' file name, such as "fp16".
        Both files appear together. Older weights of the same variant in the folder are removed, whatever their format.

        Raises OSError if the folder cannot be written. Raises ValueError if the network has tensors that its config
        does not describe, or if a LoRA is loaded and not fused (`save_lora_weights` saves a LoRA).
        """
        if has_branches(self):
            raise ValueError(f"{type(self).__name__} has a LoRA that is not fused, and it would be lost: call "
                             "fuse_lora() or unload_lora_weights() first. minit2v.training.export.save_lora saves a "
                             "LoRA in training")
        state, own = self.diffusers_state_dict(), self._own_names()
        if added := [name for name in state if name not in own]:
            raise ValueError(f"{type(self).__name__} has {len(added)} tensors that its config does not describe "
                             f"({added[0]!r}{', ...' * (len(added) > 1)}): remove the wrappers of its layers first, or "
                             "create these tensors in a subclass")
        weights_name = self.weights_name if safe_serialization or self.weights_name != "model" else "pytorch_model"
        infix, kind = f".{variant}" if variant else "", "safetensors" if safe_serialization else "bin"
        name = type(self).__name__
        head = {"_class_name": name, "_diffusers_version": DIFFUSERS_VERSION}
        if self.head is not None:
            head = {**self.head, "architectures": [name]}
        with filling(folder) as new:
            with replacing(new / f"{weights_name}{infix}.{kind}") as temporary:
                state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
                if safe_serialization:
                    from safetensors.torch import save_file

                    save_file(state, temporary, metadata={"format": "pt"})
                else:
                    torch.save(state, temporary)
            write_json(new / "config.json", {**head, **config_fields(self.config)})

    def _own_names(self) -> set[str]:
        """Diffusers' names of all tensors of a network with this config."""
        with torch.device("meta"), Weightless():
            return set(type(self).from_config(self.config).diffusers_state_dict())


def say_unneeded(method: str, why: str) -> None:
    logger.warning("%s() changes nothing, and nothing is needed: %s.", method, why)
