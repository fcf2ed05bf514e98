"""`vitarium generate`: pictures of the classes that are asked for."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import err, note, out, pairs, print_json
from vitarium.cli.options import Address, Apply, Checkpoint, Device, EngineKind, Jobs
from vitarium.errors import UsageError
from vitarium.verbs.opening import apply_methods, find_device, open_model

if TYPE_CHECKING:
    from torch import Tensor

SHEETS = (".png", ".jpg", ".webp")


@configurable
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    classes: Annotated[str | None, typer.Option(help="Numbers or names, as 0,3-5,cat.", show_default="all, at most ten")] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures of each class.")] = 4,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="A sheet (.png, .jpg, .webp), an array for FID evaluators (.npz), or a folder."),
    ] = Path("samples.png"),
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler.", show_default="the model's")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Strength of classifier-free guidance; 1: none.", show_default="the model's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed makes the same pictures.")] = 0,
    options: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the model, as sampler=heun. Repeatable.")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A picture of which a region is made anew; with --mask.")] = None,
    mask: Annotated[Path | None, typer.Option(help="A picture as large as it, white where new pixels are wanted.")] = None,
    checkpoint: Checkpoint = None,
    methods: Apply = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once; they do not depend on it.")] = 64,
    device: Device = "auto",
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Make pictures of classes with a trained generator: a denoiser, or an autoregressive model."""
    from vitarium.engine import as_engine
    from vitarium.generation.labels import parse_classes
    from vitarium.generation.making import make_images

    if output.suffix and output.suffix not in (*SHEETS, ".npz"):
        raise UsageError(f"--output must end in {', '.join(SHEETS)} or .npz, or be a folder; got {output}")
    given = read_options(options or [])
    opened = open_generator(model, checkpoint)
    apply_methods(opened, methods, None, note)
    opened.to(find_device(device))
    if image is not None or mask is not None:
        given |= read_edit(opened, image, mask)
    names = getattr(opened, "labels", None)
    wanted = parse_classes(classes, opened.num_classes, names)
    wanted = wanted[:10] if classes is None else wanted
    with err().status(f"Making {count * len(wanted)} pictures"):
        start, labels = time.perf_counter(), wanted * count
        where = as_engine(engine, address=address, jobs=jobs)
        given |= {"steps": steps, "guidance": guidance, "seed": seed}
        images = make_images(opened, labels, batch_size=batch_size, engine=where, **given)
        seconds = time.perf_counter() - start
    write(images, labels, names, output, columns=len(wanted))
    rows = {"pictures": len(images), "classes": ", ".join(str(names[c] if names else c) for c in wanted), "output": str(output)}
    rows["seconds a picture"] = round(seconds / len(images), 4)
    if as_json:
        print_json(rows)
    else:
        out().print(pairs(rows))


def open_generator(source: str, checkpoint: str | None) -> Any:
    """A model that makes pictures.

    Raises:
        UsageError: the model does something else.
    """
    from vitarium.generation import Generator

    opened = open_model(source, checkpoint)
    if not isinstance(opened, Generator):
        raise UsageError(
            f"{source} is a {type(opened).__name__}, which makes no pictures of classes (dit, sit_flow, repa and var models do)"
        )
    return opened


def read_options(assignments: list[str]) -> dict[str, Any]:
    """KEY=VALUE, values read as YAML.

    Raises:
        UsageError: one that is none of this, or that has an option of its own.
    """
    from vitarium.assignments import parse_assignment

    found: dict[str, Any] = {}
    for text in assignments:
        key, value = parse_assignment(text, "--set wants KEY=VALUE, such as sampler=heun")
        if key in ("steps", "guidance", "seed"):
            raise UsageError(f"{key} is an option of its own: --{key} {value}")
        found[key] = value
    return found


def read_edit(model: Any, image: Path | None, mask: Path | None) -> dict[str, Tensor]:
    """A picture and its mask as `edit` takes them: (1, C, H, W) in [0, 1] and (1, 1, H, W), both cut to what the model sees.

    Raises:
        UsageError: one without the other, two sizes, nothing to make anew, or a model that makes whole pictures only.
        BrokenImage: a file that is no picture.
    """
    from dataclasses import replace

    import torch

    from vitarium.catalog import preprocessing_of
    from vitarium.data.images import open_image
    from vitarium.generation import Editor

    preprocessing = preprocessing_of(model)
    if image is None or mask is None:
        raise UsageError("--image and --mask go together: a picture, and where it is made anew (white)")
    if not isinstance(model, Editor):
        raise UsageError(f"a {type(model).__name__} makes whole pictures only; --image and --mask are for models that edit (var)")
    picture, where = open_image(image), open_image(mask)
    if picture.size != where.size:
        sizes = [f"{size[0]}x{size[1]}" for size in (picture.size, where.size)]
        raise UsageError(f"the mask must be as large as the picture: {image} has {sizes[0]} pixels, {mask} has {sizes[1]}")
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    pixels = (preprocessing(picture) * std + mean).clamp(0, 1)
    region = replace(preprocessing, mean=(0.0,), std=(1.0,), interpolation="nearest")(where) > 0.5
    if not region.any():
        raise UsageError(f"{mask} has no white where the model looks, so nothing would be made anew")
    return {"image": pixels[None], "mask": region[None]}


def write(images: Tensor, labels: list[int], names: list[str] | None, output: Path, *, columns: int) -> None:
    """Pictures as one sheet, as an .npz with the keys of FID evaluators (arr_0: (N, H, W, 3) uint8), or each as a file of a folder."""
    import numpy as np

    from vitarium.files import atomic_path
    from vitarium.generation.pictures import grid, to_picture

    if output.suffix == ".npz":
        pixels = images.mul(255).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
        with atomic_path(output) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=pixels, arr_1=np.array(labels))
        return
    if output.suffix:
        with atomic_path(output) as temporary:
            grid(images, columns).save(temporary, format={".jpg": "jpeg"}.get(output.suffix, output.suffix[1:]))
        return
    output.mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        word = "".join(c if c.isalnum() else "_" for c in str(names[label] if names else label))
        with atomic_path(output / f"{i:05d}-{word}.png") as temporary:
            to_picture(image).save(temporary, format="png")
