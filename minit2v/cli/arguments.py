"""The parser of every command. This module does not import torch, so that `--help` answers at once."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from minit2v_convert.rename import nearest

from .. import __version__
from ..files import embedded
from . import adapters, long_videos, pictures, recipes
from .messages import clean, tell, write

ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"  # for every image model except shapes-image
SUFFIXES = (".mp4", ".gif", ".mkv", ".mov", ".m4v")


def _scheduler(text: str) -> str:
    if text == "help":
        from ..schedulers.names import table

        tell(*table().splitlines())
        raise SystemExit(0)
    return text


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


def _memory(text: str) -> str:
    if not re.fullmatch(r"\d+(\.\d+)? ?[kmgt]?i?b?", text.lower()) or not float(re.split(r"[^\d.]", text)[0]):
        raise argparse.ArgumentTypeError(f"must be a size such as 8GiB or 500MB, not {text!r}")
    return text


def _kernels(text: str) -> str:
    if text not in ("auto", "torch", "triton"):  # "torch,geglu=triton"
        from minit2v_kernels._dispatch import choices

        try:
            choices(text)
        except ValueError as e:
            text = str(e).removeprefix("MINIT2V_KERNELS ")
            raise argparse.ArgumentTypeError(f"{text}; for one operation give OP=CHOICE, such as geglu=triton"
                                             ) from None
    return text


def _output(text: str) -> Path:
    path = Path(text)
    if not text or text == "-" or path.name.lower() in SUFFIXES:  # for example an empty shell variable
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: give a file, such as video.mp4, or a folder")
    if path.suffix and path.suffix.lower() not in SUFFIXES and not path.is_dir() and not text.endswith(os.sep):
        raise argparse.ArgumentTypeError(f"{text}: the name of a video must end in {', '.join(SUFFIXES)}; "
                                         f"the name of a new folder with a dot must end in {os.sep}")
    return path


def _port(text: str) -> int:
    if not re.fullmatch(r"\d{1,5}", text) or int(text) >= 2**16:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 65535, not {text!r}")
    return int(text)


def _page(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a page: it must end in .html")
    return path


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line and accepts no abbreviations.

    An option that was not given has no attribute in the namespace.
    """

    def __init__(self, **kw: Any):
        super().__init__(allow_abbrev=False, argument_default=argparse.SUPPRESS, **kw)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:
            word, known = rest[0].split("=")[0], [s for a in self._actions for s in a.option_strings]
            self.error(f"unknown argument {word!r}{nearest(word, known)}")
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            message = f"must be one of {', '.join(known)}, not {value!r}{nearest(value, known)}"
            raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file: Any = None) -> None:
        write(file or sys.stderr, message)  # argparse's own method hides the error of a full disk

    def error(self, message: str) -> NoReturn:
        self.exit(2, clean(f"{self.prog}: error: {message}; see {self.prog} --help") + "\n")


def make_parser() -> Parser:
    """The parser of `minit2v` and of all its commands."""
    parser = Parser(prog="minit2v", description="Make videos from texts with diffusion models.",
                    epilog='First try: minit2v generate "a red circle moving right" -o video.mp4. '
                    "`minit2v COMMAND --help` shows the options of a command.")
    parser.add_argument("--version", action="version", version=f"minit2v {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, text: str) -> Parser:
        return commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")

    generate = command("generate", "make videos from texts")
    restyle = command("restyle", "make a new video from a video and a text")
    animate = command("animate", "make videos with an image model and a motion adapter (AnimateDiff)")
    restyle.add_argument("video", help="a video, a GIF, or a folder of images")
    for sub in (generate, restyle, animate):
        sub.add_argument("prompt", nargs="*", default=[],
                         help="a text that says what to show; each prompt makes one video")
        sub.add_argument("--prompts", metavar="FILE",
                         help="read prompts from this file, one per line; - is standard input. With -o FOLDER, "
                         "finished videos are not made again, and the processes of torchrun share the prompts")
        if sub is not restyle:
            sub.add_argument("--replay", metavar="VIDEO",
                             help="make this video again with the settings stored in it; options that you give "
                             "replace stored ones")
            sub.add_argument("--trust", action="store_true", default=False,
                             help="allow --replay to load the models and videos that are named in the file")
            sub.add_argument("--num-frames", type=_whole, metavar="N", help="number of frames (default: 16)")
        if sub is animate:
            sub.add_argument("--base", metavar="MODEL", help="a Stable Diffusion 1.5 image model, or a complete "
                             "AnimateDiff model: a folder, a file or a hub id (default: shapes-image, in this package)")
            sub.add_argument("--adapter", metavar="MODEL", help="the motion adapter: a folder, a file or a hub id "
                             f"(default: shapes-motion for shapes-image, else {ADAPTER})")
            sub.add_argument("--video", metavar="VIDEO",
                             help="change this video, GIF or folder of images, instead of starting from noise")
            pictures.add_arguments(sub)
        else:
            sub.add_argument("--model", help="a folder, a file or a hub id (default: shapes, in this package)")
        if sub is not generate:
            sub.add_argument("--from", type=_number(0, 1e6), metavar="SECONDS",
                             help="use the input video from this time on (default: its start)")
            sub.add_argument("--to", type=_number(0, 1e6), metavar="SECONDS",
                             help="use the input video up to this time (default: its end)")
            sub.add_argument("--every", type=_whole, metavar="N",
                             help="use only every N-th frame of the input video (default: 1)")
            sub.add_argument("--strength", type=_number(0, 1), metavar="S",
                             help="how much to change the input video, from 0 (nothing) to 1 (everything) "
                             "(default: 0.6)")
        long_videos.add_options(sub, _whole)
        sub.add_argument("--free-init", action=argparse.BooleanOptionalAction,
                         help="make the frames more consistent; takes three times as long (FreeInit)")
        whose = ", for the base model" if sub is animate else ""
        sub.add_argument("--revision", metavar="NAME", help=f"branch, tag or commit on the hub{whose}")
        sub.add_argument("--vae", metavar="MODEL", help="use another VAE: a file, a folder or a hub id")
        sub.add_argument("--tokenizer", metavar="MODEL", help="use another tokenizer: a folder or a hub id")
        sub.add_argument("--config", metavar="MODEL",
                         help="take the configs from this folder or hub id, if the model is a single file")
        sub.add_argument("--lora", type=adapters.lora, action="append", metavar="FILE[:WEIGHT]",
                         help="add a LoRA: a file, a folder or a hub id, and its weight (default: 1); can be repeated")
        if sub is animate:
            sub.add_argument("--motion-lora", type=adapters.lora, action="append", metavar="NAME[:WEIGHT]",
                             help=f"add a motion LoRA, and its weight (default: 1): {', '.join(adapters.MOTIONS)}, a "
                             "file, a folder or a hub id; can be repeated")
        sub.add_argument("--embedding", type=adapters.embedding, action="append", metavar="FILE[:WORD]",
                         help="add a textual inversion embedding; WORD stands for it in prompts (default: the word in "
                         "the file); can be repeated")
        sub.add_argument("--variant", metavar="NAME", help="variant of the weights files, such as fp16"
                         + "; also of the adapter's, if it has this variant" * (sub is animate))
        sub.add_argument("--negative-prompt", metavar="TEXT", help="a text that says what not to show")
        sub.add_argument("--steps", type=_whole, metavar="N",
                         help="number of denoising steps (default: 50; 25 for shapes)")
        sub.add_argument("--guidance-scale", type=_number(0, 1000), metavar="G",
                         help="how strongly the video follows the prompt; 1 turns guidance off (default: "
                         f"{({generate: 9, animate: 7.5}).get(sub, 15)}; 1.5 for shapes)")
        sub.add_argument("--scheduler", type=_scheduler, metavar="NAME",
                         help="the solver (sampler) of the denoising steps; `--scheduler help` lists them (default: "
                         + ("ddim with linear betas for Stable Diffusion, else the model's)" if sub is animate
                            else "the model's)"))
        sub.add_argument("--seed", type=_seed, metavar="N",
                         help="random seed, the same for every prompt (default: a random one; 0 for --prompts with "
                         "-o FOLDER)")
        size = {generate: "the model's", restyle: "the video's"}.get(sub, "the video's or the model's")
        sub.add_argument("--height", type=_whole, metavar="PIXELS", help=f"height of the new video (default: {size})")
        sub.add_argument("--width", type=_whole, metavar="PIXELS", help=f"width of the new video (default: {size})")
        sub.add_argument("--fps", type=_number(0.01, 1000), metavar="RATE",
                         help="frames per second (default: 8" + ", or the video's" * (sub is not generate) + ")")
        sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                         help="number format of the weights (default: float16 on cuda, else float32)")
        sub.add_argument("--device", metavar="NAME",
                         help="where to compute: auto, cpu, cuda, cuda:1, mps, ... (default: auto)")
        sub.add_argument("--compat", choices=("diffusers",),
                         help="compute the same numbers as diffusers, also where minit2v differs on purpose")
        sub.add_argument("--kernels", type=_kernels, metavar="CHOICE", help="how to run the fused operations: auto, "
                         "torch or triton (default: auto). A choice for a single operation can follow: "
                         "torch,geglu=triton. It can be your own function: geglu=package.module:function")
        sub.add_argument("--optimize", action=argparse.BooleanOptionalAction,
                         help="rearrange the weights for speed, and use CUDA graphs on cuda; --no-optimize runs the "
                         "plain networks (default: fused operations, and weights as they are)")
        sub.add_argument("-o", "--output", type=_output, metavar="PATH",
                         help=f"a file ({', '.join(SUFFIXES)}), which is replaced if it exists; or a folder, in which "
                         "no file is replaced (default: the current folder)")

    inspect = command("inspect", "show what is in a model, without loading its weights")
    inspect.add_argument("model", help=f"a folder, a checkpoint file, a hub id, {' or '.join(embedded.NAMES)}")
    inspect.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    inspect.add_argument("--variant", metavar="NAME", help="variant of the weights files, such as fp16")

    convert = command("convert", "convert checkpoints between layouts: .ckpt, .pth, .safetensors, folders")
    convert.add_argument("src", metavar="SRC", help="a checkpoint file, or a folder")
    convert.add_argument("dst", metavar="DST", help="the new file or folder; nothing is replaced")
    convert.add_argument("--to", choices=("diffusers", "authors", "single-file"),
                         help="the new layout: folders of diffusers, files of a model's authors, or one file with "
                         "all networks (default: diffusers)")
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"),
                         help="number format of the weights (default: no change)")
    convert.add_argument("--tokenizer", metavar="MODEL",
                         help="take the tokenizer from this folder or hub id; the authors' checkpoints have none")
    convert.add_argument("--config", metavar="MODEL", help="take the config from this folder, hub id or "
                         "config.json; needed if the shapes in SRC fit no published model")
    convert.add_argument("--variant", metavar="NAME", help="variant of the weights files in a folder, such as fp16")
    convert.add_argument("--bin", action="store_true", default=False, help="write .bin files instead of .safetensors")
    convert.add_argument("--ema", action="store_true", default=False,
                         help="convert the moving average (EMA) of the weights, which some single files have")
    convert.add_argument("--dry-run", action="store_true", default=False,
                         help="print the old and new name of each tensor, and write nothing")

    blank = command("blank", "write the folder of an official model with zeros as weights, for tests without a "
                    "download")
    blank.add_argument("model", metavar="MODEL", help="ms-1.7b, zeroscope-v2-576w, zeroscope-v2-xl, sd-1.5, "
                       "motion-v1-5-2, ..., or a hub id")
    blank.add_argument("dst", metavar="DIR", help="a new or empty folder")

    plan = command("plan", "count how much memory a video needs with each technique, and choose a plan that fits; "
                   "no weights are needed")
    plan.add_argument("--model", default="shapes", help="a folder, a hub id, or ms-1.7b, zeroscope-v2-576w, "
                      "zeroscope-v2-xl, sd-1.5 (default: shapes)")
    plan.add_argument("--adapter",
                      help="the motion adapter of an image model: a folder, a hub id or a name such as motion-v1-5-3 "
                      "(default: motion-v1-5-2)")
    plan.add_argument("--num-frames", type=_whole, metavar="N", help="number of frames (default: 16)")
    plan.add_argument("--height", type=_whole, metavar="PIXELS", help="height of the video (default: the model's)")
    plan.add_argument("--width", type=_whole, metavar="PIXELS", help="width of the video (default: the model's)")
    plan.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                      help="number format of the weights (default: float16 on cuda, float32 on a CPU)")
    plan.add_argument("--memory", type=_memory, metavar="SIZE",
                      help="choose a plan that fits into this much memory, such as 8GiB")
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda",
                      help="the device to plan for (default: cuda)")
    plan.add_argument("--train", metavar="WHAT",
                      help="plan a training run instead of a video: full, temporal, lora, motion, motion-lora and "
                      "other kinds of `minit2v train`")
    plan.add_argument("--targets", nargs="+", metavar="LAYERS",
                      help="layers that get a LoRA: spatial, temporal, linear, ... (default: both)")
    plan.add_argument("--rank", type=_whole, metavar="N", help="rank of the LoRA (default: 8)")
    plan.add_argument("--batch", type=_whole, metavar="N",
                      help="number of clips in a step, over all processes (default: 4)")
    plan.add_argument("--accumulate", type=_whole, metavar="N",
                      help="number of parts into which a process divides its clips, one after the other, to save "
                      "memory (default: 1)")
    plan.add_argument("--ema", action=argparse.BooleanOptionalAction,
                      help="include a moving average of the trained weights (default: yes, but not for a LoRA)")
    plan.add_argument("--processes", type=_whole, metavar="N", help="number of GPUs that train together (default: 1)")

    bisect = command("bisect", "run one step with each Triton kernel in turn, and print its error against float64")
    bisect.add_argument("model", nargs="?", default="shapes", help="a folder or a hub id (default: shapes)")
    bisect.add_argument("--kernels", type=_kernels, metavar="OP=MODULE:FUNCTION",
                        help="also run your own functions, such as geglu=package.module:function")
    bisect.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16",
                        help="number format (default: float16)")
    bisect.add_argument("--device", default="auto", metavar="NAME",
                        help="where to compute: auto, cuda, or cpu with Triton's slow interpreter (default: auto)")
    bisect.add_argument("--frames", type=_whole, default=3, metavar="N", help="number of frames (default: 3)")
    bisect.add_argument("--height", type=_whole, default=32, metavar="PIXELS", help="height of the video (default: 32)")
    bisect.add_argument("--width", type=_whole, default=32, metavar="PIXELS", help="width of the video (default: 32)")

    learn = command("train", "fine-tune a model or train a LoRA on clips; the same command resumes it")
    recipes.add_options(learn)

    trace = command("trace", "write a web page that shows each block of a model with its shapes, parameters, FLOPs, "
                    "bytes, time and source; no weights are needed")
    trace.add_argument("model", metavar="MODEL", help="a folder, a hub id, a motion adapter, "
                       f"{', '.join(embedded.NAMES[:3])}, or a name that `minit2v blank` knows: ms-1.7b, sd-1.5, ...")
    trace.add_argument("--adapter", metavar="MODEL",
                       help="the motion adapter of an image model: a folder, a hub id or a name "
                       "(default: motion-v1-5-2)")
    trace.add_argument("-o", "--output", type=_page, default=Path("explorer.html"), metavar="FILE",
                       help="the .html file, which is replaced if it exists (default: explorer.html)")
    trace.add_argument("--num-frames", type=_whole, metavar="N", help="number of frames (default: 16)")
    trace.add_argument("--height", type=_whole, metavar="PIXELS", help="height of the video (default: the model's)")
    trace.add_argument("--width", type=_whole, metavar="PIXELS", help="width of the video (default: the model's)")
    trace.add_argument("--prompt", metavar="TEXT",
                       help="run the model on this prompt, and show attention maps and measured times. This needs the "
                       "weights. The embedded models run also without it")
    trace.add_argument("--steps", type=_whole, metavar="N", help="number of denoising steps of this run (default: 10)")
    trace.add_argument("--seed", type=_seed, metavar="N", help="random seed of this run (default: 0)")
    trace.add_argument("--device", metavar="NAME", help="where to compute this run: auto, cpu, cuda, ... "
                       "(default: auto)")

    ui = command("ui", "serve a web page to make videos on this computer")
    ui.add_argument("--model", action="append", default=[], metavar="MODEL",
                    help="offer this model, too: a folder, a file or a hub id; can be repeated")
    ui.add_argument("--base", action="append", default=[], metavar="MODEL",
                    help="offer this image model for animate; can be repeated")
    ui.add_argument("--adapter", action="append", default=[], metavar="MODEL",
                    help="offer this motion adapter for the image models; can be repeated")
    ui.add_argument("--lora", action="append", default=[], metavar="FILE", help="offer this LoRA; can be repeated")
    ui.add_argument("--device", default="auto", metavar="NAME",
                    help="where to compute: auto, cpu, cuda, ... (default: auto)")
    ui.add_argument("-o", "--output", type=Path, default=Path("minit2v-videos"), metavar="FOLDER",
                    help="the only folder that the page reads and writes (default: minit2v-videos)")
    ui.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                    help="the address to listen on (default: 127.0.0.1, which only this computer can reach)")
    ui.add_argument("--port", type=_port, default=7860, metavar="N",
                    help="the port to listen on; 0 takes a free one (default: 7860)")

    for sub in (generate, restyle, animate, inspect, convert, blank, plan, bisect, learn, trace, ui):
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        sub.set_defaults(usage_error=sub.error)  # for options that do not go together
    return parser
