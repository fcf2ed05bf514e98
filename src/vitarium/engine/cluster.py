"""Execution of runs as Ray tasks: the connection to a cluster, and the backend of `run_all`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vitarium.engine.jobs import Job, Message
from vitarium.engine.settings import Engine
from vitarium.engine.worker import execute, portable, prepare, wait_until_free
from vitarium.errors import TrainingStopped, UsageError, require

log = logging.getLogger("vitarium")

POLL_SECONDS = 0.2
LOCALHOST = "127.0.0.1"


class RayConnection:
    """A connection to a Ray cluster; Ray is started on this machine if there is no address and no connection yet.

    A local Ray listens only on 127.0.0.1, without dashboard and usage statistics, and ends with `close`.

    Args:
        engine: of kind "ray".

    Raises:
        MissingExtra: Ray is not installed.
        UsageError: no cluster at the address, or no machine with the resources of one run.
    """

    def __init__(self, engine: Engine):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # otherwise it warns on stderr about Ray Data's own actors
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; otherwise it warns
        self.ray: Any = require("ray", "cluster")
        self.owner = not self.ray.is_initialized()
        if self.owner:
            self._connect(engine)
        try:
            resources = self.ray.cluster_resources()
            self.gpus = engine.gpus if engine.gpus is not None else 1.0 if resources.get("GPU") else 0.0
            self.cpus = engine.cpus or 1.0
            self._check_resources()
        except BaseException:
            self.close()
            raise

    def _connect(self, engine: Engine) -> None:
        options: dict[str, Any] = {"address": engine.address, "runtime_env": runtime_env()}
        if engine.address is None:
            options |= {"address": "local", "include_dashboard": False, "_node_ip_address": LOCALHOST}
            if engine.gpus == 0:
                options["num_gpus"] = 0
        alone = engine.address is None or engine.address.startswith((LOCALHOST, "localhost"))
        try:
            with on_localhost() if alone else contextlib.nullcontext():
                self.ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as error:
            where = engine.address or "this machine"
            raise UsageError(
                f"cannot connect to Ray at {where}: {error}; 'ray start --head' starts a cluster, and without --address one is started here"
            ) from error

    def _check_resources(self) -> None:
        """Warn, or raise on a single machine, if no machine has enough resources for a run."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if any(node.get("CPU", 0) >= self.cpus and node.get("GPU", 0) >= self.gpus for node in nodes):
            return
        message = f"no machine of the Ray cluster has {self.cpus:g} CPUs and {self.gpus:g} GPUs for one run; give fewer with cpus and gpus"
        if self.owner:
            raise UsageError(message)
        log.warning("%s; waiting for one that has", message)

    @property
    def options(self) -> dict[str, Any]:
        """Return the resources of one task or actor."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    @property
    def threads(self) -> int:
        """Return the number of PyTorch's threads in one task or actor."""
        return max(1, int(self.cpus))

    def close(self) -> None:
        """Disconnect from the cluster, and end it if it was started here."""
        if self.owner and self.ray.is_initialized():
            self.ray.shutdown()


@contextlib.contextmanager
def on_localhost() -> Iterator[None]:
    """Make Ray use 127.0.0.1 while it starts or connects; otherwise it uses this machine's external address and listens on all
    interfaces."""
    constants: Any = require("ray._private.ray_constants", "cluster")
    before, variable = constants.ENABLE_RAY_CLUSTER, constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    inherited = os.environ.get(variable)
    constants.ENABLE_RAY_CLUSTER, os.environ[variable] = False, "0"  # the variable is for Ray's own processes
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        if inherited is None:
            del os.environ[variable]
        else:
            os.environ[variable] = inherited


def runtime_env() -> dict[str, Any]:
    """Return Ray's runtime environment of the workers: this package importable from its path here, and quiet libraries."""
    source = str(Path(__file__).resolve().parents[2])
    paths = [source, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "RAY_USAGE_STATS_ENABLED": "0"}
    return {"env_vars": variables}


class Mailbox:
    """Ray actor on the caller's machine that collects the reports of runs."""

    def __init__(self) -> None:
        self.values: list[tuple[int, int, str, Any]] = []

    def put(self, position: int, attempt: int, kind: str, value: Any) -> None:
        self.values.append((position, attempt, kind, value))

    def take(self) -> list[tuple[int, int, str, Any]]:
        taken, self.values = self.values, []
        return taken


class RayTasks:
    """Execution of each run as a Ray task with its CPUs and GPUs; as many at a time as the cluster allows, or `engine.jobs`."""

    def __init__(self, engine: Engine):
        self.connection = RayConnection(engine)
        self.ray, self.jobs = self.connection.ray, engine.jobs
        self.references: dict[Any, tuple[int, int]] = {}
        self.attempts: dict[int, int] = {}
        try:
            self.mailbox = self._mailbox()
        except BaseException:
            self.connection.close()
            raise
        self.task = self.ray.remote(max_retries=0, **self.connection.options)(_task)

    def _mailbox(self) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self.ray.get_runtime_context().get_node_id(), soft=True)
        return self.ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()

    def has_room(self, running: int) -> bool:
        return self.jobs is None or running < self.jobs

    def start(self, position: int, job: Job) -> None:
        attempt = self.attempts[position] = self.attempts.get(position, 0) + 1
        job = replace(job, folder=job.folder.absolute())  # on a machine without this working folder relative paths would be wrong
        reference = self.task.options(name=job.name).remote(job, position, attempt, self.mailbox, os.getcwd(), self.connection.threads)
        self.references[reference] = position, attempt

    def messages(self) -> Iterator[Message]:
        if not self.references:
            return
        done, _ = self.ray.wait(list(self.references), timeout=POLL_SECONDS)
        for position, attempt, kind, value in self._reports():
            if attempt == self.attempts[position]:
                yield Message(kind, position, value)
        for reference in done:
            position, _ = self.references.pop(reference)
            try:
                kind, value, text = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                kind, value, text = "failed", lost(error), str(error)
            yield Message(kind, position, value, text)

    def _reports(self) -> list[tuple[int, int, str, Any]]:
        """Return the reports since the last call; none if the mailbox does not respond, because the results do not depend on it."""
        try:
            return self.ray.get(self.mailbox.take.remote())
        except self.ray.exceptions.RayError:
            return []

    def close(self, *, cancel: bool) -> None:
        if cancel:
            for reference in self.references:
                with contextlib.suppress(Exception):
                    self.ray.cancel(reference, force=False)
            if self.references:
                with contextlib.suppress(Exception):
                    self.ray.wait(list(self.references), num_returns=len(self.references), timeout=30)
        with contextlib.suppress(Exception):
            self.ray.kill(self.mailbox)
        self.connection.close()


def lost(error: Exception) -> TrainingStopped:
    """Return the error of a run that lost its process or machine, with Ray's reason in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TrainingStopped(f"its process or machine was lost ({type(error).__name__}: {' '.join(lines)[:300]})")


def _task(job: Job, position: int, attempt: int, mailbox: Any, folder: str, threads: int) -> tuple[str, Any, str]:
    """Run one job in a worker of the cluster."""
    import ray

    prepare(threads, folder)

    def report(value: Any, kind: str = "progress") -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the run continues without the mailbox
            ray.get(mailbox.put.remote(position, attempt, kind, value))

    report(None, "started")
    try:
        wait_until_free(job.folder)
        return "done", execute(job, report), ""
    except Exception as error:
        return ("failed", *portable(error))
