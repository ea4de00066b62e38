"""What the frozen networks make of the data, on disk: the VAE's mean and log-variance, text states, facts of files.

The name of a cache file is a hash of all that its content depends on. So a cache needs no check of validity: what was
made by another VAE, at another size or of another file has another name, and is not found. Files appear whole or not
at all, and two processes that make the same one write the same. Nothing is kept in memory.
"""

import hashlib
import json
import logging
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
LAYOUT = 1  # to be raised when frames are made in another way: older cache files are then not found


def digest(*things: Any) -> str:
    """A name for what can be said in JSON."""
    return hashlib.sha256(json.dumps([LAYOUT, *things], sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def digest_of(network: nn.Module) -> str:
    """What tells a network from another: a hash of its weights, their names and their dtype, and of its config."""
    total = hashlib.sha256(repr((type(network).__name__, getattr(network, "config", None))).encode())
    for name, x in sorted(network.state_dict().items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}\0".encode())
        total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


class Cache:
    """folder: where the files are; None: nothing is kept."""

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) if self.folder else 0

    def has(self, kind: str, name: str) -> bool:
        path = self._path(kind, name, ".safetensors")
        return path is not None and path.exists()

    def read(self, kind: str, name: str) -> dict[str, Tensor] | None:
        """The tensors of that name, None where there are none. kind: the folder inside."""
        path = self._path(kind, name, ".safetensors")
        if path is None or not path.exists():
            return None
        try:
            return load(path.read_bytes())
        except Exception as error:  # a broken disk breaks a reader anywhere
            logger.warning("%s is broken (%s): it is made again.", shown(path), first_line(error))
            return None

    def write(self, kind: str, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, in the memory of the CPU."""
        tensors = {key: x.detach().cpu().contiguous() for key, x in tensors.items()}
        if (path := self._path(kind, name, ".safetensors")) is not None:
            _write(path, save(tensors))
        return tensors

    def facts(self, media: Media) -> Facts:
        """What `examine` says; of a file of the same path, size and date it is read from disk. ValueError: its fault.

        Faults are not kept: what is wrong may be the disk that day.
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
