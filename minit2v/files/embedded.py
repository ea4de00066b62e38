"""The models that come with the package, by their names. No torch."""

import errno
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
NAMES = ("shapes", "shapes-image", "shapes-motion")


def find(name: str) -> Path | None:
    """The folder of an embedded model; None where the name is of none. FileNotFoundError where it was not installed."""
    if name not in NAMES:
        return None
    if not (folder := ASSETS / name).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the model of this package is not in this installation", str(folder))
    return folder
