"""Make an index of images, to be searched by an image."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import DataError
from vitarium.files import check_writable, is_model_file
from vitarium.numbers import clock
from vitarium.training.tasks.base import TableData
from vitarium.verbs.opening import Notify, execute, find_images, name_of, open_model, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn

    from vitarium.engine import Engine
    from vitarium.perception.retrieval.index import Index


@dataclass(repr=False)
class Indexed(Result):
    """An index that was written or brought up to date.

    Attributes:
        output: file of the index.
        images: number of images.
        read: number of images read; the others were in it before.
        gone: number of images removed from it.
        numbers: length of the vectors.
        seconds: wall time.
        broken: {"image", "error"} of files that could not be read.
        replaced: name of the previous index's model, if it was another one; else "".
    """

    output: Path
    images: int
    read: int
    gone: int
    numbers: int
    seconds: float
    broken: list[dict[str, str]]
    replaced: str = ""

    @property
    def kept(self) -> int:
        """Number of images that were in the index before."""
        return self.images - self.read

    def facts(self) -> dict[str, Any]:
        counts = f"{self.images} ({self.read} read in {clock(self.seconds)}, {self.kept} kept, {self.gone} gone)"
        rows: dict[str, Any] = {"images": counts, "vectors": f"{self.numbers} numbers each"}
        if self.replaced:
            rows["rebuilt"] = f"the previous index was of another model ({self.replaced})"
        return {**rows, "index": self.output}

    def tables(self) -> list[TableData]:
        rows = [[row["image"], row["error"]] for row in self.broken]
        return [TableData("Not readable", ["image", "reason"], rows)] if rows else []

    def to_dict(self) -> dict[str, Any]:
        report = {"index": str(self.output), "images": self.images, "read": self.read, "kept": self.kept, "gone": self.gone}
        return report | {"seconds": self.seconds, "numbers": self.numbers, "broken": self.broken}


def index(
    images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: str | os.PathLike[str] | nn.Module,
    output: str | os.PathLike[str],
    *,
    checkpoint: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    runtime: str = "eager",
    engine: str | Engine = "local",
    address: str | None = None,
    jobs: int | None = None,
    notify: Notify = quiet,
) -> Indexed:
    """Make an index of images for `vitarium.search`.

    A second call reads only new and changed files and drops deleted ones; an interrupted call resumes. Unreadable images are listed in the
    result and skipped.

    Args:
        images: folders, which are searched at any depth, and files.
        model: a file of `vitarium.save`, a model's name, or any image model; one trained for retrieval (vpt_proxies) is best.
        output: file of the index.
        checkpoint: weights for a name.
        batch_size: images per forward pass.
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        engine: "local", this machine; "ray", a Ray cluster; or an `engine.Engine`.
        address: of a running Ray cluster, "auto" or "HOST:PORT".
        jobs: processes that hold the model.
        notify: called with messages about progress.

    Raises:
        UsageError: unknown model or engine.
        DataError: a folder without images, or no image could be read.
        CheckpointError: weights that are not available, or the output is a file of another kind, which is not replaced.
        MissingExtra: engine="ray" without Ray.
    """
    from vitarium.engine import as_engine
    from vitarium.perception.retrieval.embedding import embeddings_of
    from vitarium.perception.retrieval.index import model_fingerprint, update

    path, where = Path(output), as_engine(engine, address=address, jobs=jobs)
    check_writable(path)
    files = list(dict.fromkeys(map(os.path.abspath, find_images(images))))
    opened = open_model(model, checkpoint)
    print_of = model_fingerprint(opened)
    opened = execute(opened, runtime, device=device, reads=embeddings_of, source=model, notify=notify)
    found, replaced = begin(path, model, print_of)
    begun = time.perf_counter()
    notify(f"Embedding {len(files)} images")
    read, gone = update(
        found,
        opened,
        files,
        batch_size=batch_size,
        engine=where,
        parts=path.with_name(f"{path.name}.parts"),
        progress=lambda done, total: notify(f"Embedding images: {done} of {total} new ones"),
    )
    if not len(found):
        raise DataError("no image could be read:\n" + "\n".join(f"  {file}: {reason}" for file, reason in found.broken[:10]))
    found.save(path)
    seconds = round(time.perf_counter() - begun, 1)
    broken = [{"image": file, "error": reason} for file, reason in found.broken]
    return Indexed(path, len(found), read, gone, found.embeddings.shape[1], seconds, broken, replaced)


def begin(output: Path, model: str | os.PathLike[str] | nn.Module, fingerprint: str) -> tuple[Index, str]:
    """Return the existing index, or a new one; and the name of the model of an index that is replaced.

    Raises:
        CheckpointError: the file is no index.
    """
    from vitarium.perception.retrieval.index import Index

    place = str(Path(model).resolve()) if is_model_file(model) else name_of(model)  # type: ignore[arg-type]
    if not output.exists():
        return Index(place, fingerprint), ""
    found = Index.load(output)
    if found.fingerprint != fingerprint:
        return Index(place, fingerprint), found.model
    found.model = place
    return found, ""
