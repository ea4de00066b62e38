"""A pipeline's folder: model_index.json names the class of each component. Each has a folder with its name."""

import importlib
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from minit2v_convert import families
from minit2v_convert.convert import FAMILIES, components, schedule_of
from minit2v_convert.folders import check_parts
from minit2v_convert.rename import nearest

from ..compat import compat_fields
from ..files import hub
from ..files.config import one_dtype, quoted, read_from
from ..files.saving import filling
from ..models.network import Network
from ..models.tokenizer import CLIPTokenizer
from ..schedulers.base import Scheduler
from .checks import unwrapped

logger = logging.getLogger(__name__)

INDEX = "model_index.json"
FIELDS_KEY = "_minit2v"  # our own fields in the index; diffusers ignores names that begin with "_"

# Class name in a model_index.json -> module. Schedulers are looked up in `minit2v.schedulers`.
CLASSES = {
    "AutoencoderKL": "models.vae",
    "CLIPTextModel": "models.clip",
    "CLIPVisionModelWithProjection": "models.clip_vision",
    "CLIPTokenizer": "models.tokenizer",
    "CLIPTokenizerFast": "models.tokenizer",
    "MotionAdapter": "models.unet_motion",
    "UNet2DConditionModel": "models.unet2d",
    "UNet3DConditionModel": "models.unet3d",
    "UNetMotionModel": "models.unet_motion",
}

NOTHING = ([None, None], ["null", None])  # the entries of components that were None

# Entries of indexes that the pipelines here do not need, and what they are.
UNUSED = {
    "safety_checker": "a classifier of single images, after the VAE",
    "feature_extractor": "prepares images for the safety checker or the image_encoder, whose config says the same",
    "image_encoder": "turns image prompts into vectors, which this pipeline does not support",
    "requires_safety_checker": "a switch of the safety checker",
}


def read_index(path_or_id: str | Path, subfolder: str | None, where: dict[str, Any]) -> dict[str, Any]:
    """The content of model_index.json. Raises ValueError if it has unknown names or fields."""
    index = hub.read_json(path_or_id, INDEX, subfolder=subfolder, **where)
    families.refuse(families.of_index(index), path_or_id)
    with read_from(path_or_id):
        check_index(index)
    return index


def check_index(index: dict[str, Any]) -> None:
    """Raises ValueError if an index has unknown names or fields."""
    check_parts(index)
    if FIELDS_KEY in index:
        fields = index[FIELDS_KEY]
        if not isinstance(fields, dict):
            raise ValueError(f"{INDEX}: {FIELDS_KEY} must be an object, not {quoted(fields)}")
        for name, value in fields.items():
            if name != "compat" and not isinstance(value, bool | str | None):
                raise ValueError(f"{INDEX}: {FIELDS_KEY} {quoted(name)} cannot be {quoted(value)}")
            if name == "compat":
                compat_fields("", value)


def pipeline_class(index: dict[str, Any], classes: dict[str, type]) -> type:
    name = index.get("_class_name")
    if isinstance(name, str) and name in classes:
        return classes[name]
    raise ValueError(f"{INDEX} names the unknown pipeline {quoted(name)}{nearest(name, list(classes))}: "
                     f"call from_pretrained on one of these classes: {', '.join(sorted(classes))}")


def component_dtypes(torch_dtype: Any, dtype: Any, names: Any) -> dict[str, torch.dtype]:
    """The dtype of each component, from one dtype, its name, a dictionary of these, or None for float32."""
    if torch_dtype is not None and dtype is not None and torch_dtype != dtype:
        raise ValueError(f"torch_dtype={torch_dtype} and dtype={dtype} are the same argument: give one of them")
    dtype = torch_dtype if dtype is None else dtype
    dtypes = dict(dtype) if isinstance(dtype, dict) else {"default": dtype}
    for name in dtypes:
        if name not in names and name != "default":
            raise ValueError(f"dtype: {name!r} is not a component{nearest(name, [*names, 'default'])}")
    default = dtypes.pop("default", None)
    return {name: one_dtype(dtypes.get(name, default)) for name in names}


def load_components(
    path_or_id: str | Path,
    subfolder: str | None,
    index: dict[str, Any],
    pipeline: type,
    overrides: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    where: dict[str, Any],
    weights: dict[str, Any],
) -> dict[str, Any]:
    """name -> component, each from its folder or from `overrides`. An optional component that is missing is None.

    A class in `overrides` loads the component of the folder, instead of the class in the index.
    """
    own, overrides = _split_classes(overrides, pipeline)
    unused = {name: why for name, why in UNUSED.items() if pipeline.COMPONENTS.get(name, ("",))[0] not in CLASSES}
    for name in overrides:
        if name not in pipeline.COMPONENTS and name not in UNUSED:
            known = [*pipeline.COMPONENTS, *pipeline.FIELDS, "variant", "revision", "subfolder", "torch_dtype", "dtype",
                     "use_safetensors", "local_files_only", "token", "cache_dir", "force_download", "compat", "strict",
                     "mmap"]
            raise TypeError(f"{pipeline.__name__}.from_pretrained() has no argument {name!r}{nearest(name, known)}")
    entries = {name: value for name, value in index.items() if not name.startswith("_")}
    for name in entries:
        if name in unused:
            logger.info("%s is ignored: %s", name, unused[name])
        elif name not in pipeline.COMPONENTS:
            raise ValueError(f"{INDEX} has {quoted(name)}, which {pipeline.__name__} does not know"
                             f"{nearest(name, list(pipeline.COMPONENTS))}")
    if "unet" in entries and "unet" not in overrides:
        part = f"{subfolder}/unet" if subfolder else "unet"
        with suppress(FileNotFoundError):  # loading will report it
            config = hub.read_json(path_or_id, "config.json", subfolder=part, **where)
            families.refuse(families.of_unet(config), f"{path_or_id}/{part}")
    classes = {}
    for name, fitting in pipeline.COMPONENTS.items():  # all checks before the first gigabyte
        if name in overrides or name in unused:
            continue
        if name in pipeline.OPTIONAL and entries.get(name) in (None, *NOTHING):
            if name in own:
                raise ValueError(f"{INDEX} has no {name!r}, so {own[name].__name__} cannot load it")
            continue
        if name not in entries:
            raise ValueError(f"{INDEX} has no {name!r}, which {pipeline.__name__} needs: give it as {_argument(name)}")
        classes[name] = own.get(name) or _component_class(name, entries[name], fitting, pipeline.__name__)
    _check_motion(classes, overrides, pipeline)
    loaded = {}
    for name, cls in classes.items():
        part = f"{subfolder}/{name}" if subfolder else name
        try:
            loaded[name] = _load(cls, path_or_id, part, where, weights, dtypes[name])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; the {name} may be given as {_argument(name)}") from error
    found = {name: overrides.get(name, loaded.get(name)) for name in pipeline.COMPONENTS}
    length = getattr(found.get("tokenizer"), "model_max_length", None)
    check_length(length, getattr(getattr(found.get("text_encoder"), "config", None), "max_position_embeddings", None))
    return found


def check_length(length: Any, positions: Any) -> None:
    """Raises ValueError if the tokenizer gives more tokens than the text encoder has positions."""
    if isinstance(length, int) and isinstance(positions, int) and length > positions:
        raise ValueError(f"the tokenizer's model_max_length is {length}, but the text_encoder has only {positions} "
                         "positions")  # fmt: skip


def _argument(name: str) -> str:
    """The argument for a component, in Python and, if there is one, on the command line."""
    return f"{name}=..." + f" (--{name})" * (name in ("vae", "tokenizer", "scheduler"))


def _split_classes(overrides: dict[str, Any], pipeline: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """(components given as classes, the others). Raises TypeError if a class does not fit."""
    classes = {name: value for name, value in overrides.items()
               if isinstance(value, type) and name in pipeline.COMPONENTS}  # fmt: skip
    for name, cls in classes.items():
        fitting = pipeline.COMPONENTS[name]
        if not callable(getattr(cls, "from_pretrained", None)):
            raise TypeError(f"{name}={cls.__name__}: the class cannot be loaded, because it has no from_pretrained")
        ours = issubclass(cls, Network | Scheduler | CLIPTokenizer)
        fits = {c.__name__ for c in cls.__mro__} & {*fitting} if fitting else issubclass(cls, Scheduler)
        if ours and not fits:
            wanted = " or ".join(fitting) or "a scheduler"
            raise TypeError(f"{name}={cls.__name__}: {pipeline.__name__} needs {wanted}, or a subclass of it")
    return classes, {name: value for name, value in overrides.items() if name not in classes}


def _load(
    cls: Any, path_or_id: str | Path, part: str, where: dict[str, Any], weights: dict[str, Any], dtype: torch.dtype
) -> Any:
    """The component in the folder `part`. A class that is not from minit2v only gets the path of the folder."""
    if issubclass(cls, Network):
        return cls.from_pretrained(path_or_id, subfolder=part, **where, **weights, dtype=dtype)
    if issubclass(cls, Scheduler | CLIPTokenizer):
        return cls.from_pretrained(path_or_id, subfolder=part, **where)
    component = cls.from_pretrained(hub.find_folder(path_or_id, part, lambda names: names, **where)[0])
    return component.to(dtype) if isinstance(component, torch.nn.Module) else component


# UNet of a file -> the pipeline for it, if the user does not choose one.
OF_UNETS = {"UNet2DConditionModel": "AnimateDiffPipeline", "UNet3DConditionModel": "TextToVideoSDPipeline"}


def pipeline_class_of_file(path: Path, classes: dict[str, type]) -> type:
    """The pipeline class for a file of weights. Raises ValueError if it has no known UNet."""
    found = components(path)
    unet = found.get("unet")
    if unet is None or unet.cls not in OF_UNETS:
        raise ValueError(f"{path} is {next(iter(found.values())).title}: it has no UNet of {' or '.join(OF_UNETS)}")
    return classes[OF_UNETS[unet.cls]]


def load_single_file(
    path: Path,
    pipeline: type,
    config: str | Path | None,
    overrides: dict[str, Any],
    dtypes: dict[str, torch.dtype],
    where: dict[str, Any],
    compat: str | None,
    strict: bool = True,
    mmap: bool = True,
) -> dict[str, Any]:
    """name -> component, from the file, from `overrides`, or from the folder or hub id `config`.

    If none has them, the scheduler is that of the published model, and the tokenizer is CLIP's. The config.json of a
    network in `config` gives the fields that shapes do not tell (heads, groups).
    """
    for name in overrides:
        if name not in pipeline.COMPONENTS:
            known = [*pipeline.COMPONENTS, *pipeline.FIELDS, "config", "torch_dtype", "dtype", "compat", "strict",
                     "mmap"]
            raise TypeError(f"{pipeline.__name__}.from_single_file() has no argument {name!r}{nearest(name, known)}")
    own, overrides = _split_classes(overrides, pipeline)
    found = components(path, mmap=mmap)
    for name, cls in own.items():
        if name in found and not issubclass(cls, Network):
            raise TypeError(f"{name}={cls.__name__}: only networks of minit2v can load a single file")
    unet = found["unet"].cls if "unet" in found else ""
    if unet not in pipeline.COMPONENTS["unet"] or unet not in FAMILIES:
        raise ValueError(f"{path} is {next(iter(found.values())).title}, without a UNet for {pipeline.__name__}")
    has_motion = "motion_adapter" in found or overrides.get("motion_adapter") is not None
    if unet == "UNet2DConditionModel" and not has_motion:
        raise ValueError(f"{path} is an image model, and {pipeline.__name__} needs motion modules: "
                         "give motion_adapter=MotionAdapter.from_pretrained(...)")
    index = read_index(config, None, where) if config is not None else {}
    wanted = [n for n in pipeline.COMPONENTS if n not in overrides and (n in found or n not in pipeline.OPTIONAL)]
    for name in wanted:  # all checks before the first gigabyte
        if name not in found and name not in index and name not in ("scheduler", "tokenizer"):
            raise ValueError(f"{path} has no {name}: give it as {_argument(name)}, or a folder or hub id that has it "
                             "as config=... (--config)")  # fmt: skip
    for name in wanted:
        if name in found and name in index and index[name][-1] == found[name].cls:
            said = hub.read_json(str(config), "config.json", subfolder=name, **where)
            found[name] = found[name].configured(said, f"{config}/{name}/config.json")
    made: dict[str, Any] = dict(overrides)
    for name in wanted:
        fitting = pipeline.COMPONENTS[name]
        if name in found:
            cls = own.get(name) or _component_class(name, [None, found[name].cls], fitting, pipeline.__name__)
            made[name] = cls.from_component(found[name], str(path), dtypes[name], compat, {}, strict)
        elif name in index:
            cls = own.get(name) or _component_class(name, index[name], fitting, pipeline.__name__)
            made[name] = _load(cls, config, name, where, dict(compat=compat, strict=strict, mmap=mmap), dtypes[name])
        elif name == "scheduler":
            schedule = schedule_of(path, unet)
            cls = own.get(name) or _component_class(name, [None, schedule["_class_name"]], (), "")
            made[name] = cls.from_config(schedule)
        else:
            made[name] = own.get(name, CLIPTokenizer).clip(FAMILIES[unet].pad_token)
            rows = found["text_encoder"].config["vocab_size"] if "text_encoder" in found else made[name].vocab_size
            if rows < made[name].vocab_size:
                raise ValueError(f"{path} has no tokenizer, and its text encoder has {rows:,} ids, fewer than CLIP's "
                                 f"{made[name].vocab_size:,}: give its tokenizer as tokenizer=... (--tokenizer)")
    return {name: made.get(name) for name in pipeline.COMPONENTS}


def _check_motion(classes: dict[str, type], overrides: dict[str, Any], pipeline: type) -> None:
    """Raises ValueError if an image model has no motion adapter. Warns if an adapter is given but not needed."""
    kinds = [c.__name__ for c in classes["unet"].__mro__] if "unet" in classes else []
    if "UNet2DConditionModel" in kinds and "motion_adapter" not in classes and (
            overrides.get("motion_adapter") is None):
        raise ValueError(f"{INDEX}: the unet is an image model, and {pipeline.__name__} needs motion modules: "
                         "give motion_adapter=MotionAdapter.from_pretrained(...)")
    if "UNetMotionModel" in kinds and overrides.get("motion_adapter") is not None:
        logger.warning("The given motion_adapter is not used, because the folder's unet has motion modules. "
                       "unet.load_motion_modules(motion_adapter) replaces them.")


def _component_class(name: str, entry: Any, fitting: tuple[str, ...], pipeline: str) -> type:
    """The class that an index entry [library, class] names."""
    if entry in NOTHING:
        raise ValueError(f"{INDEX}: {name!r} was None when this was saved: give it as {_argument(name)}")
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
        raise ValueError(f"{INDEX}: {name!r} must be [library, class], not {quoted(entry)}")
    class_name = entry[1].removeprefix("Flax")[:200]
    if fitting:
        if class_name not in fitting:
            own = "" if class_name in CLASSES else f"; if it is your own class, pass {name}={class_name}"
            raise ValueError(f"{INDEX}: {name!r} is a {class_name}, but {pipeline} needs {' or '.join(fitting)}{own}")
        return getattr(importlib.import_module(f"minit2v.{CLASSES[class_name]}"), class_name.removesuffix("Fast"))
    schedulers = importlib.import_module("minit2v.schedulers")
    known = [n for n in dir(schedulers) if n.endswith("Scheduler")]
    if class_name not in known:
        raise ValueError(f"{INDEX}: there is no scheduler {class_name!r}{nearest(class_name, known)}. If it is your "
                         f"own class, pass scheduler={class_name}. Otherwise pass one of {', '.join(known)}")
    return getattr(schedulers, class_name)


def save_components(
    folder: Path, pipeline: type, components: dict[str, Any], fields: dict[str, Any], safe_serialization: bool,
    variant: str | None,
) -> None:
    """Writes every component into its folder, and the index. All appear together."""
    components = {name: unwrapped(component) for name, component in components.items()}
    missing = [name for name, component in components.items() if component is None and name not in pipeline.OPTIONAL]
    if missing:
        raise ValueError(f"a pipeline without {' and '.join(missing)} cannot be saved")
    for name, component in components.items():
        if component is not None and not callable(getattr(component, "save_pretrained", None)):
            raise TypeError(f"{name}: a {type(component).__name__} has no save_pretrained, and cannot be saved")
        if type(component).__module__.split(".")[0] == "peft":  # it would save only the adapter
            raise TypeError(f"{name}: peft's {type(component).__name__} wraps it, and no pipeline can load that: "
                            "save the result of its merge_and_unload()")  # fmt: skip
    index: dict[str, Any] = {
        "_class_name": pipeline.__name__, "_diffusers_version": hub.DIFFUSERS_VERSION, FIELDS_KEY: fields,
    }  # fmt: skip
    with filling(folder) as new:
        for name, component in sorted(components.items()):
            if component is None:
                index[name] = NOTHING[0]
                continue
            weights = dict(safe_serialization=safe_serialization, variant=variant)
            component = getattr(component.save_pretrained, "__self__", component)  # inside a user's wrapper
            component.save_pretrained(new / name, **weights if isinstance(component, Network) else {})
            library = "transformers" if name in ("text_encoder", "tokenizer", "image_encoder") else "diffusers"
            if not type(component).__module__.startswith("minit2v."):
                library = type(component).__module__  # only information for readers: it is never imported
            index[name] = [library, type(component).__name__]
        hub.write_json(new / INDEX, index)
