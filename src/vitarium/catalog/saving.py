"""Save a whole model to one file with `save`, and load it from that file alone with `load`.

It is an ordinary safetensors file. Its header's metadata holds

    vitarium           JSON: the fields of `Record` below
    vitarium_sha256    the file's own sha256, computed with these digits as zeros; a file with any changed byte is rejected
    format             "pt", which other libraries require

If only a part of a model was trained (prompts, low-rank adapters, a head), `save(..., trained_only=True)` writes that part; the file then
records the source and the hash of the other weights, and `load` reads them from there.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.applying import methods_on, rebuild_methods
from vitarium.catalog.checkpoints import load_checkpoint
from vitarium.catalog.create import ModelSpec, create_model
from vitarium.catalog.foreign import configuration_of, library_of, rebuild_transformers
from vitarium.catalog.heads import fresh_names, mark_fresh
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.record import FORMAT, Base, Record, training_of
from vitarium.catalog.states import RECORD, SEAL, existing, fingerprint, looks_like_safetensors, read_safetensors, seal_of
from vitarium.errors import CheckpointError, UsageError, VitariumError
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
        OSError: the disk is full or read-only; an older file stays intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state, record = model.state_dict(), _record(model)
    if trained_only:
        state, record = _without_base(model, state, record)
    tensors, tied = _stored(state)
    record = record.model_copy(update=dict(tied=tied))
    metadata = {"format": "pt", RECORD: record.model_dump_json(exclude={"objective"}), SEAL: "0" * 64}
    with atomic_path(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
        except SafetensorError as error:  # the writer raises it only for errors of the disk
            raise OSError(f"cannot write {path}: {error}") from error
        _seal(temporary)


def load(path: str | Path, *, device: str | torch.device | None = None, base: str | Path | None = None) -> nn.Module:
    """Load a model from a file that `save` wrote: same name, arguments, dtypes and outputs, in eval mode. Downloads nothing, except
    published weights that the file was saved without and that are not in the cache.

    Args:
        path: the file.
        device: device of the model.
        base: for a file of the trained part only: the weights that it leaves out, if they were moved (a file of the same name beside `path`
            is found automatically).

    Raises:
        CheckpointError: missing, damaged, changed, written by a newer version, or not written by `save`; or its base is missing or another.
    """
    path = existing(path)
    if not looks_like_safetensors(path):
        raise _foreign(path)
    state, metadata = read_safetensors(path)
    if RECORD not in metadata:
        raise _foreign(path)
    record = _parse(path, metadata[RECORD])
    try:
        model = rebuild_methods(_rebuild(record), record.methods)
    except (VitariumError, LookupError) as error:
        raise CheckpointError(f"{path} holds {record.name}, which this installation cannot build: {error}") from error
    state |= {name: state[stored] for name, stored in record.tied.items() if stored in state}
    if record.base is not None:
        state = _with_base(model, state, path, record, base)
    elif base is not None:
        raise UsageError(f"{path} is whole; it takes no base")
    _fill(model, state, path, record)
    mark_fresh(model, record.untrained, f"{path.name} was saved before it was trained")
    model.weights_from = record.base.weights_from if record.base else str(path.resolve())  # type: ignore[assignment]
    return model.eval().to(device) if device is not None else model.eval()


# ---- the record


def _record(model: nn.Module) -> Record:
    spec = getattr(model, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise UsageError(
            f"a {type(model).__name__} that create_model did not make cannot be rebuilt from a file; save its state_dict() with safetensors"
        )
    arguments = dict(spec.arguments)
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int):
        arguments["num_classes"] = classes  # reset_classifier may have changed it since
    for name, value in arguments.items():
        if not _is_plain(value):
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
        methods=[report.saved() for report in methods_on(model)],
        library=library_of(spec.name),
        config=configuration_of(model) if spec.name.startswith("hf/") else None,
        untrained=fresh_names(model),
    )
    _check_rebuilds(model, record)
    return record


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _check_rebuilds(model: nn.Module, record: Record) -> None:
    """Raise UsageError for a model that `load` could not rebuild because its modules were changed after creation."""
    if record.name.startswith(("timm/", "hf/")):
        return  # not every model of other libraries can be built on the meta device
    with torch.device("meta"):
        twin = rebuild_methods(_rebuild(record), record.methods).state_dict()
    mine = {name: tensor.shape for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in twin.items()}
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()))[0][0]
        raise UsageError(f"{record.name} was changed since it was made (at {odd}), so a file could not rebuild it; save its state_dict()")


def _parse(path: Path, text: str) -> Record:
    try:
        values = json.loads(text)
        version = int(values["format"])
        if version <= FORMAT:
            record = Record.model_validate(values)
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(
            f"{path} has a damaged record of its model; its tensors can be loaded with checkpoint={str(path)!r}"
        ) from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} was written by vitarium {values.get('vitarium')} (format {version}); this is {__version__} "
            f"(format {FORMAT}): pip install --upgrade vitarium"
        )
    return record


def _rebuild(record: Record) -> nn.Module:
    """Build the model of a record, with random weights.

    Raises:
        VitariumError: the model is not available in this installation, or the record has forged arguments.
    """
    if forbidden := {"checkpoint", "checkpoint_path", "pretrained", "strict"} & set(record.arguments):
        raise UsageError(f"a saved model takes no {', '.join(sorted(forbidden))}")
    name = record.name
    if name.startswith("hf/"):
        model: nn.Module = rebuild_transformers(record.config or {})
        model.spec = ModelSpec(name, record.arguments)  # type: ignore[assignment]
    else:
        model = create_model(name if name.startswith("timm/") else name.partition(".")[0], **record.arguments)
    if record.preprocessing is not None:
        model.preprocessing = Preprocessing(**record.preprocessing)  # type: ignore[assignment]
    model.labels = record.labels  # type: ignore[assignment]
    model.training_record = record.training()  # type: ignore[assignment]
    return model


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
        twin = rebuild_methods(_rebuild(record), record.methods)
        _with_base(twin, kept, Path("the file"), record, None)
    except CheckpointError as error:
        raise UsageError(f"the frozen weights of this {record.name} are not in {source} (any more): {advice} ({error})") from error
    return kept, record


def _with_base(model: nn.Module, state: Mapping[str, Tensor], path: Path, record: Record, given: str | Path | None) -> dict[str, Tensor]:
    """Return a file's tensors, completed with those of its base.

    Raises:
        CheckpointError: the base is missing, or is not the one that the file was trained on.
    """
    assert record.base is not None
    source = str(given) if given is not None else record.base.weights_from
    beside = path.parent / Path(source).name
    if given is None and not source.startswith("pretrained:") and not Path(source).exists() and beside.is_file():
        source = str(beside)
    try:
        if source.startswith("pretrained:"):
            tag = source.partition(":")[2]
            whole = create_model(f"{record.name}.{tag}" if tag else record.name, pretrained=True, **record.arguments)
            have = rebuild_methods(whole, record.methods).state_dict()
        else:
            load_checkpoint(model, source, strict=False, quiet=True)  # the report would list the trained tensors as missing
            have = model.state_dict()
    except VitariumError as error:
        raise CheckpointError(
            f"{path} holds only the weights trained on top of {record.name}, and its base is missing: the weights from {source} ({error}); "
            "put the file there or beside it, or name it: vitarium.load(path, base=FILE)"
        ) from error
    dtype = _usual_dtype(state)
    rest = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in have.items() if name not in state}
    if fingerprint(rest) != record.base.sha256:
        raise CheckpointError(
            f"{path} was trained on top of another {record.name} than {source} holds: sha256 {record.base.sha256[:16]}... is wanted, "
            f"{fingerprint(rest)[:16]}... is there; name the right base: vitarium.load(path, base=FILE)"
        )
    return {**rest, **state}


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


def _fill(model: nn.Module, state: Mapping[str, Tensor], path: Path, record: Record) -> None:
    """Load the file's tensors into the model, in the file's dtypes."""
    own = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    wanted = model.state_dict()
    odd = [n for n in wanted if n not in state or state[n].shape != wanted[n].shape] + [n for n in state if n not in wanted]
    if odd:
        maker = " and ".join(filter(None, (f"vitarium {record.vitarium}", record.library)))
        raise CheckpointError(f"{path} does not fit the {record.name} of this installation (at {odd[0]}); it was written with {maker}")
    if dtype := _usual_dtype(state):
        model.to(dtype)  # including buffers that no file holds
    for name, tensor in state.items():
        own[name].data = own[name].data.to(tensor.dtype)
    model.load_state_dict(dict(state))


def _usual_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype of most floating-point values; None if there are none."""
    sizes = Counter[torch.dtype]()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else None


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} was not written by vitarium.save: name its model, create_model(NAME, checkpoint={str(path)!r})")
