"""How the command begins and ends cleanly: Ctrl-C during imports, closed streams, settings of a single call.

This module imports very little, and not torch. So it is ready before anything can be interrupted.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OURS = ("MINIT2V_KERNELS", "TRITON_INTERPRET")  # options set these variables for modules that are imported later


def _end(number: int, frame: Any) -> None:
    os.write(2, b"minit2v: interrupted; nothing half-written is left\n")
    os._exit(130)


@contextmanager
def importing() -> Iterator[None]:
    """Ctrl-C ends the process at once. Nothing is written yet, and an interrupted import can raise any exception."""
    ours = (threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)  # false if nohup ignores Ctrl-C
    if ours:
        signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def settings_of_a_call() -> Iterator[None]:
    """Restore the environment variables that a command has set."""
    before = {name: os.environ.get(name) for name in OURS}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def open_closed_streams() -> None:
    """Connect standard streams that the caller has closed to the null device.

    Otherwise the next opened file would get the number of a closed stream, and error messages would go into it.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
