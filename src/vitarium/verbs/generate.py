"""Generate images of classes with a trained generator."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError
from vitarium.files import check_output, save_image
from vitarium.verbs.opening import Notify, apply_methods, find_device, name_of, open_model, quiet
from vitarium.verbs.result import Result, html_drawing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from vitarium.engine import Engine

SHEETS = (".png", ".jpg", ".webp")
SIDE = 96
"""Side in pixels from which the images of a sheet keep their size."""
MOST_CLASSES = 10
"""Default number of classes."""
OWN = ("steps", "guidance", "seed")
"""Options of every generator, which are arguments of `generate`."""


@dataclass(repr=False)
class Generated(Result):
    """Generated images.

    Attributes:
        images: (N, C, H, W) float32 in [0, 1], on the CPU.
        labels: class number of each image.
        classes: the classes, in the order of the columns of a sheet: names, or numbers as text if the model has no names.
        output: file or folder that was written; None: none.
        seconds: wall time.
    """

    images: Tensor = field(repr=False)
    labels: list[int]
    classes: list[str]
    output: Path | None
    seconds: float

    def facts(self) -> dict[str, Any]:
        written = {} if self.output is None else {"output": self.output}
        return {"images": len(self.images), "classes": ", ".join(self.classes), **written, "seconds an image": self.pace}

    @property
    def pace(self) -> float:
        """Seconds an image."""
        return round(self.seconds / len(self.images), 4)

    def to_dict(self) -> dict[str, Any]:
        output = None if self.output is None else str(self.output)
        return {"images": len(self.images), "classes": ", ".join(self.classes), "output": output, "seconds per image": self.pace}

    def sheet(self) -> Image.Image:
        """Return all images side by side, a column per class below its name."""
        return sheet_of(self.images, self.classes)

    def _repr_html_(self) -> str:
        """Return the facts and the sheet as HTML."""
        return super()._repr_html_() + html_drawing(self.sheet(), side=None)


def generate(
    model: str | os.PathLike[str] | nn.Module,
    classes: str | Sequence[int | str] | None = None,
    count: int = 4,
    output: str | os.PathLike[str] | None = None,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | Sequence[str] | None = None,
    image: str | os.PathLike[str] | None = None,
    mask: str | os.PathLike[str] | None = None,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    batch_size: int = 64,
    device: str = "auto",
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    notify: Notify = quiet,
) -> Generated:
    """Generate images of classes: by a denoiser, or an autoregressive model. With `image` and `mask`, generate a region of an image.

    Image i depends only on the seed and i: batch size and engine do not change it (by more than 1e-5).

    Args:
        model: a file of `vitarium.save`, a model's name, or a generator. A model with `apply` is changed.
        classes: names or numbers, as "cat,#3-5" or ["cat", 3]; None: all, at most ten. A text is a name first: "3" is the class named
            "3", and the class number 3 (from 0) only if no name of the model is a number; "#3" is that number always. A comma inside a
            name is written "\\," in a text; in a list it needs nothing.
        count: images of each class.
        output: a sheet (.png, .jpg, .webp), an array for FID evaluators (.npz), or a folder; None: nothing is written.
        steps: of the sampler; None: the model's.
        guidance: strength of classifier-free guidance, 1: none; None: the model's.
        seed: of all random numbers.
        options: further options of the model, as {"sampler": "heun"} or ["sampler=heun"].
        image: an image of which a region is generated; with `mask`.
        mask: an image of the same size, white where new pixels are generated.
        checkpoint: weights for a name.
        apply: methods to apply first, as "evit:keep=0.7".
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        engine: "local", this machine; "ray", a Ray cluster; or an `engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: processes that hold the model.
        notify: called with messages about progress.

    Raises:
        UsageError: a model that generates no images of classes, unknown classes or options, an image without a mask, or an output of
            another ending.
        DataError: an image or a mask that cannot be read.
        CheckpointError: weights that are not available.
        MissingExtra: engine="ray" without Ray.
    """
    from vitarium.catalog.class_choice import choose_classes, describe_classes
    from vitarium.engine import as_engine
    from vitarium.generation.making import make_images
    from vitarium.perception.retrieval.index import model_fingerprint

    path = None if output is None else Path(output)
    if path is not None and path.suffix and path.suffix not in (*SHEETS, ".npz"):
        raise UsageError(f"--output must end in {', '.join(SHEETS)} or .npz, or be a folder; got {path}")
    if count < 1:
        raise UsageError(f"count must be at least 1, got {count}")
    where = as_engine(engine, address=address, jobs=jobs)
    given = read_options(options or ())
    opened = open_generator(model, checkpoint)
    apply_methods(opened, apply, None, notify)
    opened.to(find_device(device))
    if image is not None or mask is not None:
        given |= read_edit(opened, image, mask)
    names = getattr(opened, "labels", None)
    wanted = choose_classes(classes, opened.num_classes, names)
    wanted = wanted[:MOST_CLASSES] if classes is None else wanted
    labels, total = wanted * count, count * len(wanted)
    check_output(*output_files(labels, names, path))
    notify(f"Generating {total} images of {describe_classes(wanted, names)}")
    given |= {"steps": steps, "guidance": guidance, "seed": seed}
    start = time.perf_counter()
    if path is not None and total > batch_size and "image" not in given:  # so that an interrupted call resumes
        about = {"methods": [repr(method) for method in apply or ()], "batch_size": batch_size, **given}
        resume: dict[str, Any] = {
            "parts": path.with_name(f"{path.name}.parts"),
            "identity": {"weights": model_fingerprint(opened), **about},
        }
    else:
        resume = {}
    images = make_images(
        opened,
        labels,
        batch_size=batch_size,
        engine=where,
        **resume,
        progress=lambda done, total: notify(f"Generating images: {done} of {total}"),
        **given,
    )
    seconds = time.perf_counter() - start
    shown = [str(names[c] if names else c) for c in wanted]
    if path is not None:
        write(images, labels, names, path, classes=shown)
    return Generated(images, labels, shown, path, seconds)


def open_generator(source: str | os.PathLike[str] | nn.Module, checkpoint: str | None) -> Any:
    """Return a generator of images of classes.

    Raises:
        UsageError: a model of another kind.
    """
    from vitarium.generation import Generator

    opened = open_model(source, checkpoint)
    if not isinstance(opened, Generator):
        kind = type(opened).__name__
        raise UsageError(
            f"{name_of(source)} is a {kind}, which generates no images of classes; 'vitarium models --room generation' lists those that do"
        )
    return opened


def read_options(given: Mapping[str, Any] | Sequence[str]) -> dict[str, Any]:
    """Return options of a model from a dictionary, or from KEY=VALUE texts whose values are read as YAML.

    Raises:
        UsageError: another text, or an option that is an argument of `generate`.
    """
    from vitarium.assignments import parse_assignment

    if isinstance(given, Mapping):
        pairs = list(given.items())
    else:
        pairs = [parse_assignment(text, "--set wants KEY=VALUE, such as sampler=heun") for text in given]
    for key, value in pairs:
        if key in OWN:
            raise UsageError(f"{key} is a separate option: --{key} {value}")
    return dict(pairs)


def read_edit(model: Any, image: str | os.PathLike[str] | None, mask: str | os.PathLike[str] | None) -> dict[str, Tensor]:
    """Return an image (1, C, H, W) in [0, 1] and its mask (1, 1, H, W), both cropped to the model's input, for `edit`.

    Raises:
        UsageError: one without the other, two sizes, an empty mask, or a model that generates whole images only.
        BrokenImage: a file that is no image.
    """
    import torch

    from vitarium.catalog import preprocessing_of
    from vitarium.data.images import open_image
    from vitarium.generation import Editor

    preprocessing = preprocessing_of(model)
    if image is None or mask is None:
        raise UsageError("--image and --mask go together: an image, and its region to generate (white)")
    if not isinstance(model, Editor):
        raise UsageError(f"a {type(model).__name__} generates whole images only; --image and --mask are for models that edit (var)")
    original, where = open_image(image), open_image(mask)
    if original.size != where.size:
        sizes = [f"{size[0]}x{size[1]}" for size in (original.size, where.size)]
        raise UsageError(f"the mask must be as large as the image: {image} has {sizes[0]} pixels, {mask} has {sizes[1]}")
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (preprocessing(original) * std + mean).clamp(0, 1)
    region = replace(preprocessing, mean=(0.0,), std=(1.0,), interpolation="nearest")(where) > 0.5
    if not region.any():
        raise UsageError(f"{mask} has no white inside the model's crop, so nothing would be generated")
    return {"image": pixels[None], "mask": region[None]}


def sheet_of(images: Tensor, classes: Sequence[str]) -> Image.Image:
    """Draw images (N, C, H, W) in [0, 1], a column for each class below its name, small ones enlarged."""
    from vitarium.generation.grids import grid

    return grid(images, len(classes), gap=4, smallest=SIDE, captions=classes)


def write(images: Tensor, labels: list[int], names: list[str] | None, output: Path, *, classes: Sequence[str]) -> None:
    """Write images as one sheet, as an .npz with the keys of FID evaluators (arr_0: (N, H, W, 3) uint8), or each as a file of a folder."""
    import numpy as np

    from vitarium.files import MARK, atomic_path
    from vitarium.generation.grids import to_image

    if output.suffix == ".npz":
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        with atomic_path(output) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=pixels, arr_1=np.array(labels), written_by=np.array(MARK.encode()))
        return
    if output.suffix:
        save_image(sheet_of(images, classes), output, {".jpg": "jpeg"}.get(output.suffix, output.suffix[1:]))
        return
    for image, path in zip(images, output_files(labels, names, output), strict=True):
        save_image(to_image(image), path)


def output_files(labels: list[int], names: list[str] | None, output: Path | None) -> list[Path]:
    """Return the files that `write` writes: one with an ending, or one for each image of a folder."""
    if output is None or output.suffix:
        return [output] if output is not None else []
    words = ["".join(c if c.isalnum() else "_" for c in str(names[label] if names else label)) for label in labels]
    return [output / f"{i:05d}-{word}.png" for i, word in enumerate(words)]
