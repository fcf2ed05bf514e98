"""Predict for images with a trained model."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.engine import Engine, as_engine, map_images
from vitarium.engine.images import PART_BATCHES
from vitarium.errors import DataError, UsageError
from vitarium.files import check_output, is_model_file, save_image
from vitarium.pages.tables import TableData
from vitarium.texts import printable
from vitarium.verbs.opening import Notify, apply_methods, execute, find_images, name_of, open_model, quiet
from vitarium.verbs.result import Result, kept

if TYPE_CHECKING:
    from torch import nn

    from vitarium.catalog.answers import Form
    from vitarium.training.tasks.base import Task

ENDINGS, ANSWERS = (".csv", ".json"), "answers.json"
FIRST, SHORT = 3, 30
"""Answers in the text of a result, and the largest number of characters of a name and of an answer there."""


@dataclass(repr=False)
class Predictions(Result):
    """Predictions for images.

    Attributes:
        model: file or name.
        rows: one per image, in the order of the files: {"image", ...answer}, or {"image", "error"}. "drawing" is the file of a drawn
            answer.
        task: the model's task; for answers that were made without PyTorch, the form of its answers.
    """

    model: str
    rows: list[dict[str, Any]]
    task: Task | Form = field(repr=False)
    facts_beside_tables = False

    @property
    def broken(self) -> list[dict[str, Any]]:
        """The rows of images that could not be read."""
        return [row for row in self.rows if "error" in row]

    def facts(self) -> dict[str, Any]:
        shown = "; ".join(f"{Path(row['image']).name[-SHORT:]}: {self._text(row)}" for row in self.rows[:FIRST])
        more = len(self.rows) - FIRST
        answers = f"{shown}; and {more} more" if more > 0 else shown
        return {"model": self.model, "images": len(self.rows), "not readable": len(self.broken), "answers": answers}

    def _text(self, row: dict[str, Any]) -> str:
        """Return the beginning of an answer: the label and its probability, of a classifier."""
        if "error" in row:
            return "not readable"
        return " ".join(list(self.task.cells(answer_of(row)).values())[:2])[:SHORT]

    def tables(self) -> list[TableData]:
        return [answer_table(self.rows, self.task)]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "task": self.task.name, "images": self.rows}


def predict(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | nn.Module,
    *,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    device: str = "auto",
    runtime: str = "eager",
    output: str | os.PathLike[str] | None = None,
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    notify: Notify = quiet,
) -> Predictions:
    """Predict for images by the model's task: labels, segments, a restored image, an embedding, ...

    An unreadable image has a row with its error.

    Args:
        images: files and folders; folders are searched at any depth.
        model: a file of `vitarium.save`, a model's name, or a model. A model with `apply` is changed.
        checkpoint: weights for a name.
        apply: methods to apply first, as "evit:keep=0.7".
        top_k: length of ranked answers.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        output: a .csv or .json file, or a folder for answers.json and a drawing of each answer that can be drawn. An interrupted call with
            many images and an output resumes.
        engine: where the model runs: "local"; "ray", a Ray cluster, which chooses the device; or a `vitarium.engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: processes that hold the model.
        notify: called with messages about progress.

    Raises:
        UsageError: a task that has no answer for one image, a head that was never trained, an output of another ending, or one that would
            replace a file of others.
        WriteError: the output cannot be written; `error.result` is what would be returned.
        DataError: a folder without images, or no image could be read.
        CheckpointError: weights that are not available.
        MissingExtra: engine="ray" without Ray.
    """
    from vitarium.efficiency.runtimes import GRAPHS, check_runtime
    from vitarium.verbs.light import predict as predict_light

    check_runtime(runtime)
    path = None if output is None else Path(output)
    if path is not None and path.suffix and path.suffix not in ENDINGS:
        raise UsageError(f"--output must end in {' or '.join(ENDINGS)}, or be a folder; got {path}")
    check_output(path if path is None or path.suffix else path / ANSWERS)
    files = find_images(images, path, notify)
    where = as_engine(engine, address=address, jobs=jobs)
    few = path is None or len(files) <= batch_size * PART_BATCHES  # longer lists can be resumed
    plain = checkpoint is None and not apply and where.kind == "local" and where.in_process and device in ("auto", "cpu")
    found = None
    if runtime in GRAPHS and is_model_file(model) and few and plain:
        assert isinstance(model, str | os.PathLike)
        found = predict_light(files, model, runtime, limit=top_k, batch_size=batch_size, notify=notify)
    rows, task = found or _answers(files, model, checkpoint, apply, top_k, batch_size, device, runtime, path, where, notify)
    result = Predictions(name_of(model), rows, task)
    if len(result.broken) == len(rows):
        raise DataError("no image could be read:\n" + "\n".join(f"  {row['image']}: {row['error']}" for row in rows[:10]))
    if path is not None:
        with kept(result):
            write(rows, task, path)
    return result


def _answers(
    files: list[str],
    model: str | os.PathLike[str] | nn.Module,
    checkpoint: str | None,
    apply: Sequence[Any] | None,
    top_k: int,
    batch_size: int,
    device: str,
    runtime: str,
    path: Path | None,
    where: Engine,
    notify: Notify,
) -> tuple[list[dict[str, Any]], Task]:
    """Return the rows of `Predictions` and the model's task. Arguments as for `predict`, `path` its output and `where` its engine."""
    from vitarium.catalog.heads import require_head
    from vitarium.perception.retrieval.index import model_fingerprint, stamp_of
    from vitarium.training.tasks import task_of

    opened = open_model(model, checkpoint)
    require_head(opened)
    task = task_of(opened)
    if task.result_kind is None:
        raise UsageError(task.refusal())
    apply_methods(opened, apply, None, notify)
    opened = execute(opened, runtime, device=device, engine=where, task=task, source=None if apply else model, notify=notify)
    folder = path.absolute() if path is not None and not path.suffix else None
    size = batch_size * PART_BATCHES
    given: dict[str, Any] = {}
    if path is not None and len(files) > size:
        given["parts"] = path.with_name(f"{path.name}.parts")
        methods = [repr(method) for method in apply or []]
        about = {"task": task.record(), "top_k": top_k, "methods": methods, "folder": str(folder), "batch_size": batch_size}
        about |= {} if runtime == "eager" else {"runtime": runtime}
        given["identity"] = {"weights": model_fingerprint(opened), **about}
    answers = map_images(
        _answer_part,
        [(number, file, *stamp_of(file)) for number, file in enumerate(files)],
        shared=(opened, task, top_k, batch_size, folder),
        part_size=size,
        engine=where,
        progress=lambda done, total: notify(f"Looking at images: {done} of {total}"),
        **given,
    )
    return [row for part in answers for row in part], task


def _answer_part(
    items: Sequence[tuple[int, str, int, int]], model: nn.Module, task: Task, limit: int, batch_size: int, folder: Path | None
) -> list[dict[str, Any]]:
    """Predict for the files of a part: items are (number, file, size, time of change)."""
    files = [file for _, file, *_ in items]
    return answer_files(task, model, files, limit=limit, batch_size=batch_size, folder=folder, first=items[0][0])


def answer_files(
    task: Task, model: nn.Module, files: list[str], *, limit: int = 5, batch_size: int = 32, folder: Path | None = None, first: int = 0
) -> list[dict[str, Any]]:
    """Return {"image", ...answer} for each file, or {"image", "error"}; in the order of the files.

    Args:
        task: of the model.
        model: in eval mode, on its device.
        files: images.
        limit: length of ranked answers.
        batch_size: images per forward pass.
        folder: for drawings of answers, as NUMBER-NAME.png; None: none.
        first: number of the first file in the names of drawings.
    """
    from vitarium.data.folders import FileImages
    from vitarium.training.answering import answers_of, shown

    images = FileImages(files, [0] * len(files))
    rows: list[dict[str, Any]] = [{"image": file} for file in files]
    for index, answer in answers_of(task, model, images, limit=limit, batch_size=batch_size):
        rows[index] |= shown(answer)
        drawn = None if folder is None or "error" in answer else task.draw(images[index][0], answer)
        if folder is not None and drawn is not None:
            rows[index]["drawing"] = str(save_drawing(drawn, folder / f"{first + index:04d}-{Path(files[index]).stem}.png"))
    return rows


def save_drawing(drawn: Any, path: Path) -> Path:
    """Write a drawing as PNG, atomically."""
    save_image(drawn, path)
    return path


def write(rows: list[dict[str, Any]], task: Task | Form, path: Path) -> None:
    """Write answers to a .csv or .json file, or to answers.json of a folder."""
    from vitarium.files import write_json, write_text

    if path.suffix == ".csv":
        return write_text(path, to_csv(rows, task))
    if not path.suffix:
        path.mkdir(parents=True, exist_ok=True)
    write_json(path if path.suffix else path / ANSWERS, rows)


def to_csv(rows: list[dict[str, Any]], task: Task | Form) -> str:
    """Return answers as CSV, a line per image: image, the task's columns (`Task.flat`), error."""
    cells = [{} if "error" in row else task.flat({k: v for k, v in row.items() if k != "image"}) for row in rows]
    columns = list(dict.fromkeys(name for row in cells for name in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *columns, "error"])
    for row, values in zip(rows, cells, strict=True):
        texts = [row["image"], *(values.get(name, "") for name in columns), row.get("error", "")]
        writer.writerow([printable(text) if isinstance(text, str) else text for text in texts])  # labels are a file's, too
    return text.getvalue()


def answer_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return the answer in a row of `Predictions`."""
    return {name: value for name, value in row.items() if name not in ("image", "drawing")}


def answer_table(rows: list[dict[str, Any]], task: Task | Form) -> TableData:
    """Return answers as a table for display, one row per image."""
    cells = [None if "error" in row else task.cells(answer_of(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in cells if row for name in row))
    table = TableData("", ["~image", *(f"~{name}" for name in columns)])
    for row, values in zip(rows, cells, strict=True):
        texts = ["not readable", *[""] * (len(columns) - 1)] if values is None else [values.get(c, "") for c in columns]
        table.rows.append([row["image"], *texts])
    return table
