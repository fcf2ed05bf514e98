"""`vitarium evaluate`: what a model is worth on labelled images."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, out, pairs, print_json, table
from vitarium.cli.opening import apply_methods, find_device, open_model
from vitarium.cli.options import DATA_HELP, Apply, BatchSize, Checkpoint, Device
from vitarium.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from vitarium.data import ImageSet
    from vitarium.training import Learner

WEAKEST = 5  # classes that are shown
NAMES = {"accuracy": "accuracy", "top5": "accuracy, first five", "loss": "cross entropy", "calibration_error": "calibration error"}


class Split(StrEnum):
    """Parts of a data set."""

    VAL = "val"
    TRAIN = "train"


@configurable
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    data: Annotated[str | None, typer.Option(help=DATA_HELP, show_default="digits, or what suits the model's objective")] = None,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    corruptions: Annotated[bool, typer.Option("--corruptions", help="Also under ImageNet-C's corruptions, five severities each.")] = False,
    split: Annotated[Split, typer.Option(help="Which part of the data.")] = Split.VAL,
    val_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share held out of data that has no val/ part.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Of the split.")] = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file for all metrics.", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure a trained model on labelled images: accuracy, loss, calibration, and the classes it knows least."""
    from vitarium.catalog import preprocessing_of
    from vitarium.catalog.heads import require_head
    from vitarium.data import open_data
    from vitarium.files import write_json
    from vitarium.training.learners import learner_of

    opened = open_model(model, checkpoint)
    require_head(opened)
    learner = learner_of(opened)
    classes = learner.objective == "classification"
    if corruptions and not classes:
        raise UsageError(f"--corruptions counts the errors of a classifier; this model's objective is {learner.objective!r}")
    size = preprocessing_of(opened).image_size if learner.data_task != "class" else None
    images = open_data(data or learner.default_data, task=learner.data_task, seed=seed, val_fraction=val_fraction, image_size=size)
    apply_methods(opened, methods, images)
    opened.to(find_device(device))
    part = images.val if split is Split.VAL else images.train
    with err().status(f"Evaluating on {len(part)} images"):
        measured = measure(opened, part, images.classes, batch_size) if classes else measure_other(learner, part, batch_size)
    report = {"model": model, "data": images.name, "split": split.value, **measured}
    if corruptions:
        report["corruptions"] = measure_corrupted(opened, part, images.classes, batch_size, seed)
    if output is not None:
        write_json(output, report)
    (print_json if as_json else show if classes else show_other)(report)


def measure_other(learner: Learner, images: ImageSet, batch_size: int) -> dict[str, Any]:
    """What a learner of another objective than classes measures."""
    from vitarium.data import BadFiles
    from vitarium.training import evaluate as run

    bad_files = BadFiles()
    metrics = run(learner, images, batch_size=batch_size, bad_files=bad_files)
    if not metrics:
        raise UsageError(f"models of the objective {learner.objective!r} have no metrics of their own")
    return {**metrics, "images": len(images) - len(bad_files), "broken": [{"path": p, "reason": r} for p, r in bad_files.items()]}


def measure(model: Any, images: ImageSet, classes: list[str], batch_size: int) -> dict[str, Any]:
    """Metrics of a classifier; classes are matched by their names where the model knows them.

    Raises:
        DataError: the data's classes are not the model's, or too many images cannot be read.
    """
    from vitarium.data import BadFiles
    from vitarium.training import evaluate as run

    images, classes = matched(model, images, classes)
    bad_files = BadFiles()
    metrics = run(model, images, batch_size=batch_size, bad_files=bad_files)
    confusion = metrics.pop("confusion_matrix")
    return {
        **metrics,
        "images": sum(map(sum, confusion)),
        "classes": [
            {"name": name, "images": sum(row), "accuracy": row[i] / sum(row) if sum(row) else None}
            for i, (name, row) in enumerate(zip(classes, confusion, strict=False))
        ],
        "confusion_matrix": confusion,
        "broken": [{"path": path, "reason": reason} for path, reason in bad_files.items()],
    }


def measure_corrupted(model: Any, images: ImageSet, classes: list[str], batch_size: int, seed: int) -> dict[str, Any]:
    """Errors of a classifier under each corruption; of ImageNet's 1000 classes also relative to AlexNet's, as papers report it."""
    from vitarium.data import BadFiles
    from vitarium.robustness.benchmark import ALEXNET, corruption_errors

    images, classes = matched(model, images, classes)
    with err().status("") as status:
        found = corruption_errors(
            model,
            images,
            batch_size=batch_size,
            seed=seed,
            bad_files=BadFiles(),
            progress=lambda done: status.update(f"Corrupting pictures: {done} of {len(images)}"),
        )
    whole = len(classes) == 1000 and len(found.errors) == len(ALEXNET)
    return {**found.to_dict(), **({"over_alexnet": found.over_alexnet} if whole else {})}


def matched(model: Any, images: ImageSet, classes: list[str]) -> tuple[ImageSet, list[str]]:
    """The pictures with the model's numbers of their classes, and the model's names of them.

    Raises:
        DataError: the data's classes are not the model's.
    """
    from vitarium.data.image_set import View

    labels = getattr(model, "labels", None)
    if labels is not None and labels != classes:
        numbers = numbers_of(classes, labels)
        return View(images, targets=[numbers[target] for target in images.targets]), labels
    if labels is None and getattr(model, "num_classes", len(classes)) != len(classes):
        raise DataError(f"the model tells {model.num_classes} classes apart, the data has {len(classes)}: {', '.join(classes[:8])}")
    return images, classes


def numbers_of(classes: list[str], labels: list[str]) -> list[int]:
    """The model's number of each class of the data.

    Raises:
        DataError: a class that the model does not know.
    """
    if unknown := [name for name in classes if name not in labels]:
        known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        count = f"{len(unknown)} of the data's {len(classes)} classes"
        raise DataError(f"the model does not know {count}, such as {unknown[0]!r}{nearest(unknown[0], labels)} (it knows {known})")
    return [labels.index(name) for name in classes]


def told(metrics: dict[str, Any]) -> dict[str, str]:
    """The numbers among some metrics, with names and units for a person."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    if "accuracy" not in numbers:
        return {name.replace("_", " "): f"{value:.4f}" for name, value in numbers.items()}
    known = {NAMES[name]: f"{numbers[name]:.4f}" if name == "loss" else f"{100 * numbers[name]:.2f} %" for name in NAMES if name in numbers}
    return known | {name.replace("_", " "): f"{value:.4f}" for name, value in numbers.items() if name not in NAMES}


def show_other(report: dict[str, Any]) -> None:
    """The numbers of another objective as a table."""
    console = out()
    console.print(pairs({"images": f"{report['images']} ({report['data']}, {report['split']})", **told(report)}))
    if report["broken"]:
        err().print(f"[yellow]{len(report['broken'])} pictures could not be read[/]")


def show(report: dict[str, Any]) -> None:
    """The metrics as tables."""
    console = out()
    console.print(pairs({"images": f"{report['images']} ({report['data']}, {report['split']})", **told(report)}))
    known = sorted((c for c in report["classes"] if c["accuracy"] is not None), key=lambda c: c["accuracy"])
    if len(known) > 1:
        worst = table("class", ">images", ">accuracy", title="Weakest classes")
        for row in known[:WEAKEST]:
            worst.add_row(row["name"], str(row["images"]), f"{100 * row['accuracy']:.1f} %")
        console.print(worst)
    if "corruptions" in report:
        show_corruptions(report["corruptions"])


def show_corruptions(found: dict[str, Any]) -> None:
    """Errors as a table of kinds by severities."""
    console = out()
    numbers = {"error": found["clean_error"], "mean corruption error": found["mean_corruption_error"]}
    numbers |= {"relative to AlexNet (mCE)": found["over_alexnet"]} if "over_alexnet" in found else {}
    console.print(pairs({name: f"{100 * value:.2f} %" for name, value in numbers.items()}))
    rows = table("corruption", *(f">{s}" for s in found["severities"]), ">mean", title="Errors by severity, %")
    for kind, errors in found["errors"].items():
        rows.add_row(kind.replace("_", " "), *(f"{100 * e:.1f}" for e in errors), f"{100 * found['by_kind'][kind]:.1f}")
    console.print(rows)
    if "frost" not in found["errors"]:
        err().print("[yellow]without frost, whose photographs come with: pip install 'vitarium[corruptions]'[/]")
