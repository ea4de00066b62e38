"""What the command says on stderr: one line for each thing."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def say(text: str) -> None:
    """A line on stderr."""
    text = text.encode("utf-8", "backslashreplace").decode()  # an argument that is not UTF-8 can be quoted, too
    print(f"minit2v: {text}", file=sys.stderr, flush=True)


def one_line(e: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    if type(e).__name__ == "OutOfMemoryError":
        return f"out of memory: fewer frames, a smaller size or --dtype float16 need less ({str(e).split('.')[0]})"
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return " ".join(text.split()) or type(e).__name__


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """Warnings and the package's log messages as single lines, each once."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())  # the tokenizer quotes what it cuts off, and a prompt can be a book
        say(f"warning: {text if len(text) <= 300 else text[:297] + '...'}")

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
