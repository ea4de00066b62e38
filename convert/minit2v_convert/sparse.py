"""Checkpoint files of any size that take no disk: true names, shapes and dtypes around a hole that reads as zeros.

They measure what loading costs, and test that every name of the published files finds its place, without a download.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

# safetensors' names of the dtypes that published checkpoints have
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
Manifest = Mapping[str, tuple[Sequence[int], str]]  # name -> (shape, dtype name)


def write_sparse_safetensors(path: str | Path, manifest: Manifest) -> Path:
    """A `.safetensors` file: the header, then a hole."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in manifest.items():
        begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path = Path(path)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)
    return path


def write_sparse_bin(path: str | Path, manifest: Manifest) -> Path:
    """A `torch.save` file: a zip archive whose stored tensors are holes."""
    # Memory that is never touched is never given, so neither is the model in RAM.
    state = {name: torch.empty(tuple(shape), dtype=DTYPES[dtype]) for name, (shape, dtype) in manifest.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)
    return Path(path)
