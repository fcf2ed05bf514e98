"""Checkpoints of a run: one file, written atomically, with a hash and the identity of its run.

`last.ckpt` is a plain torch file (readable with `torch.load(..., weights_only=True)`) followed by one line with its SHA-256. The old file
stays until the new one is complete; one of them survives a kill at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitarium.errors import CheckpointError, UsageError
from vitarium.files import atomic_path
from vitarium.training.players import ONLY
from vitarium.training.recipe import Recipe
from vitarium.training.settings import check

LAST = "last.ckpt"
_MARK = b"\nvitarium sha256 "
_TRAILER_BYTES = len(_MARK) + 64 + 1


@dataclass
class RunState:
    """State of a run as plain values, without the tensors of the model and the optimizer.

    Args:
        identity: recipe, data, model and number of processes (see `identity_of`).
        total_steps: optimizer steps of the whole training.
        step: steps done.
        evaluated: the step that was evaluated last, -1 for none.
        seconds: spent in training steps so far, over all sessions.
        best: the best value of the learner's primary metric so far.
        history: one entry per evaluation.
        skips: turns skipped because a loss or gradient was not finite, by player; the last `in_a_row` of them are consecutive.
        bad_files: (path, reason) of images that could not be read.
        finished: whether all steps are done and evaluated.
    """

    identity: dict[str, Any]
    total_steps: int
    step: int = 0
    evaluated: int = -1
    seconds: float = 0.0
    best: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)
    in_a_row: dict[str, int] = field(default_factory=dict)
    bad_files: list[tuple[str, str]] = field(default_factory=list)
    meters: dict[str, Any] = field(default_factory=dict)
    finished: bool = False

    @property
    def skipped(self) -> int:
        """Number of skipped turns of all players."""
        return sum(self.skips.values())


def save_run(path: Path, state: RunState, tensors: dict[str, Any]) -> None:
    """Write a run's state.

    Args:
        tensors: "learner" -> a state dict; "optimizers", "averages" -> state dicts by player.

    Raises:
        WriteError: no space, no permission, read-only disk; the old file is intact and no temporary file remains.
    """
    with atomic_path(path) as temporary:
        torch.save({"run": asdict(state), **tensors}, temporary)
        with open(temporary, "rb+") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0, os.SEEK_END)
            file.write(_MARK + digest.encode() + b"\n")


def load_run(path: Path) -> tuple[RunState, dict[str, Any]]:
    """Read a checkpoint that `save_run` wrote, on the CPU.

    Raises:
        CheckpointError: truncated, changed, or not such a file.
    """
    size = path.stat().st_size
    advice = "delete it to start again, or restore a copy"
    with open(path, "rb") as file:
        file.seek(max(0, size - _TRAILER_BYTES))
        trailer = file.read()
        if not trailer.startswith(_MARK) or len(trailer) != _TRAILER_BYTES:
            raise CheckpointError(f"{path} is cut off or is not a run of Vitarium ({size:,} bytes without the closing line); {advice}")
        expected = trailer[len(_MARK) : -1].decode("ascii", "replace")
        found = _digest_of_first(file, size - _TRAILER_BYTES)
    if found != expected:
        raise CheckpointError(
            f"{path} was changed after it was written: expected SHA-256 {expected[:16]}..., got {found[:16]}...; {advice}"
        )
    try:
        content = _converted(torch.load(path, map_location="cpu", weights_only=True))
        return RunState(**content.pop("run")), content
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read ({first}); it may come from another version: {advice}") from error


def _converted(content: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a checkpoint to the present format.

    In version 0.1.0 a run had one optimizer, one moving average and one count of skipped steps, and its recipe may have keys that were
    moved since.
    """
    run = content["run"]
    if isinstance(skipped := run.pop("skipped", None), int):
        run["skips"], run["in_a_row"] = {ONLY: skipped}, {ONLY: run["in_a_row"]}
        content["averages"] = {ONLY: content.pop("ema")} if "ema" in content else {}
        if "optimizer" in content:
            content["optimizers"] = {ONLY: content.pop("optimizer")}
        with contextlib.suppress(UsageError):  # an unreadable one differs from all others; the error lists the differences
            run["identity"]["recipe"] = check(Recipe, run["identity"]["recipe"], "the recipe of the checkpoint").identity()
    return content


def _digest_of_first(file: Any, count: int) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while count > 0 and (block := file.read(min(count, 2**20))):
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()
