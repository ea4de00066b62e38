"""Finds the weights and configs in a folder in the layout of diffusers, of ModelScope, or of other authors.

    opened = open_path("zeroscope")            # {component: (open weights file, config.json)}, and notes
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import families
from . import modelscope_configuration as configuration
from .modelscope_configuration import Configuration
from .shapes import Config
from .stream import PICKLES, Source, open_file, parse_json

WEIGHTS = (".safetensors", *PICKLES)
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "pytorch_lora_weights")
# The variant is before the number of a shard, and in files from before 2025 after it.
NAME = re.compile(rf"({'|'.join(STEMS)})(?:\.(?P<v>[\w-]+?))?(?:-(?P<n>\d{{5}})-of-(?P<count>\d{{5}}))?"
                  r"(?:\.(?P<v_behind>[\w-]+?))?(?P<ending>\.safetensors|\.bin)")  # fmt: skip
NO_NETWORKS = {
    "safety_checker": "a classifier of single images",
    "feature_extractor": "prepares images for the safety checker",
    "image_encoder": "it belongs to an IP-Adapter; convert it by itself",
}
WEIGHTLESS = re.compile("Scheduler|Tokenizer|Processor|Extractor")  # in names of classes without weights
INDEX, CONFIG = "model_index.json", "config.json"


@dataclass
class Opened:
    """weights: {name: (open file, its config.json)}. A name is a component in diffusers' layout, else a file.

    notes: messages about files that are left out. configuration: ModelScope's configuration.json, or None.
    """

    weights: dict[str, tuple[Source, Config | None]]
    notes: list[str] = field(default_factory=list)
    configuration: Configuration | None = None


def open_path(src: Path, variant: str | None = None, mmap: bool = True) -> Opened:
    """Open a file, or a folder in any layout. Only headers and configs are read.

    variant: of the weights in a folder, such as "fp16". mmap: as in `open_file`. ValueError if there are no weights.
    """
    if not src.is_dir():
        if variant is not None:
            raise ValueError(f"{src} is a file: it has no variant {variant!r}")
        return Opened({"": (open_file(src, mmap), None)})
    if (src / CONFIG).is_file():
        source, notes = _weights(src, variant, mmap)
        return Opened({"": (source, parse_json(src / CONFIG))}, notes)
    if (src / INDEX).is_file():
        opened = Opened({})
        families.refuse(families.of_index(parse_json(src / INDEX)), src)
        try:
            named = networks(parse_json(src / INDEX))
        except ValueError as error:
            raise error if str(src) in str(error) else ValueError(f"{src}: {error}") from None
        for name in named:
            if not (src / name / CONFIG).is_file():
                missing = f"{src / name} has no {CONFIG}" if (src / name).is_dir() else f"there is no {src / name}"
                raise ValueError(f"{missing}, but {INDEX} names it")
        for part in sorted(p for p in src.iterdir() if (p / CONFIG).is_file()):
            if part.name in NO_NETWORKS:
                opened.notes.append(f"{part.name} is left out: {NO_NETWORKS[part.name]}")
                continue
            source, notes = _weights(part, variant, mmap)
            opened.weights[part.name] = source, parse_json(part / CONFIG)
            opened.notes += notes
        return opened
    if variant is not None:
        raise ValueError(f"{src} is not a folder of diffusers: it has no variant {variant!r}")
    return _authors_files(src, mmap)


def networks(index: Config) -> list[str]:
    """The components with weights in a pipeline's index."""
    check_parts(index)
    classes = {name: str(value[-1]) for name, value in index.items()
               if isinstance(value, list) and value and value[-1] and name not in NO_NETWORKS}  # fmt: skip
    return [name for name, cls in classes.items() if not WEIGHTLESS.search(cls)]


def check_parts(index: Config) -> None:
    """ValueError if the index has a name that cannot be a folder beside it, because names become paths."""
    for name in index:
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"{INDEX} names the part {name[:100]!r}, which cannot be the name of a folder beside it")


def is_authors_layout(path: str | Path) -> bool:
    """Whether it is a file, or a folder with ModelScope's files. False for a folder in the layout of diffusers."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path.is_file()
    marks = (configuration.NAME, configuration.FILES["ckpt_unet"][1])
    return not any((path / n).exists() for n in (INDEX, CONFIG)) and any((path / n).is_file() for n in marks)


def read_configuration(folder: Path) -> Configuration | None:
    """The content of configuration.json, or None if there is none. ValueError if it is not valid."""
    path = folder / configuration.NAME
    if not path.is_file():
        return None
    try:
        return configuration.read(parse_json(path))
    except ValueError as error:
        raise ValueError(f"{error}" if str(path) in str(error) else f"{path}: {error}") from None


def _authors_files(src: Path, mmap: bool) -> Opened:
    """Open the weights files in a folder of authors. If a configuration.json names files, only those are opened."""
    said = read_configuration(src)
    there = sorted(p.name for p in src.iterdir() if p.suffix in WEIGHTS)
    names = [n for n in there if said is None or n in said.files.values()]
    if not names:
        wanted = f"none of {', '.join(said.files.values())}" if said else "no weights"
        raise ValueError(f"{src} has {wanted}; the files there: {', '.join(sorted(os.listdir(src))) or 'none'}")
    missing = {} if said is None else {c: n for c, n in said.files.items() if n not in there}
    if "unet" in missing:
        raise ValueError(f"{src} has no {missing['unet']}, which {configuration.NAME} names as the unet")
    notes = [f"{configuration.NAME} names {n} as the {c}, but the file is missing" for c, n in missing.items()]
    notes += [f"{n} is left out: {configuration.NAME} does not name it" for n in there if n not in names]
    return Opened({n: (open_file(src / n, mmap), None) for n in names}, notes, said)


def variants(names: Iterable[str], stems: Sequence[str] = STEMS) -> dict[str, list[str]]:
    """{variant: names of its files}. Files without a variant are under ""."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if (m := NAME.fullmatch(name)) and m[1] in stems:
            found.setdefault(m["v"] or m["v_behind"] or "", []).append(name)
    return found


def _weights(folder: Path, variant: str | None, mmap: bool) -> tuple[Source, list[str]]:
    """The weights of one component, and notes. It prefers `.safetensors` to `.bin`, and one file to shards.

    variant: None takes the files without a variant, or the only variant in the folder.
    """
    found = variants(os.listdir(folder))
    notes = []
    if variant is None and found and "" not in found:
        if len(found) > 1:
            raise ValueError(f"{folder} has the variants {' and '.join(found)} of its weights: give one as variant")
        variant = next(iter(found))
        notes.append(f"{folder.name}: its weights have only the variant {variant}, which is used")
    if not (names := found.get(variant or "", [])):
        there = [n for n in sorted(os.listdir(folder)) if n.endswith(WEIGHTS)]
        wanted = f"weights of the variant {variant!r}" if variant else f"{STEMS[0]}.safetensors or the like"
        raise ValueError(f"{folder} has no {wanted}; the weights there: {', '.join(there) or 'none'}")
    parts: Mapping[str, re.Match[str]] = {n: m for n in names if (m := NAME.fullmatch(n))}
    for ending in (".safetensors", ".bin"):
        mine = {n: m for n, m in parts.items() if m["ending"] == ending}
        if whole := [n for n, m in mine.items() if not m["n"]]:
            return open_file(folder / whole[0], mmap), notes
        if mine:
            count = int(next(iter(mine.values()))["count"])
            if len(mine) != count:
                raise ValueError(f"{folder} has {len(mine)} of the {count} shards of its weights")
            return _joined(folder, [open_file(folder / n, mmap) for n in mine]), notes
    raise AssertionError("a name has one of two endings")


def _joined(folder: Path, shards: list[Source]) -> Source:
    where: dict[str, Source] = {}
    for shard in shards:
        for name in shard.header:
            if name in where:
                raise ValueError(f"{shard.path} repeats {name!r}, which another shard also has")
            where[name] = shard
    header = {name: source.header[name] for name, source in where.items()}
    metadata = tuple(dict.fromkeys(name for shard in shards for name in shard.metadata))
    return Source(folder, header, lambda name: where[name].read(name), metadata=metadata)
