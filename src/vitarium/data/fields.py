"""Samples with named fields, and the collation of their fields into batches.

    FIELDS = {
        "image": padded(3, None, None),      # (B, 3, H, W) and "image_mask" (B, H, W), True on real pixels
        "text": packed(dtype=torch.int64),   # (T_1 + ... + T_B,), "text_lengths" (B,) and "text_cu_seqlens" (B + 1,)
        "target": stacked(),                 # (B,)
        "boxes": listed(optional=True),      # a list of B values, None where a sample has none, and "boxes_present" (B,)
    }
    batch = Collate(FIELDS)([Sample(image=..., text=..., target=3), ...])

A dataset whose items are `Sample` goes through the same `Loader`, `fit` and evaluation as one of (image, target) pairs; pairs are the
simplest case (`PAIRS`). A learner declares its fields by `collate = Collate(FIELDS)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from vitarium.data.sample import Sample
from vitarium.errors import DataError, UsageError, nearest

__all__ = [
    "PAIRS",
    "Collate",
    "Field",
    "FieldTransform",
    "Sample",
    "cu_seqlens",
    "lengths_of",
    "listed",
    "packed",
    "padded",
    "stacked",
    "unpacked",
]

Kind = Literal["stacked", "padded", "packed", "listed", "default"]
KINDS: tuple[Kind, ...] = ("stacked", "padded", "packed", "listed", "default")
RESERVED = ("index", "position", "broken")
"""Names that the loader adds to a batch."""
SUFFIXES = {"padded": ("mask",), "packed": ("lengths", "cu_seqlens")}
"""Kind -> suffixes of the entries that such a field adds to a batch, as NAME_SUFFIX."""


@dataclass(frozen=True)
class Field:
    """Declaration of one field: how its values are collated.

    Args:
        kind: "stacked" (equal shapes on a new first axis), "padded" (filled up to the largest, with a mask), "packed" (laid end to end
            along the first axis, with lengths), "listed" (a list of the values as they are), or "default" (torch's default_collate).
        shape: size of each axis of one value, None where it differs from sample to sample; () for a number. None: not declared. A padded
            field needs it, with at least one None; a packed one has None first.
        dtype: of the batch; None: of the values.
        optional: whether samples may lack the field. The batch then holds NAME_present (B,), and `value` in place of a missing value;
            a stacked field needs its shape for that.
        value: fills padding and missing samples.
        multiple: padded axes are rounded up to one, such as the patch size.

    Raises:
        UsageError: a combination that cannot be collated.
    """

    kind: Kind
    shape: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None
    optional: bool = False
    value: float = 0
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a field is {', '.join(KINDS[:-1])} or default; got {self.kind!r}{nearest(str(self.kind), KINDS)}")
        varies = self.shape is not None and None in self.shape
        if self.kind == "padded" and not varies:
            raise UsageError(f"a padded field declares its shape with None on each padded axis, such as (3, None, None); got {self.shape}")
        if self.kind == "stacked" and varies:
            raise UsageError(f"a stacked field has values of one shape, got {self.shape}; declare it padded or packed where sizes differ")
        if self.kind == "packed" and self.shape is not None and (not self.shape or self.shape[0] is not None or None in self.shape[1:]):
            raise UsageError(f"a packed field varies along its first axis alone, as (None, 64); got {self.shape}")
        if self.optional and self.kind == "default":
            raise UsageError("a field of the kind default cannot be optional; declare it stacked with its shape, or listed")
        if self.optional and self.kind in ("stacked", "packed") and self.shape is None:
            raise UsageError(f"an optional {self.kind} field declares its shape, so that a missing value can be filled")
        if self.multiple < 1:
            raise UsageError(f"multiple must be at least 1, got {self.multiple}")


def stacked(*shape: int, dtype: torch.dtype | None = None, optional: bool = False, value: float = 0) -> Field:
    """Declare a field whose values have one shape; by default that of the batch's first value."""
    return Field("stacked", shape or (() if optional else None), dtype, optional, value)


def padded(*shape: int | None, dtype: torch.dtype | None = None, optional: bool = False, value: float = 0, multiple: int = 1) -> Field:
    """Declare a field that is padded to the largest value on the axes whose size is None."""
    return Field("padded", shape, dtype, optional, value, multiple)


def packed(*shape: int | None, dtype: torch.dtype | None = None, optional: bool = False) -> Field:
    """Declare a field whose values are concatenated along the first axis; by default sequences of numbers, (None,)."""
    return Field("packed", shape or (None,), dtype, optional)


def listed(*, optional: bool = False) -> Field:
    """Declare a field whose values are kept in a list."""
    return Field("listed", optional=optional)


Fields = Mapping[str, Field]
PAIRS: Fields = {"image": Field("stacked"), "target": Field("default")}
"""Fields of (image, target) pairs."""


class Collate:
    """Collate samples field by field. Picklable, so that workers and other processes can use it.

    Args:
        fields: name -> declaration.
        ignore: names of further fields of the samples that do not go into the batch.

    Raises:
        UsageError: a name that is reserved for the loader or for an entry that another field adds.
    """

    def __init__(self, fields: Fields, *, ignore: Sequence[str] = ()):
        taken = dict.fromkeys(RESERVED, "the loader")
        for name, field in fields.items():
            for suffix in (*SUFFIXES.get(field.kind, ()), *(("present",) if field.optional else ())):
                taken[f"{name}_{suffix}"] = f"the field {name!r}"
        if clash := [name for name in fields if name in taken]:
            raise UsageError(f"no field can be called {clash[0]!r}: {taken[clash[0]]} adds it to the batch; choose another name")
        self.fields, self.ignore = dict(fields), tuple(ignore)

    def check(self, sample: Mapping[str, Any]) -> None:
        """Compare one sample with the declaration.

        Raises:
            DataError: an unknown or missing field, or a value of another shape than the declared one.
        """
        for name in sample:
            if name not in self.fields and name not in self.ignore:
                hint = nearest(name, self.fields)
                raise DataError(f"the sample has an unknown field {name!r}{hint} (declared: {', '.join(self.fields)})")
        for name, field in self.fields.items():
            if name not in sample or sample[name] is None:
                if not field.optional:
                    has = ", ".join(sample) or "nothing"
                    raise DataError(
                        f"the sample lacks the field {name!r} (it has {has}); declare it with optional=True where it may be absent"
                    )
            elif field.kind in ("stacked", "padded", "packed"):
                _check_shape(name, field, _tensor(name, sample[name]).shape)

    def __call__(self, samples: Sequence[Mapping[str, Any] | tuple[Any, Any]]) -> dict[str, Any]:
        """Return the batch of these samples; the list may be empty.

        Args:
            samples: mappings of fields, or (image, target) pairs.

        Raises:
            DataError: a sample that fails `check`, or shapes that cannot be collated.
        """
        rows = [sample if isinstance(sample, Mapping) else Sample(zip(("image", "target"), sample, strict=True)) for sample in samples]
        batch: dict[str, Any] = {}
        for row in rows:
            self.check(row)
        for name, field in self.fields.items():
            values = [row.get(name) for row in rows]
            batch |= _COLLATE[field.kind](name, field, values)
            if field.optional:
                batch[f"{name}_present"] = torch.tensor([value is not None for value in values], dtype=torch.bool)
        return batch


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    try:
        return torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"the field {name!r} holds a {type(value).__name__}, which is no tensor; transform it, or declare the field listed"
        raise DataError(message) from error


def _check_shape(name: str, field: Field, shape: Sequence[int]) -> None:
    wanted = field.shape
    if wanted is None:
        return
    if len(shape) != len(wanted) or any(size not in (None, got) for size, got in zip(wanted, shape, strict=True)):
        raise DataError(f"the {field.kind} field {name!r} is declared {_shape(wanted)}, got a value of shape {_shape(shape)}")


def _shape(sizes: Sequence[int | None]) -> str:
    return f"({', '.join('*' if size is None else str(size) for size in sizes)})"


def _collate_stacked(name: str, field: Field, values: list[Any]) -> dict[str, Any]:
    tensors = [None if value is None else _tensor(name, value) for value in values]
    known = [t for t in tensors if t is not None]
    if not known:
        return {
            name: torch.full((len(values), *(size or 0 for size in field.shape or ())), field.value, dtype=field.dtype or torch.float32)
        }
    first = known[0]
    if (other := next((t for t in known if t.shape != first.shape), None)) is not None:
        shapes = f"{_shape(first.shape)} and {_shape(other.shape)}"
        raise DataError(f"the stacked field {name!r} has values of the shapes {shapes} in one batch; declare it padded, packed or listed")
    filled = [torch.full_like(first, field.value) if t is None else t for t in tensors]
    return {name: _as(torch.stack(filled), field)}


def _collate_padded(name: str, field: Field, values: list[Any]) -> dict[str, Any]:
    assert field.shape is not None
    tensors = [None if value is None else _tensor(name, value) for value in values]
    known = [t for t in tensors if t is not None]
    axes = [i for i, size in enumerate(field.shape) if size is None]
    sizes = list(field.shape)
    for i in axes:
        sizes[i] = -(-max((t.shape[i] for t in known), default=0) // field.multiple) * field.multiple
    dtype = field.dtype or (known[0].dtype if known else torch.float32)
    batch = torch.full((len(values), *(size or 0 for size in sizes)), field.value, dtype=dtype)
    mask = torch.zeros(len(values), *(sizes[i] or 0 for i in axes), dtype=torch.bool)
    for row, real, tensor in zip(batch, mask, tensors, strict=True):
        if tensor is not None:
            row[tuple(slice(0, size) for size in tensor.shape)] = tensor.to(dtype)
            real[tuple(slice(0, tensor.shape[i]) for i in axes)] = True
    return {name: batch, f"{name}_mask": mask}


def _collate_packed(name: str, field: Field, values: list[Any]) -> dict[str, Any]:
    rest = [size or 0 for size in (field.shape or (None,))[1:]]
    tensors = [None if value is None else _tensor(name, value) for value in values]
    known = [t for t in tensors if t is not None]
    dtype = field.dtype or (known[0].dtype if known else torch.float32)
    lengths = torch.tensor([0 if t is None else len(t) for t in tensors], dtype=torch.int64)
    whole = torch.cat([t.to(dtype) for t in known]) if known else torch.empty(0, *rest, dtype=dtype)
    return {name: whole, f"{name}_lengths": lengths, f"{name}_cu_seqlens": cu_seqlens(lengths)}


def _as(batch: Tensor, field: Field) -> Tensor:
    return batch if field.dtype is None else batch.to(field.dtype)


_COLLATE: dict[str, Callable[[str, Field, list[Any]], dict[str, Any]]] = {
    "stacked": _collate_stacked,
    "padded": _collate_padded,
    "packed": _collate_packed,
    "listed": lambda name, field, values: {name: values},
    "default": lambda name, field, values: {name: default_collate(values) if values else torch.empty(0, dtype=torch.int64)},
}


# ---- transforms


class FieldTransform:
    """A transform of samples that applies one function to each named field, where a sample has it.

    Args:
        functions: name -> function of the field's value; they may draw from the global generators, which the loader sets for each sample.
    """

    named = True
    """Marks the transform as one of whole samples for the loader."""

    def __init__(self, **functions: Callable[[Any], Any]):
        self.functions = functions

    def __call__(self, sample: Sample) -> Sample:
        return sample.map(**self.functions)


# ---- packed fields


def cu_seqlens(lengths: Tensor) -> Tensor:
    """Return the cumulative lengths of a packed field, beginning with 0: (B,) -> (B + 1,) int32."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def lengths_of(batch: Mapping[str, Any], name: str) -> Tensor:
    """Return the lengths (B,) of a packed field.

    Raises:
        DataError: the batch has no such field, or has it without lengths, so that the boundaries of its sequences are unknown.
    """
    if name not in batch:
        raise DataError(f"the batch has no field {name!r}{nearest(name, batch)} (it has {', '.join(batch)})")
    lengths = batch.get(f"{name}_lengths")
    if lengths is None and (ends := batch.get(f"{name}_cu_seqlens")) is not None:
        lengths = ends.diff().long()
    if lengths is None:
        raise DataError(f"the packed field {name!r} came without {name}_lengths (B,) or {name}_cu_seqlens (B + 1,); collate it as packed()")
    if int(lengths.sum()) != len(batch[name]):
        raise DataError(f"the lengths of the packed field {name!r} add up to {int(lengths.sum())}, and it has {len(batch[name])} rows")
    return lengths


def unpacked(batch: Mapping[str, Any], name: str, *, value: float = 0) -> tuple[Tensor, Tensor]:
    """Return a packed field as a padded one: (B, T, ...) and its mask (B, T), True on real rows.

    Raises:
        DataError: as `lengths_of`.
    """
    rows, lengths = batch[name] if name in batch else torch.empty(0), lengths_of(batch, name)
    longest = int(lengths.max()) if len(lengths) else 0
    mask = torch.arange(longest, device=rows.device) < lengths.to(rows.device)[:, None]
    filled = rows.new_full((len(lengths), longest, *rows.shape[1:]), value)
    filled[mask] = rows
    return filled, mask
