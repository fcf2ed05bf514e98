"""Requests to stop (Ctrl-C, or SIGTERM from a scheduler), which are recorded and take effect between two steps."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from types import FrameType
from typing import Any

log = logging.getLogger("vitarium")


class StopSignals:
    """Context in which the first SIGINT or SIGTERM sets `requested`; a second Ctrl-C interrupts at once.

    A request that came too late for the steps inside, such as during the last save, takes effect at the end of the context.

    Args:
        announce: message that is logged at once with the first request; "" for none.

    Raises:
        KeyboardInterrupt: at the end, if a request came and nothing was raised inside.
    """

    def __init__(self, announce: str = "") -> None:
        self.requested, self.announce = False, announce
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if kind is None and self.requested:
            raise KeyboardInterrupt("interrupted after the last step; the same command finishes the run")

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.announce and not self.requested:
            with contextlib.suppress(RuntimeError):  # the signal came while another line was being written
                log.warning("%s", self.announce)
        self.requested = True
