"""All text that the command prints: `say` writes a line to stderr, `tell` writes results to stdout.

Names, metadata and errors may come from a file. They are escaped here, and nowhere else.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from minit2v_convert.rename import shown

LONGEST = 2000  # characters in a line, because a text from a file can be very long


def process() -> tuple[int, int]:
    """(number of this process from 0, number of processes), from torchrun's variables; (0, 1) without torchrun."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return (int(found[0]), int(found[1])) if all(map(str.isdecimal, found)) else (0, 1)


def say(text: str) -> None:
    """Print a line to stderr. If there are several processes, the line begins with this one's number."""
    rank, size = process()
    write(sys.stderr, f"minit2v{f' {rank + 1}/{size}' if size > 1 else ''}: {clean(text)}\n")


def tell(*lines: str) -> None:
    """Print lines to stdout."""
    write(sys.stdout, "".join(f"{shown(line)}\n" for line in lines))


def tell_path(path: str | os.PathLike) -> None:
    """Print a path to stdout: escaped for a terminal, byte for byte for a script."""
    text = os.fspath(path)
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        return tell(text)
    sys.stdout.flush()
    try:
        sys.stdout.buffer.write(os.fsencode(text) + os.linesep.encode())
        sys.stdout.flush()
    except BrokenPipeError:
        _lead_nowhere(sys.stdout)


def clean(text: str) -> str:
    """The text escaped, and cut after `LONGEST` characters."""
    text = shown(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def write(stream: TextIO, text: str) -> None:
    """Write to a stream. Characters that its encoding lacks are escaped. A reader that has gone away is no error."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _lead_nowhere(stream)
    except OSError:
        if stream is not sys.stderr:  # the disk is full; if stderr itself fails, nothing can be reported
            raise


class Progress:
    """stderr for progress bars. If it cannot be written (the disk is full), the work continues."""

    def write(self, text: str) -> None:
        write(sys.stderr, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class Lines:
    """stderr for the progress of several processes: whole lines, because bars would overwrite each other."""

    # Settings of tqdm: a line every 30 seconds.
    config = {"delay": 30, "mininterval": 30, "bar_format": "{desc}step {n_fmt} of {total_fmt}, {remaining} left"}

    def write(self, text: str) -> None:
        if text.strip():
            say(text.strip())

    def flush(self) -> None: ...


def _lead_nowhere(stream: TextIO) -> None:
    """Connect the stream to the null device, so that Python does not fail again when it closes the stream."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def one_line(e: BaseException) -> str:
    """The message of an error, in one line."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    if type(e).__name__ == "OutOfMemoryError" and not str(e).startswith("out of memory"):
        return f"out of memory: try fewer frames, a smaller size or --dtype float16 ({str(e).split('.')[0]})"
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return " ".join(text.split()) or type(e).__name__


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean(" ".join(super().format(record).split()))


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """Print each warning and log message of the package as one line, once."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())  # it can be long: the tokenizer quotes the text that it cuts off
        say(f"warning: {text if len(text) <= 300 else text[:297] + '...'}")

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaped("minit2v: warning: %(message)s"))
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
