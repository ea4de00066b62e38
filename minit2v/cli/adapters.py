"""`--lora`, `--motion-lora` and `--embedding`: parses their values, finds the files, and loads them."""

import argparse
import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minit2v_convert.rename import nearest

from .messages import one_line, say

MOTIONS = ("zoom-in", "zoom-out", "pan-left", "pan-right", "tilt-up", "tilt-down", "rolling-clockwise",
           "rolling-anticlockwise")  # fmt: skip
HUB_MOTION = "guoyww/animatediff-motion-lora-"
OPTIONS = ("lora", "motion_lora", "embedding")  # settings that are lists
TAG = re.compile(r"<(lora|lyco|locon):([^<>:]*)(?::([^<>]*))?>", re.I)  # AUTOMATIC1111's, in a prompt
FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

Given = tuple[str, Any]  # file, folder or hub id, and its weight or word


def lora(text: str) -> Given:
    """(FILE, weight) from `FILE[:weight]`. A path may have colons: only the last one counts, before a number."""
    head, colon, tail = text.rpartition(":")
    weight = _number(tail) if colon else None
    if not text or colon and not head or colon and not tail:
        raise argparse.ArgumentTypeError(f"must be FILE or FILE:weight, not {text!r}")
    if weight is None:
        if colon and re.fullmatch(r"[-+.,\d]+|[-+]?(nan|inf\w*)", tail, re.I) and not Path(text).exists():
            raise argparse.ArgumentTypeError(f"{text!r}: the weight must be a number from -100 to 100, not {tail!r}")
        return text, 1.0
    return (text, 1.0) if _is_whole(text, head) else (head, weight)


def embedding(text: str) -> Given:
    """(FILE, word) from `FILE[:word]`. Only the last colon counts, if no part of a path follows it."""
    head, colon, tail = text.rpartition(":")
    if not text or colon and not head or colon and not tail:
        raise argparse.ArgumentTypeError(f"must be FILE or FILE:word, not {text!r}")
    if not colon or "/" in tail or "\\" in tail or tail.endswith(FILES) or _is_whole(text, head):
        return text, None
    return head, tail


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= 100 else None


def _is_whole(text: str, head: str) -> bool:
    """Whether the whole of `text`, with its colon, is a path."""
    if not Path(text).exists():
        return False
    if Path(head).exists():
        raise argparse.ArgumentTypeError(f"the files {head!r} and {text!r} both exist: rename one of them")
    return True


def check_prompt(prompt: str) -> str | None:
    """The error of a prompt that names a LoRA in AUTOMATIC1111's way, or None."""
    if (tag := TAG.search(prompt)) is None:
        return None
    weight = f":{tag[3]}" if tag[3] and _number(tag[3]) is not None else ""
    return (f"{tag[0]} is not read in a prompt: remove it, and give --lora {tag[2] or 'FILE'}.safetensors{weight}")


def words(name: str, stored: Any) -> list[str]:
    """The options for one of these settings in a video's metadata. ValueError if the metadata are not valid."""
    if not isinstance(stored, list):
        raise ValueError(f"{name} must be a list, not {stored!r}")
    made = []
    for entry in stored:
        path = entry.get("path") if isinstance(entry, dict) else None
        extra = entry.get("word" if name == "embedding" else "weight") if isinstance(entry, dict) else None
        if not isinstance(path, str) or not isinstance(extra, str | int | float | None) or isinstance(extra, bool):
            extra_name = "word" if name == "embedding" else "weight"
            raise ValueError(f"{name}: an entry must be an object with a path and a {extra_name}, not {entry!r}")
        made.append(f"--{name.replace('_', '-')}={path}" + (f":{extra}" if extra is not None else ""))
    return made


def digests(stored: Mapping[str, Any]) -> dict[str, str]:
    """{path: SHA-256} of the files that made a video."""
    return {entry["path"]: str(entry.get("sha256")) for name in OPTIONS for entry in stored.get(name) or ()}


def say_changes(settings: Mapping[str, Any], before: Mapping[str, str]) -> None:
    """Warn about files that have changed since the video was made."""
    for path, sha256 in digests(settings).items():
        if before.get(path, sha256) != sha256:
            say(f"warning: {path} has changed since the video was made, so the new video may differ")


def put_into(pipe: Any, settings: dict[str, Any]) -> None:
    """Load the adapters of the settings. Replaces them by what the video stores: path, weight or word, SHA-256."""
    for name in OPTIONS:
        settings[name] = [dict(zip(("path", "word" if name == "embedding" else "weight"), given, strict=True))
                          for given in settings.get(name, ())]  # fmt: skip
        if not settings[name]:
            del settings[name]
    for entry in settings.get("embedding", ()):
        with _naming("--embedding", entry["path"]):
            from ..adapters.textual_inversion import find

            file = _settle(entry, find(entry["path"]))
            for word, count in pipe.load_textual_inversion(file, token=entry["word"]).items():
                say(f"the word {word!r} stands for {count} vector{'s' * (count > 1)}")
    names: list[str] = []
    weights: list[float] = []
    for option in ("lora", "motion_lora"):
        for entry in settings.get(option, ()):
            name = f"{Path(entry['path']).stem}-{len(names) + 1}"
            with _naming(f"--{option.replace('_', '-')}", entry["path"]):
                if option == "motion_lora":
                    entry["path"] = _motion(entry["path"])
                pipe.load_lora_weights(_settle(entry, _find_lora(entry["path"])), adapter_name=name)
                _say_layers(pipe, name, option)
            names.append(name)
            weights.append(entry["weight"])
    if names:
        pipe.set_adapters(names, weights)
        if settings.get("optimize"):
            pipe.fuse_lora()


class _naming:
    """Puts the option and its value before the message of an error."""

    def __init__(self, option: str, path: str):
        self.option, self.path = option, path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, ValueError | OSError | TypeError):
            text = one_line(error)
            text = text if text.startswith(self.path) else f"{self.path}: {text}"  # name the file only once
            raise (OSError if isinstance(error, OSError) else ValueError)(f"{self.option} {text}") from error


def _motion(name: str) -> str:
    """The hub id of a motion that guoyww has published. Files, folders and hub ids stay as they are."""
    if Path(name).exists() or "/" in name or name.endswith(FILES):
        return name
    from ..files import embedded

    if embedded.find(name):
        return name
    if name not in MOTIONS:
        raise ValueError(f"there is no such file, and no motion of that name{nearest(name, MOTIONS)}; the motions are "
                         f"{', '.join(MOTIONS)}")  # fmt: skip
    return HUB_MOTION + name


def _find_lora(name: str) -> Path:
    from ..adapters.lora import file_of

    return file_of(name)


def _settle(entry: dict[str, Any], file: Path) -> Path:
    """Store a file's absolute path and SHA-256 in the settings. Returns the file."""
    from ..files import embedded

    if embedded.find(entry["path"]) is None and Path(entry["path"]).expanduser().exists():
        entry["path"] = str(Path(entry["path"]).expanduser().absolute())
    with file.open("rb") as opened:
        entry["sha256"] = hashlib.file_digest(opened, "sha256").hexdigest()
    return file


def _say_layers(pipe: Any, name: str, option: str) -> None:
    from ..adapters.lora import loras_of

    changed = {component: loras_of(getattr(pipe, component)).loaded.get(name, {}) for component in
               ("unet", "text_encoder") if getattr(pipe, component) is not None}  # fmt: skip
    if option == "motion_lora" and not any(".motion." in path for path in changed.get("unet", {})):
        raise ValueError("it changes no motion module: give it as --lora")
    counts = [f"{len(layers)} layers of the {component}" for component, layers in changed.items() if layers]
    say(f"LoRA {name.rpartition('-')[0]} changes {' and '.join(counts)}")


def say_unused(pipe: Any, prompts: list[str]) -> None:
    """Warn about embeddings whose word is in no prompt."""
    ids = {n for prompt in prompts for n in pipe.tokenizer.encode(prompt)}
    for word, (first, *_) in pipe.tokenizer.words.items():
        if first not in ids:
            say(f"warning: no prompt contains the word {word!r}, so its embedding changes nothing")
