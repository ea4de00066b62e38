"""Writes sparse checkpoint files. They have real names, shapes and dtypes, but a hole of zeros in place of the data.

Such files take almost no disk space. Tests use them to measure loading, and to load all published names without a
download.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

# The dtypes of published checkpoints, under the names of safetensors.
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
    """Write a `.safetensors` file with a header and a hole. manifest: {name: (shape, dtype)}."""
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
    """Write a `torch.save` file, a zip archive whose tensors are holes. manifest: {name: (shape, dtype)}."""
    # The system gives no memory for pages that are never touched, so the model takes no RAM either.
    state = {name: torch.empty(tuple(shape), dtype=DTYPES[dtype]) for name, (shape, dtype) in manifest.items()}
    with torch.serialization.skip_data():
        torch.save(state, path)
    return Path(path)
