"""`minit2v trace`: a web page on which the blocks of a model can be explored."""

import argparse
import os
from pathlib import Path
from typing import Any

from minit2v_convert.stream import replacing

from ..explorer.page import make_page
from ..explorer.sample import sample
from ..explorer.trace import base_and_adapter, trace_model
from ..files import embedded
from .messages import say, tell_path

PROMPT = "a red circle moving right"  # the embedded models were trained on such texts


def run(args: argparse.Namespace) -> int:
    """The exit code; an error is raised."""
    size = {"frames": getattr(args, "num_frames", None), "height": getattr(args, "height", None),
            "width": getattr(args, "width", None)}  # fmt: skip
    base, adapter = base_and_adapter(args.model, getattr(args, "adapter", None))
    prompt = getattr(args, "prompt", PROMPT if embedded.find(base) else None)
    if prompt is None and (given := [name for name in ("steps", "seed", "device") if name in args]):
        raise ValueError(f"--{given[0]} needs --prompt, the text on which {base} is run")
    if prompt is not None and embedded.find(base) is None and not Path(base).expanduser().exists() and "/" not in base:
        raise ValueError(f"--prompt needs weights, and {base} is a name without weights; give a folder or a hub id")
    say(f"counting {base}")
    traced = trace_model(base, adapter, **size)
    sampled = None
    if prompt is not None:
        from .loading import load

        video = traced.unet_video
        settings: dict[str, Any] = {"model" if video else "base": base, "steps": getattr(args, "steps", 10),
                                    "device": getattr(args, "device", "auto"), "optimize": False,
                                    **dict(zip(("num_frames", "height", "width"), traced.video[:3], strict=True)),
                                    **({"adapter": adapter} if adapter else {})}  # fmt: skip
        pipe, call = load("generate" if video else "animate", settings, None)
        sampled = sample(traced, pipe, call, prompt, getattr(args, "seed", 0))
    page = make_page(traced, sampled)
    with replacing(args.output) as temporary:
        temporary.write_text(page, encoding="utf-8")
    say(f"{args.output} has {os.stat(args.output).st_size / 1e6:.2f} MB and needs no network: open it in a browser")
    tell_path(args.output)
    return 0
