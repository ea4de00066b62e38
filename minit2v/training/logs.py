"""Numbers of a run: `log.csv`, and TensorBoard's files where it is installed."""

import csv
import sys
from pathlib import Path
from typing import Any

import torch

from .checkpoints import forget_later


class Log:
    """The log of a run that begins at `step`. Rows of later steps are removed: a kill has undone them.

    A row has the mean of the losses since the row before. Of other values it has the last one.
    """

    def __init__(self, out: Path, step: int):
        self.path, self.losses = out / "log.csv", []
        forget_later(self.path, step)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # TensorBoard is optional
            self.board = None
        else:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step or None)

    def add(self, step: int, whole: bool, seconds: float, values: dict[str, Any]) -> None:
        """Take the values of a step. whole: write the row now."""
        self.losses.append(values["loss"])
        if whole:
            row = {"minutes": round(seconds / 60, 3), **values, "loss": sum(self.losses) / len(self.losses)}
            self.losses.clear()
            append(self.path, {"step": step, **row})
            self.show("train", step, row)

    def show(self, group: str, step: int, values: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{group}/{name}", value, step)
            self.board.flush()


def append(path: Path, row: dict[str, Any]) -> None:
    """Write a row at the end of a CSV file, with numbers of six digits. A new file also gets a head."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if new:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def memory(device: torch.device) -> float:
    """The most memory that was used so far, in GiB: on the GPU, or by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
