"""Refusals: a status of HTTP and the reason in words."""

from __future__ import annotations


class Refusal(Exception):
    """A request that is not answered.

    Args:
        status: of the response, 4xx or 5xx.
        reason: what came, and what is accepted.
        retry: seconds after which the client may try again; None: it need not.
    """

    def __init__(self, status: int, reason: str, *, retry: int | None = None):
        super().__init__(reason)
        self.status, self.reason, self.retry = status, reason, retry

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


class Gone(Exception):
    """The client has closed the connection; no answer can be sent."""


GONE = 499
"""Status under which requests of such clients are counted; it is never sent."""
