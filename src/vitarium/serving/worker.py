"""The queue of images, and the one thread that runs the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from vitarium.serving.limits import Limits
from vitarium.serving.metrics import Metrics
from vitarium.serving.refusals import Refusal


@dataclass
class Job:
    """One image that waits for its answer.

    Attributes:
        content: the file's bytes.
        top_k: length of a ranked answer.
        draw: whether the answer is drawn.
        deadline: `time.monotonic()` after which its answer is no longer wanted.
        answer: of `run` (see `Worker`); it is cancelled when the client has gone.
    """

    content: bytes
    top_k: int
    draw: bool
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[Any] = field(default_factory=Future)


class Worker:
    """A bounded queue and a thread that answers its images in batches.

    Args:
        run: jobs of one `top_k` -> their answers, in order; called in the thread.
        limits: batch_size, max_wait and max_queue are used.
        metrics: counts batches and dropped images.
    """

    def __init__(self, run: Callable[[Sequence[Job]], list[Any]], limits: Limits, metrics: Metrics):
        self._run, self._limits, self._metrics = run, limits, metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, name="vitarium-worker", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, timeout: float = 10.0) -> None:
        """Let the thread finish the batch that runs, and cancel the rest."""
        with self._changed:
            self._stopping = True
            for job in self._jobs:
                job.answer.cancel()
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put the images of a request into the queue, all or none.

        Raises:
            Refusal: the queue has no room (429), or the server stops (503).
        """
        with self._changed:
            if self._stopping:
                raise Refusal(503, "the server is stopping", retry=5)
            self._drop_cancelled()
            if len(self._jobs) + len(jobs) > self._limits.max_queue:
                raise Refusal(429, f"the queue is full ({len(self._jobs)} images wait, at most {self._limits.max_queue})", retry=1)
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def _drop_cancelled(self) -> None:
        kept = [job for job in self._jobs if not job.answer.cancelled()]
        for _ in range(len(self._jobs) - len(kept)):
            self._metrics.count_dropped()
        self._jobs = deque(kept)

    def _loop(self) -> None:
        while True:
            with self._changed:
                batch = self._next_batch()
            if batch is None:
                return
            if batch:
                self._metrics.count_batch(len(batch))
                self._answer(batch)

    def _next_batch(self) -> list[Job] | None:
        """Wait for images and take those of the next batch; None when the server stops."""
        self._changed.wait_for(lambda: self._jobs or self._stopping)
        if self._limits.batch_size > 1 and not self._stopping:
            end = self._jobs[0].arrived + self._limits.max_wait / 1000
            self._changed.wait_for(lambda: len(self._jobs) >= self._limits.batch_size or self._stopping, max(0.0, end - time.monotonic()))
        if self._stopping:
            return None
        batch: list[Job] = []
        while self._jobs and len(batch) < self._limits.batch_size and (not batch or self._jobs[0].top_k == batch[0].top_k):
            job = self._jobs.popleft()
            if time.monotonic() > job.deadline:
                job.answer.cancel()
            if job.answer.set_running_or_notify_cancel():
                batch.append(job)
            else:
                self._metrics.count_dropped()
        return batch

    def _answer(self, batch: list[Job]) -> None:
        try:
            answers = self._run(batch)
        except Exception as error:
            if len(batch) > 1:  # one image may be at fault
                for job in batch:
                    self._answer([job])
                return
            batch[0].answer.set_exception(error)
            return
        for job, answer in zip(batch, answers, strict=True):
            job.answer.set_result(answer)
