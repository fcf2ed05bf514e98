"""Save a whole model to one file with `save`, and load it from that file alone with `load`.

It is an ordinary safetensors file. Its header's metadata holds

    vitarium           JSON: the fields of `Record` below
    vitarium_sha256    the file's own sha256, computed with these digits as zeros; a file with any changed byte is rejected
    format             "pt", which other libraries require

If only a part of a model was trained (prompts, low-rank adapters, a head), `save(..., trained_only=True)` writes that part; the file then
records the source and the hash of the other weights.

A file may come from anybody. `load` runs no code of it, makes no request and opens no other file, except the base of a trained part that
is given, lies beside it, is in a cache, or was noted in the user's cache when the file was written here; it compares the record with the
tensors before it takes memory (`vitarium.catalog.from_record`).
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.applying import methods_on, rebuild_methods
from vitarium.catalog.checkpoints import load_checkpoint, read_together
from vitarium.catalog.create import ModelSpec, create_model
from vitarium.catalog.foreign import configuration_of, is_foreign, library_of
from vitarium.catalog.from_record import build, build_for
from vitarium.catalog.heads import fresh_names, mark_fresh
from vitarium.catalog.rebuilding import Contents, check_counts, rebuilding, refuse_files, without_weights
from vitarium.catalog.record import FORMAT, Base, MethodRecord, Record, is_plain, read_record, training_of
from vitarium.catalog.states import RECORD, SEAL, Weights, existing, fingerprint, looks_like_safetensors, read_safetensors, seal_of
from vitarium.catalog.weights import TOGETHER, cached, fetch_pretrained, in_place_of, is_address, published_sources
from vitarium.catalog.weights import fetch as fetch_weights
from vitarium.errors import CheckpointError, UsageError, VitariumError
from vitarium.files import atomic_path, cache_folder, write_text
from vitarium.version import __version__


def save(model: nn.Module, path: str | Path, *, trained_only: bool = False) -> None:
    """Write a model to one file, atomically.

    Args:
        model: a model from `create_model` or `load`, in any dtype, on any device; its number of classes may have been changed.
        path: file to write, usually "*.safetensors". An existing file is replaced.
        trained_only: leave out the frozen parameters (`requires_grad` False). They must still equal those of the file or of the published
            weights that the model started from, which is checked; `load` then needs these as well.

    Raises:
        UsageError: the model cannot be rebuilt from its name and arguments, or the path is no regular file; with `trained_only`: nothing is
            frozen, or no file holds the frozen weights.
        WriteError: the disk is full or read-only; an older file stays intact.
    """
    state, record = model.state_dict(), _record(model)
    if trained_only:
        state, record = _without_base(model, state, record)
    tensors, tied = _stored(state)
    _write(path, tensors, record.model_copy(update=dict(tied=tied)))
    if record.base is not None:
        _note_base(record.base)


def change_record(path: str | Path, **changes: Any) -> None:
    """Change fields of the record of a file that `save` wrote, atomically. Its tensors stay as they are; its hash becomes the new one.

    Args:
        path: the file, of this or an earlier version; its record is then one of this version.
        changes: fields of `Record`, such as temperature.

    Raises:
        CheckpointError: as `load`.
        WriteError: the disk is full or read-only; the file stays intact.
    """
    path = existing(path).resolve()
    state, metadata = read_safetensors(path)
    if RECORD not in metadata:
        raise _foreign(path)
    record = _parse(path, metadata[RECORD], state)
    state = {name: tensor.clone() for name, tensor in state.items()}  # they are mapped, and Windows replaces no mapped file
    now = {"vitarium": __version__, "format": FORMAT, "objective": None, **record.training().model_dump()}
    _write(path, state, Record.model_validate({**record.model_dump(), **now, **changes}))


def _write(path: str | Path, tensors: Mapping[str, Tensor], record: Record) -> None:
    from safetensors.torch import save_file

    metadata = {"format": "pt", RECORD: record.model_dump_json(exclude={"objective"}), SEAL: "0" * 64}
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata)
        _seal(temporary)


def load(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    checkpoint: str | Path | None = None,
    fetch: bool = False,
    base: str | Path | None = None,
) -> nn.Module:
    """Load a model from a file that `save` wrote: same name, arguments, dtypes and outputs, in eval mode.

    Unless `fetch` is given, it makes no request and opens no other file, except the base of a file of the trained part only: `checkpoint`,
    a file of the base's name beside `path`, the file from which `save` left it out on this machine (noted by hash in
    `vitarium.files.cache_folder()`), or published weights in the hub's or torch's cache.

    Args:
        path: the file; or "hf:OWNER/NAME[/FILE]", a file on the hub, which is taken from its cache or, with `fetch`, downloaded.
        device: device of the model.
        checkpoint: for a file of the trained part only: the weights that it leaves out.
        fetch: whether weights that such a file leaves out are downloaded, or read from the path that it records; and whether the
            configuration of a nested model of transformers is.
        base: earlier name of `checkpoint`.

    Raises:
        CheckpointError: missing, damaged, changed, written by a newer version, or not written by `save`; a record that does not fit the
            tensors; or its base is missing or another.
        UsageError: `checkpoint` for a file that is whole.
    """
    refuse_files(f"the model {path}")
    checkpoint = base if checkpoint is None else checkpoint
    path = existing(_from_hub(str(path), fetch) if str(path).startswith("hf:") else path)
    if not looks_like_safetensors(path):
        raise _foreign(path)
    state, metadata = read_safetensors(path)
    if RECORD not in metadata:
        raise _foreign(path)
    record = _parse(path, metadata[RECORD], state)
    state |= {name: state[stored] for name, stored in record.tied.items()}
    contents = Contents.of(state.values())
    if record.base is None:
        if checkpoint is not None:
            raise UsageError(f"{path} is whole; it takes no base")
        model = build_for(record, state, contents, str(path), fetch=fetch)
    else:
        found = _find_base(path, record, checkpoint, fetch)
        model = build_for(record, state, contents + found.contents, str(path), fetch=fetch)
        state = _with_base(model, state, path, record, found)
    _fill(model, state, path)
    model.training_record = record.training()  # type: ignore[assignment]
    mark_fresh(model, record.untrained, f"{path.name} was saved before it was trained")
    model.weights_from = found.source if record.base else str(path.resolve())  # type: ignore[assignment]
    return model.eval().to(device) if device is not None else model.eval()


def _from_hub(source: str, fetch: bool) -> Path:
    """Return the local file of "hf:OWNER/NAME[/FILE]".

    Raises:
        CheckpointError: it is in no cache, and may not be downloaded, or cannot be.
    """
    found = fetch_weights(source, remedy=in_place_of(source)) if fetch else cached(source)
    if found is None:
        raise CheckpointError(f"{source} is in no cache: vitarium.load({source!r}, fetch=True) downloads it")
    return found


def is_partial(path: str | os.PathLike[str]) -> bool:
    """Return whether a file of `save` holds only the trained part of a model; False for any other file, and for one that cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(RECORD, "null"))
    except (OSError, ValueError, RecursionError, SafetensorError):
        return False
    return isinstance(record, dict) and record.get("base") is not None


# ---- the record


def _record(model: nn.Module) -> Record:
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(
            f"a {type(model).__name__} that create_model did not make cannot be rebuilt from a file; save its state_dict() with safetensors"
        )
    arguments = without_weights(spec.arguments)
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        arguments["num_classes"] = classes  # reset_classifier may have changed it since
    for name, value in arguments.items():
        if not is_plain(value):
            raise UsageError(
                f"{spec.name} cannot be saved: its argument {name}={value!r} is no plain value (number, text, list, table of these)"
            )
    labels = getattr(model, "labels", None)
    if labels is not None and classes is not None and len(labels) != classes:
        raise UsageError(f"{spec.name} has {classes} classes and {len(labels)} labels; set model.labels to their names, or to None")
    preprocessing, training = getattr(model, "preprocessing", None), training_of(model)
    record = Record(
        vitarium=__version__,
        format=FORMAT,
        name=spec.name,
        arguments=arguments,
        preprocessing=preprocessing and preprocessing.to_dict(),
        labels=labels and [str(label) for label in labels],
        **{name: getattr(training, name) for name in type(training).model_fields},
        methods=[MethodRecord(**report.saved()) for report in methods_on(model)],
        library=library_of(spec.name),
        config=configuration_of(model) if spec.name.startswith("hf/") else None,
        untrained=fresh_names(model),
    )
    _check_rebuilds(model, record)
    return record


def _check_rebuilds(model: nn.Module, record: Record) -> None:
    """Raise UsageError for a model that `load` could not rebuild because its modules were changed after creation."""
    if is_foreign(record.name):
        return  # not every model of other libraries can be built on the meta device
    with rebuilding(fetch=True), torch.device("meta"):
        twin = build(record).state_dict()
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in twin.items()}
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
        raise UsageError(f"{record.name} was changed since it was made (at {odd}), so a file could not rebuild it; save its state_dict()")


def _parse(path: Path, text: str, state: Mapping[str, Tensor]) -> Record:
    """Read the record of a file and check the names of its tied tensors.

    Raises:
        CheckpointError: a newer format, or a record that does not fit.
    """
    record = read_record(text, str(path))
    for name, stored in record.tied.items():
        if stored not in state or name in state:
            raise CheckpointError(
                f"{path} has a damaged record of its model: tied.{name}: the file {'holds it' if name in state else f'lacks {stored!r}'}"
            )
    return record


# ---- files without their base


def check_trained_only(model: nn.Module) -> None:
    """Check before a training that `save(model, path, trained_only=True)` will work; raises the same UsageError."""
    _without_base(model, model.state_dict(), _record(model))


def _without_base(model: nn.Module, state: Mapping[str, Tensor], record: Record) -> tuple[dict[str, Tensor], Record]:
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
        _with_base(twin, kept, Path("the file"), record, _find_base(Path("the file"), record, None, fetch=True))
    except CheckpointError as error:
        raise UsageError(f"the frozen weights of this {record.name} are not in {source} (any more): {advice} ({error})") from error
    return kept, record


@dataclass(frozen=True)
class _Found:
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


def _find_base(path: Path, record: Record, given: str | Path | None, fetch: bool) -> _Found:
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
            return _Found(source, None, file, _contents(read_together(str(file))) if file else UNKNOWN)
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
    return _Found(kept, weights, None, _contents(weights))


def _note_base(base: Base) -> None:
    """Note in the user's cache where the base of a saved file is, so that `load` finds it without trusting the path in the file."""
    if Path(base.weights_from).is_file():
        with contextlib.suppress(OSError):  # a read-only home: `load` then asks for the base
            write_text(cache_folder() / "bases" / base.sha256, base.weights_from)


def _noted_base(base: Base) -> Path | None:
    """Return the file that `_note_base` noted for a base on this machine; None if there is none (any more)."""
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


def _with_base(model: nn.Module, state: Mapping[str, Tensor], path: Path, record: Record, found: _Found) -> dict[str, Tensor]:
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
    dtype = _usual_dtype(state)
    rest = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in have.items() if name not in state}
    if fingerprint(rest) != record.base.sha256:
        raise CheckpointError(
            f"{path} was trained on top of another {record.name} than {found.source} holds: sha256 {record.base.sha256[:16]}... is wanted, "
            f"{fingerprint(rest)[:16]}... is there; name the right base: vitarium.load(path, checkpoint=FILE)"
        )
    return {**rest, **state}


def _published(record: Record, found: _Found) -> nn.Module:
    """Create a model of another library with its published weights, from a file in a cache if there is one."""
    check_counts(record.arguments, found.contents, "arguments")
    arguments = without_weights(record.arguments)
    if found.file is None:
        return create_model(record.name, pretrained=True, **arguments)
    if record.name.startswith("hf/"):
        return create_model(f"hf/{found.file.parent}", pretrained=True, **arguments)
    return create_model(record.name, pretrained=True, pretrained_cfg_overlay={"file": str(found.file)}, **arguments)


# ---- the tensors


def _stored(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors as safetensors requires them (contiguous, without duplicates), and for each tied name the stored name."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in first:
            tied[name] = first[place]
            continue
        first[place] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
    return tensors, tied


def _seal(path: Path) -> None:
    """Order the header's metadata, so that equal models make equal files, and write the file's hash into it."""
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(ordered) == length:
            file.seek(8)
            file.write(ordered)
    digest, place = seal_of(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(digest.encode())


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Load tensors of the model's names and shapes into it, in their dtypes."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    try:
        if dtype := _usual_dtype(state):
            model.to(dtype)  # including buffers that no file holds
        for name, tensor in state.items():
            own[name].data = own[name].data.to(tensor.dtype)
        model.load_state_dict(dict(state))
    except (RuntimeError, TypeError, LookupError) as error:
        first = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} does not fit the model that it records: {first}") from error


def _usual_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype of most floating-point values; None if there are none."""
    sizes = Counter[torch.dtype]()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was not written by vitarium.save: name its model, create_model(NAME, checkpoint={str(path)!r})")
