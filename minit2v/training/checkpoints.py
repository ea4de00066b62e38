"""Checkpoints of a run: each is one file, `step-000200.ckpt`, that is there whole or not at all. The newest whole wins.

What a state holds is the trainer's business; here it is tensors, numbers and words, as `torch.save` writes them.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from minit2v_convert.stream import first_line, parse_json, replacing

from ..files.hub import write_json
from .recipe import Recipe

NAME = re.compile(r"step-(\d+)\.ckpt")


def load_state(path: Path) -> Any:
    """What torch.save has written. ValueError in one line where that is not whole."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a broken file breaks its reader anywhere
        raise ValueError(f"{path} is broken ({first_line(error)}): remove it to begin anew") from None


def forget_later(log: Path, step: int) -> None:
    """Rows of later steps go: a kill has undone them, and they will be made again. So does a row that is not whole."""
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    later = [not line.endswith("\n") or (n := line.split(",")[0]).isdecimal() and int(n) > step for line in lines]
    if any(later):
        with replacing(log) as temporary:
            temporary.write_text("".join(line for line, gone in zip(lines, later, strict=True) if not gone))


def save(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write the state after `step` steps, and remove all but the newest `keep` checkpoints.

    The file and its name are on the disk before an older one goes. OSError names the file where it cannot be written.
    """
    path = folder / f"step-{step:06d}.ckpt"
    with replacing(path) as temporary:
        torch.save(state, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
    sync(folder)
    for old in sorted(all_of(folder))[:-keep]:
        all_of(folder)[old].unlink(missing_ok=True)
    return path


def sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can (Windows cannot)."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def all_of(folder: Path) -> dict[int, Path]:
    """Step -> its checkpoint."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(m[1]): path for path in paths if (m := NAME.fullmatch(path.name))}


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read, and its state; None where there is none.

    ValueError where there are some, and none is whole: to begin anew is for the user to say.
    """
    for unfinished in folder.glob(".step-*.ckpt"):  # of a process that was killed while it wrote
        unfinished.unlink(missing_ok=True)
    errors = []
    for _, path in sorted(all_of(folder).items(), reverse=True):
        try:
            return path, load_state(path)
        except ValueError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(errors[0])
    return None


def claim(out: Path, recipe: Recipe, about: dict[str, Any], resume_anyway: bool = False) -> None:
    """Make the folder of a run and write `run.json`: the recipe and what it is about (`about`: model, data).

    ValueError where the folder is that of another run: it says what has changed.
    """
    out.mkdir(parents=True, exist_ok=True)
    path = out / "run.json"
    if path.exists() and not resume_anyway:
        before = parse_json(path)
        changed = recipe.changes(before.get("recipe", {}))
        changed += [f"the {k} is another" for k, v in about.items() if k in before and before[k] != v]
        if changed:
            raise ValueError(f"{path} is that of another run: {'; '.join(changed)}. Give another folder as --out, or "
                             "--resume-anyway to go on with what is new")  # fmt: skip
    write_json(path, {"recipe": recipe.values(), **about})
