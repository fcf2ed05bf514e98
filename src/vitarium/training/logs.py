"""Log files of a run: log.csv, evaluations.jsonl, and what its loggers write."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitarium.data.bad_files import BadFiles
from vitarium.files import write_text
from vitarium.training.boards import Boards
from vitarium.training.recipe import Recipe

log = logging.getLogger("vitarium")


class Meters:
    """Means of logged scalars since the last line, accumulated on the device without synchronisation.

    Args:
        saved: value of `state` in the checkpoint of a resumed run; the next line then equals that of an uninterrupted run.
    """

    def __init__(self, saved: dict[str, Any], device: torch.device):
        self.sums: dict[str, Tensor] = {name: total.to(device) for name, total in saved.get("sums", {}).items()}
        # checkpoints from before there were several players have one count for all
        self.counts: dict[str, int] = saved.get("counts") or dict.fromkeys(self.sums, saved.get("count", 0))

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's scalars; each name is averaged over the steps that have it."""
        for name, value in values.items():
            known = self.sums.get(name)
            self.sums[name] = value.detach().clone() if known is None else known.add_(value.detach())
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Return the means and start over. Empty without a counted step."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means

    def state(self) -> dict[str, Any]:
        """Return plain values and tensors for `saved`."""
        return {"sums": dict(self.sums), "counts": dict(self.counts)}


class Logs:
    """Log files of one run, in the first process. A log that cannot be written (a full disk) does not stop the training.

    On resuming, lines after the checkpoint are dropped, because these steps are repeated.

    Args:
        folder: of the run.
        step: at which the run resumes.
        recipe: names the loggers that are used beside the files (see `vitarium.training.boards`).
    """

    def __init__(self, folder: Path, step: int, recipe: Recipe):
        self.path = folder / "log.csv"
        self.evaluations = folder / "evaluations.jsonl"
        self.columns: list[str] = []
        kept = self._kept_rows(step) if step and self.path.exists() else []
        if kept:
            write_text(self.path, _csv_text(self.columns, kept, header=True))
        else:
            self.columns = []
            self.path.unlink(missing_ok=True)
        self.boards = Boards(folder, step, recipe)

    def _kept_rows(self, step: int) -> list[dict[str, Any]]:
        with open(self.path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            self.columns = list(reader.fieldnames or [])
            # a power cut may leave half a line
            return [row for row in reader if None not in row.values() and (row.get("step") or "").isdigit() and int(row["step"]) <= step]

    def line(self, row: dict[str, Any]) -> None:
        """Append a line to log.csv. A new name gets a new column."""
        header = not self.columns
        new = [] if header else [name for name in row if name not in self.columns]
        with self._forgiven(self.path):
            if new:
                with open(self.path, encoding="utf-8", newline="") as file:
                    rows: list[dict[str, Any]] = list(csv.DictReader(file))
                write_text(self.path, _csv_text([*self.columns, *new], rows, header=True))
            self.columns = [*self.columns, *new] if not header else list(row)
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                file.write(_csv_text(self.columns, [row], header=header))
        self._plot("train", row)

    def evaluation(self, history: list[dict[str, Any]]) -> None:
        """Rewrite evaluations.jsonl, one object per evaluation."""
        with self._forgiven(self.evaluations):
            write_text(self.evaluations, "".join(json.dumps(entry) + "\n" for entry in history))
        self._plot("val", history[-1])

    def bad_files(self, bad: BadFiles) -> None:
        """Rewrite bad_files.txt."""
        with self._forgiven(self.path.with_name("bad_files.txt")):
            bad.write(self.path.parent)

    def _plot(self, group: str, values: dict[str, Any]) -> None:
        numbers = {
            f"{group}/{name}": value for name, value in values.items() if name not in ("step", "epoch") and isinstance(value, int | float)
        }
        self.boards.add(numbers, values["step"])

    @contextlib.contextmanager
    def _forgiven(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("cannot write %s (%s); training continues", path, error.strerror or error)

    def close(self) -> None:
        """Close the loggers."""
        self.boards.close()


def _csv_text(columns: list[str], rows: list[dict[str, Any]], *, header: bool) -> str:
    lines = [",".join(columns)] if header else []
    for row in rows:
        lines.append(",".join(f"{value:.7g}" if isinstance(value := row.get(column, ""), float) else str(value) for column in columns))
    return "\n".join(lines) + "\n"
