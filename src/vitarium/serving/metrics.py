"""Numbers of the server in Prometheus' text format."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Histogram:
    """Counts of values by upper bounds.

    Args:
        bounds: ascending.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = tuple(bounds), [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        """Yield the lines of the text format."""
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.6f}"
        yield f"{name}_count {total}"


class Metrics:
    """Counts of requests, images and batches, and the time of answers. Safe in several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds, self._batches = Histogram(SECONDS), Histogram(SIZES)
        self._images = self._dropped = 0

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request; the time of answers to /predict and /draw goes into the histogram."""
        with self._lock:
            self._requests[route, status] += 1
            if route in ("/predict", "/draw") and status == 200:
                self._seconds.add(seconds)

    def count_batch(self, size: int) -> None:
        """Count a forward pass of `size` images."""
        with self._lock:
            self._batches.add(size)
            self._images += size

    def count_dropped(self) -> None:
        """Count an image whose client had gone, or whose time was over, before it ran."""
        with self._lock:
            self._dropped += 1

    def by_status(self) -> dict[int, int]:
        """Return the number of requests of all routes by status."""
        with self._lock:
            found: Counter[int] = Counter()
            for (_, status), count in self._requests.items():
                found[status] += count
            return dict(sorted(found.items()))

    def text(self, waiting: int) -> str:
        """Return all numbers in Prometheus' text format.

        Args:
            waiting: images in the queue.
        """
        with self._lock:
            requests = [
                f'vitarium_requests_total{{route="{route}",status="{status}"}} {count}'
                for (route, status), count in sorted(self._requests.items())
            ]
            parts = [
                ("vitarium_requests_total", "counter", "Requests by route and status.", requests),
                ("vitarium_images_total", "counter", "Images that the model has seen.", [f"vitarium_images_total {self._images}"]),
                ("vitarium_dropped_total", "counter", "Images dropped before they ran.", [f"vitarium_dropped_total {self._dropped}"]),
                ("vitarium_queue_images", "gauge", "Images that wait.", [f"vitarium_queue_images {waiting}"]),
                ("vitarium_answer_seconds", "histogram", "Time of answers.", list(self._seconds.lines("vitarium_answer_seconds"))),
                ("vitarium_batch_images", "histogram", "Images per forward pass.", list(self._batches.lines("vitarium_batch_images"))),
            ]
        return "".join(f"# HELP {name} {text}\n# TYPE {name} {kind}\n" + "\n".join([*lines, ""]) for name, kind, text, lines in parts)
