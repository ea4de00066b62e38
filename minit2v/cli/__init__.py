"""The `minit2v` command: videos from texts, videos from videos, and a look into model folders.

What torch is needed for is imported when it is needed: `minit2v --help` and a wrong option answer at once.
"""

import argparse
import errno
import logging
import os
import platform
import re
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from minit2v_convert.rename import nearest

ASSETS = Path(__file__).parent.parent / "assets"
# The models that come with the package: what each command takes where no other is given.
EMBEDDED = {
    "generate": {"model": "shapes"},
    "restyle": {"model": "shapes"},
    "animate": {"base": "shapes-image", "adapter": "shapes-motion"},
}
EMBEDDED_NAMES = ("shapes", "shapes-image", "shapes-motion")
# What suits a model better than the defaults of its pipeline, for those names that say which model it is.
PRESETS: dict[str, dict[str, Any]] = {
    "shapes": {"num_frames": 16, "steps": 25, "guidance_scale": 1.5},
    "shapes-image": {"num_frames": 16, "steps": 25, "guidance_scale": 1.5},
}
PIPELINES = {  # (command, whether there is a video to begin with)
    ("generate", False): "TextToVideoSDPipeline",
    ("restyle", True): "VideoToVideoSDPipeline",
    ("animate", False): "AnimateDiffPipeline",
    ("animate", True): "AnimateDiffVideoToVideoPipeline",
}
ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"  # for every other image model
# The published adapters were trained with linear betas (docs/animatediff.md, section 12). In Stable Diffusion's own
# schedule, `scaled_linear`, every timestep has less noise than the motion modules learned to find there, and videos
# wash out. The other fields are those that diffusers' documentation runs AnimateDiff with.
MOTION_SCHEDULE = {"beta_schedule": "linear", "timestep_spacing": "linspace", "steps_offset": 1, "clip_sample": False}
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "pndm": "PNDMScheduler",
}
SUFFIXES = (".mp4", ".gif", ".mkv", ".mov", ".m4v")
# The settings that make a video, under the names of their options. They are stored in the file, and `--replay` reads
# them back through the parser, so that a file says nothing that the command line could not.
SETTINGS = ("model", "base", "adapter", "revision", "variant", "negative_prompt", "num_frames", "steps",
            "guidance_scale", "strength", "free_init", "scheduler", "seed", "height", "width", "fps", "dtype", "device",
            "compat", "kernels", "optimize")
DECODED_AT_ONCE = 8  # frames: what the VAE's last layers need would otherwise grow with the video


# ---------------------------------------------------------------------------------------------------------- arguments


def _whole(text: str) -> int:
    if not re.fullmatch(r"\+?\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d+", text) or int(text) >= 2**64:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2**64 - 1, not {text!r}")
    return int(text)


def _number(low: float, high: float, open_low: bool = False) -> Any:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high or (open_low and value == low):
            lowest = f"above {low:g}" if open_low else f"from {low:g}"
            raise argparse.ArgumentTypeError(f"must be a number {lowest} to {high:g}, not {text!r}")
        return value

    return parse


def _kernels(text: str) -> str:
    if text not in ("auto", "torch", "triton"):  # "torch,geglu=triton"
        from minit2v_kernels._dispatch import choices

        try:
            choices(text)
        except ValueError as e:
            raise argparse.ArgumentTypeError(str(e).removeprefix("MINIT2V_KERNELS ")) from None
    return text


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix and path.suffix.lower() not in SUFFIXES and not path.is_dir() and not text.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"{text}: a file must end in {', '.join(SUFFIXES)}; a folder in {os.sep}")
    return path


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, takes no abbreviations, and keeps no trace of what is not given."""

    def __init__(self, **kw: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kw)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            word, known = rest[0].split("=")[0], [s for a in self._actions for s in a.option_strings]
            self.error(f"unknown argument {word!r}{nearest(word, known)}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> Parser:
    from .. import __version__

    parser = Parser(prog="minit2v", description="Text-to-video diffusion.")
    parser.add_argument("--version", action="version", version=f"minit2v {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    generate = commands.add_parser("generate", help="make videos of texts")
    restyle = commands.add_parser("restyle", help="make a video of a video and a text")
    animate = commands.add_parser("animate", help="make videos with an image model and a motion adapter (AnimateDiff)")
    restyle.add_argument("video", help="a video, a GIF, or a folder of images")
    for sub in (generate, restyle, animate):
        sub.add_argument("prompt", nargs="*", default=[], help="what to show; each prompt makes a file")
        sub.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line, - for standard input")
        if sub is not restyle:
            sub.add_argument("--replay", metavar="VIDEO", help="make this video again; options given here win")
            sub.add_argument("--num-frames", type=_whole, metavar="N", help="length of the video")
        if sub is animate:
            sub.add_argument("--base", metavar="MODEL", help="an image model of Stable Diffusion 1.5, or a whole "
                             "AnimateDiff model: a folder or a hub id; shapes-image is the one in this package")
            sub.add_argument("--adapter", metavar="MODEL", help="the motion adapter: a folder or a hub id; "
                             f"shapes-motion for shapes-image, else {ADAPTER}")
            sub.add_argument("--video", metavar="VIDEO", help="begin with a video, a GIF, or a folder of images")
        else:
            sub.add_argument("--model", help="a folder or a hub id; shapes is the one in this package")
        if sub is not generate:
            sub.add_argument("--strength", type=_number(0, 1), metavar="S",
                             help="how far to go from the video: 0 not at all, 1 all the way; 0.6")
        sub.add_argument("--free-init", action=argparse.BooleanOptionalAction,
                         help="steadier videos in three times the time (FreeInit)")
        whose = " (the base's)" if sub is animate else ""
        sub.add_argument("--revision", metavar="NAME", help=f"branch, tag or commit on the hub{whose}")
        sub.add_argument("--variant", metavar="NAME", help="variant of the weights' files: fp16"
                         + " (of the adapter's where there is one)" * (sub is animate))
        sub.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
        sub.add_argument("--steps", type=_whole, metavar="N", help="denoising steps")
        sub.add_argument("--guidance-scale", type=_number(0, 1000), metavar="G", help="how close to the prompt")
        sub.add_argument("--scheduler", metavar="NAME", help=f"solver: {', '.join(SCHEDULERS)}, or a class name"
                         + "; on Stable Diffusion ddim, and all with linear betas" * (sub is animate))
        sub.add_argument("--seed", type=_seed, metavar="N", help="of the noise, the same for each prompt; else drawn")
        size = {generate: "the model's", restyle: "the video's"}.get(sub, "the video's or the model's")
        sub.add_argument("--height", type=_whole, metavar="PIXELS", help=f"if not {size}")
        sub.add_argument("--width", type=_whole, metavar="PIXELS", help=f"if not {size}")
        sub.add_argument("--fps", type=_number(0, 1000, True), metavar="RATE",
                         help="frames per second: 8" + ", if not the video's" * (sub is not generate))
        sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                         help="of the weights: float16 on cuda, else float32")
        sub.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")
        sub.add_argument("--compat", choices=("diffusers",), help="give the reference's numbers where ours differ")
        sub.add_argument("--kernels", type=_kernels, metavar="CHOICE", help="how to run the fused operations: auto, "
                         "torch, triton, or with choices for some: torch,geglu=triton")
        sub.add_argument("--optimize", action=argparse.BooleanOptionalAction,
                         help="lay the weights out for speed; on cuda, launch steps as CUDA graphs")
        sub.add_argument("-o", "--output", type=_output, metavar="PATH",
                         help=f"a file ({', '.join(SUFFIXES)}; replaced), or a folder (names are made, none replaced)")

    inspect = commands.add_parser("inspect", help="say what is in a model, without loading its weights")
    inspect.add_argument("model", help=f"a folder, a file of weights, a hub id, {' or '.join(EMBEDDED_NAMES)}")
    inspect.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    inspect.add_argument("--variant", metavar="NAME", help="variant of the weights' files: fp16")

    convert = commands.add_parser("convert", help="from one published layout to another: .ckpt, .pth, .safetensors, "
                                  "folders")
    convert.add_argument("src", metavar="SRC", help="a file of weights, or a folder")
    convert.add_argument("dst", metavar="DST", help="what to write; nothing is replaced")
    convert.add_argument("--to", choices=("diffusers", "original", "single-file"), help="the layout: diffusers")
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of the weights, if not as they are")
    convert.add_argument("--tokenizer", metavar="MODEL", help="a folder or a hub id that has one; originals have none")
    convert.add_argument("--config", metavar="MODEL", help="a folder, hub id or config.json for what an original does "
                         "not say")
    convert.add_argument("--variant", metavar="NAME", help="variant of a folder's weights: fp16")
    convert.add_argument("--bin", action="store_true", default=False, help="weights in .bin files, not .safetensors")
    convert.add_argument("--ema", action="store_true", default=False, help="take a single file's moving average")
    convert.add_argument("--dry-run", action="store_true", default=False, help="print the mapping and write nothing")

    bisect = commands.add_parser("bisect", help="run a step with each fused operation in turn as a Triton kernel, and "
                                 "say how far each is from float64")
    bisect.add_argument("model", nargs="?", default="shapes", help="a folder or a hub id: shapes")
    bisect.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="float16")
    bisect.add_argument("--device", default="auto", metavar="NAME", help="cuda, or the CPU by Triton's interpreter")
    bisect.add_argument("--frames", type=_whole, default=3, metavar="N", help="of the video: 3")
    bisect.add_argument("--height", type=_whole, default=32, metavar="PIXELS", help="32")
    bisect.add_argument("--width", type=_whole, default=32, metavar="PIXELS", help="32")

    for sub in (generate, restyle, animate, inspect, convert, bisect):
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
    return parser


# ------------------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 after an error, 2 on wrong usage, 130 when interrupted."""
    parser = _parser()
    debug = False
    try:
        with _said_in_one_line():
            args = parser.parse_args(argv)
            debug = args.debug
            if args.command == "inspect":
                return _inspect(args)
            if args.command == "convert":
                return _convert(args)
            if args.command == "bisect":
                return _bisect(args)
            return _make(args, parser)
    except SystemExit as e:  # of argparse, which has said why
        return e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        if debug:
            raise
        _say("interrupted; nothing half-written is left")
        return 130
    except Exception as e:
        if debug:
            raise
        _say(f"error: {_one_line(e)}")
        return 1


def _say(text: str) -> None:
    text = text.encode("utf-8", "backslashreplace").decode()  # an argument that is not UTF-8 can be quoted, too
    print(f"minit2v: {text}", file=sys.stderr, flush=True)


def _one_line(e: BaseException) -> str:
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    if type(e).__name__ == "OutOfMemoryError":
        return f"out of memory: fewer frames, a smaller size or --dtype float16 need less ({str(e).split('.')[0]})"
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return " ".join(text.split()) or type(e).__name__


@contextmanager
def _said_in_one_line() -> Iterator[None]:
    """Warnings and the package's log messages as single lines, each once."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())  # the tokenizer quotes what it cuts off, and a prompt can be a book
        _say(f"warning: {text if len(text) <= 300 else text[:297] + '...'}")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("minit2v: warning: %(message)s"))
    handler.setLevel(logging.WARNING)
    logger = logging.getLogger("minit2v")
    before, propagate = warnings.showwarning, logger.propagate
    warnings.showwarning, logger.propagate = show, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        warnings.showwarning, logger.propagate = before, propagate
        logger.removeHandler(handler)


def _inspect(args: argparse.Namespace) -> int:
    from .inspect import report

    lines, good = report(_find_model(args.model), revision=getattr(args, "revision", None),
                         variant=getattr(args, "variant", None))
    print("\n".join(lines))
    return 0 if good else 1


def _convert(args: argparse.Namespace) -> int:
    from .convert import run

    print("\n".join(run(args)))
    return 0


def _bisect(args: argparse.Namespace) -> int:
    import torch

    device, path = _device(args.device), _find_model(args.model)
    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from ..fast import bisect
    from ..pipelines.checks import check_pixels

    check_pixels("--height", args.height, bisect.FACTOR)
    check_pixels("--width", args.width, bisect.FACTOR)
    unet = bisect.load(path, getattr(torch, args.dtype), device)
    given = bisect.inputs(unet, args.frames, args.height, args.width)
    _say(f"{type(unet).__name__} of {args.model}, one step, x {tuple(given[0].shape)}, {args.dtype} on {device}"
         + (": by Triton's interpreter, which is slow" if device.type != "cuda" else ""))
    good = True
    for line, fine in bisect.lines(bisect.bisect(unet, *given)):
        print(line, flush=True)
        good &= fine
    return 0 if good else 1


# ------------------------------------------------------------------------------------------------------------- videos


def _make(args: argparse.Namespace, parser: Parser) -> int:
    """`generate`, `restyle` and `animate`: one model, a file for each prompt."""
    digest = None
    if "replay" in args:
        args, digest = _replay(args, parser)
    given = {k: v for k, v in vars(args).items() if k in SETTINGS}
    video, source = getattr(args, "video", None), {}
    prompts = list(args.prompt) + (_read_prompts(args.prompts) if "prompts" in args else [])
    if not prompts:
        parser.error("give a prompt or --prompts FILE" + " or --replay VIDEO" * (args.command != "restyle"))
    if video is not None and "num_frames" in given:
        parser.error("--num-frames: a video has its own number of frames")
    if video is None and "strength" in given:
        parser.error("--strength: how far to go from which video? Give --video VIDEO")
    models = dict(EMBEDDED[args.command])
    if "adapter" in given and "base" not in given:
        parser.error("--adapter: to which image model? Give --base MODEL")
    if given.get("base", models.get("base")) != models.get("base"):
        del models["adapter"]
    if "kernels" in args:
        os.environ["MINIT2V_KERNELS"] = args.kernels
    given = models | given
    preset = PRESETS.get(given.get("model") or given["base"], {})
    settings = {"seed": secrets.randbelow(2**32), "fps": 8.0, **preset}
    paths = _output_paths(getattr(args, "output", None), prompts, given.get("seed", settings["seed"]))
    if video is not None:
        settings.pop("num_frames", None)
        video, measured, source = _read_source(video, digest)
        settings |= measured
    settings |= given
    pipe, call = _load(args.command, settings, video is not None)

    _say(_summary(settings, len(video) if video else settings["num_frames"]))
    failures = []
    for n, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        pipe.set_progress_bar_config(desc=f"{n + 1}/{len(prompts)}" if len(prompts) > 1 else None, unit="step",
                                     dynamic_ncols=True)
        try:
            start = time.monotonic()
            frames = _run(pipe, call, prompt, settings["seed"], video)
            about = {"minit2v": args.command, "prompt": prompt, **{k: settings[k] for k in SETTINGS if k in settings},
                     **source, "versions": _versions()}
            _write(frames, path, settings["fps"], about)
            print(path, flush=True)
            _say(f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} in {time.monotonic() - start:.1f} s")
        except Exception as e:
            if args.debug:
                raise
            failures.append(f"error: {_quote(prompt) + ': ' if len(prompts) > 1 else ''}{_one_line(e)}")
    for line in failures:
        _say(line)
    if failures and len(prompts) > 1:
        _say(f"{len(failures)} of {len(prompts)} prompts failed")
    return 1 if failures else 0


def _summary(s: dict[str, Any], frames: int) -> str:
    size = f"{frames} frames of {s['width']}x{s['height']} at {s['fps']:g} fps"
    parts = [size, f"{s['steps']} steps of {s['scheduler']}", f"guidance {s['guidance_scale']:g}", f"seed {s['seed']}",
             f"{s['dtype']} on {s['device']}", f"kernels {s['kernels']}"]
    if "strength" in s:
        parts.insert(2, f"strength {s['strength']:g}")
    if s.get("free_init"):
        parts.insert(2, "FreeInit")
    if s.get("optimize"):
        parts.append("optimized")
    if s.get("negative_prompt"):
        parts.append(f"not {_quote(s['negative_prompt'])}")
    return ", ".join(parts + [f"{k} {s[k]}" for k in ("revision", "variant", "compat") if s.get(k)])


def _run(pipe: Any, call: dict[str, Any], prompt: str, seed: int, video: Any) -> Any:
    """The frames (f h w 3) of one prompt. The noise comes from the CPU, so that the seed means the same everywhere."""
    import torch

    extra = {} if video is None else {"video": video}
    return pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="np",
                decode_chunk_size=DECODED_AT_ONCE, **call, **extra).frames[0]


def _write(frames: Any, path: Path, fps: float, about: dict[str, Any]) -> None:
    from ..files.video import export_to_gif, export_to_video

    export = export_to_gif if path.suffix.lower() == ".gif" else export_to_video
    export(frames, path, fps=fps, metadata=about)


def _load(command: str, settings: dict[str, Any], from_video: bool) -> tuple[Any, dict[str, Any]]:
    """The pipeline, and the arguments of its call; `settings` gets what was chosen for options that were not given."""
    import inspect

    import torch

    from minit2v_convert.folders import is_original

    from .. import pipelines, schedulers
    from ..pipelines.checks import check_size

    solver = _scheduler_class(settings["scheduler"], schedulers) if settings.get("scheduler") else None
    device = _device(settings.get("device", "auto"))
    dtype = settings.setdefault("dtype", "float16" if device.type == "cuda" else "float32")
    where = {"revision": settings.get("revision")}
    weights = {"variant": settings.get("variant"), "dtype": getattr(torch, dtype), "compat": settings.get("compat")}
    main = settings.get("model") or settings["base"]
    path = _find_model(main)
    schedule = _schedule_of_motion(path, settings, where) if command == "animate" else {}
    if schedule and solver is None:
        solver = schedulers.DDIMScheduler
    _say(f"loading {main}" + (f" with {settings['adapter']}" if "adapter" in settings else ""))
    parts: dict[str, Any] = {}
    if solver is not None:
        known = {k: v for k, v in schedule.items() if k in solver.field_defaults()}
        if is_original(path):
            parts["scheduler"] = solver.from_config(_family_of_file(path)[1], **known)
        else:
            parts["scheduler"] = solver.from_pretrained(path, subfolder="scheduler", **where, **known)
    if "adapter" in settings:
        parts["motion_adapter"] = _load_adapter(settings["adapter"], weights)
    cls = getattr(pipelines, PIPELINES[command, from_video])
    pipe = cls.from_pretrained(path, **where, **weights, **parts).to(device)
    if settings.get("free_init"):
        pipe.enable_free_init()
    if settings.get("optimize"):
        pipe.optimize()

    same = ("guidance_scale", "negative_prompt", "height", "width", "strength" if from_video else "num_frames")
    names = {"steps": "num_inference_steps", **{name: name for name in same}}
    if not from_video:
        height, width = settings.get("height"), settings.get("width")
        settings["height"], settings["width"] = check_size(height, width, pipe.unet, pipe.vae_scale_factor)
    defaults = inspect.signature(cls.__call__).parameters
    call = {argument: settings.setdefault(name, defaults[argument].default) for name, argument in names.items()}
    for name in settings.keys() & {"model", "base", "adapter"}:
        if settings[name] not in EMBEDDED_NAMES and Path(settings[name]).exists():
            settings[name] = os.path.abspath(settings[name])  # to be found from other folders, too
    settings |= {"scheduler": type(pipe.scheduler).__name__, "device": str(device),
                 "kernels": os.environ.get("MINIT2V_KERNELS") or "auto"}
    return pipe, call


def _schedule_of_motion(path: str, settings: dict[str, Any], where: dict[str, Any]) -> dict[str, Any]:
    """The fields of the noise schedule in which motion modules differ from the image model, which gets an adapter."""
    from minit2v_convert.folders import is_original

    from ..files.hub import read_json
    from ..pipelines.files import read_index

    if is_file := is_original(path):
        unet, own = _family_of_file(path)
    else:
        unet = (read_index(path, None, where).get("unet") or [None])[-1]
    if unet != "UNet2DConditionModel":  # a whole AnimateDiff model, or what the pipeline will refuse
        if "adapter" in settings:
            raise ValueError(f"--adapter: it goes into a UNet2DConditionModel, and {settings['base']} has a {unet}")
        return {}
    settings.setdefault("adapter", ADAPTER)
    if not is_file:
        own = read_json(path, "scheduler_config.json", subfolder="scheduler", **where)
    is_stable = own.get("beta_schedule") == "scaled_linear" and own.get("prediction_type", "epsilon") == "epsilon"
    return MOTION_SCHEDULE if is_stable else {}


def _family_of_file(path: str) -> tuple[str, dict[str, Any]]:
    """The class of the UNet in an original, and its scheduler's config: the published one, where none is said."""
    from minit2v_convert.convert import FAMILIES, components, schedule_of

    unet = components(path).get("unet")
    if unet is None or unet.cls not in FAMILIES:
        raise ValueError(f"{path} has no UNet of {' or '.join(FAMILIES)}: it is no model")
    return unet.cls, dict(schedule_of(path, unet.cls))


def _load_adapter(name: str, weights: dict[str, Any]) -> Any:
    from ..models.unet_motion import MotionAdapter

    path = _find_model(name)
    try:
        return MotionAdapter.from_pretrained(path, **weights)
    except FileNotFoundError:
        if weights["variant"] is None:
            raise
        _say(f"{name} has no variant {weights['variant']}: its other weights are read")
        return MotionAdapter.from_pretrained(path, **{**weights, "variant": None})


def _find_model(model: str) -> str:
    """A folder, a file or a hub id."""
    if model in EMBEDDED_NAMES:
        folder = ASSETS / model
        if not folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the model of this package is not in this installation", str(folder))
        return str(folder)
    if not Path(model).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        near = nearest(model, EMBEDDED_NAMES)
        raise FileNotFoundError(errno.ENOENT, f"no such folder, and no hub id (owner/name){near}", model)
    return model


def _scheduler_class(name: str, schedulers: Any) -> type:
    known = {n.lower(): n for n in dir(schedulers) if n.endswith("Scheduler")}
    found = SCHEDULERS.get(name.lower(), name).lower()
    if found not in known:
        there = [*SCHEDULERS, *known.values()]
        raise ValueError(f"no scheduler {name!r}{nearest(name, there)}; there are {', '.join(there)}")
    return getattr(schedulers, known[found])


def _device(name: str) -> Any:
    import torch

    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}; there are auto, cpu{f' and {there.type}' if there else ''}") from None
    usable = device.type == "cpu" or (there is not None and device.type == there.type)
    if not usable or (device.index or 0) >= max(1, torch.accelerator.device_count()):
        raise ValueError(f"the device {name!r} is not here; there are auto, cpu{f' and {there.type}' if there else ''}")
    return device


def _versions() -> dict[str, str]:
    import torch

    from .. import __version__

    return {"minit2v": __version__, "torch": torch.__version__, "python": platform.python_version()}


# -------------------------------------------------------------------------------------------------------------- files


def _read_prompts(file: str) -> list[str]:
    """The lines of a file, blank ones left out."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"{file}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{file}: no prompts in it")
    return prompts


def _quote(prompt: str) -> str:
    return f'"{prompt}"' if len(prompt) <= 60 else f'"{prompt[:57]}..."'


def _output_paths(output: Path | None, prompts: list[str], seed: int) -> list[Path]:
    """A path for each prompt, in a folder that is there and can be written: found out before the work, not after it."""
    is_file = output is not None and output.suffix.lower() in SUFFIXES and not output.is_dir()
    folder = output.parent if is_file else output or Path()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise type(e)(e.errno, f"cannot write here ({e.strerror})", str(folder)) from None
    if is_file and len(prompts) == 1:
        if output.exists():
            _say(f"{output} will be replaced")
        return [output]
    paths: list[Path] = []
    for n, prompt in enumerate(prompts):
        words = re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "video"
        stem, suffix = (f"{output.stem}-{n + 1}", output.suffix) if is_file else (f"{words}-{seed}", ".mp4")
        names = (folder / f"{stem}{f'-{k}' if k > 1 else ''}{suffix}" for k in range(1, 10**6))
        paths.append(next(p for p in names if p not in paths and not p.exists()))
    return paths


def _read_source(path: str, wanted: str | None) -> tuple[list, dict[str, Any], dict[str, str]]:
    """The frames to begin with, the settings that they suggest, and what says which video it was.

    wanted: the digest that the frames should have.
    """
    import hashlib

    from ..files.video import load_video

    frames, fps = load_video(path, return_fps=True)
    digest = hashlib.sha256(b"".join(f.tobytes() for f in frames)).hexdigest()
    if wanted not in (None, digest):
        raise ValueError(f"{path}: not the video that was begun with, its frames have changed")
    measured = {"strength": 0.6, "height": frames[0].height, "width": frames[0].width, **({"fps": fps} if fps else {})}
    where = path if path.startswith(("http://", "https://")) else str(Path(path).absolute())
    return frames, measured, {"video": where, "video_sha256": digest}


def _option(name: str, value: Any) -> str:
    option = name.replace("_", "-")
    return f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option}={value}"


def _replay(args: argparse.Namespace, parser: Parser) -> tuple[argparse.Namespace, str | None]:
    """The arguments that made a video, under those given now; and the digest of the video that it began with."""
    from ..files.video import read_metadata

    stored = read_metadata(args.replay)
    command, source = stored.get("minit2v"), stored.get("video")
    if command not in EMBEDDED or not isinstance(stored.get("prompt"), str):
        raise ValueError(f"{args.replay}: no settings of minit2v are stored in this file")
    if (command == "animate") != (args.command == "animate"):
        again = "animate" if command == "animate" else "generate"
        raise ValueError(f"{args.replay} was made by {command}: minit2v {again} --replay makes it again")
    given = {k: v for k, v in vars(args).items() if k not in ("command", "replay", "prompt", "prompts")}
    words = [_option(k, stored[k]) for k in SETTINGS if stored.get(k) is not None]
    prompts = args.prompt or ([] if "prompts" in args else [stored["prompt"]])
    if source is not None and command == "animate":
        words.append(f"--video={source}")
    first = [str(source)] if command == "restyle" else []
    again = parser.parse_args([command, *words, "--", *first, *prompts])
    if "video" in given and "num_frames" in again:  # that of the video made of a text alone
        del again.num_frames
    for name, value in [*given.items(), *([("prompts", args.prompts)] if "prompts" in args else [])]:
        setattr(again, name, value)

    then, now = stored.get("versions", {}), _versions()
    if changed := [f"{k} {then.get(k)} -> {v}" for k, v in now.items() if then.get(k) != v]:
        _say(f"warning: the video may come out differently, as versions have changed: {', '.join(changed)}")
    if "device" not in given:
        try:
            _device(again.device)
        except ValueError:
            _say(f"warning: made on {again.device}, which is not here: the numbers may differ a little")
            again.device = "auto"
    return again, None if "video" in given else stored.get("video_sha256")
