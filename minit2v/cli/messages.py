"""The doors through which text leaves the command. What may be of a file (names, metadata, errors) is escaped here, and
nowhere else: `say` on stderr, one line for each thing; `tell` on stdout."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from minit2v_convert.rename import shown

LONGEST = 2000  # characters of a line: what a file says can be of any length


def process() -> tuple[int, int]:
    """(number of this process from 0, how many there are), as torchrun says it; (0, 1) where it has not started us."""
    found = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    return (int(found[0]), int(found[1])) if all(map(str.isdecimal, found)) else (0, 1)


def say(text: str) -> None:
    """A line on stderr. Of several processes each says which one it is."""
    rank, size = process()
    write(sys.stderr, f"minit2v{f' {rank + 1}/{size}' if size > 1 else ''}: {clean(text)}\n")


def tell(*lines: str) -> None:
    """Lines on stdout."""
    write(sys.stdout, "".join(f"{shown(line)}\n" for line in lines))


def tell_path(path: str | os.PathLike) -> None:
    """A path on stdout: at a terminal escaped, else byte for byte, as a script needs it."""
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
    """Escaped, and cut where it is longer than anybody reads."""
    text = shown(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def write(stream: TextIO, text: str) -> None:
    """Whatever the stream's encoding is: what it lacks is escaped. Nobody reads any more: that is no error."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        _lead_nowhere(stream)
    except OSError:
        if stream is not sys.stderr:  # a full disk; on stderr nobody could be told
            raise


class Progress:
    """stderr for progress bars: where it takes no more (a full disk), the work goes on."""

    def write(self, text: str) -> None:
        write(sys.stderr, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


class Lines:
    """stderr for the progress bars of several processes: a whole line each time, as bars would overwrite each other."""

    # For tqdm: the first after so many seconds, and then as seldom.
    config = {"delay": 30, "mininterval": 30, "bar_format": "{desc}step {n_fmt} of {total_fmt}, {remaining} left"}

    def write(self, text: str) -> None:
        if text.strip():
            say(text.strip())

    def flush(self) -> None: ...


def _lead_nowhere(stream: TextIO) -> None:
    """So that Python does not fail on it once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def one_line(e: BaseException) -> str:
    """What an error says, in one line."""
    if isinstance(e, OSError) and e.strerror:
        return f"{e.filename}: {e.strerror}" if e.filename else e.strerror
    if type(e).__name__ == "OutOfMemoryError" and not str(e).startswith("out of memory"):
        return f"out of memory: fewer frames, a smaller size or --dtype float16 need less ({str(e).split('.')[0]})"
    text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
    return " ".join(text.split()) or type(e).__name__


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return clean(" ".join(super().format(record).split()))


@contextmanager
def said_in_one_line() -> Iterator[None]:
    """Warnings and the package's log messages as single lines, each once."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())  # the tokenizer quotes what it cuts off, and a prompt can be a book
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
