"""A time limit on a piece of work in this process, such as torch.compile, which has none of its own."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Overdue(BaseException):
    """Raised in work that exceeds its limit; no `except Exception` of a compiler stops it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the work inside after some seconds of wall time.

    It needs a timer signal of POSIX and the main thread; elsewhere (Windows, a thread of a server) there is no limit.

    Args:
        seconds: above 0.

    Raises:
        TimeoutError: the work was interrupted.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: Any) -> None:
        raise Overdue

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again each second, in case a destructor swallows the first
            yield
        finally:  # inside, so that an interrupt at the very end is handled, too
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Overdue:
        raise TimeoutError(f"not finished within {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
