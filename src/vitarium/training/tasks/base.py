"""Base class of tasks: data, metrics, and predictions with their presentation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor, nn

from vitarium.catalog.answers import plain_cells, plain_flat
from vitarium.catalog.class_lists import order_note
from vitarium.data.image_set import View
from vitarium.errors import DataError, UsageError, nearest
from vitarium.pages.tables import TableData as TableData
from vitarium.training.settings import Section

if TYPE_CHECKING:
    from PIL import Image

    from vitarium.data import ImageData

Batch = dict[str, Any]
log = logging.getLogger("vitarium")


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes:
        name: key in the task's metrics.
        best: whether larger or smaller values are better.
        unit: "%" for a share of 1 that is shown in percent, "dB", ...; "" for a plain number.
        title: name in tables and reports, such as "PSNR"; "": the name.
        share_of_images: whether the value is the share of the images for which something holds, whose standard error is known.
    """

    name: str
    best: Literal["max", "min"] = "max"
    unit: str = ""
    title: str = ""
    share_of_images: bool = False

    @property
    def label(self) -> str:
        """Name in tables and reports."""
        return self.title or self.name.replace("_", " ")

    def rank(self, value: float) -> float:
        """Return a number that is smaller the better the value is."""
        return -value if self.best == "max" else value

    def number(self, value: float) -> str:
        """Return the value without its unit, as tables show it: percent with one decimal, else four significant digits."""
        return f"{100 * value:.1f}" if self.unit == "%" else f"{value:.4g}"

    def short(self, value: float) -> str:
        """Return `number` with the unit."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def text(self, value: float) -> str:
        """Return the value with its unit."""
        return f"{100 * value:.2f} %" if self.unit == "%" else f"{value:.4f} {self.unit}".rstrip()

    def difference(self, before: float, after: float) -> str:
        """Return the signed change of the value with its unit."""
        return f"{100 * (after - before):+.2f} points" if self.unit == "%" else f"{after - before:+.4g} {self.unit}".rstrip()


@dataclass(frozen=True)
class ConfusionData:
    """A confusion matrix of a report.

    Attributes:
        title, words: heading, and one sentence on what it shows.
        names: of the classes.
        counts: rows true, columns predicted.
    """

    title: str
    words: str
    names: list[str]
    counts: list[list[int]]


@dataclass(frozen=True)
class GalleryImage:
    """A held-out image in a report, with a caption.

    Attributes:
        index: place in the held-out part.
        source: path or identifier.
        answer, note, truth: the model's answer, a short remark on it, and the true answer.
        description: text for readers who do not see the image.
    """

    index: int
    source: str
    answer: str
    note: str
    truth: str
    description: str


@dataclass(frozen=True)
class GalleryData:
    """Held-out images of a report.

    Attributes:
        title, words: heading, and one sentence on what is shown.
        images: none where `words` gives the reason.
    """

    title: str
    words: str
    images: list[GalleryImage] = field(default_factory=list)


ReportSection = TableData | ConfusionData | GalleryData


class Task(Section):
    """Base class of tasks, such as classification or segmentation.

    A task opens labelled data, matches a model's outputs with the data's labels, computes metrics, and returns and draws answers
    (predictions) for single images. Commands call these methods and do not depend on the kind of task. The task is recorded in saved files
    and is independent of the learner.

    A subclass is registered by `@task(NAME)`. Its fields are its options: plain values that a saved file records.
    """

    name: ClassVar[str] = ""
    """Registered name, set by `@task`."""

    data_kind: ClassVar[str] = "class"
    """Kind of labels: the `task` of `open_data`."""

    default_data: ClassVar[str] = "digits"
    """Default data for evaluation."""

    usage: ClassVar[str] = "vitarium predict IMAGE --model {file}"
    """Command to show after training, with {file} for the saved model."""

    result_kind: ClassVar[str | None] = None
    """Kind of answer that `vitarium predict` gives for an image, such as "labels" or "segments"; None: there is no answer for one image."""

    no_answer: ClassVar[str] = ""
    """Reason why there is no answer for one image, and the command to use instead."""

    classifies: ClassVar[bool] = False
    """True if the output is logits (B, num_classes) of exclusive classes, which error rates and class explanations need."""

    mergeable: ClassVar[bool] = True
    """True if metrics of different images can be merged, which evaluation in several processes needs."""

    own_models: ClassVar[bool] = False
    """True if its models have a form of their own, so that a model for another task cannot be trained for it, and the other way round."""

    conditions: ClassVar[bool] = False
    """True if the model takes classes as input."""

    eager_only: ClassVar[str] = ""
    """Reason why its metrics and answers need the model in PyTorch; "": any runtime may execute it (`vitarium.efficiency.runtimes`)."""

    @property
    def reads(self) -> Callable[[nn.Module, Tensor], Tensor] | None:
        """The function of (model, images) that metrics and answers call; None: the model's forward."""
        return None

    @property
    def primary(self) -> Metric:
        """The metric that selects the best evaluation."""
        return Metric("loss", "min")

    def record(self) -> dict[str, Any]:
        """Return name and options as plain values, from which `parse_task` creates an equal task."""
        return {"name": self.name, **self.model_dump(mode="json")}

    # ---- data

    def open(
        self,
        source: str | None = None,
        *,
        seed: int = 0,
        val_fraction: float = 0.2,
        image_size: int | None = None,
        split: str | None = None,
    ) -> ImageData:
        """Open data with the labels of this task.

        Args:
            source: name or path (see `open_data`); None: `default_data`.
            seed, val_fraction: of the split, if the data has none.
            image_size: side of images that are rendered, pixels. Class-labelled data ignores it and keeps its own size.
            split: None for training; else the part to evaluate: see `open_data`.

        Raises:
            DataError: there is no such data, or it has no labels of this kind.
        """
        from vitarium.data import open_data
        from vitarium.data.opening import embedded

        size = None if self.data_kind == "class" else image_size
        division: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction, "split": split}
        return open_data(source or embedded(self.default_data), task=self.data_kind, image_size=size, **division)

    def match(self, model: nn.Module, data: ImageData) -> ImageData:
        """Return the data with its targets in the model's numbering of the labels. The default changes nothing.

        Raises:
            DataError: the data has labels that the model does not have.
        """
        return data

    def transform(self, model: nn.Module) -> Callable[..., Any]:
        """Return the evaluation transform: image -> tensor (C, H, W); one with a true attribute `joint` maps (image, target) to both."""
        from vitarium.catalog.create import preprocessing_of

        return preprocessing_of(model)

    @staticmethod
    def collate(samples: list[tuple[Tensor, Any]]) -> Batch:
        """Collate samples (tensor, target) into a batch with "image" and "target"."""
        from vitarium.data.loader import stack

        return stack(samples)

    # ---- metrics

    def metrics(self, model: nn.Module) -> Any:
        """Return a new torchmetrics collection (or a ModuleDict of metrics) for `update`; None: the task has no metrics."""
        return None

    def update(self, metrics: Any, model: nn.Module, batch: Batch) -> None:
        """Update the metrics by a batch of held-out samples; called without gradients, in eval mode.

        Args:
            metrics: from `metrics`.
            model: on the device of the batch.
            batch: "image" (B, C, H, W), "target", "index" (B,), and further entries of `collate`.
        """

    def summary(self, metrics: Any, model: nn.Module) -> dict[str, Any]:
        """Return the metrics' values as plain numbers, lists or tables."""
        return {} if metrics is None else {name: value.tolist() for name, value in metrics.compute().items()}

    def report(self, values: dict[str, Any], data: ImageData) -> dict[str, Any]:
        """Return the values of an evaluation arranged for a report, for example with one row per class."""
        return values

    def texts(self, values: dict[str, Any]) -> dict[str, str]:
        """Return the scalar metrics as readable names and values with units."""
        primary = self.primary
        numbers = {name: value for name, value in values.items() if isinstance(value, float)}
        return {name.replace("_", " "): primary.text(v) if name == primary.name else f"{v:.4f}" for name, v in numbers.items()}

    def tables(self, report: dict[str, Any]) -> list[TableData]:
        """Return further tables of a report."""
        return []

    def extras(self, model: Any, data: ImageData, values: dict[str, Any], *, batch_size: int = 64) -> dict[str, Any]:
        """Return what a comparison keeps of a model beside its metrics, as plain values for `sections`; by default the tables.

        Args:
            model: trained, in eval mode.
            data: what it was trained and evaluated on.
            values: metrics on the held-out part.
            batch_size: images per forward pass.

        Returns:
            values by name; a number replaces the metric of its name.
        """
        from dataclasses import asdict

        return {"tables": [asdict(table) for table in self.tables(self.report(values, data))]}

    def sections(self, model: str, extras: dict[str, Any], classes: list[str]) -> list[ReportSection]:
        """Return the sections of a report on a model.

        Args:
            model: its name.
            extras: see `extras`.
            classes: names of the data's classes.
        """
        return [TableData(f"{table['title']}, {model}", table["columns"], table["rows"]) for table in extras.get("tables", [])]

    def baseline(self, data: ImageData) -> dict[str, float]:
        """Return the scores of the best constant prediction on the held-out part; {} if there is none."""
        return {}

    # ---- answers

    def answers(self, model: nn.Module, batch: Batch, *, limit: int = 5) -> list[dict[str, Any]]:
        """Return one answer per image as plain values; entries whose names begin with "_" are for `draw` only.

        Args:
            model: in eval mode, on the device of the batch; gradients are off.
            batch: "image" (B, C, H, W) and "index" (B,).
            limit: length of ranked answers.

        Raises:
            UsageError: the task has no answer for one image.
        """
        raise UsageError(self.refusal())

    def refusal(self) -> str:
        """Return the error message of a command that needs an answer for one image, for tasks without one."""
        return f"a model trained to {self.name} has no answer for a single image; {self.no_answer or 'vitarium evaluate measures it'}"

    def cells(self, answer: dict[str, Any]) -> dict[str, str]:
        """Return the columns of an answer for a table on the terminal."""
        return plain_cells(answer)

    def flat(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Return the columns of an answer for a CSV file: scalars by name; nested values as JSON."""
        return plain_flat(answer)

    def draw(self, image: Image.Image, answer: dict[str, Any]) -> Image.Image | None:
        """Draw an answer over its image; return None if there is nothing to draw."""
        return None

    def sheets(self, model: nn.Module, batch: Batch) -> dict[str, Image.Image]:
        """Draw example outputs of a held-out batch by name; shown after each evaluation of a training."""
        return {}


def match_classes(model: Any, data: ImageData, renumber: Callable[[list[int]], Callable[[Any], Any]], *, listed: bool = True) -> ImageData:
    """Match the data's class names with the model's labels.

    Args:
        model: with `labels` (or None if the names are unknown) and `num_classes`.
        data: with `classes`.
        renumber: returns the function that maps one target, given the model's number of each of the data's classes.
        listed: whether the targets are in `data.train.targets`; else these are placeholders, and targets are mapped on access.

    Returns:
        the data with the model's labels as `classes`; the same object if nothing has to change.

    Raises:
        DataError: a class that the model does not have, or another number of classes if the model has no names.
    """
    labels, classes = getattr(model, "labels", None), list(data.classes)
    if labels is None:
        count = getattr(model, "num_classes", len(classes))
        if classes and count != len(classes):
            raise DataError(f"the model has {count} classes, the data has {len(classes)}: {', '.join(classes[:8])}")
        if classes and getattr(model, "weights_from", None) is not None:
            log.warning("%s", order_note(classes))
        return data
    if not classes or list(labels) == classes:
        return data
    change = renumber(numbers_of(classes, list(labels)))
    train, val = (
        View(part, targets=[change(target) for target in part.targets]) if listed else View(part, transform_target=change)
        for part in (data.train, data.val)
    )
    return replace(data, train=train, val=val, classes=list(labels))


def numbers_of(classes: list[str], labels: list[str]) -> list[int]:
    """Return the model's number of each class of the data.

    Raises:
        DataError: a class that the model does not have.
    """
    if unknown := [name for name in classes if name not in labels]:
        known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        count = f"{len(unknown)} of the data's {len(classes)} classes"
        raise DataError(f"the model does not know {count}, such as {unknown[0]!r}{nearest(unknown[0], labels)} (it knows {known})")
    return [labels.index(name) for name in classes]
