"""Ending a run by Ctrl-C or SIGTERM after the step in hand."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def ending() -> Iterator[list[int]]:
    """Gives a list that gets the number of the first SIGTERM or Ctrl-C. A second signal ends the program at once.

    The run looks at the list after each step. In other threads than the main one the list stays empty.
    """
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
