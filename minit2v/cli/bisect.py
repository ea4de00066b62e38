"""`minit2v bisect`: runs a step with one fused operation at a time as a Triton kernel, and compares it with float64."""

import argparse
import os

import torch

from ..pipelines.checks import check_pixels
from .loading import find_device
from .messages import say, tell


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if the error of an operation is too large."""
    device = find_device(args.device)
    if device.type != "cuda":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from minit2v_kernels._dispatch import own

    from ..fast import bisect

    setting = getattr(args, "kernels", "")
    own(setting)  # imported before anything is loaded, and after the interpreter was chosen
    check_pixels("--height", args.height, bisect.FACTOR)
    check_pixels("--width", args.width, bisect.FACTOR)
    unet = bisect.load(args.model, getattr(torch, args.dtype), device)
    inputs = bisect.inputs(unet, args.frames, args.height, args.width)
    say(f"{type(unet).__name__} of {args.model}, one step, x {tuple(inputs[0].shape)}, {args.dtype} on {device}"
         + (", run by Triton's interpreter, which is slow" if device.type != "cuda" else ""))
    good = True
    for line, fine in bisect.lines(bisect.bisect(unet, *inputs, setting)):
        tell(line)
        good &= fine
    return 0 if good else 1
