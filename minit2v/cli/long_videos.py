"""Options for videos that are longer than a model's number of frames: windows, FreeNoise, texts for single frames."""

import argparse
import json
import re
from typing import Any

WINDOW = 16  # frames, if --loop or --window-overlap is given without --window
# `prompt_at` is not in this list, because its value is not a single word.
OPTIONS = ("window", "window_overlap", "loop", "free_noise", "prompt_interpolation", "prompt_weights")


class TextAt(argparse.Action):
    """`--prompt-at 24 "a blue square"`, given several times: {24: "a blue square", ...}."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: str | None = None) -> None:
        frame, text = values
        if not re.fullmatch(r"\d+", frame):
            parser.error(f"argument {option}: the frame must be a whole number from 0, not {frame!r}")
        found = dict(getattr(namespace, self.dest, {}))
        if int(frame) in found:
            parser.error(f"argument {option}: frame {int(frame)} already has the text {found[int(frame)]!r}")
        setattr(namespace, self.dest, found | {int(frame): text})


def add_options(sub: argparse.ArgumentParser, whole: Any) -> None:
    """whole: the parser of positive whole numbers."""
    sub.add_argument("--window", type=whole, metavar="N",
                     help="make long videos: the model sees N frames at a time (16 fits most models)")
    sub.add_argument("--window-overlap", type=whole, metavar="N",
                     help="number of frames that two windows share (default: 4)")
    sub.add_argument("--loop", action=argparse.BooleanOptionalAction,
                     help="make a loop, whose last frame leads back to the first")
    sub.add_argument("--free-noise", action=argparse.BooleanOptionalAction,
                     help="repeat the noise of the first window, so that all windows look alike (FreeNoise)")
    sub.add_argument("--prompt-at", nargs=2, action=TextAt, metavar=("FRAME", "TEXT"),
                     help="use another text from this frame on; the frames before change smoothly towards it; can be "
                     "repeated")
    sub.add_argument("--prompt-interpolation", choices=("linear", "spherical"),
                     help="how to go from one text to the next (default: linear)")
    sub.add_argument("--prompt-weights", action=argparse.BooleanOptionalAction,
                     help="read (word:1.3), [word] and BREAK in prompts, and long prompts, as A1111 does")


def prompt_of(line: str) -> tuple[str, dict[int, str]]:
    """A line of a file of prompts -> the first text, and {frame: text} of the later ones.

    A line is a text, or JSON {"0": text, "24": text}. ValueError if a line begins like JSON, with `{"`, but is not
    such an object.
    """
    if not line.startswith('{"'):
        return line, {}
    try:
        texts = read_texts(json.loads(line))
    except ValueError as e:
        example = '{"0": "a cat", "24": "a dog"}'
        raise ValueError(f'{line:.60}: a line that begins with {{" must be JSON such as {example} ({e})') from None
    first = min(texts)
    return texts[first], {k: v for k, v in texts.items() if k}


def read_texts(stored: Any) -> dict[int, str]:
    """{"24": text} from JSON -> {24: text}. ValueError if it is something else."""
    if not isinstance(stored, dict) or not stored:
        raise ValueError("it is not an object with texts")
    for frame, text in stored.items():
        if not re.fullmatch(r"\d{1,9}", frame) or not isinstance(text, str):
            raise ValueError(f"{frame!r}: {text!r:.40} is not a frame with its text")
    return {int(frame): text for frame, text in stored.items()}


def texts_of(prompt: str, at: dict[int, str]) -> Any:
    """The `prompt` argument of a pipeline."""
    return {0: prompt} | at if at else prompt


def is_long(settings: dict[str, Any]) -> bool:
    """Whether a video may have more frames than the model sees at a time."""
    return any(settings.get(name) for name in ("window", "window_overlap", "loop", "free_noise"))


def put_into(pipe: Any, settings: dict[str, Any]) -> None:
    """Enable the techniques of the settings. ValueError, with the name of the option, if a value does not fit."""
    if settings.get("prompt_weights"):
        pipe.prompt_weights = "a1111"
    most = getattr(pipe.unet.config, "motion_max_seq_length", None)
    length = settings.get("window") or min(WINDOW, most or WINDOW)
    if most is not None and length > most:
        raise ValueError(f"--window {length}: the motion adapter has position encodings for {most} frames only")
    if settings.get("free_noise"):
        pipe.enable_free_noise(length, max(1, length // 4))
    if any(settings.get(name) for name in ("window", "window_overlap", "loop")):
        overlap = settings.get("window_overlap", min(4, length - 1))
        if overlap >= length:
            raise ValueError(f"--window-overlap {overlap} must be less than --window {length}")
        pipe.enable_context_windows(length, overlap=overlap, loop=bool(settings.get("loop")))


def summary(settings: dict[str, Any]) -> list[str]:
    parts = [f"window {settings['window']}"] if settings.get("window") else []
    words = {"loop": "loop", "free_noise": "FreeNoise", "prompt_weights": "weighted words"}
    return parts + [word for name, word in words.items() if settings.get(name)]
