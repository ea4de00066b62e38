"""Folders of a model that change as a whole."""

import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minit2v_convert.folders import STEMS, variants
from minit2v_convert.stream import ended_cleanly, shown

logger = logging.getLogger(__name__)

# Says which file has which tensor, where they are in shards. The variant has two places.
LIST = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.(?P<v>[\w-]+))?\.(?:safetensors|bin)\.index"
                  r"(?:\.(?P<v_behind>[\w-]+))?\.json")  # fmt: skip
# Without these nothing loads. So they go first and come last, the index after all others.
HEADS = ("tokenizer.json", "vocab.json", "config.json", "model_index.json")


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to; when the block has gone well, its files take their places in `folder` together.

    Until then nothing in `folder` changes, and where it did not exist, it appears whole. A kill in the very moment of
    the change leaves a folder that does not load; it never leaves a mix of old and new. What would be read in the place
    of the new files is removed: weights of the same variant in another kind of file, or in shards. All else stays.
    OSError names `folder`, or what in it is in the way.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it leads to
    name = f".{folder.name[:30]}-{secrets.token_hex(16)}"
    new = folder / name if folder.is_dir() else folder.with_name(name)
    with ended_cleanly():
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            yield new
            _put(new, folder)
        except OSError as error:
            if isinstance(error, FileExistsError | NotADirectoryError) and error.filename is not None:
                raise OSError(f"cannot write {shown(folder)}: {shown(error.filename)} is not a folder") from error
            raise OSError(str(error).replace(str(new), str(folder))) from error
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    if not folder.exists():
        with suppress(OSError):  # somebody has made it meanwhile
            new.rename(folder)
            return
    files = [p.relative_to(new) for p in new.rglob("*") if p.is_file()]
    files.sort(key=lambda p: HEADS.index(p.name) + 1 if p.name in HEADS else 0)
    for place in {folder / p.parent for p in files}:
        place.mkdir(parents=True, exist_ok=True)
        if place.stat().st_dev != new.stat().st_dev or not os.access(place, os.W_OK):
            raise OSError(f"cannot write {shown(place)}: it is on another disk than {shown(folder)}, or read-only")
    if taken := [p for p in files if (folder / p).is_dir()]:
        raise OSError(f"cannot write {shown(folder / taken[0])}: there is a folder of that name")
    with locked(folder):
        for p in reversed(files):
            if p.name in HEADS:
                (folder / p).unlink(missing_ok=True)
        for p in _superseded(files, folder):
            logger.warning("%s is removed: it would be read in the place of what is saved.", shown(folder / p))
            (folder / p).unlink()
        for p in files:
            os.replace(new / p, folder / p)


def _superseded(files: list[Path], folder: Path) -> list[Path]:
    """What is read before, or beside, the new files, and is not among them."""
    old: list[Path] = []
    for place in {p.parent for p in files}:
        mine = {p.name for p in files if p.parent == place}
        there = [p.name for p in (folder / place).iterdir() if p.is_file()]
        lists = {n: m["v"] or m["v_behind"] or "" for n in there if (m := LIST.fullmatch(n))}  # of shards
        for variant in variants(mine):
            weights = variants(there).get(variant, [])
            old += [place / n for n in (*weights, *(n for n, v in lists.items() if v == variant)) if n not in mine]
        if "tokenizer_config.json" in mine and "added_tokens.json" in there:
            old.append(place / "added_tokens.json")
    return old


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Of two who save into one folder, one waits; on Windows, and on disks without locks, they must not meet.

    The lock ends with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
