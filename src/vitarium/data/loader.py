"""Batches whose order and augmentation are pure functions of seed, epoch and index, for any number of workers.

    order        (seed, epoch)               -> a permutation of the samples
    randomness   (seed, epoch, index, copy)  -> the state of Python's, NumPy's and torch's generators while one sample is read

An epoch can therefore begin at any step without reading the earlier ones, and a resumed run gets the same batches as an uninterrupted one.

With W ranks and batches of b, step s of an epoch covers samples s*W*b to (s+1)*W*b of the order, and rank r takes the r-th block of b: the
union over ranks is the batch of one process with W*b. Training (`drop_last`) leaves out the last incomplete global batch, so that all ranks
make the same number of full steps; evaluation distributes the samples in turn without padding, so that each is counted once (ranks may then
differ by one batch).
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from vitarium.catalog.preprocessing import Preprocessing
from vitarium.data.bad_files import BadFiles, BrokenImage
from vitarium.data.fields import PAIRS, Collate, Sample
from vitarium.data.order import balanced, class_numbers, shuffled
from vitarium.data.workers import WaitingWatch, end_at_exit, end_workers, signals_held_back, start_worker, workers_of
from vitarium.errors import DataError

MEMORY_BYTES = 256 * 2**20
"""Largest size in bytes of the in-process cache of samples without random transforms."""

_MASK = 2**64 - 1


def mix(*values: int) -> int:
    """Hash several numbers to one of 64 bits (splitmix64); similar keys give unrelated numbers."""
    state = 0
    for value in values:
        state = ((state ^ (value & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_generators(*key: int) -> None:
    """Set Python's, NumPy's and torch's CPU generator from a key. About 10 us; `torch.manual_seed` alone takes ten times that."""
    seed = mix(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Restore Python's, NumPy's and torch's CPU generators at the end of the context."""
    numpy_generator = np.random.get_bit_generator()
    states = random.getstate(), numpy_generator.state, torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy_generator.state = states[1]
        torch.default_generator.set_state(states[2])


@dataclass(frozen=True)
class _Plan:
    """One batch to read: the samples, and the copy of each (see `repeats`)."""

    epoch: int
    indices: list[int]
    copies: list[int]


@dataclass(frozen=True)
class _Failure:
    """An error in a worker as text, because the exception may not be picklable."""

    index: int
    reason: str


class _Reader:
    """Reader of whole batches, in the main process or in a worker (torch calls `__getitems__` for a batch at once)."""

    def __init__(
        self,
        dataset: Any,
        transform: Callable[..., Any],
        collate: Callable[[list[Any]], dict[str, Any]],
        seed: int,
        memory: dict[int, Any] | None,
        workers: int,
    ):
        self.dataset, self.transform, self.collate, self.seed, self.memory = dataset, transform, collate, seed, memory
        self.joint, self.named = bool(getattr(transform, "joint", False)), bool(getattr(transform, "named", False))
        self.check: Callable[[Any], None] | None = getattr(collate, "check", None)
        self.reading = torch.full((max(1, workers),), -1).share_memory_()  # the sample that each worker reads, for error messages

    def __getitems__(self, plan: _Plan) -> dict[str, Any] | _Failure:
        worker = get_worker_info()
        place = worker.id if worker else 0
        samples, indices, positions, broken = [], [], [], []
        for position, (index, copy) in enumerate(zip(plan.indices, plan.copies, strict=True)):
            self.reading[place] = index
            try:
                samples.append(self._sample(plan.epoch, index, copy))
            except BrokenImage as error:
                broken.append((error.path, error.reason))
                continue
            except Exception as error:
                failure = _Failure(index, f"{type(error).__name__}: {error}")
                if worker:
                    return failure
                raise _data_error(self.dataset, failure) from error
            indices.append(index)
            positions.append(position)
        self.reading[place] = -1
        try:
            batch = self.collate(samples)
        except Exception as error:  # samples of different shapes, for example
            failure = _Failure(indices[0] if indices else plan.indices[0], f"its batch cannot be collated: {error}")
            if worker:
                return failure
            raise _data_error(self.dataset, failure) from error
        numbers = {"index": torch.tensor(indices, dtype=torch.int64), "position": torch.tensor(positions, dtype=torch.int64)}
        return {**batch, **numbers, "broken": broken}

    def _sample(self, epoch: int, index: int, copy: int) -> Any:
        if self.memory is not None and index in self.memory:
            return self.memory[index]
        seed_generators(self.seed, epoch, index, copy)
        item = self.dataset[index]
        sample = self._fields(item) if isinstance(item, Sample) else self._pair(*item)
        if self.memory is not None:
            self.memory[index] = sample
        return sample

    def _pair(self, image: Any, target: Any) -> tuple[Any, Any]:
        return self.transform(image, target) if self.joint else (self.transform(image), target)

    def _fields(self, sample: Sample) -> Sample:
        """Transform a sample with named fields: as a whole by a transform with `named`, else its image (and target) like a pair's."""
        if self.named:
            made = self.transform(sample)
        elif self.joint:
            image, target = self.transform(sample.get("image"), sample.get("target"))
            made = Sample(sample | {"image": image, "target": target})
        else:
            made = sample.map(image=self.transform)
        if self.check is not None:
            self.check(made)
        return made


_PAIRS = Collate(PAIRS)


def stack(samples: list[tuple[Tensor, Any]]) -> dict[str, Any]:
    """Stack samples of one size: {"image": (B, C, H, W), "target": (B, ...)}, both empty if there are none."""
    return _PAIRS(samples)


class _Sampler:
    """The batches of the current epoch, updated in place while the workers live."""

    def __init__(self) -> None:
        self.plans: list[_Plan] = []

    def __iter__(self) -> Iterator[_Plan]:
        return iter(self.plans)

    def __len__(self) -> int:
        return len(self.plans)


class Loader:
    """Batches of an image set, `{"image": (B, C, H, W) float32, "target": (B,) int64, "index": (B,) int64}`; clips are (B, C, T, H, W).

    "position" (B,) int64 numbers the samples within the batch, counting those that could not be read.

    An image that raises `BrokenImage` is recorded and left out: its batch is smaller by one, and it is not replaced. A batch
    without any readable image is empty (B = 0).

    Args:
        dataset: gives (image, target), or a `Sample` with named fields (see `vitarium.data.fields`), by index; its length is fixed.
            An optional `describe(index)` returns the name of a sample for messages.
        transform: image -> (C, H, W); may draw from Python's, NumPy's and torch's global generators. With a true attribute `joint`:
            (image, target) -> (tensor, target); with `named`: `Sample` -> `Sample`. One without either changes the field "image" of a
            `Sample`.
        collate: list of (tensor, target) or `Sample`, which may be empty -> the batch, without "index". A `Collate` checks each sample.
        batch_size: samples per batch on this rank.
        seed: of the order and of the augmentation.
        shuffle: a new order each epoch; else the order of the set.
        drop_last: leave out the last incomplete global batch (training); else evaluate every sample once.
        rank, world_size: this process among those that divide each epoch.
        num_workers: processes that read ahead; 0 reads in this process, which is best for small images in memory.
        bad_files: record of unreadable images; more than it allows stop the epoch.
        repeats: number of differently augmented copies of a sample in an epoch (repeated augmentation; the epoch keeps its length and sees
            fewer different samples).
        balance: an order in which every class occurs equally often (see `vitarium.data.order.balanced`); the set has class numbers as
            `targets`.
        timeout: seconds without a batch, or any worker going on to another sample, after which the workers are considered stuck.

    Raises:
        DataError: no samples; with `drop_last` fewer than one global batch; with `balance` no class numbers.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[..., Any],
        *,
        batch_size: int,
        collate: Callable[[list[Any]], dict[str, Any]] = stack,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        bad_files: BadFiles | None = None,
        repeats: int = 1,
        balance: bool = False,
        timeout: float = 50.0,
    ):
        if len(dataset) == 0:
            raise DataError("the data holds no samples")
        if drop_last and len(dataset) < batch_size * world_size:
            fit = max(1, len(dataset) // world_size)
            raise DataError(
                f"{len(dataset)} training images are fewer than one batch ({batch_size} a process, {world_size} process"
                f"{'es' if world_size > 1 else ''}); use batch_size={fit} (--batch-size {fit}) or less, or more data"
            )
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.repeats = shuffle, drop_last, repeats
        self._classes = class_numbers(dataset.targets) if balance else None
        self.rank, self.world_size = rank, world_size
        self.num_workers, self.timeout, self.bad_files = num_workers, timeout, bad_files
        keep = num_workers == 0 and isinstance(transform, Preprocessing) and _bytes(transform) * len(dataset) <= MEMORY_BYTES
        self._reader = _Reader(dataset, transform, collate, seed, {} if keep else None, num_workers)
        self._sampler = _Sampler()
        self._workers: DataLoader | None = None

    @property
    def steps(self) -> int:
        """Return the number of batches of an epoch on this rank."""
        count = len(self.dataset)
        if self.drop_last:
            return count // (self.batch_size * self.world_size)
        return -(-len(range(self.rank, count, self.world_size)) // self.batch_size)

    def plan(self, epoch: int, start_step: int = 0) -> list[_Plan]:
        """Return the batches of an epoch on this rank from a step on, without reading."""
        count = len(self.dataset)
        if self._classes is not None:
            order = balanced(self._classes, self.seed, epoch)
        else:
            order = shuffled(count, self.seed, epoch) if self.shuffle else np.arange(count)
        order, copies = order[np.arange(count) // self.repeats], np.arange(count) % self.repeats  # of any number of repeats
        if self.drop_last:
            shape = self.steps, self.world_size, self.batch_size
            used = self.steps * self.world_size * self.batch_size
            order, copies = (values[:used].reshape(shape)[:, self.rank].reshape(-1) for values in (order, copies))
        else:
            order, copies = order[self.rank :: self.world_size], copies[self.rank :: self.world_size]
        size = self.batch_size
        return [
            _Plan(epoch, order[s * size : (s + 1) * size].tolist(), copies[s * size : (s + 1) * size].tolist())
            for s in range(start_step, self.steps)
        ]

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Yield the batches of an epoch, from a step on (earlier ones are not read).

        Raises:
            DataError: a sample cannot be read for a reason other than a broken file, a worker dies or hangs (the message names the
                sample), or more images are broken than `bad_files` allows.
        """
        plans = self.plan(epoch, start_step)
        batches = self._from_workers(plans) if self.num_workers else self._in_process(plans)
        for batch in batches:
            if isinstance(batch, _Failure):
                self.close()
                raise _data_error(self.dataset, batch)
            broken = batch.pop("broken")
            if broken and self.bad_files is not None:
                for path, reason in broken:
                    self.bad_files.record(path, reason)
                self.bad_files.check(len(self.dataset))
            yield batch

    def close(self) -> None:
        """Stop the workers; the next epoch starts new ones."""
        processes = workers_of(self._workers)
        self._workers = None  # they are asked to end, and have a few seconds
        end_workers(processes)

    def _in_process(self, plans: list[_Plan]) -> Iterator[dict[str, Any] | _Failure]:
        for plan in plans:
            with generators_kept():
                batch = self._reader.__getitems__(plan)
            yield batch

    def _from_workers(self, plans: list[_Plan]) -> Iterator[dict[str, Any] | _Failure]:
        self._sampler.plans = plans
        if self._workers is None:
            self._workers = DataLoader(
                self._reader,  # type: ignore[arg-type]
                batch_sampler=self._sampler,  # type: ignore[arg-type]
                num_workers=self.num_workers,
                collate_fn=_unchanged,
                persistent_workers=True,
                timeout=self.timeout,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=functools.partial(start_worker, of_main_thread=threading.current_thread() is threading.main_thread()),
                generator=torch.Generator(),  # otherwise each epoch would draw a number from the global generator
            )
        self._reader.reading.fill_(-1)
        with signals_held_back():
            batches = iter(self._workers)
        processes = workers_of(self._workers)
        end_at_exit(processes)
        with WaitingWatch(self.timeout, self._reader.reading, processes, self._where) as watch:
            while True:
                try:
                    with watch.waiting():
                        batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, EOFError, OSError) as error:  # readers return errors, so a worker was killed or is stuck
                    hangs = "timed out" in str(error)
                    if hangs and watch.busy():
                        continue  # slow, but no worker is stuck; the watch has said so
                    message = self._post_mortem(processes, error, hangs=hangs or watch.ended, found=watch.found)
                    end_workers(processes)  # do not wait for a stuck worker
                    self.close()
                    raise DataError(message) from error
                yield batch

    def _where(self) -> str:
        """Return in words which samples the workers are reading."""
        samples = [index for index in self._reader.reading.tolist() if index >= 0]
        return f"reading {', '.join(_name(self.dataset, index) for index in samples)}" if samples else "not reading a sample"

    def _post_mortem(self, processes: list[Any], error: Exception, *, hangs: bool, found: str) -> str:
        if not hangs:  # a connection breaks a moment before its process has ended
            ended = multiprocessing.connection.wait([process.sentinel for process in processes], timeout=5)
            for process in processes:
                if process.sentinel in ended:
                    process.join(timeout=5)  # its pipes close a moment before it can be reaped
        dead = [] if hangs else [i for i, process in enumerate(processes) if not process.is_alive()]
        reading = self._reader.reading.tolist()
        samples = [reading[i] for i in dead or range(len(reading)) if reading[i] >= 0]
        if dead:
            codes = ", ".join(str(processes[i].exitcode) for i in dead)
            what = f"{len(dead)} of {self.num_workers} data workers died (exit code {codes})"
        elif hangs:
            what = f"the data workers gave no batch for {self.timeout:g} seconds"
        else:
            what = f"the data workers failed ({error})"
        where = f" while reading {', '.join(_name(self.dataset, i) for i in samples)}" if samples else ""
        return f"{what}{where}{found}; num_workers=0 reads in the main process and shows what happens (too little memory is a common cause)"


def _unchanged(batch: Any) -> Any:
    return batch


def _bytes(transform: Preprocessing) -> int:
    return 4 * transform.channels * (transform.frames or 1) * transform.image_size**2


def _name(dataset: Any, index: int) -> str:
    describe = getattr(dataset, "describe", None)
    return f"sample {index} ({describe(index)})" if describe else f"sample {index}"


def _data_error(dataset: Any, failure: _Failure) -> DataError:
    return DataError(f"cannot read {_name(dataset, failure.index)}: {failure.reason}")
