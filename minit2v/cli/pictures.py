"""`--ip-adapter` and `--image` of `minit2v animate`: the pictures that IP-Adapters are shown."""

import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from .messages import say


def add_arguments(parser: Any) -> None:
    parser.add_argument("--ip-adapter", action="append", metavar="FILE", help="show the model a picture with this "
                        "IP-Adapter: a file, or owner/name/file on the hub; may be given several times")
    parser.add_argument("--image", action="append", type=_picture, metavar="PICTURE[:SCALE]", help="the picture, and "
                        "how much it counts: 1; with one IP-Adapter it may be given several times, else one for each")


def _picture(text: str) -> str:
    where, scale = split(text)
    if not where:
        raise argparse.ArgumentTypeError(f"{text!r} is no PICTURE[:SCALE]")
    return f"{where}:{scale:g}"


def split(text: str) -> tuple[str, float]:
    """PICTURE[:SCALE]. A file of that very name has no scale behind it."""
    found = re.fullmatch(r"(.*):([-+]?(?:\d+\.?\d*|\.\d+))", text, re.DOTALL)
    if found is None or Path(text).exists():
        return text, 1.0
    return found[1], float(found[2])


def check(args: argparse.Namespace) -> None:
    """Ends with wrong usage where there is one without the other, or not one for each."""
    adapters, images = getattr(args, "ip_adapter", []), getattr(args, "image", [])
    if adapters and not images:
        args.usage_error("--ip-adapter: it is shown which picture? Give --image PICTURE")
    if images and not adapters:
        args.usage_error("--image: it is shown by which adapter? Give --ip-adapter FILE")
    if len(adapters) > 1 and len(images) != len(adapters):
        args.usage_error(f"{len(images)} --image for {len(adapters)} --ip-adapter: give one for each")
    if len(adapters) == 1 and len({split(image)[1] for image in images}) > 1:
        args.usage_error("--image: all pictures of one --ip-adapter count the same, give them one scale")


def load(pipe: Any, settings: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Put the adapters into the pipeline; returns the argument of its call. Settings get what finds the files again.

    before: the settings of a video that is made again, with the digests of what it was made with.
    """
    if "ip_adapter" not in settings:
        return {}
    from ..adapters import ip_adapter
    from ..files.video import load_image

    names = settings["ip_adapter"]
    where, scales = zip(*map(split, settings["image"]), strict=True)
    images = [load_image(path) for path in where]
    files = [Path(ip_adapter.find(name, None, None).label) for name in names]
    say(f"loading {' and '.join(names)}")
    pipe.load_ip_adapter(list(names))
    pipe.set_ip_adapter_scale(list(scales[: len(names)]))
    settings["ip_adapter"] = [_found_again(name) for name in names]
    settings["image"] = [f"{_found_again(path)}:{scale:g}" for path, scale in zip(where, scales, strict=True)]
    settings["ip_adapter_sha256"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    settings["image_sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    for name in ("ip_adapter", "image"):
        if settings[name] != before.get(name):  # others were given
            continue
        then = before.get(f"{name}_sha256")
        for k, (what, now) in enumerate(zip(settings[name], settings[f"{name}_sha256"], strict=True)):
            if not isinstance(then, list) or then[k : k + 1] != [now]:
                say(f"warning: {what} is not what it was: its content has changed")
    return {"ip_adapter_image": [images] if len(names) == 1 else images}


def _found_again(name: str) -> str:
    """A path from any folder; an address or a name on the hub as it is."""
    return os.path.abspath(name) if Path(name).exists() else name
