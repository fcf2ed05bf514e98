"""SIGINT (Ctrl-C) and SIGTERM (schedulers) end every command alike: it cleans up, and exits with code 130 and a message.

Both raise KeyboardInterrupt in the main thread. There are two exceptions. During an import Python would leave a module half initialised, or
swallow the exception in compiled code and continue with it, so the process ends at once; nothing is written meanwhile that is not written
atomically. Once the result is complete, or the message is being printed, a signal changes nothing (the first one) or ends the process at
once (further ones).

While a model is trained, `vitarium.training.signals` takes over: it saves first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

CODE = 130
MESSAGE = "interrupted"
SHOW_CURSOR = "\x1b[?25h"
NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Handle both signals inside, and end the process with code 130 if one came before or after the command's own handling.

    Afterwards they are ignored, because Python restores the default actions while it exits: they would end a complete command with
    another exit code.
    """
    _handle(_interrupt)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        settle()
        print(str(interrupt) or MESSAGE, file=sys.stderr)
        sys.exit(CODE)
    finally:
        _handle(signal.SIG_IGN)


def settle() -> None:
    """Let the process finish what it prints: the next signal is ignored, and further ones end it at once.

    Outside `interruptible` nothing changes: there the signals belong to the calling program.
    """
    if signal.getsignal(signal.SIGTERM) is _interrupt:
        _handle(_last)


def _handle(handler: object) -> None:
    for number in NUMBERS:
        signal.signal(number, handler)  # type: ignore[arg-type]


def _interrupt(_number: int, frame: FrameType | None) -> None:
    if _importing(frame):
        _end()
    raise KeyboardInterrupt


def _last(_number: int, _frame: FrameType | None) -> None:
    _handle(lambda *_: _end())


def _importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported at this point of the program."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _end() -> None:
    """End the process without further code of Python; its children notice that their pipes close."""
    with contextlib.suppress(OSError):
        os.write(2, f"{SHOW_CURSOR if os.isatty(2) else ''}{MESSAGE}\n".encode())
    os._exit(CODE)
