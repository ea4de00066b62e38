"""`minit2v generate`, `restyle` and `animate`: they load one model and write one video for each prompt."""

import argparse
import hashlib
import io
import os
import platform
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from .. import __version__
from ..files import embedded
from . import adapters, batches, long_videos, pictures
from .arguments import SUFFIXES, make_parser
from .ends import importing
from .messages import Lines, Progress, one_line, process, say, tell_path

# The default models of each command. They come with the package.
EMBEDDED = {
    "generate": {"model": "shapes"},
    "restyle": {"model": "shapes"},
    "animate": {"base": "shapes-image", "adapter": "shapes-motion"},
}
# Settings that suit the embedded models better than the defaults of their pipelines.
PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {"num_frames": 16, "steps": 25, "guidance_scale": 1.5},
    "shapes-image": {"num_frames": 16, "steps": 25, "guidance_scale": 1.5},
}
# The settings of a video, under the names of their options. They are stored in the video file. `--replay` reads them
# back through the parser, so a file cannot set anything that the command line could not.
SETTINGS = ("model", "base", "adapter", "vae", "tokenizer", "config", *adapters.OPTIONS, *pictures.OPTIONS, "revision",
            "variant", "negative_prompt", "num_frames", "steps", "guidance_scale", "strength", "free_init",
            *long_videos.OPTIONS, "scheduler", "seed", "height", "width", "fps", "dtype", "device", "compat", "kernels",
            "optimize")
CUT = ("from", "to", "every")  # the part of the input video that is used
DIGESTS = tuple(f"{name}_sha256" for name in pictures.OPTIONS)  # stored with the settings
DECODED_AT_ONCE = 8  # frames; otherwise the memory of the VAE's last layers grows with the video


class Watch(Protocol):
    """Callbacks while a video is made. They may raise an exception to stop it."""

    def begin(self, pipe: Any, call: dict[str, Any]) -> None:
        """Before the first step. call: the arguments of the pipeline's call."""

    def step(self, pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> None:
        """After each step: the pipeline's `callback_on_step_end`."""

    def frames(self, frames: Iterator[Any]) -> Iterator[Any]:
        """Pass on the decoded frames, which go into the file."""

    def made(self, path: Path) -> None:
        """The file is complete."""


def run(args: argparse.Namespace, watch: Watch | None = None) -> int:
    """The exit code: 1 where some prompts failed."""
    digest, before = None, {}
    if "replay" in args:
        args, digest, before = _replay(args)
    given = {k: v for k, v in vars(args).items() if k in (*SETTINGS, *CUT)}
    video, source = getattr(args, "video", None), {}
    at = getattr(args, "prompt_at", {})
    output = getattr(args, "output", None)
    in_batch = "prompts" in args and output is not None and not _is_file(output)
    rank, processes = process()
    if processes > 1 and (not in_batch or args.prompts == "-"):
        args.usage_error(f"torchrun started {processes} processes, which share a list of prompts: give --prompts FILE "
                         "and -o FOLDER")
    entries = [(prompt, at) for prompt in args.prompt]
    if "prompts" in args:
        entries += [(prompt, own or at) for prompt, own in map(long_videos.prompt_of, _read_prompts(args.prompts))]
    if in_batch:
        entries = batches.unique(entries)
    prompts = [prompt for prompt, _ in entries]
    if not prompts:
        args.usage_error("give a prompt or --prompts FILE" + " or --replay VIDEO" * (args.command != "restyle"))
    if 0 in at:
        args.usage_error("--prompt-at 0: frame 0 already has the prompt itself; give a later frame")
    texts = [text for prompt, at in entries for text in (prompt, *at.values())] + [given.get("negative_prompt", "")]
    for text in texts:
        if wrong := adapters.check_prompt(text):
            args.usage_error(wrong)
    if video is not None and "num_frames" in given:
        args.usage_error("--num-frames: the input video sets the number of frames; shorten it with --from and --to")
    if video is None and "strength" in given:
        args.usage_error("--strength needs an input video: give --video VIDEO")
    pictures.check(args)
    models = dict(EMBEDDED[args.command])
    if "adapter" in given and "base" not in given:
        args.usage_error("--adapter needs an image model: give --base MODEL")
    if given.get("base", models.get("base")) != models.get("base"):
        del models["adapter"]
    if "kernels" in args:
        os.environ["MINIT2V_KERNELS"] = args.kernels
        if ":" in args.kernels:  # import the user's functions before anything is loaded
            from minit2v_kernels._dispatch import own

            own(args.kernels)
    given = models | given
    main = given.get("model") or given["base"]
    preset = PRESETS[main] if embedded.find(main) else {}
    # In a folder the seed is 0 and not random, so that the same command finds the videos that it has made.
    settings = {"seed": 0 if in_batch else secrets.randbelow(2**32), "fps": 8.0, **preset}
    paths = _output_paths(output, prompts, given.get("seed", settings["seed"]))
    if video is not None:
        settings.pop("num_frames", None)
        video, measured, source = _read_source(video, digest, {k: given.pop(k) for k in CUT if k in given})
        settings |= measured
    elif cut := [k for k in CUT if k in given]:
        args.usage_error(f"--{cut[0]} needs an input video: give --video VIDEO")
    settings |= given
    sound = _find_sound(source, settings["fps"], measured.get("fps")) if video is not None else None
    for path in paths:
        if not 0.01 <= settings["fps"] <= (most := 100 if path.suffix.lower() == ".gif" else 1000):
            raise ValueError(f"{path} can have 0.01 to {most} frames per second, not {settings['fps']:g}: change --fps")
    with importing():
        from ..files.video import find_ffmpeg
        from .loading import load  # importing torch takes a second: so it comes after the checks above

    if any(path.suffix.lower() != ".gif" for path in paths):
        find_ffmpeg()
    pipe, call = load(args.command, settings, len(video) if video else None)
    if watch is not None:
        watch.begin(pipe, call)
        call["callback_on_step_end"] = watch.step
    pictures.say_changes(settings, before)
    adapters.say_changes(settings, before)
    if "embedding" in settings:
        adapters.say_unused(pipe, texts)
    if rank == 0:
        say(_summary(settings, len(video) if video else settings["num_frames"]))

    def about(prompt: str, at: dict[int, str]) -> dict[str, Any]:
        return {"minit2v": args.command, "prompt": prompt, **({"prompt_at": at} if at else {}),
                **{k: settings[k] for k in (*SETTINGS, *DIGESTS) if k in settings}, **source, "versions": _versions()}

    batch = batches.Batch(output, entries, paths, about) if in_batch else None
    if batch and batch.there:
        say(f"{len(batch.there)} of {len(batch.own)} videos are there already")
        for path in batch.there:
            tell_path(path)
    failures = []
    for n, path in batch.todo if batch else enumerate(paths):
        prompt, at = entries[n]
        bar = {"desc": f"{n + 1}/{len(prompts)}" if len(prompts) > 1 else None, "unit": "step", "dynamic_ncols": True}
        pipe.set_progress_bar_config(**bar, **({"file": Progress()} if processes == 1 else
                                               {"file": Lines(), **Lines.config}))
        try:
            start = time.monotonic()
            latents = _latents(pipe, call, long_videos.texts_of(prompt, at), settings["seed"], video)
            frames = pipe.stream_frames(latents, DECODED_AT_ONCE)
            frames = frames if watch is None else watch.frames(frames)
            path = _write(frames, path, settings["fps"], about(prompt, at), path == output, sound)
            tell_path(path) if watch is None else watch.made(path)
            height, width = (n * pipe.vae_scale_factor for n in latents.shape[3:])
            seconds, what = time.monotonic() - start, f"{latents.shape[2]} frames of {width}x{height}"
            if batch:
                batch.say_made(n, path, seconds, what)
            else:
                say(f"{what} in {seconds:.1f} s")
        except Exception as e:
            if args.debug:
                raise
            failures.append(f"error: {_quote(prompt) + ': ' if len(prompts) > 1 else ''}{one_line(e)}")
            if batch:
                batch.failed(n, e)
            if processes > 1:  # report it now, as the other processes may run for hours
                say(failures[-1])
    for line in failures if processes == 1 else ():
        say(line)
    if failures and len(prompts) > 1:
        where = f": see {output / batches.REPORT}" if batch else ""
        say(f"{len(failures)} of {len(batch.own) if batch else len(prompts)} prompts failed{where}")
    return batch.exit_code(len(failures)) if batch else 1 if failures else 0


def _summary(s: dict[str, Any], frames: int) -> str:
    size = f"{frames} frames of {s['width']}x{s['height']} at {s['fps']:g} fps"
    parts = [size, f"{s['steps']} steps of {s['scheduler']}", f"guidance {s['guidance_scale']:g}", f"seed {s['seed']}",
             f"{s['dtype']} on {s['device']}", f"kernels {s['kernels']}"]
    if "strength" in s:
        parts.insert(2, f"strength {s['strength']:g}")
    if s.get("free_init"):
        parts.insert(2, "FreeInit")
    parts += long_videos.summary(s)
    if s.get("optimize"):
        parts.append("optimized")
    if s.get("ip_adapter"):
        parts.append(f"{len(s['image'])} picture{'s' * (len(s['image']) > 1)}")
    for name in ("lora", "motion_lora"):
        parts += [f"LoRA {Path(entry['path']).name} at {entry['weight']:g}" for entry in s.get(name, ())]
    if s.get("negative_prompt"):
        parts.append(f"negative prompt {_quote(s['negative_prompt'])}")
    return ", ".join(parts + [f"{k} {s[k]}" for k in ("revision", "variant", "compat") if s.get(k)])


def _latents(pipe: Any, call: dict[str, Any], prompt: Any, seed: int, video: Any) -> Any:
    """The latents (1 c f h w) of one prompt. The noise is drawn on the CPU, so a seed means the same on every device.
    """
    import torch

    extra = {} if video is None else {"video": video}
    return pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="latent",
                decode_chunk_size=DECODED_AT_ONCE, **call, **extra).frames


def _write(
    frames: Any, path: Path, fps: float, about: dict[str, Any], replace: bool, sound: tuple[str, float] | None = None
) -> Path:
    """Write a video, and return its path. If `path` exists and `replace` is false, the name gets a number.

    frames: (h w 3) each. sound: a file with sound, and the time in seconds from which it is copied.
    """
    from minit2v_convert.stream import ended_cleanly

    from ..files.saving import locked
    from ..files.video import export_to_gif, export_to_video

    export: Any = export_to_gif if path.suffix.lower() == ".gif" else export_to_video
    if sound is not None and export is export_to_video:
        export = partial(export, sound=sound[0], sound_from=sound[1])
    if replace:
        export(frames, path, fps=fps, metadata=about)
        return path
    scratch: Any = tempfile.TemporaryDirectory(prefix=".minit2v-", dir=path.parent)
    with ended_cleanly(), scratch, locked(scratch.name):
        whole = Path(scratch.name) / path.name
        try:
            export(frames, whole, fps=fps, metadata=about)
        except OSError as e:
            raise OSError(str(e).replace(str(whole), str(path))) from e
        return _named(whole, path)


def _named(whole: Path, path: Path) -> Path:
    """Give the file the first free name. Two processes that ask at the same time get two names."""

    def takes(name: Path) -> bool:
        try:
            os.link(whole, name)
        except FileExistsError:
            return False
        except OSError:  # this disk has no hard links
            try:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            os.replace(whole, name)
        return True

    return batches.first_name(path, takes)


def _versions() -> dict[str, str]:
    import torch

    return {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()}


def _read_prompts(file: str) -> list[str]:
    """The lines of a file without blank ones. A line ends with a line feed, a carriage return, or both."""
    try:
        if file == "-":  # always UTF-8, not the terminal's encoding
            text = sys.stdin.buffer.read().decode() if hasattr(sys.stdin, "buffer") else sys.stdin.read()
        else:
            text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    lines = re.split(r"[\r\n]+", text.removeprefix("\ufeff"))  # some editors begin a file with a byte order mark
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: the file has no prompts; write one per line")
    return prompts


def _quote(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 60 else f'"{prompt[:57]}..."'


def _is_file(output: Path | None) -> bool:
    return output is not None and output.suffix.lower() in SUFFIXES and not output.is_dir()


def _output_paths(output: Path | None, prompts: list[str], seed: int) -> list[Path]:
    """A path for each prompt. The folder is created, and tested for writing, before any work begins.

    Only the name of a file for a single prompt is final. Other names get a number if they are taken (`_write`).
    """
    is_file = _is_file(output)
    folder = output.parent if is_file else output or Path()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise type(e)(e.errno, f"cannot write here ({e.strerror})", str(folder)) from None
    if is_file and len(prompts) == 1:
        if output.exists():
            say(f"{output} will be replaced")
        return [output]
    if is_file:
        return [folder / f"{output.stem}-{n + 1}{output.suffix}" for n in range(len(prompts))]
    system = sys.getfilesystemencoding()  # it may lack letters of the prompt
    words = [re.sub(r"[\W_]+", "-", prompt.lower().encode(system, "ignore").decode(system))[:40].strip("-") or "video"
             for prompt in prompts]
    return [folder / f"{w}-{seed}.mp4" for w in words]


def _read_source(
    path: str, wanted: str | None, cut: dict[str, Any]
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The frames of the input video, default settings for it, and metadata that name the video and its part.

    The frames are read a few at a time, here and again for every prompt. So the video is never in memory as a whole.

    wanted: the SHA-256 that the frames should have. ValueError if they have another one.
    """
    from ..files.video import VideoFrames

    frames = VideoFrames(path, start=cut.get("from", 0.0), end=cut.get("to"), every=cut.get("every", 1))
    total, (width, height) = hashlib.sha256(), frames.size
    for frame in frames:
        total.update(frame.tobytes())
    digest = total.hexdigest()
    if wanted not in (None, digest):
        raise ValueError(f"{path}: its frames have changed since the first video was made from it; give the original "
                         "file")
    measured = {"strength": 0.6, "height": height, "width": width, **({"fps": frames.fps} if frames.fps else {})}
    where = path if "://" in path else str(Path(path).absolute())
    return frames, measured, {"video": where, "video_sha256": digest, **cut}


def _find_sound(source: dict[str, Any], fps: float, of_video: float | None) -> tuple[str, float] | None:
    """The file whose sound the new video gets, and the start in seconds. Says why if the sound cannot be used."""
    from ..files.video import has_sound

    if "://" in source["video"]:
        say("sound is copied from local files only: download the video first to keep its sound")
        return None
    if not has_sound(source["video"]):
        return None
    if of_video is None or abs(fps - of_video) > 1e-3 * fps:
        say(f"the sound of the video is left out: it does not fit {fps:g} frames per second")
        return None
    return source["video"], source.get("from", 0.0)


def parse(words: list[str]) -> argparse.Namespace:
    """The arguments of a command. If they are wrong it raises ValueError, and does not end the process."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as said:
            return make_parser().parse_args(words)
    except SystemExit:  # also from `--scheduler help`, which prints a list
        why = said.getvalue().strip().partition(": error: ")[2].rpartition("; see ")[0]
        raise ValueError(why or "help") from None


def options(name: str, value: Any) -> list[str]:
    option = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{'' if value else 'no-'}{option}"]
    several = name in pictures.OPTIONS and isinstance(value, list)
    return [f"--{option}={one}" for one in (value if several else [value])]


def _replay(args: argparse.Namespace) -> tuple[argparse.Namespace, str | None, dict[str, str]]:
    """The stored arguments of a video, replaced by those given now; the SHA-256 of its input video, and of adapters.

    A file from somebody else may name any model and video. They are loaded only with `--trust`.
    """
    from ..files.video import read_metadata

    with importing():
        from .loading import find_device

    stored = read_metadata(args.replay)
    command, source = stored.get("minit2v"), stored.get("video")
    if command not in EMBEDDED or not isinstance(stored.get("prompt"), str):
        raise ValueError(f"{args.replay}: no settings of minit2v are stored in this file")
    if (command == "animate") != (args.command == "animate"):
        again = "animate" if command == "animate" else "generate"
        raise ValueError(f"{args.replay} was made by {command}: use minit2v {again} --replay")
    given = {k: v for k, v in vars(args).items() if k not in ("command", "replay", "prompt", "prompts")}
    try:
        lists = {k: adapters.words(k, stored.get(k, [])) for k in adapters.OPTIONS}
    except ValueError as e:
        raise ValueError(f"{args.replay}: the settings stored in this file are not valid: {e}") from None
    _check_trust(args, stored, given)
    words = [word for k in (*SETTINGS, *CUT) if stored.get(k) is not None and k not in adapters.OPTIONS
             for word in options(k, stored[k])]
    words += [word for k in adapters.OPTIONS for word in lists[k]]
    prompts = args.prompt or ([] if "prompts" in args else [stored["prompt"]])
    if source is not None and command == "animate":
        words.append(f"--video={source}")
    first = [str(source)] if command == "restyle" else []
    try:
        again = parse([command, *words, "--", *first, *prompts])
    except ValueError as e:
        raise ValueError(f"{args.replay}: the settings stored in this file are not valid: {e}") from None
    if "prompt_at" in stored and "prompt_at" not in given and not args.prompt and "prompts" not in args:
        try:
            again.prompt_at = long_videos.read_texts(stored["prompt_at"])
        except ValueError as e:
            raise ValueError(f"{args.replay}: the settings stored in this file are not valid: {e}") from None
    if "video" in given and "num_frames" in again:  # the input video given now sets the number of frames
        del again.num_frames
    for name, value in [*given.items(), *([("prompts", args.prompts)] if "prompts" in args else [])]:
        setattr(again, name, value)

    then, now = stored.get("versions"), _versions()
    then = then if isinstance(then, dict) else {}
    if changed := [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]:
        say(f"warning: the video may differ, because versions have changed: {', '.join(changed)}")
    if "device" not in given:
        try:
            find_device(getattr(again, "device", "auto"))
        except ValueError:
            say(f"warning: the video was made on {again.device}, which this computer does not have: it may differ a "
                "little")
            again.device = "auto"
    digests = pictures.digests(stored) | adapters.digests(stored)
    return again, None if "video" in given else stored.get("video_sha256"), digests


def _check_trust(args: argparse.Namespace, stored: dict[str, Any], given: dict[str, Any]) -> None:
    """Print the models and videos outside this package that a file names. ValueError if they are not trusted."""
    if "kernels" not in given and ":" in str(stored.get("kernels", "")):  # a file must not choose what is imported
        raise ValueError(f"{args.replay} was made with custom functions, {stored['kernels']!r}, which are never loaded "
                         "from a file: give --kernels")
    names = ("model", "base", "adapter", "vae", "tokenizer", "config", "video", *pictures.OPTIONS)
    said = {k: ", ".join(map(str, v)) if isinstance(v := stored[k], list) else str(v)
            for k in names if stored.get(k) is not None and k not in given}  # fmt: skip
    named = {k: v for k, v in said.items() if k == "video" or embedded.find(v) is None}
    for name in adapters.OPTIONS:
        if name not in given and (paths := [p["path"] for p in stored.get(name, ()) if not embedded.find(p["path"])]):
            named[name.replace("_", "-")] = " and ".join(paths)
    if not named:
        return
    what = ", ".join(f"{k} {v!r}" for k, v in named.items())
    if args.trust:
        return say(f"using what {args.replay} names: {what}")
    own = [f"--{k}" for k in named if k != "video" or args.command == "animate"]
    raise ValueError(f"{args.replay} names {what}: give --trust to use them"
                     + f", or your own {' and '.join(own)}" * bool(own))
