"""The models that come with the package, which every `from_pretrained` knows by their names. No torch."""

import errno
import logging
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("shapes", "shapes-image", "shapes-motion", "shapes-orbit")
HEADS = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")  # one of them is in each


def find(name: str | Path) -> Path | None:
    """The folder of an embedded model, None where the name is of none.

    A folder here of that name that holds a model wins, and the log says so. Raises FileNotFoundError where the package
    was installed without its models.
    """
    if str(name) not in NAMES:
        return None
    if any((Path(name) / file).is_file() for file in HEADS):
        _tell(Path(name).absolute())
        return None
    if not (folder := ASSETS / name).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the model of this package is not in this installation", str(folder))
    return folder


@cache
def _tell(folder: Path) -> None:
    """Once, though a pipeline asks for every component."""
    logger.warning("%s is taken, not the embedded model %r: a folder wins.", folder, folder.name)
