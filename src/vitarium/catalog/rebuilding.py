"""Rebuilding of models from the records of saved files, which may be forged: no network, no other files, bounded counts.

    with rebuilding():                   # create_model loads no weights inside, for nested models either
        with Limits(contents), torch.device("meta"):
            twin = create_model(...)

A record names a constructor and its arguments. Inside `rebuilding`, `create_model` ignores the weights that nested models were created from
(the file holds the result), and nothing is downloaded or read from other files. `check_counts` compares numbers in the record with what
the file holds before a model is built, and `Limits` stops a constructor that makes more than that.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitarium.catalog.preprocessing import LARGEST_SIDE
from vitarium.errors import CheckpointError, UsageError

WEIGHT_KEYS = ("checkpoint", "checkpoint_path", "pretrained", "strict", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `create_model` and of timm that name weights or files; they are not part of a model's architecture."""
READING_KEYS = (
    *("token", "use_auth_token", "proxies", "subfolder", "gguf_file", "trust_remote_code", "code_revision", "local_files_only"),
    *("force_download", "return_unused_kwargs", "_configuration_file", "_from_auto", "_from_pipeline"),
)
"""Arguments of transformers' `from_pretrained` that say how and where files are read (a token is secret); they are not part of a model."""
SIDES = ("image_size", "img_size", "input_size", "resolution", "input_resolution")
"""Arguments in pixels, which no tensor of the file bounds."""
NO_SIZES = re.compile(r"(_id|_ids|_token|theta|temperature|seed|^id2label|^label2id|max_length|vocab_size|max_position_embeddings)$")
"""Keys of transformers' configurations whose numbers are no sizes, or those of parts that a vision model leaves out."""
DEPTHS = re.compile(r"(^|_)(depths?|layers?|blocks?|stages?|repeats?)($|_)")
"""Names of arguments that count layers; each layer has at least one tensor in the file."""
SLACK = 64
"""Counts up to this number are accepted for any file."""

_FETCH: ContextVar[bool | None] = ContextVar("fetch", default=None)
"""None: no model is being rebuilt; else whether it may read configurations of nested models from the hub."""


@contextlib.contextmanager
def rebuilding(fetch: bool = False) -> Iterator[None]:
    """Mark that models are built from a file's record: `create_model` loads no weights, and `refuse_files` raises.

    Args:
        fetch: whether nested models of transformers ("hf/OWNER/NAME") may take their configuration from the hub or a folder.
    """
    token = _FETCH.set(fetch)
    try:
        yield
    finally:
        _FETCH.reset(token)


def is_rebuilding() -> bool:
    """Return whether a model is being built from a file's record in this context."""
    return _FETCH.get() is not None


def refuse_files(what: str, *, configuration: bool = False) -> None:
    """Raise if a model is being built from a file's record.

    Args:
        what: the file or address that would be opened, for the message.
        configuration: whether it is only a model's configuration, which `rebuilding(fetch=True)` permits.

    Raises:
        CheckpointError: it is.
    """
    allowed = _FETCH.get()
    if allowed is None or (configuration and allowed):
        return
    remedy = "; if you trust the file: vitarium.load(FILE, fetch=True)" if configuration else ""
    raise CheckpointError(f"a saved file may not open another one, and its record names {what}{remedy}")


def without_weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return constructor arguments without those that name weights or say how files are read, in nested tables either."""
    kept = {key: value for key, value in arguments.items() if key not in WEIGHT_KEYS + READING_KEYS}
    return {key: without_weights(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


# ---- counts


@dataclass(frozen=True)
class Contents:
    """Sizes of a file's tensors, which bound the counts in its record.

    Attributes:
        tensors: number of tensors, tied names included.
        axis: length of the longest axis.
        bytes: of all tensors.
    """

    tensors: int
    axis: int
    bytes: int

    @classmethod
    def of(cls, tensors: Iterable[Tensor], names: int = 0) -> Contents:
        """Return the contents of tensors, and of `names` further names for them."""
        found = list(tensors)
        axis = max((max(t.shape, default=1) for t in found if t.numel()), default=1)  # an empty tensor may have an axis of any length
        distinct = {(t.data_ptr(), t.nbytes) for t in found}  # tied tensors once
        return cls(len(found) + names, axis, sum(size for _, size in distinct))

    def __add__(self, other: Contents) -> Contents:
        return Contents(self.tensors + other.tensors, max(self.axis, other.axis), self.bytes + other.bytes)

    @property
    def largest(self) -> int:
        """Largest accepted number in a record: four times the longest axis, because a part of each layer may have been pruned."""
        return 4 * self.axis + 1024

    @property
    def layers(self) -> int:
        """Largest accepted number of layers."""
        return self.tensors + SLACK


def check_counts(values: Any, contents: Contents, place: str, key: str = "") -> None:
    """Compare the numbers of a record with what its file holds.

    Args:
        values: a number, or a list or table of values.
        contents: of the file.
        place: field of the record, for the message.
        key: name of the closest table entry.

    Raises:
        UsageError: it names the field, the number and the bound.
    """
    if isinstance(values, Mapping):
        for name, value in values.items():
            check_counts(value, contents, f"{place}.{name}", str(name))
    elif isinstance(values, list | tuple):
        if len(values) > contents.largest:
            raise UsageError(f"{place} lists {len(values):,} values, and the file holds {contents.tensors:,} tensors")
        numbers = [v for v in values if isinstance(v, int)]
        if DEPTHS.search(key) and sum(numbers) > 2 * contents.tensors + 4 * SLACK:
            raise UsageError(f"{place} counts {sum(numbers):,} layers, and the file holds {contents.tensors:,} tensors")
        for i, value in enumerate(values):
            check_counts(value, contents, f"{place}.{i}", key)
    elif isinstance(values, int) and not isinstance(values, bool):
        _check_count(values, contents, place, key)


def _check_count(value: int, contents: Contents, place: str, key: str) -> None:
    if NO_SIZES.search(key):
        return
    if key in SIDES:
        if abs(value) > LARGEST_SIDE:
            raise UsageError(f"{place} must be at most {LARGEST_SIDE:,} pixels, got {value:,}")
    elif DEPTHS.search(key) and value > contents.layers:
        raise UsageError(f"{place} is {value:,}, and the file holds {contents.tensors:,} tensors")
    elif abs(value) > contents.largest:
        raise UsageError(f"{place} is {value:,}, and no tensor of the file has an axis over {contents.axis:,}")


class TooLarge(Exception):
    """A constructor made more than its file holds (see `Limits`)."""


FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.arange, torch.linspace}
)
"""Functions of torch that take memory for as many values as their arguments say."""


class Limits(TorchFunctionMode):
    """Stops a constructor that makes more than a file holds: by the number of torch's calls, and by the size of real tensors.

    A model that is built on the meta device takes 4 to 11 calls a tensor, up to 27 with a trial pass, and no memory for weights.

    Args:
        contents: of the file.

    Raises:
        TooLarge: inside the context, from any call of torch.
    """

    def __init__(self, contents: Contents):
        super().__init__()
        self.calls = 24 * contents.tensors + 3_000
        self.values: float = 64 * contents.bytes + 2**22  # up to 8 packed weights a byte, of a model that pruning has made 8 times smaller

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.calls -= 1
        if self.calls < 0:
            raise TooLarge("it makes many more layers than the file holds tensors")
        if func in FACTORIES and not _on_meta(kwargs):
            self.values -= _values(func, args, kwargs)
            if self.values < 0:
                raise TooLarge("it makes much larger tensors than the file holds")
        return func(*args, **kwargs)


def _on_meta(kwargs: Mapping[str, Any]) -> bool:
    """Return whether a factory function is called for the meta device, where tensors take no memory."""
    device = kwargs.get("device")
    return device is not None and torch.device(device).type == "meta"


def _values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
    """Return an upper bound of the number of values that a factory function of torch makes."""
    if func is torch.linspace:
        return float(kwargs.get("steps", args[2] if len(args) > 2 else 0))
    size = kwargs.get("size", args)
    size = next((one for one in size if isinstance(one, tuple | list)), size)  # torch.full and randint take numbers beside it
    numbers = [abs(n) for n in size if isinstance(n, int | float)]
    return max(numbers, default=0) if func is torch.arange else math.prod(numbers)
