"""Settings of an engine as one value."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vitarium.errors import UsageError, nearest

KINDS = ("local", "ray")


@dataclass(frozen=True)
class Engine:
    """Place where runs and parts are computed, and the resources of each.

    Args:
        kind: "local", processes of this machine; or "ray", tasks and actors of a Ray cluster.
        address: of a running Ray cluster: "auto", or "HOST:PORT". None starts Ray on this machine for the duration of the work.
        jobs: runs (or processes that hold a model) at a time. None: one at a time locally, in the calling process; as many as the
            cluster's CPUs and GPUs allow under Ray.
        cpus: of each of them: its share of the scheduler's CPUs, and PyTorch's threads. None: 1 under Ray, an equal share of the cores
            locally.
        gpus: of each of them; fractions share a device. None: 1 under Ray if the cluster has any, else 0.

    Raises:
        UsageError: an unknown engine, an address without Ray, or a number out of range.
    """

    kind: str = "local"
    address: str | None = None
    jobs: int | None = None
    cpus: float | None = None
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"engine must be one of {', '.join(KINDS)}; got {self.kind!r}{nearest(str(self.kind), KINDS)}")
        if self.address is not None and self.kind != "ray":
            raise UsageError(f"address={self.address!r} is of a Ray cluster; give engine='ray' (--engine ray) with it")
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"jobs must be at least 1, got {self.jobs}")
        if self.cpus is not None and self.cpus <= 0:
            raise UsageError(f"cpus must be above 0, got {self.cpus}")
        if self.gpus is not None and self.gpus < 0:
            raise UsageError(f"gpus must be 0 or more, got {self.gpus}")

    @property
    def in_process(self) -> bool:
        """True if the work runs in the calling process, one item after the other."""
        return self.kind == "local" and self.jobs in (None, 1)


def as_engine(
    engine: str | Engine = "local",
    *,
    address: str | None = None,
    jobs: int | None = None,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Engine:
    """Return the engine that a caller's arguments describe; arguments that are None do not change an `Engine`.

    Raises:
        UsageError: see `Engine`.
    """
    given = {name: value for name, value in dict(address=address, jobs=jobs, cpus=cpus, gpus=gpus).items() if value is not None}
    return replace(engine, **given) if isinstance(engine, Engine) else Engine(engine, **given)  # type: ignore[arg-type]
