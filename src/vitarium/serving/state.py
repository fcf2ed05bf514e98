"""The state that routes, middleware and the server share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vitarium.serving.limits import Limits
from vitarium.serving.metrics import Metrics

if TYPE_CHECKING:
    from torch import nn

    from vitarium.serving.worker import Worker
    from vitarium.training.tasks.base import Task

LOOPBACK = frozenset(["localhost", "127.0.0.1", "::1"])
"""Names of this machine, under which a server without a token answers its own users only."""


@dataclass
class State:
    """State of a server.

    Attributes:
        model: in eval mode, on its device.
        task: of the model.
        limits: see `Limits`.
        info: what /info returns.
        token: that requests must carry; None: none.
        hosts: accepted names of this server while there is no token; None: any.
        metrics: counts of requests and images.
        worker: the queue; set by `create_app`.
        ready: whether the warm-up forward has succeeded.
        stopping: whether new requests are refused.
        open_requests: requests for answers that are read or answered.
        held: bytes of their bodies.
        routes: known paths, for metrics.
    """

    model: nn.Module
    task: Task
    limits: Limits
    info: dict[str, Any]
    token: str | None = None
    hosts: frozenset[str] | None = LOOPBACK
    metrics: Metrics = field(default_factory=Metrics)
    worker: Worker = field(init=False)
    ready: bool = False
    stopping: bool = False
    open_requests: int = 0
    held: int = 0
    routes: frozenset[str] = frozenset()
