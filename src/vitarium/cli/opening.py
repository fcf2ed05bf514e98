"""What commands share: a model from a file or a name, a device from a word."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.cli.console import err
from vitarium.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vitarium.data import ImageData

FILE_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")


def is_file(source: str) -> bool:
    """Whether a MODEL argument means a saved file and not a name."""
    return source.endswith(FILE_ENDINGS) or Path(source).is_file()


def open_model(source: str, checkpoint: str | None = None, **options: Any) -> nn.Module:
    """A trained model in eval mode: a file of `vitarium.save`, or a name with a checkpoint, or a name with its published weights.

    Raises:
        UsageError: unknown name, or both a file and a checkpoint.
        CheckpointError: weights that are not there, or cannot be read or fetched.
    """
    import vitarium

    if is_file(source):
        if checkpoint is not None:
            raise UsageError(f"{source} holds its own weights; give --checkpoint only with a model's name")
        return vitarium.load(source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells each try; the error at the end says it once
    return vitarium.create_model(source, checkpoint=checkpoint, pretrained=checkpoint is None, **options).eval()


CALIBRATION_IMAGES = 256


def apply_methods(model: nn.Module, texts: list[str] | None, data: ImageData | None) -> nn.Module:
    """The methods of `--apply` onto a model; one that calibrates sees up to `CALIBRATION_IMAGES` training pictures. Prints the reports.

    Raises:
        UsageError: unknown methods or options, a wrong order, or a method that needs data where there are none.
    """
    import vitarium
    from vitarium.catalog.methods import parse_method

    parsed = [parse_method(text) for text in texts or []]
    for i, method in enumerate(parsed):
        if getattr(method, "calibration", False) is None:
            if data is None:
                raise UsageError(f"{method.slug} is calibrated on pictures; give some with --data")
            parsed[i] = dataclasses.replace(method, calibration=calibration_batches(model, data))  # type: ignore[call-arg]
    vitarium.apply(model, *parsed, quiet=True)
    for report in getattr(model, "methods", [])[-len(parsed) :] if parsed else []:
        err().print(str(report), markup=False, style="dim")
    return model


def calibration_batches(model: nn.Module, data: ImageData, batch_size: int = 32) -> list[torch.Tensor]:
    """Training pictures, spread over the whole part, prepared for the model: tensors (B, C, H, W)."""
    from vitarium.catalog import preprocessing_of
    from vitarium.data import BadFiles, Subset
    from vitarium.data.loader import Loader

    step = max(1, len(data.train) // CALIBRATION_IMAGES)
    some = Subset(data.train, range(0, len(data.train), step)[:CALIBRATION_IMAGES])
    loader = Loader(some, preprocessing_of(model), batch_size=batch_size, bad_files=BadFiles())
    return [batch["image"] for batch in loader.epoch(0) if len(batch["index"])]


def describe_model(name: str, **options: Any) -> nn.Module:
    """A model without weights, on the meta device: for its shapes and its cost."""
    import torch

    import vitarium

    with torch.device("meta"), quiet():
        return vitarium.create_model(name, **options)


def find_device(word: str) -> torch.device:
    """ "auto" (an accelerator if there is one), "cpu", "cuda", "cuda:1", "mps" ...

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


def matcher(pattern: str) -> re.Pattern[str]:
    """A shell pattern as an expression; a word without wildcards is looked for anywhere."""
    import fnmatch

    return re.compile(fnmatch.translate(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"), re.IGNORECASE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Other libraries' warnings are not a user's business."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
