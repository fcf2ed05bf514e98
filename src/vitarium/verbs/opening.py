"""Functions that verbs share: opening of models, devices, methods and files from their arguments."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import DataError, UsageError
from vitarium.files import MODEL_ENDINGS, is_model_file

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitarium.data import ImageData
    from vitarium.engine import Engine
    from vitarium.training.tasks.base import Task

CALIBRATION_IMAGES = 256
"""Largest number of training images for calibration."""

MODEL = "model.safetensors"
"""File that a training writes into its folder."""

Source = "str | os.PathLike[str] | nn.Module"
Notify = Callable[[str], None]


def quiet(_text: str) -> None:
    """Ignore a message. Messages that end with a line break are notes; others report progress."""


def open_model(source: str | os.PathLike[str] | nn.Module, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """Open a trained model in eval mode.

    Args:
        source: a file of `vitarium.save`, on the hub as "hf:OWNER/NAME[/FILE]"; a name, with `checkpoint` or else its published weights; or
            a model, which is returned as it is.
        checkpoint: weights for a name: file, "hf:OWNER/NAME", or address; for a file of the trained part only, the weights below it.
        options: for `create_model`, with a name.

    Raises:
        UsageError: unknown name, or a checkpoint for a file or model with its own weights.
        CheckpointError: weights that are missing, or cannot be read or fetched.
    """
    import vitarium

    if not isinstance(source, str | os.PathLike):
        if checkpoint is not None:
            raise UsageError("a model that is given as an object has its own weights; give checkpoint only with a model's name")
        return source.eval()
    if os.fspath(source).startswith("hf:"):
        from vitarium.catalog.weights import fetch, in_place_of

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return vitarium.load(fetch(os.fspath(source), remedy=in_place_of(os.fspath(source))), checkpoint=checkpoint)
    check_no_model(os.fspath(source))
    if is_model_file(source):
        from vitarium.catalog.saving import is_partial

        if checkpoint is not None and not is_partial(source):
            raise UsageError(f"{source} holds its own weights; give --checkpoint only with a model's name")
        return vitarium.load(os.fspath(source), checkpoint=checkpoint)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each attempt is logged; the final error is sufficient
    return vitarium.create_model(os.fspath(source), checkpoint=checkpoint, pretrained=checkpoint is None, **options).eval()


def check_no_model(source: str) -> None:
    """Refuse what is given as a model and cannot be one: an image, a folder, or the folder or checkpoint of a training that has not ended.

    Raises:
        UsageError: it is one; the message says what to give.
    """
    from vitarium.data.images import is_image_file
    from vitarium.training.checkpoint import LAST

    path = Path(source)
    if path.is_file() and is_image_file(path):
        raise UsageError(f"{path} is an image, and a model is wanted here: give the image as an argument and the model with --model FILE")
    folder = path if path.is_dir() else path.parent if path.name in (LAST, MODEL) else None
    if folder is None or (path.name == MODEL and path.is_file()):
        return
    if path.name != MODEL and (folder / MODEL).is_file():
        what = "is a folder" if path.is_dir() else "holds the state of a training, not a model"
        raise UsageError(f"{path} {what}; name its file: {folder / MODEL}")
    if (folder / LAST).is_file():
        raise UsageError(
            f"{folder} is the folder of a training that has not ended: {MODEL} is written at its end. The command that began it resumes it "
            f"(vitarium train ... --out {folder}); {LAST} is its state, from which no command opens a model"
        )


def name_of(source: str | os.PathLike[str] | nn.Module) -> str:
    """Return the name of a model for reports: the file or name as it was given, else the name in its spec, else its class."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return getattr(getattr(source, "spec", None), "name", None) or type(source).__name__


def apply_methods(model: nn.Module, methods: Sequence[Any] | None, data: ImageData | None, notify: Notify = quiet) -> nn.Module:
    """Apply methods, in order, and pass their reports to `notify`.

    Args:
        model: is changed.
        methods: each a `Method` or its text, as "evit:keep=0.7". Calibration uses up to `CALIBRATION_IMAGES` training images.
        data: for calibration.
        notify: called with each report as text.

    Raises:
        UsageError: unknown methods or options, a wrong order, or a method that needs data without any.
    """
    import vitarium
    from vitarium.catalog.methods import parse_method

    parsed = [parse_method(method) if isinstance(method, str) else method for method in methods or []]
    for i, method in enumerate(parsed):
        if getattr(method, "calibration", False) is None:
            if data is None:
                raise UsageError(
                    f"{method.slug} is calibrated on images: 'vitarium compress MODEL --apply {method} --data DIR --output FILE' writes a "
                    "file that needs none"
                )
            if not len(data.train):
                raise UsageError(
                    f"{method.slug} is calibrated on images, and {data.name} has none for training; give data with such a part"
                )
            parsed[i] = dataclasses.replace(method, calibration=calibration_batches(model, data))
    vitarium.apply(model, *parsed, quiet=True)
    for report in getattr(model, "methods", [])[-len(parsed) :] if parsed else []:
        notify(f"{report}\n")
    return model


def calibration_batches(model: nn.Module, data: ImageData, batch_size: int = 32) -> list[dict[str, Any]]:
    """Return training samples, spread evenly over the whole part, as the model's learner prepares them: its inputs by name."""
    import torch

    from vitarium.data import BadFiles, Subset
    from vitarium.data.loader import Loader
    from vitarium.training.base import Learner
    from vitarium.training.learners import learner_class_of, learner_of

    classifies = learner_class_of(model)[0].task_name in ("classify", "multilabel")
    headless = classifies and not getattr(model, "num_classes", 0)
    learner = Learner(model) if headless else learner_of(model)  # those of classifiers refuse a model without classes
    step = max(1, len(data.train) // CALIBRATION_IMAGES)
    some = Subset(data.train, range(0, len(data.train), step)[:CALIBRATION_IMAGES])
    loader = Loader(some, learner.transform(None), collate=learner.collate, batch_size=batch_size, bad_files=BadFiles())
    with torch.no_grad():
        return [dict(learner.model_inputs(batch)) for batch in loader.epoch(0) if len(batch["index"])]


def find_device(word: str) -> torch.device:
    """Return the device of "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps" ...

    Raises:
        UsageError: not a device, or not one of this machine's.
    """
    import torch

    if word == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"no device {word!r} here; 'vitarium env' lists those that there are ('auto' picks)") from error
    return device


def execute(
    model: nn.Module,
    runtime: str = "eager",
    *,
    device: str | None = "auto",
    engine: Engine | None = None,
    task: Task | None = None,
    reads: Callable[..., Any] | None = None,
    source: Any = None,
    notify: Notify = quiet,
) -> nn.Module:
    """Return a model on its device, executed by a runtime (see `vitarium.efficiency.runtimes`).

    Args:
        model: in eval mode, with its methods applied.
        runtime: "eager", "compile", "onnxruntime" or "openvino".
        device: "auto", "cpu", "cuda", ...; None: the model stays where it is.
        engine: where it runs later; another one than the local one chooses the device.
        task: whose answers or metrics are computed; it names what they read from the model.
        reads: function of (model, images) that is needed, without a task.
        source: the file that the model was loaded from, if no method was applied since: its graph is kept beside it. Another value is
            ignored.
        notify: called with messages about progress.

    Raises:
        UsageError: unknown runtime or device, a device that the runtime does not have, or a runtime that does not take the model.
        CheckpointError: the runtime's outputs differ from the model's.
        MissingExtra: the runtime is not installed.
    """
    from vitarium.efficiency.runtimes import GRAPHS, check_runtime, run_with

    check_runtime(runtime)
    device = None if engine is not None and engine.kind != "local" else device
    if runtime == "eager":
        return model if device is None else model.to(find_device(device))
    if task is not None and task.eager_only:
        raise UsageError(f"a model of the task {task.name} runs with --runtime eager only: {task.eager_only}")
    if runtime not in GRAPHS:
        model = model if device is None else model.to(find_device(device))
    elif device not in ("auto", "cpu", None):
        raise UsageError(f"{runtime} runs on the CPU here, and the device is {device}: leave --device out, or choose eager or compile")
    file = source if is_model_file(source) and Path(source).is_file() else None  # a file on the hub has no place for a graph
    return run_with(model, runtime, source=file, reads=task.reads if task is not None else reads, notify=notify)


def find_images(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    notify: Notify = quiet,
) -> list[str]:
    """Return the given files, and the images (or, if there are none, the videos) below the given folders, in order.

    Args:
        paths: files and folders.
        output: where results will be written; files there that were not given by name are results of an earlier call, and left out.
        notify: called with a note about what was left out.

    Raises:
        UsageError: something other than paths, a pattern that is no file, or an output that is one of the folders.
        DataError: a folder without images.
    """
    from vitarium.data.scan import scan

    found: list[str] = []
    several = isinstance(paths, Sequence) and not isinstance(paths, str)
    if odd := [p for p in (paths if several else [paths]) if not isinstance(p, str | os.PathLike)]:  # type: ignore[union-attr]
        raise UsageError(f"images are given as paths of files and folders, got a {type(odd[0]).__name__}; save it to a file first")
    results = None if output is None else os.path.abspath(output)
    for path in [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]:
        if not path.is_dir():
            if path.name.endswith(MODEL_ENDINGS):
                raise UsageError(
                    f"{path} is a file of weights, and images are wanted here: give it as --model {path}, and images as arguments"
                )
            if re.search(r"[*?\[]", str(path)) and not path.exists():
                parents = (place for place in path.parents if not re.search(r"[*?\[]", str(place)))
                raise UsageError(
                    f"there is no file {path}: patterns are expanded by the shell, not here; leave out the quotes, or give the folder "
                    f"{next(parents, Path())}"
                )
            found.append(str(path))
            continue
        below = scan([path], path)
        inside = below.images[path] or below.videos[path]
        for note in below.notes(path):
            logging.getLogger("vitarium").warning("%s", note)
        if inside and results == os.path.abspath(path):
            raise UsageError(f"{path} is the folder of the images; choose another output, such as {path / 'results'}")
        if results is not None:
            given = [file for file in inside if not _is_within(file, results)]
            if len(given) < len(inside):
                notify(f"left out: {len(inside) - len(given)} images at {output}, which are results of an earlier call\n")
            inside = given
        if not inside:
            raise DataError(f"{path} holds no images and no videos")
        found += inside
    return found


def _is_within(file: str, place: str) -> bool:
    """Return whether a file is the absolute path `place`, or lies below it."""
    whole = os.path.abspath(file)
    return whole == place or whole.startswith(os.path.join(place, ""))


def open_for(
    model: nn.Module,
    data: str | os.PathLike[str] | None,
    *,
    seed: int | None = None,
    val_fraction: float | None = None,
    split: str | None = None,
) -> ImageData:
    """Open data with the labels of a model's task, rendered at its size, with targets in its numbering of the labels.

    Args:
        model: any; see `task_of`.
        data: as for `vitarium.open_data`; None: the task's default.
        seed, val_fraction: of the split, if the data has none; None: those of the model's training, else 0 and 0.2.
        split: None for training, which needs two parts; else the part that becomes `val`: see `vitarium.open_data`.

    Raises:
        DataError: no such data, or labels that the model does not have.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.training.tasks import task_of

    task = task_of(model)
    source = None if data is None else os.fspath(data)
    division: dict[str, Any] = {**division_of(model, seed, val_fraction), "split": split}
    images = task.open(source, image_size=preprocessing_of(model).image_size, **division)
    try:
        return task.match(model, images)
    except DataError as error:
        if data is None:
            raise DataError(f"no data was named, so that {task.default_data} was opened: {error}; name yours with --data") from error
        raise


def open_to_evaluate(
    model: nn.Module,
    data: str | os.PathLike[str] | None,
    *,
    split: str = "auto",
    seed: int | None = None,
    val_fraction: float | None = None,
    calibrated: bool = False,
    notify: Notify = quiet,
) -> ImageData:
    """Open the images on which a model is evaluated, as the data's `val`.

    Args:
        model: any; see `task_of`.
        data: as for `vitarium.open_data`; None: that of the model's training, else the task's default.
        split: "val", "test", "train" or "all"; "auto": of the data that the model was trained on the part that was held out then; of other
            data the held-out part, or every labelled image if they have none.
        seed, val_fraction: of the part that is held out of data without parts, instead of every image.
        calibrated: whether a method needs images for its calibration, which are not evaluated.
        notify: called with the name of the data, where none was given.

    Raises:
        DataError: no such data or part, or labels that the model does not have.
    """
    from vitarium.catalog.record import training_of
    from vitarium.training.tasks import task_of

    if split == "auto" and (seed is not None or val_fraction is not None):
        split = "val"
    record, named = training_of(model).data, data is not None
    if data is None:
        if record is None:
            default = task_of(model).default_data
            notify(f"No data was named, and this model does not record its own: the task's default, {default}, is opened\n")
        else:
            data = record.source
            notify(f"No data was named: {data} is opened, on which the model was trained\n")
    if split == "auto" and (own := open_own(model, data)) is not None:
        return own
    division: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction}
    try:
        images = open_for(model, data, split=split, **division)
    except DataError as error:
        if named or record is None:
            raise
        raise DataError(f"no data was named, and {data}, on which the model was trained, is of no use here: {error}") from error
    if calibrated and images.part == "all" and not len(images.train):
        images = open_for(model, data, split="val", **division)
    return images


def division_of(model: nn.Module, seed: int | None = None, val_fraction: float | None = None) -> dict[str, Any]:
    """Return seed and val_fraction of a split: as given, else those of the model's training, so that the same images are held out, else 0
    and 0.2."""
    from vitarium.catalog.record import training_of

    record = training_of(model).data
    own = (record.seed, record.val_fraction) if record else (0, 0.2)
    return {"seed": own[0] if seed is None else seed, "val_fraction": own[1] if val_fraction is None else val_fraction}


def open_own(model: nn.Module, data: str | os.PathLike[str] | None) -> ImageData | None:
    """Open data as it was divided when a model was trained on it; None if it was not trained on this data.

    It is the same data if names and targets are, or the contents of the training images, as in a copy of the folder.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.catalog.record import training_of
    from vitarium.training.fingerprints import fingerprint_images
    from vitarium.training.recording import digest_of
    from vitarium.training.tasks import task_of

    record, task = training_of(model).data, task_of(model)
    if record is None or data is None:
        return None
    try:
        images = task.open(os.fspath(data), image_size=preprocessing_of(model).image_size, **division_of(model))
    except (DataError, UsageError):
        return None  # it cannot be trained on, so that the model was not
    same = record.fingerprint in (digest_of(images), digest_of(images, earlier=True)) or (
        record.images is not None and len(images.train) == record.images.count and fingerprint_images(images.train) == record.images
    )
    return task.match(model, images) if same else None


def open_unlabelled(
    model: nn.Module, data: str | os.PathLike[str], *, seed: int | None = None, val_fraction: float | None = None
) -> ImageData:
    """Open images at a model's size for a model without predictions for images; their labels are not used.

    Raises:
        DataError: no such data.
    """
    from vitarium.catalog import preprocessing_of
    from vitarium.data import open_data

    size = preprocessing_of(model).image_size
    return open_data(os.fspath(data), task="image", image_size=size, **division_of(model, seed, val_fraction))
