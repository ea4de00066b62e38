"""`--ip-adapter` and `--image` of `minit2v animate`: IP-Adapters, and the pictures that they use as prompts."""

import argparse
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .messages import one_line, say

OPTIONS = ("ip_adapter", "image")  # settings that are lists; digests of the files are stored as "..._sha256"


def add_arguments(parser: Any) -> None:
    parser.add_argument("--ip-adapter", action="append", metavar="FILE", help="use an image as a prompt with this "
                        "IP-Adapter: a file, or owner/name/file on the hub; can be repeated")
    parser.add_argument("--image", action="append", type=_picture, metavar="PICTURE[:SCALE]", help="the image for the "
                        "IP-Adapter, and its weight (default: 1); can be repeated. Several IP-Adapters need one image "
                        "each")


def _picture(text: str) -> str:
    where, scale = split(text)
    if not where:
        raise argparse.ArgumentTypeError(f"{text!r} is not a PICTURE[:SCALE]")
    if where != text and Path(text).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is the whole name of a picture: add a scale, {text}:1")
    return f"{where}:{scale:g}"


def split(text: str) -> tuple[str, float]:
    """(PICTURE, SCALE) from PICTURE[:SCALE]. The scale begins after the last colon, if a number follows it."""
    found = re.fullmatch(r"(.*):([-+]?(?:\d+\.?\d*|\.\d+))", text, re.DOTALL)
    return (text, 1.0) if found is None else (found[1], float(found[2]))


def check(args: argparse.Namespace) -> None:
    """End with a usage error if one option is given without the other, or if their numbers do not fit."""
    adapters, images = getattr(args, "ip_adapter", []), getattr(args, "image", [])
    if adapters and not images:
        args.usage_error("--ip-adapter needs a picture: give --image PICTURE")
    if images and not adapters:
        args.usage_error("--image needs an IP-Adapter: give --ip-adapter FILE")
    if len(adapters) > 1 and len(images) != len(adapters):
        args.usage_error(f"{len(images)} --image for {len(adapters)} --ip-adapter: give one for each")
    if len(adapters) == 1 and len({split(image)[1] for image in images}) > 1:
        args.usage_error("--image: the pictures of one --ip-adapter have different scales; give all of them the same")


def load(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Load the adapters into the pipeline; returns the argument of its call. `settings` gets absolute paths."""
    if "ip_adapter" not in settings:
        return {}
    from ..adapters import ip_adapter
    from ..files.video import load_image

    names = settings["ip_adapter"]
    where, scales = zip(*map(split, settings["image"]), strict=True)
    images = [load_image(path) for path in where]
    say(f"loading {' and '.join(names)}")
    try:
        files = [Path(ip_adapter.find(name, None, None).label) for name in names]
        pipe.load_ip_adapter(list(names))
        pipe.set_ip_adapter_scale(list(scales[: len(names)]))
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"--ip-adapter: {one_line(error)}") from error
    settings["ip_adapter"] = [_found_again(name) for name in names]
    settings["image"] = [f"{_found_again(path)}:{scale:g}" for path, scale in zip(where, scales, strict=True)]
    settings["ip_adapter_sha256"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    settings["image_sha256"] = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return {"ip_adapter_image": [images] if len(names) == 1 else images}


def _found_again(name: str) -> str:
    """An absolute path, which is valid in every folder. A URL or a name on the hub stays as it is."""
    return os.path.abspath(name) if Path(name).exists() else name


def digests(stored: Mapping[str, Any]) -> dict[str, str]:
    """{adapter or picture: SHA-256} from a video's settings. For a picture it is the SHA-256 of its pixels."""
    found: dict[str, str] = {}
    for name in OPTIONS:
        what, sums = stored.get(name), stored.get(f"{name}_sha256")
        if isinstance(what, list) and isinstance(sums, list):
            found |= zip(map(str, what), map(str, sums), strict=False)
    return found


def say_changes(settings: Mapping[str, Any], before: Mapping[str, str]) -> None:
    """Warn about files that have changed since the video was made."""
    for what, now in digests(settings).items():
        if before.get(what, now) != now:
            say(f"warning: {what} has changed since the video was made, so the new video may differ")
