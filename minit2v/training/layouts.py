"""Reads every usual layout of clips and captions on disk into the same list of `Entry`.

- a folder of videos and pictures, with `a.txt` or `a.caption` beside `a.mp4`, also in folders inside
- `videos.txt` and, line by line, `prompt.txt`, `prompts.txt` or `captions.txt`
- `metadata.jsonl`, `.json` or `.csv`: a file and a caption in each row
- WebVid's csv (videoid, name, page_dir), Video-BLIP2's JSON (captions for places), VGen's list (file|||caption)
- tar archives as WebDataset's: `key.mp4` and `key.txt` or `key.json`
- one video or picture
- a TOML file that names several of these, with settings for each (`read_sets`)
"""

import csv
import io
import json
import logging
import os
import tarfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from minit2v_convert.rename import nearest, shown
from minit2v_convert.stream import first_line

from ..files.video import IMAGES
from .clips import VIDEOS, Media

logger = logging.getLogger(__name__)

MEDIA = (*VIDEOS, *IMAGES)
CAPTIONS = (".txt", ".caption")
LISTS = ("metadata.jsonl", "metadata.json", "metadata.csv", "videos.txt")
PROMPTS = ("prompt.txt", "prompts.txt", "captions.txt")  # beside videos.txt
FILES = ("file_name", "video_path", "image_path", "video", "image", "file", "path")  # how rows name a file
TEXTS = ("caption", "text", "prompt")  # and its caption

TABLES = ("set", "datasets", "directory")  # of a TOML file: ours, kohya's and musubi's, diffusion-pipe's
ALIASES = {  # what their settings are called here
    "video_directory": "path", "image_directory": "path", "image_dir": "path", "directory": "path",
    "video_jsonl_file": "path", "image_jsonl_file": "path", "num_repeats": "repeats", "target_frames": "frames",
    "frame_extraction": "clips", "frame_sample": "places", "frame_stride": "stride", "caption_prefix": "prefix",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One file of a set. captions: each visit takes one of them. at: the frame where clips must begin, if it is given.

    fault: why the file cannot be used, if that is known already.
    """

    media: Media
    captions: tuple[str, ...] = ()
    at: int | None = None
    fault: str | None = None


def read_layout(
    path: str | Path, folder: str | Path | None = None, warn: Callable[[str], None] = logger.warning
) -> list[Entry]:
    """The files of a folder, a list or an archive, or a single file. It is not checked whether they exist.

    folder: where the files of a list are, if not beside it. warn: takes a line about files that are left out.
    ValueError: there are no files. ValueError, OSError: the list cannot be read.
    """
    if entries := _entries(Path(path), folder, warn):
        return entries
    raise ValueError(f"{shown(path)}: no videos and no pictures")


def _entries(path: Path, folder: str | Path | None, warn: Callable[[str], None]) -> list[Entry]:
    if path.is_dir():
        lists = [path / name for name in LISTS if (path / name).is_file()
                 and (name != "videos.txt" or any((path / prompts).is_file() for prompts in PROMPTS))]
        if len(lists) > 1:
            raise ValueError(f"{shown(path)}: has {lists[0].name} and {lists[1].name}: name the one that is meant")
        if not lists:
            return list(_folder(path, warn))
        path = lists[0]
    ending = path.suffix.lower()
    if ending in MEDIA:
        return [_beside(path)]
    if ending == ".tar":
        return list(_archive(path))
    root = path.parent if folder is None else Path(folder)
    if ending not in (".txt", ".csv", ".json", ".jsonl"):
        what = "not a folder, a list, an archive, a video or a picture" if path.exists() else "no such file or folder"
        raise ValueError(f"{shown(path)}: {what}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{shown(path)}: is not text in UTF-8") from None
    try:
        return list({".txt": _lines, ".csv": _csv, ".json": _json, ".jsonl": _jsonl}[ending](path, text, root))
    except (json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{shown(path)}: is broken ({first_line(error)})") from None


def _entry(root: Path, name: str, *captions: Any, at: int | None = None) -> Entry:
    path = root / name
    return Entry(Media(path, str(path)), _texts(*captions), at)


def _texts(*captions: Any) -> tuple[str, ...]:
    """The texts without line breaks and double spaces. Empty texts are left out."""
    return tuple(" ".join(c.split()) for c in captions if isinstance(c, str) and c.strip())


# Folders and archives.


def _folder(path: Path, warn: Callable[[str], None]) -> Iterator[Entry]:
    """All files, also in folders inside. Hidden folders, folders of training runs and other files are left out."""
    files, seen = [], set()
    for place, folders, names in os.walk(path, followlinks=True):
        if "run.json" in names:
            warn(f"{shown(place)} is left out: it is the folder of a training run")
        if "run.json" in names or os.path.realpath(place) in seen:  # links can lead back
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    clips = {file.with_suffix("") for file in files if file.suffix.lower() in MEDIA}
    alone = sorted(f for f in files if f.suffix.lower() in CAPTIONS and f.with_suffix("") not in clips)
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        warn(f"no clip has the name of {', '.join(shown(f) for f in alone[:3])}{more}: not used as a caption")
    for file in sorted(files):
        if file.suffix.lower() in MEDIA:
            yield _beside(file)
        elif file.suffix.lower() == ".tar":
            yield from _archive(file)


def _beside(path: Path) -> Entry:
    """A file with the caption from the text file of the same name."""
    media = Media(path, str(path))
    found = [f for ending in CAPTIONS if (f := path.with_suffix(ending)).is_file()]
    if len(found) > 1:
        return Entry(media, fault=f"has two captions, {found[0].name} and {found[1].name}: remove one")
    try:
        return Entry(media, _texts(*(f.read_text(encoding="utf-8-sig") for f in found)))
    except UnicodeDecodeError:
        return Entry(media, fault=f"its caption {found[0].name} is not text in UTF-8")


def _archive(path: Path) -> Iterator[Entry]:
    """Only names and positions are read. A key is a name up to its first dot, as in WebDataset."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            try:
                for member in tar:
                    name = PurePosixPath(member.name)
                    if member.isfile() and not name.name.startswith("."):
                        key, _, ending = name.name.partition(".")
                        samples.setdefault(str(name.with_name(key)), {})["." + ending.lower()] = member
            except (tarfile.TarError, EOFError) as error:  # what is whole before it is used
                yield Entry(Media(path, str(path)), fault=f"a damaged archive ({first_line(error)})")
            for parts in samples.values():
                files = [m for ending, m in parts.items() if ending in MEDIA]
                if files:
                    media = Media(path, f"{path}/{files[0].name}", files[0].offset_data, files[0].size)
                    fault = f"and {files[1].name} have the same key" if len(files) > 1 else None
                    yield Entry(media, fault=fault) if fault else _member(tar, media, parts)
    except (tarfile.TarError, EOFError) as error:
        yield Entry(Media(path, str(path)), fault=f"a damaged archive ({first_line(error)})")


def _member(tar: tarfile.TarFile, media: Media, parts: Mapping[str, tarfile.TarInfo]) -> Entry:
    try:
        for ending in (*CAPTIONS, ".json"):
            if ending in parts and (file := tar.extractfile(parts[ending])) is not None:
                text = file.read().decode("utf-8-sig")
                return Entry(media, _caption(json.loads(text)) if ending == ".json" else _texts(text))
    except (UnicodeDecodeError, ValueError, RecursionError):
        return Entry(media, fault=f"its caption {ending} in the archive cannot be read")
    return Entry(media)


# Lists.


def _lines(path: Path, text: str, root: Path) -> Iterator[Entry]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all("|||" in line for line in lines):
        for line in lines:
            name, _, caption = line.partition("|||")
            yield _entry(root, name.strip(), caption)
        return
    beside = [path.with_name(name) for name in PROMPTS if path.with_name(name).is_file()]
    if len(beside) != 1:
        raise ValueError(f"{shown(path)}: its captions must be in one file beside it, {', '.join(PROMPTS)}, and there "
                         f"are {len(beside)}; or its lines are file|||caption")  # fmt: skip
    captions = beside[0].read_text(encoding="utf-8-sig").splitlines()
    while captions and not captions[-1].strip():
        captions.pop()
    files = text.splitlines()
    while files and not files[-1].strip():
        files.pop()
    if len(files) != len(captions):
        raise ValueError(f"{shown(path)}: has {len(files)} lines, and {beside[0].name} {len(captions)}")
    for name, caption in zip(files, captions, strict=True):
        yield _entry(root, name.strip(), caption)


def _csv(path: Path, text: str, root: Path) -> Iterator[Entry]:
    csv.field_size_limit(2**24)
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    for n, row in enumerate(rows, start=2):
        if "videoid" in row and "name" in row:  # WebVid's, whose downloaders make a folder for each page or none
            names = [f"{row['videoid']}.mp4", f"{row.get('page_dir') or '.'}/{row['videoid']}.mp4"]
            yield _entry(root, next((x for x in names if (root / x).is_file()), names[0]), row["name"])
        else:
            yield _row(path, n, row, root)


def _jsonl(path: Path, text: str, root: Path) -> Iterator[Entry]:
    for n, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _row(path, n, json.loads(line), root)


def _json(path: Path, text: str, root: Path) -> Iterator[Entry]:
    said = json.loads(text)
    if isinstance(said, dict) and isinstance(said.get("data"), list):  # Video-BLIP2's
        for n, video in enumerate(said["data"], start=1):
            places = video.get("data") if isinstance(video, dict) else None
            if not isinstance(places, list) or not isinstance(video.get("video_path"), str):
                raise ValueError(f"{shown(path)}: entry {n} has no video_path, or no list of captions as data")
            for place in places:
                at = place.get("frame_index") if isinstance(place, dict) else None
                if type(at) is not int or at < 0:
                    raise ValueError(f"{shown(path)}: entry {n} has a caption without a frame_index")
                if place.get("clip_path"):  # that place, cut out as a file
                    yield _entry(root, place["clip_path"], place.get("prompt"))
                else:
                    yield _entry(root, video["video_path"], place.get("prompt"), at=at)
    elif isinstance(said, dict):
        for name, about in said.items():
            yield _entry(root, name, *(_caption(about) if isinstance(about, dict) else (about,)))
    elif isinstance(said, list):
        for n, row in enumerate(said, start=1):
            yield _row(path, n, row, root)
    else:
        raise ValueError(f"{shown(path)}: is neither a list of files nor an object of them")


def _row(path: Path, n: int, row: Any, root: Path) -> Entry:
    """A row of a list. Other columns are ignored."""
    name = next((row[key] for key in FILES if row.get(key)), None) if isinstance(row, dict) else None
    if not isinstance(name, str):
        there = f"has {', '.join(map(repr, row))}" if isinstance(row, dict) else "has no names"
        raise ValueError(f"{shown(path)}: row {n} names no file: it {there}, and needs one of {', '.join(FILES)}")
    return _entry(root, name, *_caption(row))


def _caption(row: Any) -> tuple[str, ...]:
    """The captions of one file: a text, or a list of texts."""
    said = next((row[key] for key in TEXTS if row.get(key)), None) if isinstance(row, dict) else None
    return _texts(*said) if isinstance(said, list) else _texts(said)


# Several sets.


def read_sets(path: Path) -> list[dict[str, Any]]:
    """The sets of a TOML file as mappings of settings. Paths in it are relative to its folder.

    [[set]] is ours. [[datasets]] (with [[datasets.subsets]]) and [[directory]], as other trainers have them, are read
    too: with their names for the settings that exist here. [general] and what stands before the sets is for all.
    """
    try:
        said = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown(path)}: is not TOML ({first_line(error)})") from None
    tables = [name for name in TABLES if name in said]
    if len(tables) != 1 or not isinstance(said[tables[0]], list):
        raise ValueError(f"{shown(path)}: has no sets, each beginning with [[set]]")
    shared = {k: v for k, v in said.items() if k not in (*TABLES, "general")} | said.get("general", {})
    found = []
    for table in said[tables[0]]:
        subsets = table.pop("subsets", [{}])
        for subset in subsets:
            settings = _renamed(path, shared) | _renamed(path, table) | _renamed(path, subset)
            if "path" not in settings:
                raise ValueError(f"{shown(path)}: a set has no path{nearest('path', list(table | subset))}")
            for name in ("path", "folder"):
                if name in settings:
                    settings[name] = path.parent / settings[name]
            found.append(settings)
    return found


def _renamed(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, value in table.items():
        if name == "frames" or name == "target_frames":
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if name == "frame_extraction" and value == "full":
            value = "all"
        if name == "resolution":  # width and height, or one number for both
            sides = value if isinstance(value, list) else [value, value]
            if len(sides) != 2:
                raise ValueError(f"{shown(path)}: resolution is a number or [width, height], not {value!r}")
            settings |= {"width": sides[0], "height": sides[1]}
        elif name in ("caption_extension", "enable_bucket"):
            if value not in (*CAPTIONS, True):
                raise ValueError(f"{shown(path)}: {name} = {value!r} is not supported")
        else:
            settings[ALIASES.get(name, name)] = value
    return settings
