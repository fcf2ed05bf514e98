"""`vitarium index`: the pictures of folders, ready to be searched by a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitarium.cli.config import configurable
from vitarium.cli.console import clock, err, out, pairs, print_json
from vitarium.cli.options import Address, BatchSize, Checkpoint, Device, EngineKind, Jobs
from vitarium.errors import DataError
from vitarium.verbs.opening import find_device, open_model

if TYPE_CHECKING:
    from vitarium.perception.retrieval.index import Index


@configurable
def index(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders that are searched to the bottom, and pictures.")],
    model: Annotated[str, typer.Option(metavar="MODEL|FILE", help="A file that `vitarium.save` wrote, or a model's name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the index; one that is there is brought up to date.")],
    checkpoint: Checkpoint = None,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    engine: EngineKind = "local",
    address: Address = None,
    jobs: Jobs = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Make an index of pictures, to be searched with `vitarium search`. Any image model will do; one of 'train vpt_proxies' is best.

    Called again, it reads only what is new or changed, and forgets what is gone; interrupted, it goes on where it was. A picture that
    cannot be read is named and skipped (exit code 3 if none can be read).
    """
    from vitarium.engine import as_engine
    from vitarium.perception.retrieval.index import model_fingerprint, update
    from vitarium.verbs.opening import find_images as find_pictures

    files = list(dict.fromkeys(find_pictures(folders)))
    opened = open_model(model, checkpoint)
    print_of = model_fingerprint(opened)
    opened.to(find_device(device))
    found, anew = begin(output, model, print_of)
    begun = time.perf_counter()
    with err().status(f"Looking at {len(files)} pictures") as status:
        read, gone = update(
            found,
            opened,
            files,
            batch_size=batch_size,
            engine=as_engine(engine, address=address, jobs=jobs),
            parts=output.with_name(f"{output.name}.parts"),
            progress=lambda done, total: status.update(f"{done} of {total} new images"),
        )
    if not len(found):
        raise DataError("no picture could be read:\n" + "\n".join(f"  {file}: {reason}" for file, reason in found.broken[:10]))
    found.save(output)
    seconds = round(time.perf_counter() - begun, 1)
    report = {"index": str(output), "pictures": len(found), "read": read, "kept": len(found) - read, "gone": gone, "seconds": seconds}
    report |= {"numbers": found.embeddings.shape[1], "broken": [{"image": file, "error": reason} for file, reason in found.broken]}
    for file, reason in found.broken:
        err().print(f"skipped {file}: {reason}", markup=False, style="yellow", soft_wrap=True)
    if as_json:
        return print_json(report)
    rows = {"pictures": f"{len(found)} ({read} read in {clock(seconds)}, {len(found) - read} kept, {gone} gone)"}
    rows |= (
        {"vectors": f"{report['numbers']} numbers each", "made anew": anew} if anew else {"vectors": f"{report['numbers']} numbers each"}
    )
    out().print(pairs({**rows, "index": output, "use it": f"vitarium search {output} IMAGE"}))


def begin(output: Path, model: str, fingerprint: str) -> tuple[Index, str]:
    """The index that is there, or a new one; and why it is made anew where another was there.

    Raises:
        CheckpointError: the file is no index; it is not written over.
    """
    from vitarium.perception.retrieval.index import Index

    place = str(Path(model).resolve()) if Path(model).is_file() else model
    if not output.exists():
        return Index(place, fingerprint), ""
    found = Index.load(output)
    if found.fingerprint != fingerprint:
        return Index(place, fingerprint), f"the one that was there is of another model ({found.model})"
    found.model = place
    return found, ""
