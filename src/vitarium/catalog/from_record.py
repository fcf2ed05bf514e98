"""Building of a model from a record, which may be forged: what it makes is compared with the file's tensors before memory is taken."""

from __future__ import annotations

import contextlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitarium.catalog.applying import rebuild_methods
from vitarium.catalog.create import ModelSpec, create_model
from vitarium.catalog.foreign import check_configuration, is_foreign, rebuild_transformers
from vitarium.catalog.preprocessing import Preprocessing
from vitarium.catalog.rebuilding import WEIGHT_KEYS, Contents, Limits, TooLarge, check_counts, rebuilding
from vitarium.catalog.record import ModelRecord, Record
from vitarium.catalog.registry import find_model
from vitarium.errors import CheckpointError, MissingExtra, UsageError, VitariumError


def build(record: ModelRecord) -> nn.Module:
    """Build the model of a record with its methods, preprocessing and labels, and with random weights.

    Raises:
        VitariumError: the model is not available in this installation, or the record has forged arguments.
    """
    if forbidden := set(WEIGHT_KEYS) & set(record.arguments):
        raise UsageError(f"arguments: a saved model takes no {', '.join(sorted(forbidden))}")
    name = record.name
    if name.startswith("hf/"):
        check_configuration(record.arguments, "arguments")  # the weights of a base are read with them
        model: nn.Module = rebuild_transformers(record.config or {})
        model.spec = ModelSpec(name, record.arguments)  # type: ignore[assignment]
    else:
        model = create_model(name if name.startswith("timm/") else name.partition(".")[0], **record.arguments)
    if record.preprocessing is not None:
        model.preprocessing = Preprocessing(**record.preprocessing)  # type: ignore[assignment]
    if record.labels is not None or not hasattr(model, "labels"):
        model.labels = record.labels  # type: ignore[assignment]
    return rebuild_methods(model, record.saved_methods())


def build_for(record: Record, state: Mapping[str, Tensor], contents: Contents, place: str, *, fetch: bool = False) -> nn.Module:
    """Build the model of a file's record, if its tensors have the shapes of the file's.

    Counts in the record are compared with `contents` first; then the model is built without memory on the meta device, where its shapes are
    compared; then for use. A model of another library that cannot be built on the meta device is built once, within limits.

    Args:
        record: of the file.
        state: the file's tensors.
        contents: of the file, and of its base.
        place: the file, for messages.
        fetch: see `rebuilding`.

    Raises:
        CheckpointError: the record does not lead to a model with these tensors.
    """
    with rebuilding(fetch):
        with _explained(record, place):
            for values, field in ((record.arguments, "arguments"), (record.config or {}, "config"), (record.saved_methods(), "methods")):
                check_counts(values, contents, field)
        try:
            with _explained(record, place), Limits(contents), torch.device("meta"):
                twin = build(record)
        except CheckpointError:
            if not is_foreign(record.name):
                raise
        else:
            compare(twin, state, record, contents, place)
        with _explained(record, place), Limits(contents):
            model = build(record)
        compare(model, state, record, contents, place)
    return model


@contextlib.contextmanager
def _explained(record: Record, place: str) -> typing.Iterator[None]:
    """Turn any error of a constructor into a CheckpointError that names the field of the record."""
    cannot = f"{place} holds {record.name}, which this installation cannot build"
    try:
        yield
    except MissingExtra:
        raise
    except (VitariumError, LookupError) as error:
        wrong = None if str(error).startswith(("arguments", "config", "methods")) else wrong_argument(record)
        reason = str(error).partition("\n")[0][:400] if wrong else error
        raise CheckpointError(f"{cannot}: {f'{wrong} ({reason})' if wrong else reason}") from error
    except TooLarge as error:
        raise CheckpointError(f"{cannot}: its arguments are too large ({error})") from error
    except Exception as error:  # a constructor with forged arguments can fail in any way
        field = wrong_argument(record) or ("methods" if record.methods else "config" if record.config else "arguments")
        raise CheckpointError(f"{cannot}: its {field} cannot be used ({type(error).__name__}: {str(error)[:200]})") from error


def compare(model: nn.Module, state: Mapping[str, Tensor], record: Record, contents: Contents, place: str) -> None:
    """Compare the names and shapes of a model's tensors with a file's.

    Raises:
        CheckpointError: it names the first tensor that differs.
    """
    wanted = model.state_dict()
    odd = [n for n in wanted if n in state and state[n].shape != wanted[n].shape] + [n for n in state if n not in wanted]
    if record.base is None:
        odd += [n for n in wanted if n not in state]
    elif sum(t.numel() for t in wanted.values()) > 64 * contents.bytes + 2**22:
        odd += [max(wanted, key=lambda n: wanted[n].numel())]
    computed = {name: buffer.numel() for name, buffer in model.named_buffers() if name not in wanted}
    if sum(computed.values()) > 4 * contents.bytes + 2**22:
        largest = max(computed, key=lambda n: computed[n])
        raise CheckpointError(
            f"{place} holds {record.name}, whose arguments are too large: {largest} would have {computed[largest]:,} values"
        )
    if odd:
        maker = " and ".join(filter(None, (f"vitarium {record.vitarium}", record.library)))
        raise CheckpointError(f"{place} does not fit the {record.name} of this installation (at {odd[0]}); it was written with {maker}")
    classes = getattr(model, "num_classes", None)
    if record.labels is not None and isinstance(classes, int) and classes != len(record.labels):
        raise CheckpointError(f"{place} has a damaged record of its model: labels: {len(record.labels)} names for {classes} classes")
    known = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in record.untrained if name not in known]:
        raise CheckpointError(f"{place} has a damaged record of its model: untrained: the model has no parameter {unknown[0]!r}")


# ---- the argument that does not fit


def wrong_argument(record: ModelRecord) -> str | None:
    """Describe the first argument whose kind differs from its annotation in the constructor, for the message of an error; None if there is
    none."""
    if is_foreign(record.name):
        return None
    try:
        cls = find_model(record.name.partition(".")[0])[0].cls
        hints = typing.get_type_hints(cls.__init__)
    except Exception:  # the message does without it
        return None
    parameters = inspect.signature(cls).parameters
    for name, value in record.arguments.items():
        if name in parameters and name in hints and not _may_be(value, hints[name]):
            return f"arguments.{name} must be {_words(hints[name])}, got {value!r:.60}"
    return None


def _may_be(value: Any, hint: Any) -> bool:
    """Return False if a plain value is certainly of another kind than an annotation."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_may_be(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is not None and args and isinstance(value, list):
        kinds = [arg for arg in args if arg is not ...]
        return not issubclass(origin, Mapping) and all(any(_may_be(v, kind) for kind in kinds) for v in value)
    if origin is not None:
        return isinstance(value, dict) if issubclass(origin, Mapping) else not isinstance(value, str | int | float | dict)
    kinds_of: dict[Any, Any] = {int: int, float: (int, float), bool: bool, str: str, type(None): type(None), None: type(None)}
    if hint not in kinds_of:
        return True
    return isinstance(value, kinds_of[hint]) and not (isinstance(value, bool) and hint in (int, float))


def _words(hint: Any) -> str:
    from vitarium.catalog.options import describe

    return describe(hint)
