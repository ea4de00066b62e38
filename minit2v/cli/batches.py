"""A list of prompts, made into a folder of videos by one process, or by several that torchrun starts.

Of n processes each takes every n-th prompt, and none waits for another. Videos that the folder has already are left
out. So the same command goes on after a kill, also with another number of processes. `report.json` in the folder says
what became of each prompt.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from .messages import one_line, process, say

REPORT = "report.json"
NOT_COMPARED = ("versions",)  # a video by another version of torch counts, too
LEFT_OVER = 60  # seconds until an unfinished file that no process holds is removed


class Batch:
    """The videos that this process has to make.

    folder: where all videos go.
    entries: (prompt, {frame: text}) of the whole list.
    paths: the usual file of each entry.
    about: makes what the file of an entry stores.
    """

    def __init__(
        self,
        folder: Path,
        entries: list[tuple[str, dict[int, str]]],
        paths: list[Path],
        about: Callable[[str, dict[int, str]], dict[str, Any]],
    ):
        self.folder, self.entries, self.paths = folder, entries, paths
        self.stored = [_plain(about(*entry)) for entry in entries]
        self.rank, self.size = process()
        self.own = range(self.rank, len(entries), self.size)
        self.seconds: list[float] = []
        remove_left_over(folder)
        places = self._places()
        self.todo = [(n, places[n][0]) for n in self.own if not places[n][1]]
        self.there = [places[n][0] for n in self.own if places[n][1]]
        found = {n: {"file": places[n][0].name} for n in self.own if places[n][1]}
        self._report({n: found.get(n) for n in self.own})

    def _places(self) -> dict[int, tuple[Path, bool]]:
        """The file of each own video, and whether it is there already: whole, and with the same settings.

        Another video with that name stays, and the new one gets a number. All processes find the same names: what
        another process makes meanwhile gets the name that is found for it here.
        """
        groups: dict[Path, list[int]] = {}
        for n, path in enumerate(self.paths):
            groups.setdefault(path, []).append(n)
        found: dict[int, tuple[Path, bool]] = {}
        for path, numbers in groups.items():
            if not any(n in self.own for n in numbers):
                continue
            taken: set[Path] = set()
            for n in numbers:
                name = first_name(path, partial(self._fits, n, taken))
                taken.add(name)
                found[n] = name, name.exists()
        return found

    def _fits(self, n: int, taken: set[Path], name: Path) -> bool:
        return name not in taken and (not name.exists() or self._is_made(name, n))

    def _is_made(self, path: Path, n: int) -> bool:
        from ..files.video import read_metadata

        if not is_whole(path):
            if n in self.own:
                say(f"warning: {path} is not complete; it stays, and the video gets another name")
            return False
        try:
            return _plain(read_metadata(path)) == self.stored[n]
        except (ValueError, OSError, RuntimeError):
            return False

    def say_made(self, n: int, path: Path, seconds: float, what: str) -> None:
        """Note a finished video. Several processes also say how many videos of the list are done."""
        self.seconds.append(seconds)
        done, failed = self._report({n: {"file": path.name, "seconds": round(seconds, 2)}})
        if self.size == 1:
            return say(f"{what} in {seconds:.1f} s")
        left = len(self.todo) - [m for m, _ in self.todo].index(n) - 1
        rest = f", about {_time(left * sum(self.seconds) / len(self.seconds))} left here" if left else ""
        say(f"{path.name}: {what} in {seconds:.1f} s; {done + failed} of {len(self.entries)} done{rest}")

    def failed(self, n: int, error: BaseException) -> None:
        self._report({n: {"error": one_line(error)}})

    def _report(self, news: dict[int, dict[str, Any] | None]) -> tuple[int, int]:
        """Write what is new about these prompts into the report. None: nothing is known yet.

        Returns how many prompts of the whole list are made, and how many failed.
        """
        from minit2v_convert.stream import replacing

        from ..files.saving import locked

        path = self.folder / REPORT
        settings = {k: v for k, v in self.stored[0].items() if k not in ("prompt", "prompt_at")}
        keys = [_key(stored) for stored in self.stored]
        with locked(self.folder):
            old: dict[str, Any] = {}
            with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is not ours
                read = json.loads(path.read_text(encoding="utf-8"))
                if read["settings"] == settings:  # else it is that of another list
                    old = {_key(video): {k: v for k, v in video.items() if k in ("file", "seconds", "error")}
                           for video in read["videos"]}  # fmt: skip
            known = {n: old[key] for n, key in enumerate(keys) if key in old}
            for n, entry in news.items():
                kept = known.pop(n, {})
                if entry is not None:
                    known[n] = entry | ({"seconds": kept["seconds"]} if entry.get("file") == kept.get("file")
                                        and "seconds" in kept and "seconds" not in entry else {})  # fmt: skip
            failed = sum("error" in entry for entry in known.values())
            made = len(known) - failed
            videos = [{k: self.stored[n][k] for k in ("prompt", "prompt_at") if k in self.stored[n]} | known[n]
                      for n in sorted(known)]  # fmt: skip
            content = {"prompts": len(keys), "made": made, "failed": failed, "settings": settings, "videos": videos}
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return made, failed

    def exit_code(self, failed: int) -> int:
        """1 where prompts failed.

        torchrun ends all processes when one returns 1. So only the process that ends last returns it, for the failures
        of all.
        """
        if self.size == 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
            return 1 if failed else 0
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # there is no store to count in
            return 0
        from torch import distributed

        store, _, _ = next(distributed.rendezvous("env://"))
        # A restart has the same store, and counts from 0.
        store = distributed.PrefixStore(f"minit2v {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        store.add("failed", failed)
        if store.add("ended", 1) < self.size:
            return 0
        return 1 if store.add("failed", 0) else 0


def unique(entries: list[tuple[str, dict[int, str]]]) -> list[tuple[str, dict[int, str]]]:
    """Each prompt once, in the order of the list. All have one seed, so the same text gives the same video."""
    found: dict[str, tuple[str, dict[int, str]]] = {}
    for text, at in entries:
        found.setdefault(repr((text, sorted(at.items()))), (text, at))
    return [*found.values()]


def numbered(path: Path, k: int) -> Path:
    """The k-th name for a video, from 1: `cat.mp4`, `cat-2.mp4`, ..."""
    return path if k == 1 else path.with_name(f"{path.stem}-{k}{path.suffix}")


def first_name(path: Path, fits: Callable[[Path], bool]) -> Path:
    """The first of `path` and its `numbered` names that fits."""
    return next(name for k in itertools.count(1) if fits(name := numbered(path, k)))


def is_whole(path: Path) -> bool:
    """Whether an MP4 file is as long as its parts say. A file that was cut off can still have all its metadata."""
    at, end = 0, path.stat().st_size
    with path.open("rb") as file:
        while at < end:
            file.seek(at)
            head = file.read(16)
            size = int.from_bytes(head[:4], "big")
            size = int.from_bytes(head[8:16], "big") if size == 1 else size
            if len(head) < 8 or size < 8:
                return False
            at += size
    return at == end > 0


def _plain(stored: dict[str, Any]) -> dict[str, Any]:
    """What is compared, as it comes back from JSON."""
    return json.loads(json.dumps({k: v for k, v in stored.items() if k not in NOT_COMPARED}, default=str))


def _key(stored: dict[str, Any]) -> str:
    return json.dumps([stored["prompt"], stored.get("prompt_at")], sort_keys=True)


def _time(seconds: float) -> str:
    count, unit = next(((seconds / n, unit) for n, unit in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * n),
                       (seconds, "seconds"))  # fmt: skip
    return f"{count:.0f} {unit}"


def remove_left_over(folder: Path) -> None:
    """Remove unfinished files of killed processes."""
    for path in (*folder.glob(".minit2v-*"), *folder.glob(".report-*.json")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime < LEFT_OVER or (path.is_dir() and _is_held(path)):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_held(folder: Path) -> bool:
    """Whether a process is writing to the folder (see `locked`)."""
    try:
        import fcntl
    except ImportError:
        return True
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)
