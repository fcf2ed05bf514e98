"""Bases: the weights that a file of the trained part only leaves out (see `vitarium.catalog.saving`). They are found without trust in the
file: as given, beside it, in a cache, or where this machine's user has noted them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from vitarium.catalog.applying import rebuild_methods
from vitarium.catalog.checkpoints import load_checkpoint, read_together
from vitarium.catalog.create import create_model
from vitarium.catalog.foreign import is_foreign
from vitarium.catalog.from_record import build
from vitarium.catalog.rebuilding import Contents, check_counts, rebuilding, without_weights
from vitarium.catalog.record import Base, Record
from vitarium.catalog.states import Weights, fingerprint, usual_dtype
from vitarium.catalog.weights import TOGETHER, cached, fetch_pretrained, is_address, published_sources
from vitarium.catalog.weights import fetch as fetch_weights
from vitarium.errors import CheckpointError, UsageError, VitariumError
from vitarium.files import cache_folder, write_text


def without_base(model: nn.Module, state: Mapping[str, Tensor], record: Record) -> tuple[dict[str, Tensor], Record]:
    """Return the trainable tensors (and buffers), and a record of the source of the others.

    Raises:
        UsageError: none are frozen, or no file holds them.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    kept = {name: tensor for name, tensor in state.items() if name not in frozen}
    if len(kept) == len(state):
        raise UsageError(f"every parameter of this {record.name} learns, so there is no base to leave out; save it whole")
    source = getattr(model, "weights_from", None)
    advice = "vitarium.save(the base model, FILE), load it, and adapt that"
    if source is None:
        raise UsageError(f"the frozen weights of this {record.name} are in no file that could be named: {advice}")
    digest = fingerprint({name: state[name] for name in frozen})
    record = record.model_copy(update=dict(base=Base(weights_from=source, sha256=digest)))
    try:
        with rebuilding(fetch=True):
            twin = build(record)
        with_base(twin, kept, Path("the file"), record, find_base(Path("the file"), record, None, fetch=True))
    except CheckpointError as error:
        raise UsageError(f"the frozen weights of this {record.name} are not in {source} (any more): {advice} ({error})") from error
    return kept, record


@dataclass(frozen=True)
class Found:
    """The base of a file of the trained part.

    Attributes:
        source: where it is, for `weights_from`.
        weights: what it holds; None: the published weights of a model of another library, which that library loads.
        file: the file of such weights in a cache; None: the library fetches it.
        contents: sizes of its tensors.
    """

    source: str
    weights: Weights | None
    file: Path | None
    contents: Contents


UNKNOWN = Contents(tensors=5_000, axis=2**16, bytes=2**32)
"""Bounds for weights that another library downloads."""


def find_base(path: Path, record: Record, given: str | Path | None, fetch: bool) -> Found:
    """Find the base of a file: as given, beside the file, or in a cache; with `fetch` also by a request or at the recorded path.

    Raises:
        CheckpointError: it is not there; the message has the calls that name or fetch it.
    """
    assert record.base is not None
    source = str(given) if given is not None else record.base.weights_from
    try:
        published = source.startswith("pretrained:")
        if published and is_foreign(record.name):
            [address] = published_sources(record.name, None)
            file = _cached(address)
            if file is None and not fetch:
                raise CheckpointError("they are in no cache")
            return Found(source, None, file, _contents(read_together(str(file))) if file else UNKNOWN)
        if published:
            tag = source.partition(":")[2] or None
            place = TOGETHER.join(map(str, _cached_together(record.name, tag)))
            place = str(fetch_pretrained(record.name, tag)) if fetch and not place else place
        else:
            noted = _noted_base(record.base) if given is None else None
            place = str(noted) if noted else _place(path, source, recorded=given is None, fetch=fetch)
        if not place:
            raise CheckpointError("they are in no cache" if published or is_address(source) else "a path in a file is not opened unasked")
        weights = read_together(place)
    except (VitariumError, OSError, ValueError) as error:  # a forged source can be a name that the disk or the hub's client rejects
        raise CheckpointError(
            f"{path} holds only the weights trained on top of {record.name}, and its base is missing: the weights from {source} ({error}); "
            f"put the file beside it, or name it: vitarium.load(path, checkpoint=FILE) (base=FILE in earlier versions; --checkpoint FILE); "
            "or, if you trust the file, fetch it: vitarium.load(path, fetch=True)"
        ) from error
    kept = source if published or is_address(source) else str(Path(place).resolve()) if Path(place).exists() else place
    return Found(kept, weights, None, _contents(weights))


def note_base(base: Base) -> None:
    """Note in the user's cache where the base of a saved file is, so that `load` finds it without trusting the path in the file."""
    if Path(base.weights_from).is_file():
        with contextlib.suppress(OSError):  # a read-only home: `load` then asks for the base
            write_text(cache_folder() / "bases" / base.sha256, base.weights_from)


def _noted_base(base: Base) -> Path | None:
    """Return the file that `note_base` noted for a base on this machine; None if there is none (any more)."""
    try:
        place = Path((cache_folder() / "bases" / base.sha256).read_text(encoding="utf-8"))
    except (OSError, UnicodeError):
        return None
    return place if place.is_file() else None


def _contents(weights: Weights) -> Contents:
    return Contents.of(weights.forms[-1].values())


def _cached(address: str) -> Path | None:
    try:
        return cached(address)
    except VitariumError:  # not among timm's, or another hash
        return None


def _cached_together(name: str, tag: str | None) -> list[Path]:
    """Return the cached files of the first source of published weights that is in a cache as a whole; [] if none is."""
    for source in published_sources(name, tag):
        files = [_cached(part.strip()) for part in source.split(TOGETHER)]
        if all(files):
            return [file for file in files if file]
    return []


def _place(path: Path, source: str, *, recorded: bool, fetch: bool) -> str:
    """Return the local place of weights that a caller named, or that a file recorded; "" if they are not to be opened."""
    places = []
    for part in [source] if Path(source).exists() else source.split(TOGETHER):
        part = part.strip()
        beside = path.parent / Path(part).name
        if is_address(part):
            place = _cached(part) or (fetch_weights(part) if fetch else None)
        elif recorded and beside.is_file() and beside.resolve() != path.resolve():
            place = beside
        else:
            place = Path(part) if fetch or not recorded else None
        if place is None:
            return ""
        places.append(str(place))
    return TOGETHER.join(places)


def with_base(model: nn.Module, state: Mapping[str, Tensor], path: Path, record: Record, found: Found) -> dict[str, Tensor]:
    """Return a file's tensors, completed with those of its base.

    Raises:
        CheckpointError: the base is not the one that the file was trained on.
    """
    assert record.base is not None
    try:
        if found.weights is None:
            have = rebuild_methods(_published(record, found), record.saved_methods()).state_dict()
        else:
            base = replace(found.weights, labels=None)  # the model's labels may be those of a trained head
            load_checkpoint(model, base, strict=False, quiet=True)  # the report would list the trained tensors as missing
            have = model.state_dict()
    except VitariumError as error:
        raise CheckpointError(f"{path} was trained on top of {record.name}, and {found.source} does not fit it: {error}") from error
    dtype = usual_dtype(state)
    rest = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in have.items() if name not in state}
    if fingerprint(rest) != record.base.sha256:
        raise CheckpointError(
            f"{path} was trained on top of another {record.name} than {found.source} holds: sha256 {record.base.sha256[:16]}... is wanted, "
            f"{fingerprint(rest)[:16]}... is there; name the right base: vitarium.load(path, checkpoint=FILE)"
        )
    return {**rest, **state}


def _published(record: Record, found: Found) -> nn.Module:
    """Create a model of another library with its published weights, from a file in a cache if there is one."""
    check_counts(record.arguments, found.contents, "arguments")
    arguments = without_weights(record.arguments)
    if found.file is None:
        return create_model(record.name, pretrained=True, **arguments)
    if record.name.startswith("hf/"):
        return create_model(f"hf/{found.file.parent}", pretrained=True, **arguments)
    return create_model(record.name, pretrained=True, pretrained_cfg_overlay={"file": str(found.file)}, **arguments)
