"""`minit2v inspect`: shows what is in a model. It reads only the configs and the headers of the weights files."""

import argparse
import importlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from minit2v_convert import families
from minit2v_convert.convert import components
from minit2v_convert.detect import FLOATS, detect
from minit2v_convert.folders import is_authors_layout, open_path, variants
from minit2v_convert.modelscope_configuration import NAME
from minit2v_convert.rename import nearest
from minit2v_convert.shapes import POSITION_IDS
from minit2v_convert.stream import DTYPES, first_line, open_file, parse_json

from ..adapters import formats, lora, textual_inversion
from ..files import embedded, hub
from ..files.config import BROKEN, quoted, read_from
from ..files.weights import Weightless
from ..models.clip import CLIPTextModel
from ..models.tokenizer import CLIPTokenizer
from ..models.unet2d import UNet2DConditionModel
from ..models.unet3d import UNet3DConditionModel
from ..models.unet_motion import MotionAdapter, UNetMotionModel, known_resnet_norms
from ..pipelines import files as pipeline_files
from ..pipelines.base import DiffusionPipeline
from .messages import tell

WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pth", ".pt", ".msgpack", ".onnx")
IMAGES = "StableDiffusionPipeline"  # not a pipeline of this package, but AnimateDiff's image model


class Source(Protocol):
    """The place of a model. `part` is the folder of a component, or "" for the model's own folder."""

    def sizes(self, part: str) -> dict[str, int]:
        """{file: size in bytes} of a part; empty if there is no such part."""

    def json(self, part: str, name: str) -> dict[str, Any]:
        """The object in a JSON file."""

    def tensors(self, part: str, name: str) -> dict[str, Tensor]:
        """The tensors of a weights file, on `meta`."""

    def tokenizer(self, part: str) -> CLIPTokenizer:
        """The tokenizer. Its files are read completely."""


class Folder:
    def __init__(self, root: Path):
        self.root = root

    def sizes(self, part: str) -> dict[str, int]:
        folder = self.root / part
        return {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.is_file()} if folder.is_dir() else {}

    def json(self, part: str, name: str) -> dict[str, Any]:
        return parse_json(self.root / part / name)

    def tensors(self, part: str, name: str) -> dict[str, Tensor]:
        path = self.root / part / name
        return {n: _meta(name, n, dtype, shape) for n, (shape, dtype) in open_file(path).header.items()}

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.root / part)


class Repository:
    """A repository on the hub. Its small files are downloaded, and the headers of its weights."""

    def __init__(self, repo: str, revision: str | None):
        from huggingface_hub import HfApi

        self.api, self.repo, self.revision = HfApi(), repo, revision
        try:
            info = self.api.model_info(repo, revision=revision, files_metadata=True)
        except Exception as e:  # versions of huggingface_hub use three HTTP libraries, each with its own exceptions
            raise OSError(f"{repo}: the hub did not list its files: {first_line(e)}") from None
        self.files = {s.rfilename: s.size or 0 for s in info.siblings or ()}

    def sizes(self, part: str) -> dict[str, int]:
        prefix = f"{part}/" if part else ""
        names = {n.removeprefix(prefix): size for n, size in sorted(self.files.items()) if n.startswith(prefix)}
        return {n: size for n, size in names.items() if "/" not in n}

    def json(self, part: str, name: str) -> dict[str, Any]:
        return hub.read_json(self.repo, name, subfolder=part or None, revision=self.revision)

    def tensors(self, part: str, name: str) -> dict[str, Tensor]:
        if not name.endswith(".safetensors"):
            raise ValueError(f"{name} is a pickle, which has no header; it must be downloaded to inspect it")
        path = f"{part}/{name}" if part else name
        try:
            header = self.api.parse_safetensors_file_metadata(self.repo, path, revision=self.revision).tensors
        except Exception as e:
            raise OSError(f"the header of {name} cannot be read: {first_line(e)}") from None
        return {n: _meta(name, n, t.dtype, t.shape) for n, t in header.items()}

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.repo, subfolder=part or None, revision=self.revision)


def _meta(file: str, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
    if dtype not in DTYPES:
        raise ValueError(f"{file}: {name!r} has the unknown dtype {dtype!r}")
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta")


# ------------------------------------------------------------------------------------------------------------- report


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if something in the model does not fit."""
    lines, good = report(args.model, revision=getattr(args, "revision", None),
                         variant=getattr(args, "variant", None))
    tell(*lines)
    return 0 if good else 1


def report(model: str, revision: str | None = None, variant: str | None = None) -> tuple[list[str], bool]:
    """The lines of the report on a folder, a file or a hub id, and whether everything in it fits."""
    model = str(hub.local(model, revision=revision))
    path = embedded.find(model) or Path(model).expanduser()
    if is_authors_layout(path):
        return _report_folder(path) if path.is_dir() else _report_file(path)
    source = Folder(path) if path.is_dir() else _repository(model, revision)
    there = source.sizes("")
    if pipeline_files.INDEX in there:
        with read_from(model):
            index = source.json("", pipeline_files.INDEX)
            pipeline_files.check_index(index)  # before its names are used as paths
        families.refuse(families.of_index(index), model)
        if "config.json" in source.sizes("unet"):
            families.refuse(families.of_unet(source.json("unet", "config.json")), model)
        title, parts, faults = _parts(index)
    elif "config.json" in there:
        title, parts, faults = "a single component", {"": None}, []
    elif path.is_dir() and lora.has_file(path):
        file = lora.open_lora(path)
        return _report_lora(file, file.label)
    else:
        raise FileNotFoundError(f"{model} has neither {pipeline_files.INDEX} nor config.json; "
                                f"the files there: {', '.join(there) or 'none'}")
    rows, total = [], 0
    for part, cls in parts.items():
        row, count, wrong = _inspect(source, part, cls, variant, os.path.basename(os.path.abspath(part or model)))
        rows.append(row)
        total += count
        faults += [f"{part + ': ' if part else ''}{w}" for w in wrong]
    lines = [f"{model}: {title}", "", *_table(("component", "class", "parameters", "dtype", "keys", "files"), rows)]
    lines += ["", f"{total:,} parameters", *(f"wrong: {fault}" for fault in faults)]
    return [line.rstrip() for line in lines], not faults


def _repository(repo: str, revision: str | None) -> Source:
    """The repository on the hub. If the hub cannot be reached, the files in the cache."""
    hub.check_hub_id(repo)
    try:
        return Repository(repo, revision)
    except OSError as e:
        try:
            folder, _ = hub.find_folder(repo, None, lambda names: [], revision=revision, local_files_only=True)
        except FileNotFoundError:
            raise e from None
        warnings.warn(f"{e}; only the files in the cache are shown", stacklevel=2)
        return Folder(folder)


def _parts(index: dict[str, Any]) -> tuple[str, dict[str, str | None], list[str]]:
    """The pipeline's class, {component: its class} and the errors in the index."""
    name = str(index.get("_class_name"))[:200]
    parts: dict[str, str | None] = {}
    faults = []
    for part, entry in index.items():
        if part.startswith("_") or part in pipeline_files.UNUSED or entry in pipeline_files.NOTHING:
            continue
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[1], str):
            faults.append(f"{part}: the index must have [library, class] for it, not {quoted(entry)}")
            continue
        parts[part] = entry[1][:200]
    pipeline = DiffusionPipeline.CLASSES.get("AnimateDiffPipeline" if name == IMAGES else name)
    if pipeline is None:
        faults.append(f"minit2v has no pipeline {name!r}{nearest(name, [*DiffusionPipeline.CLASSES, IMAGES])}")
    else:
        needed = [part for part in pipeline.COMPONENTS if part not in pipeline.OPTIONAL]
        faults += [f"{part}: missing in the index; {name} needs it" for part in needed if part not in parts]
    return name + ", an image model that animate takes as --base" * (name == IMAGES), parts, faults


def _inspect(
    source: Source, part: str, cls: str | None, variant: str | None, name: str
) -> tuple[tuple[str, ...], int, list[str]]:
    """The row of one component, its number of parameters, and its errors. name: that of its folder or model."""
    sizes = source.sizes(part)
    if not sizes:
        return (part, cls or "", "", "", "", "no files"), 0, ["its folder has no files"]
    try:
        if cls is None or cls in pipeline_files.CLASSES and not cls.startswith("CLIPTokenizer"):
            return _inspect_network(source, part, cls, variant, name, sizes)
        shown = (part, cls, "", "", "", _files(sizes))
        if cls.startswith("CLIPTokenizer"):
            tokenizer = source.tokenizer(part)
            length = tokenizer.model_max_length
            if part and "config.json" in source.sizes("text_encoder"):
                known = source.json("text_encoder", "config.json").get("max_position_embeddings")
                pipeline_files.check_length(length, known)
            return shown, 0, _second_vocabulary(source, part, sizes, tokenizer)
        schedulers = importlib.import_module("minit2v.schedulers")
        known = [n for n in dir(schedulers) if n.endswith("Scheduler")]
        if cls not in known:
            return shown, 0, [f"minit2v has no class {cls!r}{nearest(cls, [*known, *pipeline_files.CLASSES])}"]
        getattr(schedulers, cls).from_config(source.json(part, "scheduler_config.json"))
        return shown, 0, []
    except (*BROKEN, OSError) as e:  # a file can contain anything
        return (part, cls or "", "", "", "", _files(sizes)), 0, [first_line(e)]


def _second_vocabulary(source: Source, part: str, names: Iterable[str], tokenizer: CLIPTokenizer) -> list[str]:
    """The errors of vocab.json and merges.txt beside tokenizer.json. minit2v does not read them, other programs do."""
    if not isinstance(source, Folder) or not {"tokenizer.json", "vocab.json", "merges.txt"} <= {*names}:
        return []
    try:
        second = CLIPTokenizer._read(source.root / part, [n for n in names if n != "tokenizer.json"])
    except (*BROKEN, OSError) as e:
        return [f"{first_line(e)} (minit2v reads tokenizer.json instead)"]
    one, two = (json.loads(t.backend.to_str())["model"] for t in (tokenizer, second))
    return [] if all(one[k] == two[k] for k in ("vocab", "merges")) else [
        "vocab.json and merges.txt have another vocabulary than tokenizer.json, which minit2v reads"]


def _inspect_network(
    source: Source, part: str, cls: str | None, variant: str | None, name: str, sizes: dict[str, int]
) -> tuple[tuple[str, ...], int, list[str]]:
    config = source.json(part, "config.json")
    families.refuse(families.of_unet(config))
    cls = (cls or str(config.get("_class_name") or (config.get("architectures") or [None])[0]))[:200]
    if cls not in pipeline_files.CLASSES:
        raise ValueError(f"config.json is for {cls!r}, a class that minit2v does not have"
                         f"{nearest(cls, [*pipeline_files.CLASSES])}")
    network = getattr(importlib.import_module(f"minit2v.{pipeline_files.CLASSES[cls]}"), cls)
    tensors: dict[str, Tensor] = {}
    files, unreadable = _files(sizes), ""
    try:
        own = variants(sizes, (network.weights_name, "pytorch_model"))
        lone = next(iter(own)) if variant is None and len(own) == 1 else None  # loading needs `variant=` for it
        choose = hub.choose_weights(network.weights_name, variant or lone or None, None)
        chosen = [n for n in choose(list(sizes)) if n != "config.json"]
        files = _files({n: sizes[n] for n in chosen}) + f" (load it with variant {lone})" * bool(lone)
        if unread := [n for n in sizes if n.endswith(WEIGHTS) and n not in chosen]:
            files += f" (not read: {_files({n: sizes[n] for n in unread})})"
        for file in chosen:
            tensors |= source.tensors(part, file)
        found, unknown = network.layout.match(tensors)
    except FileNotFoundError as e:
        unreadable = f"no {e}"
    except (ValueError, OSError) as e:
        unreadable = first_line(e)
    with torch.device("meta"), Weightless():
        model = network.from_config(network.config_of(config, [tensors]))
    count = sum(p.numel() for p in model.parameters())
    shown = (part, cls + _version(model.config, name), f"{count:,}")
    if unreadable:
        return (*shown, "", "", files), count, [unreadable]
    expected = model.state_dict()
    unknown += [name for ours, name in found.items() if ours not in expected]
    missing = list(network.layout.to_diffusers({n: None for n in expected if n not in found}))
    have = {ours: network.layout.squeeze(ours, tensors[name]) for ours, name in found.items() if ours in expected}
    shapes = [f"{found[n]!r} is {tuple(x.shape)}, not {tuple(expected[n].shape)}" for n, x in have.items()
              if x.shape != expected[n].shape]
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in have.values())
    dtype = ", ".join(dtypes) if len(dtypes) < 2 else ", ".join(f"{n} {k}" for k, n in dtypes.most_common())
    fits = len(have) - len(shapes)
    keys = f"all {fits} match" if not (missing or unknown or shapes) else f"{fits} of {len(expected)} match"
    whole = [repr(found[n]) for n, x in have.items() if expected[n].is_floating_point() and not x.is_floating_point()]
    faults = {"missing": [*map(repr, missing)], "unknown": [*map(repr, unknown)], "of another shape": shapes,
              "of integers": whole}
    wrong = [f"{len(items)} keys {what}: {_some(items)}" for what, items in faults.items() if items]
    return (*shown, dtype, keys, files), count, wrong


def _version(config: Any, name: str) -> str:
    """For networks with motion modules: AnimateDiff's version, and the largest number of frames."""
    if not hasattr(config, "motion_max_seq_length"):
        return ""
    frames = config.motion_max_seq_length
    if config.use_motion_mid_block:
        return f" (v2: {frames} positions, a mid block)"
    version = {"video": "1", "frame": "3", None: "1 or 3"}[config.resnet_norms or known_resnet_norms(config, name)]
    return f" (v{version}: {frames} positions, no mid block)"


def _some(items: list[str]) -> str:
    return ", ".join(items[:3]) + (", ..." if len(items) > 3 else "")


def _files(sizes: dict[str, int]) -> str:
    """Names and sizes. The shards of a file are counted together."""
    merged: dict[str, list[int]] = {}
    for name, size in sizes.items():
        merged.setdefault(re.sub(r"-\d{5}-of-", "-*-of-", name), []).append(size)
    return ", ".join(f"{name} {_bytes(sum(s))}" for name, s in merged.items())


def _bytes(n: int) -> str:
    k = min(int(math.log10(max(n, 1)) // 3), 4)
    return f"{n / 1000**k:.{1 if k else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[k]}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    rows = [head, *rows]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    return ["  ".join(f"{cell:>{w}}" if n == 2 else f"{cell:<{w}}" for n, (cell, w) in
                      enumerate(zip(row, widths, strict=True))) for row in rows]


# ------------------------------------------------------------------------------------------------- the authors' files


def _report_folder(folder: Path) -> tuple[list[str], bool]:
    """The report on a folder of ModelScope's files, and whether they are complete and fit each other."""
    try:
        opened = open_path(folder)
    except ValueError as error:
        return [str(error)], False
    lines, whole = [f"{folder}: the authors' files", *opened.notes], True
    for source, _ in opened.weights.values():
        more, good = _report_file(source.path)
        lines, whole = [*lines, "", *more], whole and good
    lines.append("")
    try:
        components(folder)
    except ValueError as error:
        if whole:
            lines.append(f"wrong: {error}")
        whole = False
    if said := opened.configuration:
        missing = [n for n in said.files.values() if not (folder / n).is_file()]
        lines += [f"{NAME}: the file {n} is missing" for n in missing]
        fields = ", ".join(f"{name} {value}" for name, value in said.scheduler.items())
        lines.append(f"{NAME}: {fields}")
        whole = whole and not missing
    return lines, whole


def _report_file(path: Path) -> tuple[list[str], bool]:
    """The report on a checkpoint file, from its header, and whether it is complete."""
    is_lora = False
    try:
        source = open_file(path)
        if is_lora := formats.is_lora(source.header):
            return _report_lora(lora.open_lora(path), f"{path}: {path.stat().st_size:,} bytes")
        with read_from(path, (ValueError,)):
            kind = detect(source.header)
    except ValueError:
        if is_lora:
            raise
        if lines := textual_inversion.describe(path):
            return [f"{path}: {path.stat().st_size:,} bytes", *lines, "complete"], True
        raise
    lines = [f"{path}: {path.stat().st_size:,} bytes", *kind.describe()]
    if source.nest:
        lines.insert(2, f"below {'.'.join(source.nest)}")
    lines += [f"not converted: {name}, {why}" for name, why in (source.ignored or {}).items()]
    if kind.layout.refused:
        lines.append(kind.layout.refused)
    whole = [n for part in kind.parts for n in sorted(part.mapped)
             if source.header[n][1] not in FLOATS and not n.endswith(POSITION_IDS)]  # fmt: skip
    if whole:
        lines.append(f"wrong: {len(whole)} tensors of integers: {_some([*map(repr, whole)])}")
    good = kind.complete and not whole
    return [*lines, "complete" if good else "not complete"], good


def _report_lora(file: lora.File, title: str) -> tuple[list[str], bool]:
    """The report on a LoRA file, and whether all of it fits a published model or an embedded one."""
    try:
        lines, good = formats.describe(file.header, file.read, file.configs(), formats.published())
        if not good:
            more, fits = formats.describe(file.header, file.read, file.configs(), _embedded())
            lines, good = (more, fits) if fits else (lines, good)
    except formats.Refused as error:
        raise ValueError(f"{file.label}: {error}") from None
    return [title, *lines, "complete" if good else "not complete"], good


def _embedded() -> dict[str, list[formats.Target]]:
    """The networks of the embedded models that LoRAs can change."""

    def network(cls: Any, name: str, part: str = "") -> Any:
        return cls.from_config(parse_json(Path(embedded.find(name) or "") / part / "config.json"))

    with torch.device("meta"), Weightless():
        unets = {
            "shapes": network(UNet3DConditionModel, "shapes", "unet"),
            "shapes-image": UNetMotionModel.from_unet2d(network(UNet2DConditionModel, "shapes-image", "unet"),
                                                        network(MotionAdapter, "shapes-motion"), load_weights=False),
        }  # fmt: skip
        return {name: [lora.target_of("unet", unet),
                       lora.target_of("text_encoder", network(CLIPTextModel, name, "text_encoder"))]
                for name, unet in unets.items()}  # fmt: skip
