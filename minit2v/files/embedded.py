"""The embedded models, which come with the package. Every `from_pretrained` accepts their names. No torch here."""

import errno
import logging
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("shapes", "shapes-image", "shapes-motion", "shapes-orbit")
HEADS = ("model_index.json", "config.json", "pytorch_lora_weights.safetensors")  # one of them is in each


def find(name: str | Path) -> Path | None:
    """The folder of an embedded model, or None for any other name.

    If the current folder has a model of that name, it is used instead, and the log says so. Raises FileNotFoundError
    if the package was installed without its models.
    """
    if str(name) not in NAMES:
        return None
    if any((Path(name) / file).is_file() for file in HEADS):
        _tell(Path(name).absolute())
        return None
    if not (folder := ASSETS / name).is_dir():
        raise FileNotFoundError(errno.ENOENT, "this installation lacks the embedded models; install it again",
                                str(folder))
    return folder


@cache
def _tell(folder: Path) -> None:
    """Log it only once, although a pipeline asks for every component."""
    logger.warning("The folder %s is used, not the embedded model %r.", folder, folder.name)
