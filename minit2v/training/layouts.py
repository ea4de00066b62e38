"""How people lay out clips and captions on disk, each read into the same list of `Entry`."""

from dataclasses import dataclass
from pathlib import Path

from minit2v_convert.rename import shown

from ..files.video import IMAGES
from .clips import VIDEOS, Media

CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True)
class Entry:
    """One file of a set. captions: of which each visit takes one; at: the frame that clips must begin at, if any."""

    media: Media
    captions: tuple[str, ...]
    at: int | None = None


def read_layout(path: str | Path) -> list[Entry]:
    """The files that a folder, a list or a single file names. Whether they exist is not looked at."""
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in (*VIDEOS, *IMAGES):
        return [Entry(Media(path, str(path)), _beside(path))]
    raise ValueError(f"{shown(path)}: not a folder, a list, a video or a picture")


def _folder(path: Path) -> list[Entry]:
    """Videos and pictures with captions beside them, in all folders inside but hidden ones."""
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in (*VIDEOS, *IMAGES)
                   and not any(part.startswith(".") for part in f.relative_to(path).parts))  # fmt: skip
    return [Entry(Media(f, str(f)), _beside(f)) for f in files]


def _beside(path: Path) -> tuple[str, ...]:
    """The caption in the file of the same name. ValueError where there are two, or it is no text."""
    found = [f for ending in CAPTIONS if (f := path.with_suffix(ending)).is_file()]
    if not found:
        return ()
    if len(found) > 1:
        raise ValueError(f"{shown(path)}: has two captions, {found[0].name} and {found[1].name}: remove one")
    try:
        text = " ".join(found[0].read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"{shown(found[0])}: is no text in UTF-8") from None
    return (text,) if text else ()
