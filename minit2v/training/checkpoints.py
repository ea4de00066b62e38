"""Checkpoints of a run. Each is there whole or not at all, and the newest whole one is used.

`step-000200.ckpt` is a file, written by a process that has all weights. `step-000200` is a folder, where each process
has written its part of the weights. A state has names and tensors. The trainer knows what they mean.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minit2v_convert.stream import first_line, parse_json, replacing

from ..files.hub import write_json
from ..parallel import World, sync
from .recipe import Recipe

FORMAT = 1  # of the names and tensors in a checkpoint
DONE, VERSION = "number/done", "number/format"
NAME = re.compile(r"step-(\d+)(?:\.ckpt)?")


def load_state(path: Path) -> Any:
    """Read what torch.save has written. ValueError, one line, where it is not whole."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # a damaged file can raise any error
        raise ValueError(f"{path} is broken ({first_line(error)}): remove it to begin anew") from None


def forget_later(log: Path, step: int) -> None:
    """Remove rows of later steps, and a row that is not whole. A kill has undone these steps: they are made again."""
    if not log.exists():
        return
    lines = log.read_text().splitlines(keepends=True)
    later = [not line.endswith("\n") or (n := line.split(",")[0]).isdecimal() and int(n) > step for line in lines]
    if any(later):
        with replacing(log) as temporary:
            temporary.write_text("".join(line for line, gone in zip(lines, later, strict=True) if not gone))


def save(folder: Path, step: int, state: Mapping[str, Tensor], keep: int = 2, world: World | None = None) -> None:
    """Write the state after `step` steps, and remove all but the newest `keep` checkpoints.

    world: given where each process has a part of the tensors. Then all must call this function. The new checkpoint is
    on the disk before an older one is removed. OSError names the file that cannot be written.
    """
    if world is not None:
        world.save_sharded(folder / f"step-{step:06d}", state)
    else:
        with replacing(folder / f"step-{step:06d}.ckpt") as temporary:
            torch.save(dict(state), temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        sync(folder)
    if world is None or world.is_first:
        for _, old in sorted(all_of(folder).items())[:-keep]:
            remove(old)


def remove(path: Path) -> None:
    """Remove a checkpoint. A folder loses its name first, so that nobody finds a part of it."""
    if path.is_dir():
        gone = path.with_name(f"{path.name}.part")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def all_of(folder: Path) -> dict[int, Path]:
    """{step: its checkpoint}."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return {int(m[1]): path for path in paths if (m := NAME.fullmatch(path.name))}


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None. Unfinished files of a killed process are removed.

    ValueError where there are checkpoints and none is whole. The user decides whether to begin anew.
    """
    for unfinished in folder.glob(".step-*.ckpt"):
        unfinished.unlink(missing_ok=True)
    errors = []
    for _, path in sorted(all_of(folder).items(), reverse=True):
        if path.is_dir():  # a folder gets its name when it is whole
            return path
        try:
            torch.load(path, weights_only=True, map_location="cpu", mmap=True)  # reads the list of tensors at its end
            return path
        except Exception as error:
            errors.append(f"{path} is broken ({first_line(error)}): remove it to begin anew")
    if errors:
        raise ValueError(errors[0])
    return None


def read(path: Path, world: World, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """The state of a checkpoint, written by any number of processes.

    like: name -> the tensor that takes the value, or None. Where that one is sharded, the value is sharded like it.
    ValueError where the checkpoint is broken or has another format.
    """
    state = world.load_sharded(path, like) if path.is_dir() else load_state(path)
    known = isinstance(state, dict) and all(isinstance(x, Tensor) for x in state.values()) and DONE in state
    version = int(state.get(VERSION, 1)) if known else 0
    if version != FORMAT:
        raise ValueError(f"{path} has {f'the format {version}' if version else 'an older format'}, and this version of "
                         f"minit2v reads format {FORMAT}: use the version that wrote it, or another --out")  # fmt: skip
    return state if path.is_dir() else {name: as_spread(x, like(name)) for name, x in state.items()}


def as_spread(x: Tensor, like: Tensor | None) -> Tensor:
    """x, sharded like `like`: each process keeps its part."""
    if like is None or not hasattr(like, "placements") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)


def claim(out: Path, recipe: Recipe, about: dict[str, Any], resume_anyway: bool = False) -> None:
    """Make the folder of a run, and write `run.json`: the recipe and hashes of the model and the data (`about`).

    ValueError where the folder belongs to another run. It says what has changed.
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


def digest_of_some(network: nn.Module) -> str:
    """A fast hash of a network: of the first numbers of each of its tensors."""
    total = hashlib.sha256()
    for name, x in network.named_parameters():
        total.update(f"{name} {tuple(x.shape)} {x.detach().flatten()[:32].double().tolist()}".encode())
    return total.hexdigest()
