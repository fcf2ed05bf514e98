"""Serve a model over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitarium.errors import UsageError, require
from vitarium.files import is_model_file
from vitarium.verbs.opening import Notify, apply_methods, execute, name_of, open_model, quiet
from vitarium.verbs.result import Result

if TYPE_CHECKING:
    from torch import nn


EXTRA = "serve"


@dataclass(repr=False)
class Served(Result):
    """A server that has ended.

    Attributes:
        model: file or name.
        address: it had.
        requests: number of requests, of all routes, by status of HTTP; 499: the client had gone.
        seconds: it ran.
    """

    model: str
    address: str
    requests: dict[int, int]
    seconds: float

    def facts(self) -> dict[str, Any]:
        counts = ", ".join(f"{count} with status {status}" for status, count in self.requests.items())
        return {"model": self.model, "address": self.address, "requests": counts or "none", "seconds": round(self.seconds, 1)}


def serve(
    model: str | os.PathLike[str] | nn.Module,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    device: str = "auto",
    runtime: str = "eager",
    token: str | None = None,
    top_k: int = 5,
    batch_size: int = 1,
    max_wait: float = 5,
    max_queue: int = 64,
    limit_mb: float = 20,
    limit_megapixels: float = 50,
    timeout: float = 60,
    notify: Notify = quiet,
) -> Served:
    """Serve a model over HTTP until the process is interrupted, and return what was answered.

    The routes are POST /predict (JSON, as `vitarium predict --json`), POST /draw (PNG), GET /info, /healthz, /metrics (Prometheus) and
    / (a page to drop images on). SIGINT or SIGTERM ends it: requests that run are answered, new ones are refused.

    Args:
        model: a file of `vitarium.save`, a model's name, or a model. A model with `apply` is changed.
        host: address to listen on; 127.0.0.1 is this machine only.
        port: 0 takes a free one.
        checkpoint: weights for a name.
        apply: methods to apply first, as "evit:keep=0.7".
        device: "auto", "cpu", "cuda", ...
        runtime: what executes the model: "eager", "compile", "onnxruntime" or "openvino" (see `vitarium.efficiency.runtimes`).
        token: that clients have to send as "Authorization: Bearer TOKEN"; None: none is needed.
        top_k: length of ranked answers where a request sets none.
        batch_size: most images per forward pass. 1: each answer has the bits of `vitarium predict` for that image; more: its last bits can
            depend on how many images arrived together.
        max_wait: milliseconds that an image waits for others to fill a batch.
        max_queue: images that may wait; requests beyond it get 429.
        limit_mb: largest body of a request, megabytes.
        limit_megapixels: largest image, checked before it is decoded.
        timeout: seconds from the end of a request's body to its answer; then 504.
        notify: called with messages about progress; one with the address when the server listens.

    Raises:
        UsageError: a port that is taken, a limit out of range, or a model without an answer for one image.
        CheckpointError: weights that are not available.
        MissingExtra: FastAPI or uvicorn is not installed.
    """
    require_server()
    from vitarium.serving.server import Server, bind, is_loopback, url_of

    with bind(host, port) as made:  # before the model is opened: a taken port is known at once
        notify("Opening the model")
        local = is_loopback(made)
        limits: dict[str, Any] = dict(top_k=top_k, batch_size=batch_size, max_wait=max_wait, max_queue=max_queue, timeout=timeout)
        limits |= dict(limit_mb=limit_mb, limit_megapixels=limit_megapixels)
        given: dict[str, Any] = dict(checkpoint=checkpoint, apply=apply, device=device, runtime=runtime, token=token, notify=notify)
        app = create_app(model, **given, local=local, **limits)
        address, state, begin = url_of(made), app.state.vitarium, time.monotonic()
        if not local and token is None:
            notify("Without a token, everybody who reaches this machine can use the server\n")

        def announce() -> None:
            notify(f"{address} serves {name_of(model)} (Ctrl-C ends it)\n")
            notify("Serving")

        Server(app, state, announce).run(sockets=[made])
    return Served(name_of(model), address, state.metrics.by_status(), time.monotonic() - begin)


def create_app(
    model: str | os.PathLike[str] | nn.Module,
    *,
    checkpoint: str | None = None,
    apply: Sequence[Any] | None = None,
    device: str = "auto",
    runtime: str = "eager",
    token: str | None = None,
    name: str | None = None,
    local: bool = True,
    notify: Notify = quiet,
    **limits: Any,
) -> Any:
    """Return the FastAPI application that `serve` runs, for a server of your own.

    Args:
        model, checkpoint, apply, device, runtime, token, notify: see `serve`.
        name: of the model in answers; None: file or name as it was given.
        local: without a token, accept only requests to this machine's own names (localhost, 127.0.0.1, ::1).
        limits: fields of `vitarium.serving.limits.Limits`.

    Raises:
        UsageError: see `serve`.
    """
    require_server()
    from vitarium.catalog.create import preprocessing_of
    from vitarium.catalog.heads import require_head
    from vitarium.serving.app import make_app, warm_up
    from vitarium.serving.limits import Limits
    from vitarium.serving.state import LOOPBACK, State
    from vitarium.training.tasks import task_of
    from vitarium.version import __version__

    unknown = set(limits) - set(Limits.__dataclass_fields__)
    if unknown:
        raise UsageError(f"unknown limits: {', '.join(sorted(unknown))}; there are {', '.join(Limits.__dataclass_fields__)}")
    if token is not None and (not token.strip() or not token.isascii() or any(c.isspace() for c in token)):
        raise UsageError("the token must be ASCII text without spaces")
    checked = Limits(**limits)
    opened = apply_methods(open_model(model, checkpoint), apply, None, notify)
    require_head(opened)
    task, preprocessing = task_of(opened), preprocessing_of(opened)
    if task.result_kind is None:
        raise UsageError(task.refusal())
    if preprocessing.frames is not None:
        raise UsageError("this model takes clips, and the server takes single images; 'vitarium predict' takes videos")
    source = model if is_model_file(model) and not apply else None
    opened = execute(opened, runtime, device=device, task=task, source=source, notify=notify)
    shown = name or name_of(model)
    about = {
        "vitarium": __version__,
        "model": Path(shown).name if is_model_file(shown) else shown,  # without the folders of this machine
        "architecture": getattr(getattr(opened, "spec", None), "name", type(opened).__name__),
        "task": task.name,
        "labels": getattr(opened, "labels", None),
        "preprocessing": preprocessing.to_dict(),
        "runtime": runtime,
        "methods": [report.method.slug for report in getattr(opened, "methods", [])],
        "limits": checked.to_dict(),
    }
    state = State(opened, task, checked, about, token=token, hosts=LOOPBACK if local else None)
    app = make_app(state)
    warm_up(state)
    return app


def require_server() -> None:
    """Raise MissingExtra unless the packages of the server are installed."""
    for package in ("fastapi", "uvicorn", "python_multipart"):
        require(package, EXTRA)
