"""Limits of the server."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vitarium.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Limits on what clients send and on how long they wait.

    Args:
        top_k: length of ranked answers where the request does not set it, from 1 to `LONGEST_RANKING`.
        batch_size: most images per forward pass. 1: each answer has the bits of `vitarium predict` for that image; more: its last bits can
            depend on how many images arrived together.
        max_wait: milliseconds that an image waits for others to fill a batch.
        max_queue: images that may wait; requests beyond it get 429.
        limit_mb: largest body of a request, megabytes.
        held_mb: megabytes of all bodies that are received or answered at a time, and room for one at least; requests beyond it get 429.
        limit_megapixels: largest image in megapixels, checked before it is decoded.
        files: most images of a request.
        timeout: seconds from the end of a request's body to its answer; then 504.
        body_timeout: seconds in which the body has to arrive; then 408.

    Raises:
        UsageError: a value out of range.
    """

    top_k: int = 5
    batch_size: int = 1
    max_wait: float = 5.0
    max_queue: int = 64
    limit_mb: float = 20.0
    held_mb: float = 400.0
    limit_megapixels: float = 50.0
    files: int = 16
    timeout: float = 60.0
    body_timeout: float = 20.0

    def __post_init__(self) -> None:
        least = {"top_k": 1, "batch_size": 1, "max_wait": 0, "max_queue": 1, "files": 1}
        for name, value in asdict(self).items():
            low = least.get(name, 0)
            if not (low <= value < float("inf")) or (name not in least and value == 0):
                raise UsageError(f"{name} must be {f'at least {low}' if name in least else 'above 0'}, got {value}")
        if self.top_k > LONGEST_RANKING:
            raise UsageError(f"top_k must be at most {LONGEST_RANKING}, got {self.top_k}")

    @property
    def bytes(self) -> int:
        """Largest sum of the files of a body in bytes."""
        return int(self.limit_mb * 1e6)

    @property
    def body_bytes(self) -> int:
        """Largest body in bytes."""
        return self.bytes + OVERHEAD

    @property
    def held_bytes(self) -> int:
        """Largest number of bytes of all bodies that are held at a time."""
        return max(int(self.held_mb * 1e6), self.body_bytes)

    @property
    def pixels(self) -> int:
        """Largest number of pixels of an image."""
        return int(self.limit_megapixels * 1e6)

    @property
    def open_requests(self) -> int:
        """Largest number of requests for answers whose bodies are read or answered at a time."""
        return 2 * self.max_queue + 32

    def to_dict(self) -> dict[str, Any]:
        """Return the limits as plain values."""
        return asdict(self)


LONGEST_RANKING = 1000
"""Largest `top_k`."""
OVERHEAD = 64_000
"""Bytes of a multipart body beside its files."""
