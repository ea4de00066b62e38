"""What the command line takes: the parser of every command. No torch, so that `--help` answers at once."""

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

ADAPTER = "guoyww/animatediff-motion-adapter-v1-5-2"  # for every other image model
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
            raise argparse.ArgumentTypeError(str(e).removeprefix("MINIT2V_KERNELS ")) from None
    return text


def _output(text: str) -> Path:
    path = Path(text)
    if not text or text == "-" or path.name.lower() in SUFFIXES:  # a variable without a value, or so
        raise argparse.ArgumentTypeError(f"{text!r} is no name: give a file, such as video.mp4, or a folder")
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

    def _print_message(self, message: str, file: Any = None) -> None:
        write(file or sys.stderr, message)  # argparse's own says nothing of a full disk

    def error(self, message: str) -> NoReturn:
        self.exit(2, clean(f"{self.prog}: error: {message}; see {self.prog} --help") + "\n")


def make_parser() -> Parser:
    """The parser of `minit2v` and of all its commands."""
    parser = Parser(prog="minit2v", description="Text-to-video diffusion.")
    parser.add_argument("--version", action="version", version=f"minit2v {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    generate = commands.add_parser("generate", help="make videos of texts")
    restyle = commands.add_parser("restyle", help="make a video of a video and a text")
    animate = commands.add_parser("animate", help="make videos with an image model and a motion adapter (AnimateDiff)")
    restyle.add_argument("video", help="a video, a GIF, or a folder of images")
    for sub in (generate, restyle, animate):
        sub.add_argument("prompt", nargs="*", default=[], help="what to show; each prompt makes a file")
        sub.add_argument("--prompts", metavar="FILE", help="a file with one prompt per line, - for standard input; "
                         "with -o FOLDER what is there is not made again, and the processes of torchrun share it")
        if sub is not restyle:
            sub.add_argument("--replay", metavar="VIDEO", help="make this video again; options given here win")
            sub.add_argument("--trust", action="store_true", default=False,
                             help="use the models and videos that the replayed file names, whoever made it")
            sub.add_argument("--num-frames", type=_whole, metavar="N", help="length of the video")
        if sub is animate:
            sub.add_argument("--base", metavar="MODEL", help="an image model of Stable Diffusion 1.5, or a whole "
                             "AnimateDiff model: a folder or a hub id; shapes-image is the one in this package")
            sub.add_argument("--adapter", metavar="MODEL", help="the motion adapter: a folder or a hub id; "
                             f"shapes-motion for shapes-image, else {ADAPTER}")
            sub.add_argument("--video", metavar="VIDEO", help="begin with a video, a GIF, or a folder of images")
            pictures.add_arguments(sub)
        else:
            sub.add_argument("--model", help="a folder or a hub id; shapes is the one in this package")
        if sub is not generate:
            sub.add_argument("--from", type=_number(0, 1e6), metavar="SECONDS", help="begin here in the video")
            sub.add_argument("--to", type=_number(0, 1e6), metavar="SECONDS", help="end here in the video")
            sub.add_argument("--every", type=_whole, metavar="N", help="take every n-th frame of the video")
            sub.add_argument("--strength", type=_number(0, 1), metavar="S",
                             help="how far to go from the video: 0 not at all, 1 all the way; 0.6")
        long_videos.add_options(sub, _whole)
        sub.add_argument("--free-init", action=argparse.BooleanOptionalAction,
                         help="steadier videos in three times the time (FreeInit)")
        whose = " (the base's)" if sub is animate else ""
        sub.add_argument("--revision", metavar="NAME", help=f"branch, tag or commit on the hub{whose}")
        sub.add_argument("--vae", metavar="MODEL", help="another VAE: a file, a folder or a hub id")
        sub.add_argument("--tokenizer", metavar="MODEL", help="another tokenizer: a folder or a hub id")
        sub.add_argument("--config", metavar="MODEL", help="a folder or a hub id that has what a file of weights lacks")
        sub.add_argument("--lora", type=adapters.lora, action="append", metavar="FILE[:WEIGHT]",
                         help="a LoRA: a file, a folder or a hub id, and how strong: 1; may be given several times")
        if sub is animate:
            sub.add_argument("--motion-lora", type=adapters.lora, action="append", metavar="NAME[:WEIGHT]",
                             help=f"a LoRA of the motion: {', '.join(adapters.MOTIONS)}, a file, a folder or a hub id")
        sub.add_argument("--embedding", type=adapters.embedding, action="append", metavar="FILE[:WORD]",
                         help="a word that stands for learned vectors (textual inversion), and its name in prompts")
        sub.add_argument("--variant", metavar="NAME", help="variant of the weights' files: fp16"
                         + " (of the adapter's where there is one)" * (sub is animate))
        sub.add_argument("--negative-prompt", metavar="TEXT", help="what not to show")
        sub.add_argument("--steps", type=_whole, metavar="N", help="denoising steps")
        sub.add_argument("--guidance-scale", type=_number(0, 1000), metavar="G", help="how close to the prompt")
        sub.add_argument("--scheduler", type=_scheduler, metavar="NAME", help="solver: `--scheduler help` lists them"
                         + "; on Stable Diffusion ddim, and all with linear betas" * (sub is animate))
        sub.add_argument("--seed", type=_seed, metavar="N", help="of the noise, the same for each prompt; else drawn, "
                         "and 0 for --prompts with -o FOLDER")
        size = {generate: "the model's", restyle: "the video's"}.get(sub, "the video's or the model's")
        sub.add_argument("--height", type=_whole, metavar="PIXELS", help=f"if not {size}")
        sub.add_argument("--width", type=_whole, metavar="PIXELS", help=f"if not {size}")
        sub.add_argument("--fps", type=_number(0.01, 1000), metavar="RATE",
                         help="frames per second: 8" + ", if not the video's" * (sub is not generate))
        sub.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                         help="of the weights: float16 on cuda, else float32")
        sub.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps, ...")
        sub.add_argument("--compat", choices=("diffusers",), help="give the reference's numbers where ours differ")
        sub.add_argument("--kernels", type=_kernels, metavar="CHOICE", help="how to run the fused operations: auto, "
                         "torch, triton, or with choices for some: torch,geglu=triton")
        sub.add_argument("--optimize", action=argparse.BooleanOptionalAction,
                         help="move weights in memory for speed; on cuda, launch steps as CUDA graphs. With "
                         "--no-optimize the networks run as they are written")
        sub.add_argument("-o", "--output", type=_output, metavar="PATH",
                         help=f"a file ({', '.join(SUFFIXES)}; replaced), or a folder (names are made, none replaced)")

    inspect = commands.add_parser("inspect", help="say what is in a model, without loading its weights")
    inspect.add_argument("model", help=f"a folder, a file of weights, a hub id, {' or '.join(embedded.NAMES)}")
    inspect.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub")
    inspect.add_argument("--variant", metavar="NAME", help="variant of the weights' files: fp16")

    convert = commands.add_parser("convert", help="from one layout to another: .ckpt, .pth, .safetensors, "
                                  "folders")
    convert.add_argument("src", metavar="SRC", help="a file of weights, or a folder")
    convert.add_argument("dst", metavar="DST", help="what to write; nothing is replaced")
    convert.add_argument("--to", choices=("diffusers", "authors", "single-file"), help="the layout: diffusers")
    convert.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), help="of the weights, if not as they are")
    convert.add_argument("--tokenizer", metavar="MODEL", help="a folder or hub id that has one; authors' files do not")
    convert.add_argument("--config", metavar="MODEL", help="a folder, hub id or config.json for what authors' "
                         "files do not say")
    convert.add_argument("--variant", metavar="NAME", help="variant of a folder's weights: fp16")
    convert.add_argument("--bin", action="store_true", default=False, help="weights in .bin files, not .safetensors")
    convert.add_argument("--ema", action="store_true", default=False, help="take a single file's moving average")
    convert.add_argument("--dry-run", action="store_true", default=False, help="print the mapping and write nothing")

    blank = commands.add_parser("blank", help="write the folder of an official model, of full size, with zeros for its "
                                "weights: to test and measure without a download")
    blank.add_argument("model", metavar="MODEL", help="ms-1.7b, zeroscope-v2-576w, zeroscope-v2-xl, sd-1.5, "
                       "motion-v1-5-2, ..., or a hub id")
    blank.add_argument("dst", metavar="DIR", help="a folder that is not there or empty")

    plan = commands.add_parser("plan", help="say how much memory a video takes, with and without each technique, and "
                               "the fastest way that fits; no weights are needed")
    plan.add_argument("--model", default="shapes", help="a folder, a hub id, or ms-1.7b, zeroscope-v2-576w, "
                      "zeroscope-v2-xl, sd-1.5: shapes")
    plan.add_argument("--num-frames", type=_whole, metavar="N", help="length of the video: 16")
    plan.add_argument("--height", type=_whole, metavar="PIXELS", help="if not the model's")
    plan.add_argument("--width", type=_whole, metavar="PIXELS", help="if not the model's")
    plan.add_argument("--dtype", choices=("float32", "float16", "bfloat16"),
                      help="of the weights: float16, for a CPU float32")
    plan.add_argument("--memory", type=_memory, metavar="SIZE", help="what there is, such as 8GiB: chooses a plan")
    plan.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it is to run: cuda")

    bisect = commands.add_parser("bisect", help="run a step with each fused operation in turn as a Triton kernel, and "
                                 "say how far each is from float64")
    bisect.add_argument("model", nargs="?", default="shapes", help="a folder or a hub id: shapes")
    bisect.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float16", help="float16")
    bisect.add_argument("--device", default="auto", metavar="NAME", help="cuda, or the CPU by Triton's interpreter")
    bisect.add_argument("--frames", type=_whole, default=3, metavar="N", help="of the video: 3")
    bisect.add_argument("--height", type=_whole, default=32, metavar="PIXELS", help="32")
    bisect.add_argument("--width", type=_whole, default=32, metavar="PIXELS", help="32")

    learn = commands.add_parser("train", help="fine-tune a model or train a LoRA on clips; the same command goes on "
                                "where it was")
    recipes.add_options(learn)

    for sub in (generate, restyle, animate, inspect, convert, blank, plan, bisect, learn):
        sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
        sub.set_defaults(usage_error=sub.error)  # for what is wrong together: points to the command's own help
    return parser
