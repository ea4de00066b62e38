"""Ending a run by Ctrl-C or SIGTERM after the step in hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ending() -> Iterator[list[int]]:
    """A list into which the first SIGTERM or Ctrl-C goes, for the run to end by itself; a second one ends it now."""
    came: list[int] = []
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        came.append(number)
        for n, handler in before.items():
            signal.signal(n, handler)

    if threading.current_thread() is threading.main_thread():
        before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        for n, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(n, note)
    try:
        yield came
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
