"""Reading of weights files: without executing their content, with checks for damage, and with tensors extracted from containers.

Three formats: safetensors, torch's own through `weights_only=True`, and numpy's .npz without pickles. Beyond torch's own allow-list, only
`argparse.Namespace` and numpy's scalars and dtypes are accepted: many authors left their options in the file, and these run no code.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pickle
import pickletools
import re
import struct
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitarium.catalog.class_lists import class_list_of
from vitarium.errors import CheckpointError, nearest

State = dict[str, Tensor]

SEAL = "vitarium_sha256"
"""Key of a safetensors header: the file's sha256, computed with these 64 digits as zeros. Written by `save`, checked if present."""
RECORD = "vitarium"
"""Key of a safetensors header: how to rebuild the model (see vitarium.catalog.saving)."""

# Averaged weights come first: if a file has both, the published results are those of the averaged ones.
CONTAINERS = ("state_dict_ema", "model_ema", "params_ema", "ema", "teacher", "model", "state_dict", "params", "module", "student")
PREFIXES = ("module.", "_orig_mod.", "backbone.", "encoder.", "model.")
NEARLY_ALL = 0.9
"""Share of the tensors that must have a prefix for it to be removed as a wrapper's."""
GRAPHS = ".vitarium"
"""Ending of the folder of kept graphs beside a file (see `efficiency.runtimes.cache`), which is no name that is meant."""
DEPTH_LIMIT = 4
"""Largest depth of nested containers."""
HEADER_LIMIT = 100 * 2**20
"""Largest header of a safetensors file in bytes, the format's own limit."""


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors and the wrappers around them."""

    path: Path
    forms: list[State]
    """The tensors under their names in the file, then with wrappers' prefixes removed one after another."""
    opened: list[str] = field(default_factory=list)
    """Containers that were opened, such as "model_ema", and removed prefixes, such as "module."."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Metadata of a safetensors file."""
    labels: list[str] | None = None
    """Names of the classes in the order of the head's rows, where the file holds them."""


def read_state(path: str | Path) -> State:
    """Return name -> tensor (on the CPU, in the file's dtypes) of a weights file, without containers and wrappers' prefixes.

    Raises:
        CheckpointError: the file is missing, empty, truncated, changed, unsafe, or holds no weights.
    """
    return read_weights(path).forms[-1]


def read_weights(path: str | Path) -> Weights:
    """Read a weights file like `read_state`, with all candidate forms of the tensors' names."""
    path = existing(path)
    metadata: Mapping[str, str] = {}
    if looks_like_safetensors(path):
        content, metadata = read_safetensors(path)
    elif path.suffix == ".npz":
        content = _read_npz(path)
    else:
        content = _read_torch(path)
    state, opened = _open_containers(content, path)
    forms = [state]
    while prefix := next((p for p in PREFIXES if _is_wrapped(forms[-1], p)), None):
        forms.append({name.removeprefix(prefix): tensor for name, tensor in forms[-1].items()})
        opened.append(prefix)
    return Weights(path, forms, opened, metadata, _labels_of(content, metadata))


def _labels_of(content: Any, metadata: Mapping[str, str]) -> list[str] | None:
    """Return the class names in a file: in the record of `save`, in other metadata, or beside the tensors of a torch file."""
    return class_list_of({"metadata": metadata.get(RECORD)}) or class_list_of(metadata) or class_list_of(content)


def existing(path: str | Path) -> Path:
    """Return the path of an existing file that may hold weights.

    Raises:
        CheckpointError: no such file (the message suggests near names), a folder, an empty file, or a web page or git-lfs pointer.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".pt", ".bin"))
        raise CheckpointError(f"{path} is a folder; name the file in it" + (f": {', '.join(inside[:5])}" if inside else ""))
    if not path.is_file():
        names = sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(GRAPHS)) if path.parent.is_dir() else []
        where = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
        raise CheckpointError(f"there is no file {path}{where}{nearest(path.name, names)}")
    with _reading(path), open(path, "rb") as file:
        start = file.read(512)
    if not start:
        raise CheckpointError(f"{path} is empty (0 bytes): the download or copy failed; fetch it again")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is a web page, not weights: the server sent a login or error page; fetch the file itself")
    if text.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", start)
        length = f" of {int(size[1]):,} bytes" if size else ""
        raise CheckpointError(f"{path} is a git-lfs pointer to a file{length}, not the file; run `git lfs pull` in its repository")
    return path


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names, dtypes, shapes and values, in the order of the names; independent of device and memory layout."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- safetensors


def looks_like_safetensors(path: Path) -> bool:
    """Return whether a file is one by content (eight bytes of length, then a JSON object) or by name."""
    with _reading(path), open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" or (path.suffix == ".safetensors" and not start.startswith(b"PK"))


def read_safetensors(path: Path) -> tuple[State, dict[str, str]]:
    """Return the tensors and the header's metadata; a sealed file (see `SEAL`) is verified first.

    Raises:
        CheckpointError: the file is truncated, damaged, changed, or not in this format.
    """
    import safetensors

    with _reading(path):
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if RECORD in metadata or SEAL in metadata:
                    check_seal(path, metadata)
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, UnicodeError, ValueError, RuntimeError, OverflowError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is {_what_is_wrong(path)}") from error


def seal_of(path: Path) -> tuple[str, int]:
    """Return the expected seal of a safetensors file, and the offset of its digits (-1 if there is none)."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        start = struct.pack("<Q", length) + file.read(min(length, HEADER_LIMIT))
        found = re.search(rb'"%b":"([0-9a-f]{64})"' % SEAL.encode(), start)
        if found:
            start = start[: found.start(1)] + b"0" * 64 + start[found.end(1) :]
        digest = hashlib.sha256(start)
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest(), found.start(1) if found else -1


def check_seal(path: Path, metadata: Mapping[str, str]) -> None:
    """Verify that a file is byte for byte what `save` wrote.

    Raises:
        CheckpointError: it was changed.
    """
    actual, place = seal_of(path)
    if place < 0 or metadata.get(SEAL) != actual:
        expected = metadata.get(SEAL, "")[:16] if place >= 0 else "none"
        raise CheckpointError(f"{path} was changed after it was saved: expected sha256 {expected}..., got {actual[:16]}...; copy it again")


def _what_is_wrong(path: Path) -> str:
    """Describe the damage of an unreadable safetensors file, from its sizes."""
    actual = path.stat().st_size
    if actual < 10:
        return f"no whole safetensors file: expected at least 10 bytes, got {actual}; fetch it again"
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > HEADER_LIMIT:
            return f"no safetensors file: its header claims {length:,} bytes, the format allows {HEADER_LIMIT:,}"
        text = file.read(length)
    if len(text) < length:
        return f"truncated: expected at least {8 + length:,} bytes, got {actual:,}; fetch it again"
    try:
        header = json.loads(text)
        expected = 8 + length + max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return "damaged, or no safetensors file: its header is not a table of tensors; fetch it again"
    if actual != expected:
        return f"{'truncated' if actual < expected else 'damaged'}: expected {expected:,} bytes, got {actual:,}; fetch it again"
    return "damaged: its table of tensors contradicts itself; fetch it again"


# ---- numpy files


def _read_npz(path: Path) -> State:
    """Read the arrays of an .npz archive, the format of Google's JAX releases; pickled content is not read.

    Raises:
        CheckpointError: the archive is damaged, or holds anything but arrays of numbers.
    """
    import numpy as np

    with _reading(path):
        try:
            with np.load(path, allow_pickle=False) as archive:
                return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
        except OSError:
            raise
        except Exception as error:  # numpy and zipfile fail in many ways on damaged archives
            raise CheckpointError(f"{path} is no whole archive of arrays ({_first_line(str(error)) or type(error).__name__})") from error


# ---- torch files


_ALLOWING = threading.Lock()
"""Lock for torch's global allow-list: two threads that extend and restore it concurrently would leave it extended."""


def _allowed() -> list[Any]:
    import numpy as np
    from numpy._core.multiarray import scalar

    kinds = [getattr(np.dtypes, name) for name in np.dtypes.__all__ if name != "ObjectDType"]
    wanted = [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar"), *kinds]
    users = torch.serialization.get_safe_globals()  # torch removes our entries at the end, so entries of the user must not be among them
    return [entry for entry in wanted if entry not in users]


def _read_torch(path: Path) -> Any:
    """Load the content of a torch file with `weights_only=True`."""
    with _reading(path), _ALLOWING, torch.serialization.safe_globals(_allowed()), open(path, "rb") as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except pickle.UnpicklingError as error:
            raise CheckpointError(_why_unsafe(path, str(error))) from error
        except MemoryError:
            raise
        except Exception as error:  # a hostile or broken pickle can fail anywhere in torch's reader; no code of it has run
            raise CheckpointError(f"{path} is {_what_is_wrong_with_torch(path, error)}") from error


def _why_unsafe(path: Path, message: str) -> str:
    names = _globals_named(path, message)
    if not names:
        detail = _first_line(message.partition("WeightsUnpickler error:")[2] or message)
        return f"{path} is no weights file that torch can read safely ({detail})"
    return (
        f"{path} holds more than weights: it names {', '.join(names[:8])}. Reading it could run code, so it was not read. If you trust "
        f"its author, convert it once, on a machine that may be lost: python -c \"import torch; c = torch.load('{path.name}', "
        f"weights_only=False); torch.save(c.get('model', c), 'weights.pth')\""
    )


def _globals_named(path: Path, message: str) -> list[str]:
    """Return the functions and classes that a refused pickle names, without executing it."""
    if zipfile.is_zipfile(path):
        with contextlib.suppress(Exception):  # a hostile archive may be broken as well
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    if found := re.findall(r"(?:GLOBAL|class) ([\w.]+)", message):
        return sorted(set(found))
    names: list[str] = []
    texts: list[str] = []
    with contextlib.suppress(Exception), open(path, "rb") as file:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                names.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                names.append(".".join(texts[-2:]))
            elif isinstance(argument, str):
                texts.append(argument)
    return sorted(set(names))


def _what_is_wrong_with_torch(path: Path, error: Exception) -> str:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4)
    if "legacy .tar format" in str(error):
        return "in torch's format of 2016, which cannot be read safely; convert it with an old torch on a machine that may be lost"
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        return f"truncated: a torch file ends with a list of its parts, and this one stops after {size:,} bytes; fetch it again"
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if "TorchScript" in str(error) or any(name.endswith("/constants.pkl") for name in names):
            return "a TorchScript program, not weights; save its state_dict() with safetensors and pass that"
        if not any(name.endswith("data.pkl") for name in names):
            return (
                f"a zip archive without torch's weights (it holds {', '.join(names[:3]) or 'nothing'}); unpack it and pass the file in it"
            )
    return f"no whole weights file ({size:,} bytes; {_first_line(str(error)) or type(error).__name__}); fetch it again"


def _first_line(text: str) -> str:
    return next((line.strip()[:160] for line in text.splitlines() if line.strip()), "")


# ---- what is inside


def _open_containers(content: Any, path: Path) -> tuple[State, list[str]]:
    """Return the mapping of tensors inside the containers of training scripts, and the names of those containers."""
    opened: list[str] = []
    while isinstance(content, Mapping) and len(opened) < DEPTH_LIMIT:  # a hostile file can hold itself
        inner = next((key for key in CONTAINERS if _has_tensors(content.get(key))), None)
        if inner is None:
            break
        content = content[inner]
        opened.append(inner)
    state = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        what = (
            f"a table of {', '.join(map(repr, list(content)[:5])) or 'nothing'}" if isinstance(content, Mapping) else type(content).__name__
        )
        raise CheckpointError(f"{path} holds no named tensors, but {what}; pass a file with a model's state_dict")
    return state, opened


def _has_tensors(value: Any, depth: int = DEPTH_LIMIT) -> bool:
    if not isinstance(value, Mapping) or depth == 0:
        return False
    return any(isinstance(v, Tensor) or (k in CONTAINERS and _has_tensors(v, depth - 1)) for k, v in value.items())


def _is_wrapped(state: State, prefix: str) -> bool:
    wrapped = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
    clashes = any(name in state for name in wrapped)
    return len(wrapped) >= NEARLY_ALL * len(state) and not clashes and "" not in wrapped


def usual_dtype(state: Mapping[str, Tensor]) -> torch.dtype | None:
    """Return the dtype of most floating-point values; None if there are none."""
    sizes = Counter[torch.dtype]()
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else None
