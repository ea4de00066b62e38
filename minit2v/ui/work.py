"""The functions of the page's buttons. This module does not use Gradio.

A form of the page becomes the arguments of `minit2v generate`, `restyle` or `animate`, which makes the video.
"""

import hashlib
import os
import queue
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image

from minit2v_convert.stream import beside

from ..cli import adapters, batches, videos
from ..cli.arguments import SUFFIXES
from ..cli.messages import one_line
from ..files import embedded
from ..files.video import read_metadata
from ..pipelines import frames as pixels
from ..schedulers.names import NAMES, solver_of

COMMANDS = ("generate", "restyle", "animate")
SOLVERS = [row.name for row in NAMES]
# The fields of a form, and the commands that have them. An empty field takes the command's default.
FIELDS = {
    "prompt": COMMANDS, "negative_prompt": COMMANDS, "model": ("generate", "restyle"), "base": ("animate",),
    "adapter": ("animate",), "video": ("restyle", "animate"), "strength": ("restyle", "animate"),
    "num_frames": ("generate", "animate"), "steps": COMMANDS, "guidance_scale": COMMANDS, "scheduler": COMMANDS,
    "seed": COMMANDS, "height": COMMANDS, "width": COMMANDS, "fps": COMMANDS, "lora": COMMANDS,
    "motion_lora": ("animate",),
}  # fmt: skip
# Settings in a file about how it was computed. The page does not repeat them.
OF_A_RUN = ("minit2v", "versions", "device", "dtype", "kernels", "video_sha256", "optimize")
PREVIEWS, PREVIEW_FRAMES, SIDE = 8, 3, 128  # previews per video, frames per preview, smallest side in pixels
CACHE = ".page"  # a folder in the output folder, for files that the browser sends or receives
SOURCES = "sources"  # a folder in the output folder, for input videos

Form = dict[str, Any]


class Cancelled(BaseException):
    """Raised while a video is made, to stop it. It is not an `Exception`, because nothing has failed."""


@dataclass(frozen=True)
class Update:
    """`done` of `steps` denoising steps are done. preview: frames side by side, or None if there is no new one."""

    done: int
    steps: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Made:
    """A finished video. warnings: those that the command has printed."""

    path: Path
    seconds: float
    warnings: list[str]


class Work:
    """An output folder, the models that may be used, and at most one video that is being made.

    folder: besides the models, only this folder is read and written. Models are given as folders, files or hub ids.
    The embedded models are always offered. A form cannot load any other model.
    """

    def __init__(self, folder: Path, models: Sequence[str] = (), bases: Sequence[str] = (),
                 adapters: Sequence[str] = (), loras: Sequence[str] = (), device: str = "auto"):  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = Path(os.path.realpath(folder)), device
        self.cache = self.folder / CACHE
        self.cache.mkdir(exist_ok=True)
        batches.remove_left_over(self.folder)  # unfinished files of a page that was killed
        self.offered = {"model": ["shapes", *map(_found_again, models)],
                        "base": ["shapes-image", *map(_found_again, bases)],
                        "adapter": list(map(_found_again, adapters)),
                        "lora": list(map(_found_again, loras)), "motion_lora": ["shapes-orbit"]}  # fmt: skip
        self._captions: dict[tuple[str, int], str] = {}
        self._busy, self._cancel = threading.Lock(), threading.Event()

    # Videos ----------------------------------------------------------------------------------------------------------

    def make(self, form: Form) -> Iterator[Update | Made]:
        """Make the video of a form, and yield updates. Raises ValueError, with a message of one line, or Cancelled.

        The video is made in a thread of its own, also if nobody reads the updates.
        """
        if not self._busy.acquire(blocking=False):
            raise ValueError("another video is being made: wait until it is finished, or cancel it")
        try:
            args = videos.parse(self._words(form))
            self._cancel.clear()
            job = _Job(args, self._cancel, self._busy.release)
        except BaseException:
            self._busy.release()
            raise
        return job.updates()

    def cancel(self) -> bool:
        """Stop the video that is being made. No file of it is left. Returns whether there was one."""
        self._cancel.set()
        return self._busy.locked()

    def end(self) -> None:
        """Cancel the video that is being made, and wait until its files are removed. Call it before the process ends.
        """
        if self.cancel() and self._busy.acquire(timeout=60):
            self._busy.release()

    def _words(self, form: Form) -> list[str]:
        """The form as arguments of a command. ValueError if a value is not offered or not valid."""
        command = form.get("command")
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}; the commands are {', '.join(COMMANDS)}")
        if unknown := sorted(form.keys() - FIELDS.keys() - {"command"}):
            raise ValueError(f"the page has no field {unknown[0]!r}")
        given = {name: value for name, value in form.items()
                 if value not in (None, "", {}) and command in FIELDS.get(name, ())}  # fmt: skip
        prompt = str(given.pop("prompt", "")).strip()
        if not prompt:
            raise ValueError("write a prompt first")
        if "scheduler" in given:
            solver_of(str(given["scheduler"]))
        video = given.pop("video", None)
        if command == "restyle" and video is None:
            raise ValueError("choose a video to restyle first")
        if video is None:
            given.pop("strength", None)
        else:
            video = str(self.inside(str(video)))
            given.pop("num_frames", None)
        words = []
        for name, value in given.items():
            if name in ("lora", "motion_lora"):
                for path, weight in value.items():
                    self._check_offered(name, path)
                    words += adapters.words(name, [{"path": path, "weight": float(weight)}]) if weight else []
                continue
            self._check_offered(name, value)
            words += videos.options(name, value)
        if command == "animate" and video is not None:
            words.append(f"--video={video}")
        if command == "animate" and "adapter" in given and given.get("base") in (None, "shapes-image"):
            raise ValueError(f"shapes-image has its own motion adapter: leave {given['adapter']} out")
        first = [video] if command == "restyle" else []
        return [command, *words, f"--device={self.device}", f"--output={self.folder}", "--debug", "--", *first, prompt]

    def _check_offered(self, name: str, value: Any) -> None:
        if name in self.offered and value not in self.offered[name]:
            raise ValueError(f"{value} is not offered here: start the page with "
                             f"`minit2v ui --{name.replace('_', '-')} {value}`")  # fmt: skip

    # The folder ------------------------------------------------------------------------------------------------------

    def inside(self, name: str) -> Path:
        """The path of a file in the output folder, with links resolved. ValueError for every other path."""
        path = Path(os.path.realpath(self.folder / name)) if "\0" not in name else Path()
        if not path.is_relative_to(self.folder) or not path.is_file():
            raise ValueError(f"{name!r} is not a file in {self.folder}")
        return path

    def videos(self, most: int = 24) -> list[Path]:
        """The newest videos in the output folder, newest first. Links are left out."""
        found = []
        for path in self.folder.iterdir():
            with suppress(OSError):
                if path.suffix.lower() in SUFFIXES and not path.is_symlink() and path.is_file():
                    found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found, reverse=True)[:most]]

    def caption(self, path: Path) -> str:
        """The settings of a video of the folder in one line, or its name if it has none."""
        try:
            key = path.name, path.stat().st_mtime_ns
            if key not in self._captions:
                self._captions[key] = describe(self.settings(path.name)[0])
            return self._captions[key]
        except (ValueError, OSError, RuntimeError):
            return path.name

    def keep(self, upload: str) -> str:
        """Copy a video from the browser into the folder, and return its name there.

        The cache may be emptied. With the copy, a `restyle` can be made again from the settings in its video.
        """
        path = self.inside(upload)
        with path.open("rb") as file:
            name = hashlib.file_digest(file, "sha256").hexdigest()[:16] + path.suffix.lower()
        target = self.folder / SOURCES / name
        target.parent.mkdir(exist_ok=True)
        if Path(os.path.realpath(target)) != target:
            raise ValueError(f"{target} is a link: remove it")
        if not target.exists():
            with beside(target) as whole:
                shutil.copyfile(path, whole)
        return f"{SOURCES}/{name}"

    # Settings --------------------------------------------------------------------------------------------------------

    def settings(self, name: str) -> tuple[Form, list[str]]:
        """The form that makes a video of the folder again, and the settings that the page cannot repeat.

        ValueError if no valid settings are stored in the file. A file from somebody else may contain anything. So
        every value goes through the command line's parser, and only offered models are accepted.
        """
        path = self.inside(name)
        stored = read_metadata(path)
        command = stored.get("minit2v")
        if command not in COMMANDS or not isinstance(stored.get("prompt"), str):
            raise ValueError(f"{path.name}: no settings of minit2v are stored in this file")
        form: Form = {"command": command, "prompt": stored["prompt"]}
        lost, words = [], []
        for key, value in stored.items():
            if key in (*OF_A_RUN, "prompt") or key.endswith("_sha256") or value in (None, "", [], False):
                continue
            if key not in FIELDS or command not in FIELDS[key]:
                lost.append(f"{key} {value}")
            elif key == "video":
                try:
                    form["video"] = str(self.inside(str(value)).relative_to(self.folder))
                except ValueError:
                    lost.append(f"video {value}: send it again")
            elif key in ("lora", "motion_lora"):
                adapters.words(key, value)
                there = {e["path"]: e.get("weight", 1.0) for e in value if e["path"] in self.offered[key]}
                form[key] = there
                lost += [f"{key} {e['path']}" for e in value if e["path"] not in there]
            elif key in self.offered:
                if key == "adapter" and value == "shapes-motion" and stored.get("base") == "shapes-image":
                    continue  # it is the command's default
                if value in self.offered[key]:
                    form[key] = value
                else:
                    lost.append(f"{key} {value}")
            else:
                words += videos.options(key, value)
        source = ["x"] if command == "restyle" else []
        if command == "animate" and stored.get("video"):
            words.append("--video=x")
        try:
            parsed = vars(videos.parse([command, *words, "--", *source, stored["prompt"]]))
        except ValueError as e:
            raise ValueError(f"{path.name}: the settings stored in this file are not valid: {e}") from None
        return form | {k: v for k, v in parsed.items() if k in FIELDS and k not in form and k != "video"}, lost


def describe(stored: Mapping[str, Any]) -> str:
    """The settings of a form, in one line."""
    def shown(name: str, value: Any) -> str:
        text = f"{value:g}" if isinstance(value, float) else f"{value}"
        if isinstance(value, dict):
            text = " ".join(f"{Path(k).name}:{v:g}" for k, v in value.items())
        return text if name in ("command", "prompt") else f"{name.replace('_', ' ')} {text}"

    return ", ".join(shown(k, v) for k, v in stored.items() if v not in (None, "", {}))


def _found_again(name: str) -> str:
    """An absolute path, as it is stored in videos. The name of an embedded model or a hub id stays as it is."""
    path = Path(name).expanduser()
    return os.path.abspath(path) if embedded.find(name) is None and path.exists() else name


# ----------------------------------------------------------------------------------------------------- one video


class _Warnings:
    """A stream that passes text on to stderr, and keeps the command's warnings."""

    def __init__(self, stream: Any):
        self.stream, self.kept = stream, list[str]()

    def write(self, text: str) -> int:
        mark = "minit2v: warning: "
        self.kept += [line.removeprefix(mark) for line in text.splitlines() if line.startswith(mark)]
        return self.stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@dataclass
class _Job:
    """A command that runs in its own thread, and the `videos.Watch` that follows it."""

    args: Any
    cancel: threading.Event
    release: Callable[[], None]
    said: "queue.SimpleQueue[Update | Made | BaseException]" = field(default_factory=queue.SimpleQueue)
    steps: int = 0
    guess: torch.Tensor | None = None  # the last step's estimate of x_0

    def __post_init__(self) -> None:
        self.began = time.monotonic()
        self.path: Path | None = None
        threading.Thread(target=self._run, name="minit2v ui", daemon=True).start()

    def updates(self) -> Iterator[Update | Made]:
        while True:
            said = self.said.get()
            if isinstance(said, Cancelled):
                raise said
            if isinstance(said, BaseException):
                raise ValueError(one_line(said)) from said
            yield said
            if isinstance(said, Made):
                return

    def _run(self) -> None:
        end: Made | BaseException
        warnings = _Warnings(sys.stderr)
        try:
            self.args.usage_error = _refuse  # argparse's own method would end the process
            with redirect_stderr(warnings):
                videos.run(self.args, self)
            assert self.path is not None
            end = Made(self.path, time.monotonic() - self.began, warnings.kept)
        except BaseException as e:  # the page shows every error, and the next video can be made
            end = e
        self.guess = None
        self.release()
        self.said.put(end)

    def _check(self) -> None:
        if self.cancel.is_set():
            raise Cancelled

    # videos.Watch

    def begin(self, pipe: Any, call: dict[str, Any]) -> None:
        self._check()
        share = call["strength"] if "strength" in call else 1.0
        self.steps = max(1, int(call["num_inference_steps"] * share))
        self.said.put(Update(0, self.steps))
        solver, step = pipe.scheduler, pipe.scheduler.step

        @wraps(step)
        def kept(eps: Any, t: Any, x: Any, *args: Any, **kw: Any) -> Any:
            out = step(eps, t, x, *args, **kw)
            self.guess = out.pred_original_sample
            if self.guess is None:  # this solver gives no x0: compute it from the prediction
                noise, now = solver._upcast(eps, x)
                self.guess = solver._x0_and_eps(noise, now, *solver._levels(now, t))[0]
            return out

        solver.step = kept

    def step(self, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> None:
        self._check()
        done, preview = step + 1, None
        every = max(1, round(self.steps / PREVIEWS))
        if self.guess is not None and done % every == 0 and done < self.steps:
            x = rearrange(self.guess, f"{pipe.STEP_AXES} -> b c f h w", b=1)
            preview = picture(pipe, x)
        self.said.put(Update(done, max(done, self.steps), preview))

    def frames(self, frames: Iterator[Any]) -> Iterator[Any]:
        for frame in frames:
            self._check()
            yield frame

    def made(self, path: Path) -> None:
        self.path = path


def _refuse(message: str) -> None:
    raise ValueError(message)


def picture(pipe: Any, x: torch.Tensor) -> Image.Image:
    """Latents (1 c f h w) -> an image of some of their frames, decoded, side by side."""
    total = x.shape[2]
    chosen = sorted({round(k * (total - 1) / max(1, PREVIEW_FRAMES - 1)) for k in range(PREVIEW_FRAMES)})
    images = pixels.from_tensor(pipe.decode_latents(x[:, :, chosen], len(chosen)), "pil")[0]
    width, height = images[0].size
    scale = max(1, -(-SIDE // min(width, height)))
    strip = Image.new("RGB", (width * scale * len(images), height * scale))
    for n, image in enumerate(images):
        strip.paste(image.resize((width * scale, height * scale), Image.Resampling.NEAREST), (n * width * scale, 0))
    return strip
