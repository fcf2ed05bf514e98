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

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.applying import methods_on
from vitarium.catalog.bases import find_base, note_base, with_base, without_base
from vitarium.catalog.create import ModelSpec
from vitarium.catalog.foreign import configuration_of, is_foreign, library_of
from vitarium.catalog.from_record import build, build_for
from vitarium.catalog.heads import fresh_names, mark_fresh
from vitarium.catalog.rebuilding import Contents, rebuilding, refuse_files, without_weights
from vitarium.catalog.record import FORMAT, MethodRecord, Record, is_plain, read_record, training_of
from vitarium.catalog.states import (
    RECORD,
    SEAL,
    existing,
    looks_like_safetensors,
    read_safetensors,
    seal_of,
    usual_dtype,
)
from vitarium.catalog.weights import cached, in_place_of
from vitarium.catalog.weights import fetch as fetch_weights
from vitarium.errors import CheckpointError, UsageError
from vitarium.files import atomic_path
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
        state, record = without_base(model, state, record)
    tensors, tied = _stored(state)
    _write(path, tensors, record.model_copy(update=dict(tied=tied)))
    if record.base is not None:
        note_base(record.base)


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
        found = find_base(path, record, checkpoint, fetch)
        model = build_for(record, state, contents + found.contents, str(path), fetch=fetch)
        state = with_base(model, state, path, record, found)
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


def check_trained_only(model: nn.Module) -> None:
    """Check before a training that `save(model, path, trained_only=True)` will work; raises the same UsageError."""
    without_base(model, model.state_dict(), _record(model))


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
        if dtype := usual_dtype(state):
            model.to(dtype)  # including buffers that no file holds
        for name, tensor in state.items():
            own[name].data = own[name].data.to(tensor.dtype)
        model.load_state_dict(dict(state))
    except (RuntimeError, TypeError, LookupError) as error:
        first = str(error).splitlines()[0][:200]
        raise CheckpointError(f"{path} does not fit the model that it records: {first}") from error


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was not written by vitarium.save: name its model, create_model(NAME, checkpoint={str(path)!r})")
