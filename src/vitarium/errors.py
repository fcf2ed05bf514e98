"""Errors that a user can cause, one class per kind with its exit code. Messages state the fault, the accepted values and a remedy.

| exit code | kind |
|---|---|
| 2 | usage or configuration (`UsageError` and its kinds, `InputError`, `MissingExtra`), a file that cannot be written (`WriteError`) |
| 3 | data (`DataError`) |
| 4 | checkpoint (`CheckpointError`) |
| 5 | training stopped for cause (`TrainingStopped`) |
| 130 | interrupted |
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class VitariumError(Exception):
    """Base of all errors; the command line prints the message without a traceback and exits with `exit_code`."""

    exit_code = 1


class UsageError(VitariumError, ValueError):
    """An option, a name or a configuration that cannot be used."""

    exit_code = 2


class InputError(VitariumError, ValueError):
    """A tensor that a model does not accept: wrong rank, channels, dtype, layout or size."""

    exit_code = 2


class UnsupportedModel(UsageError, TypeError):
    """A model that `anatomy` does not support because of its class or one of its parts, which the message names."""


class AttachError(UsageError):
    """A method found no module to change, or its neutral form changed the model's outputs; the model is unchanged."""


class WriteError(VitariumError, OSError):
    """A file that cannot be written: the disk is full or read-only, or a permission is missing. `vitarium.files.write_error` makes it.

    Args:
        message: names the file, the reason, and what to do.
        code: the system's number of the error, kept in `errno`; None: not known.
        reason: kept in `strerror`.

    Attributes:
        result: what had been computed for the file, which the command line then prints; None: nothing.
    """

    exit_code = 2

    def __init__(self, message: str, code: int | None = None, reason: str = ""):
        super().__init__(message)
        self.errno, self.strerror = code, reason
        self.result: Any = None

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.errno, self.strerror)


class MissingExtra(VitariumError, ImportError):
    """An optional package is not installed; the message has the command that installs it."""

    exit_code = 2


class DataError(VitariumError, ValueError):
    """Data that cannot be used: empty, one class, too many broken images, foreign layout."""

    exit_code = 3


class CheckpointError(VitariumError, ValueError):
    """A weights file that is truncated, changed, unsafe or of another model."""

    exit_code = 4


class TrainingStopped(VitariumError, RuntimeError):
    """Training stopped because of an error, such as losses that are not finite or a full disk at the last save."""

    exit_code = 5


class NotSaved(TrainingStopped):
    """The last checkpoint of a training cannot be written, as on a full disk.

    Attributes:
        result: the `FitResult` if the training is over, so that the learner has the final weights; None: it is not over, or the weights are
            in other processes.
        reason: message of the checkpoint's `WriteError`.
    """

    result: Any = None
    reason = ""


SHORT = 3
"""Characters up to which a name is looked for at the beginning of a part only, in `nearest`."""


def nearest(name: str, names: Iterable[str], *, count: int = 3) -> str:
    """Return '; did you mean a, b?' for a misspelt name, or '' if no name is similar, as the end of an error message.

    Similar are names of mostly the same letters, else those that contain it: at the beginning of a part ("run" not in "sparse_prune") if
    it is short.
    """
    names = list(dict.fromkeys(names))
    near = difflib.get_close_matches(name, names, n=count, cutoff=0.5)
    if not difflib.get_close_matches(name, near, n=1, cutoff=0.6):  # "hornet" has half of the letters of "photos"
        begin = "" if len(name) > SHORT else r"(?:^|[\W_])"
        near = [n for n in names if name and re.search(begin + re.escape(name), n, re.IGNORECASE)][:count]
    return f"; did you mean {', '.join(near)}?" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: name to import, such as "onnxruntime".
        extra: the extra of this project that installs it, such as "export".

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise MissingExtra(f"{package} is not installed ({error}); install it with: pip install 'vitarium[{extra}]'") from error
