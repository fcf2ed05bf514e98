"""Processing of many images: a long list is divided into parts, each computed by a process that holds the model.

A part is a run of consecutive items. Its value does not depend on where it is computed, so that the engine, the number of processes and the
loss of a machine do not change results. With a folder, each part is a file in it, written atomically, and a later call computes the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vitarium.engine.settings import Engine, as_engine
from vitarium.engine.worker import portable, prepare
from vitarium.errors import TrainingStopped, UsageError
from vitarium.files import atomic_path, lock_folder, write_json

log = logging.getLogger("vitarium")

IDENTITY = "parts.json"
ATTEMPTS = 2
"""Number of attempts at a part that fails or loses its process or machine."""
PART_BATCHES = 8
"""Default number of batches in a part: large enough to hide the overhead of a part, small enough to lose little."""

Part = Callable[..., Any]


def map_images(
    function: Part,
    items: Sequence[Any],
    *,
    shared: Sequence[Any] = (),
    part_size: int,
    engine: str | Engine = "local",
    parts: str | os.PathLike[str] | None = None,
    identity: Any = None,
    keep: Sequence[Any] = (),
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> list[Any]:
    """Return function(items[i : i + part_size], *shared) for each part, in order.

    Args:
        function: a function of a module. Its result may consist of tensors, numbers, strings, and lists, tuples and dictionaries of them.
        items: paths, indices, labels; small picklable values.
        shared: objects that every part needs (models, image sets), sent to each process once. Under Ray modules are moved to the device of
            the process (a GPU if it has one); locally they are not moved.
        part_size: items per part. A multiple of the batch size that `function` uses, so that batches do not depend on the division.
        engine: "local", one process, this one; "ray", a pool of Ray Data's actors; or an `Engine` with all settings.
        parts: folder for the parts, removed when all are done; on a cluster it must be on a disk that all machines share. None: values
            stay in memory, and an interrupted call begins again.
        identity: JSON value of everything besides items and part_size that determines the results, such as a model's fingerprint and
            options. A folder of parts of another identity is emptied, and so is one of another list.
        keep: values of `finished_parts` of another list that are still needed; they stay in the folder until all parts are done.
        progress: called with the number of finished items and of all items.

    Raises:
        MissingExtra: the engine is "ray" and Ray is not installed.
        UsageError: another process uses the folder, the cluster cannot access it, or several jobs without Ray.
        Exception: the error of a part that failed twice, or a user error at once.
    """
    if part_size < 1:
        raise UsageError(f"part_size must be at least 1, got {part_size}")
    where = as_engine(engine)
    if where.kind == "local" and not where.in_process:
        raise UsageError(f"several processes for images (jobs={where.jobs}) are Ray's: give engine='ray' (--engine ray) with them")
    starts = range(0, len(items), part_size)
    with _Parts.open(parts, items, part_size, identity, keep) as store:
        missing = [i for i in range(len(starts)) if not store.has(i)]
        done = len(items) - sum(len(items[starts[i] : starts[i] + part_size]) for i in missing)
        progress(done, len(items))
        work = [(i, items[starts[i] : starts[i] + part_size]) for i in missing]
        compute = _on_ray if where.kind == "ray" and work else _here
        for number, payload in compute(function, work, shared, where, store.folder):
            done += len(items[starts[number] : starts[number] + part_size])
            store.take(number, payload)
            progress(done, len(items))
        return [store.value(i) for i in range(len(starts))]


class _Parts:
    """The values of parts: in memory, or as files of a folder that this process holds."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.values: dict[int, Any] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Any, items: Sequence[Any], part_size: int, identity: Any, keep: Sequence[Any]) -> Iterator[_Parts]:
        if folder is None:
            yield cls(None)
            return
        path = Path(folder).absolute()
        digest = hashlib.sha256(repr(list(items)).encode()).hexdigest()
        wanted = json.loads(json.dumps({"items": digest, "part_size": part_size, "identity": identity}))
        with lock_folder(path):
            if _read_json(path / IDENTITY) != wanted:
                _replace_parts(path, keep)
                write_json(path / IDENTITY, wanted)
            yield cls(path)
            shutil.rmtree(path, ignore_errors=True)

    def has(self, number: int) -> bool:
        return self.folder is not None and file_of(self.folder, number).exists()

    def take(self, number: int, payload: bytes | None) -> None:
        """Store a part's value; None stands for one that was written to the folder."""
        if payload is not None:
            self.values[number] = unpack(payload)
        elif not self.has(number):
            raise UsageError(
                f"a part is finished, but {self.folder} does not hold it: the folder must be on a disk that all machines share"
            )

    def value(self, number: int) -> Any:
        if number in self.values:
            return self.values[number]
        assert self.folder is not None
        return unpack(file_of(self.folder, number).read_bytes())


def finished_parts(folder: str | os.PathLike[str], identity: Any) -> list[Any]:
    """Return the values of all parts of this identity that an interrupted `map_images` left in a folder, for any list."""
    path = Path(folder)
    found = _read_json(path / IDENTITY)
    if not isinstance(found, dict) or found.get("identity") != json.loads(json.dumps(identity)):
        return []
    return [unpack(file.read_bytes()) for file in sorted([*path.glob("kept-*.pt"), *path.glob("part-*.pt")])]


def _replace_parts(folder: Path, keep: Sequence[Any]) -> None:
    """Delete the parts of another list after the values to keep were written."""
    old = {*folder.glob("part-*.pt"), *folder.glob("kept-*.pt")}
    for value in keep:
        payload = pack(value)
        path = folder / f"kept-{hashlib.sha256(payload).hexdigest()[:16]}.pt"
        with atomic_path(path) as temporary:
            temporary.write_bytes(payload)
        old.discard(path)
    for path in old:
        path.unlink()


def file_of(folder: Path, number: int) -> Path:
    """Return the file of a part."""
    return folder / f"part-{number:06d}.pt"


def pack(value: Any) -> bytes:
    """Return a value as the bytes of a torch file, which is read back without running code."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(payload: bytes) -> Any:
    """Return the value of `pack`."""
    import torch

    return torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _compute(function: Part, items: Any, shared: Sequence[Any], number: int, folder: Path | None) -> bytes | None:
    """Compute a part; return its value as bytes, or None if it was written to the folder."""
    payload = pack(function(items, *shared))
    if folder is None:
        return payload
    with atomic_path(file_of(folder, number)) as temporary:
        temporary.write_bytes(payload)
    return None


def _here(
    function: Part, work: Iterable[tuple[int, Any]], shared: Sequence[Any], engine: Engine, folder: Path | None
) -> Iterator[tuple[int, bytes | None]]:
    for number, items in work:
        yield number, _compute(function, items, shared, number, folder)


# ---- Ray Data


class _Actor:
    """One process of the pool: holds the shared objects, and computes parts."""

    def __init__(self, function: Part, shared: Any, folder: Path | None, threads: int, cwd: str):
        import ray
        import torch
        from torch import nn

        prepare(threads, cwd)
        device = torch.device("cuda") if ray.get_gpu_ids() and torch.cuda.is_available() else torch.device("cpu")
        self.function, self.folder = function, folder
        self.shared = [value.to(device) if isinstance(value, nn.Module) else value for value in ray.get(shared)]

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        numbers, payloads, errors = [], [], []
        for number, packed in zip(batch["number"], batch["items"], strict=True):
            payload, failure = b"", b""
            try:
                payload = _compute(self.function, _unpickle(packed), self.shared, int(number), self.folder) or b""
            except Exception as error:  # an exception would end the whole pipeline
                failure = _pickle(portable(error))
            numbers.append(int(number))
            payloads.append(payload)
            errors.append(failure)
        return {"number": numbers, "payload": payloads, "error": errors}


def _pickle(value: Any) -> bytes:
    return pickle.dumps(value)


def _unpickle(value: bytes) -> Any:
    return pickle.loads(value)  # created by this process or its actors, never read from a file


def _on_ray(
    function: Part, work: Iterable[tuple[int, Any]], shared: Sequence[Any], engine: Engine, folder: Path | None
) -> Iterator[tuple[int, bytes | None]]:
    """Yield all parts from a pool of actors; parts that fail, or are lost with the whole pipeline, are tried once more."""
    from vitarium.engine.cluster import RayConnection

    connection = RayConnection(engine)
    rest = dict(work)
    try:
        with _on_cpu(shared) as values:
            reference = connection.ray.put(list(values))
        for attempt in range(1, ATTEMPTS + 1):
            failures: dict[int, tuple[Exception, str]] = {}
            try:
                for number, payload, error in _pipeline(connection, function, rest, reference, engine, folder):
                    if error:
                        failures[number] = _unpickle(error)
                        continue
                    del rest[number]
                    yield number, payload or None
            except connection.ray.exceptions.RayError as error:
                if attempt == ATTEMPTS:
                    raise TrainingStopped(f"the Ray cluster lost {len(rest)} parts twice ({type(error).__name__}: {error})") from error
                log.warning("Ray lost its work (%s); continuing with the %d parts that are left", type(error).__name__, len(rest))
            raise_lasting(failures, last=attempt == ATTEMPTS)
            if not rest:
                return
    finally:
        connection.close()


def raise_lasting(failures: dict[int, tuple[Exception, str]], *, last: bool) -> None:
    """Raise the error of a part if a second attempt would not help or has failed."""
    from vitarium.engine.runs import worth_a_retry

    for number, (error, text) in sorted(failures.items()):
        if last or not worth_a_retry(error):
            log.debug("part %d failed:\n%s", number, text)
            raise error
        log.warning("part %d failed (%s), and is tried once more", number, "".join(traceback.format_exception_only(error)).strip())


def _pipeline(
    connection: Any, function: Part, work: dict[int, Any], shared: Any, engine: Engine, folder: Path | None
) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, payload and pickled error of each part in the order in which Ray Data returns them."""
    import ray.data

    rows = [{"number": number, "items": _pickle(items)} for number, items in work.items()]
    most = engine.jobs or max(1, min(len(rows), _room(connection)))
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        _Actor,
        batch_size=1,
        fn_constructor_args=(function, shared, folder, connection.threads, os.getcwd()),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(rows))),
        **connection.options,
    )
    with _quiet_ray_data():
        for row in results.iter_rows():
            yield int(row["number"]), row["payload"], row["error"]


@contextlib.contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Switch off Ray Data's progress bars and messages within the context."""
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        logger.setLevel(before[1])


def _room(connection: Any) -> int:
    """Return the number of actors that fit on the cluster's CPUs and GPUs."""
    resources = connection.ray.cluster_resources()
    counts = [resources.get("CPU", 1) / connection.cpus] + ([resources.get("GPU", 0) / connection.gpus] if connection.gpus else [])
    return max(1, int(min(counts)))


@contextlib.contextmanager
def _on_cpu(shared: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Yield the shared objects with their modules on the CPU, so that any machine can load them; move them back afterwards."""
    from torch import nn

    places = [(m, p.device) for m in shared if isinstance(m, nn.Module) and (p := next(m.parameters(), None)) is not None]
    for module, _ in places:
        module.to("cpu")
    try:
        yield shared
    finally:
        for module, device in places:
            module.to(device)
