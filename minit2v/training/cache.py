"""What frozen networks make of the data, on disk: the VAE's mean and log-variance, text states, facts of files.

The name of a cache file is a hash of everything that its content depends on. What another VAE has made has another
name, and so has another size or another file. So nothing in the cache can be out of date. Files appear whole or not at
all. Two processes that make the same file write the same content. Nothing is kept in memory.
"""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from minit2v_convert.rename import shown
from minit2v_convert.stream import first_line, replacing

from .clips import Facts, Media, examine

logger = logging.getLogger(__name__)
LAYOUT = 1  # raise it when frames are made in another way: then older cache files are not found


def digest(*things: Any) -> str:
    """A hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps([LAYOUT, *things], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def digest_of(network: nn.Module) -> str:
    """A hash of the weights of a network, their names and dtypes, and its config."""
    total = hashlib.sha256(repr((type(network).__name__, getattr(network, "config", None))).encode())
    for name, x in sorted(network.state_dict().items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\0".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class Cache:
    """A cache in a folder. With None nothing is kept."""

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)

    def size(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.folder.rglob("*.*") if self.folder else ():
            with suppress(FileNotFoundError):  # another process has renamed its unfinished file
                total += path.stat().st_size
        return total

    def has(self, kind: str, name: str) -> bool:
        path = self._path(kind, name, ".safetensors")
        return path is not None and path.exists()

    def read(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """The tensors of that name, or None. kind: the folder inside the cache."""
        path = self._path(kind, name, ".safetensors")
        if path is None or not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except Exception as error:  # a damaged file can raise any error
            logger.warning("%s is broken (%s): it is made again.", shown(path), first_line(error))
            return None

    def write(self, kind: str, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Store tensors, and return them on the CPU."""
        tensors = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        if (path := self._path(kind, name, ".safetensors")) is not None:
            _write(path, save(tensors))
        return tensors

    def facts(self, media: Media) -> Facts:
        """What `examine` finds. For a file of the same path, size and date it comes from the cache.

        ValueError says what is wrong with the file. Faults are not kept, because a fault may pass.
        """
        path = None
        if media.path.is_file():
            stat = media.path.stat()
            known = digest(str(media.path.absolute()), stat.st_size, stat.st_mtime_ns, media.offset, media.size)
            path = self._path("files", known, ".json")
        if path is not None and path.exists():
            try:
                said = json.loads(path.read_text(encoding="utf-8"))
                return Facts(**said | {"times": tuple(said["times"])})
            except (ValueError, TypeError, KeyError):
                logger.warning("%s is broken: it is made again.", shown(path))
        facts = examine(media)
        if path is not None:
            _write(path, json.dumps(asdict(facts)).encode())
        return facts

    def _path(self, kind: str, name: str, ending: str) -> Path | None:
        return None if self.folder is None else self.folder / kind / name[:2] / f"{name}{ending}"


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)
