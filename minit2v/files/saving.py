"""Saves a model's folder so that all its files change together."""

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

# The index of shards, which names the file of each tensor. The variant can be at two places in its name.
LIST = re.compile(rf"(?:{'|'.join(STEMS)})(?:\.(?P<v>[\w-]+))?\.(?:safetensors|bin)\.index"
                  r"(?:\.(?P<v_behind>[\w-]+))?\.json")  # fmt: skip
# Nothing loads without these files. So the old ones are removed first, and the new ones come last.
HEADS = ("tokenizer.json", "vocab.json", "config.json", "model_index.json")


@contextmanager
def filling(folder: str | Path) -> Iterator[Path]:
    """Yield a new folder to write to. When the block succeeds, its files move into `folder` together.

    Until then nothing in `folder` changes. If `folder` did not exist, it appears complete. A kill during the move
    leaves a folder that does not load, and never a mix of old and new files. Old files that would be read instead of
    the new ones are removed: weights of the same variant in another file format, or in shards. Other files stay.
    OSError names `folder`, or the file that is in the way.
    """
    folder = Path(os.path.realpath(folder))  # follow links
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
        with suppress(OSError):  # another process may have made it
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
            logger.warning("%s is removed, because it would be read instead of the saved files.", shown(folder / p))
            (folder / p).unlink()
        for p in files:
            os.replace(new / p, folder / p)


def _superseded(files: list[Path], folder: Path) -> list[Path]:
    """Old files that would be read instead of, or together with, the new files."""
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
def locked(folder: Path, busy: str | None = None) -> Iterator[None]:
    """Lock a folder, so that two processes do not save into it at the same time: the second one waits.

    busy: the message of a ValueError that the second one gets at once, in place of waiting.
    Windows, and disks without locks, give no such protection. The lock ends when the process ends, also by a kill.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if busy is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(busy) from None
        except OSError:  # a disk without locks
            pass
        yield
    finally:
        os.close(descriptor)
