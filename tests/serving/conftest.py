"""A small classifier, images, and a real server on this machine."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import vitarium

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")


def png(seed: int, side: int = 24) -> bytes:
    """Return a random PNG."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Running:
    """A server that runs in a thread.

    Attributes:
        url: its address.
        state: its state.
        server: to stop it.
        thread: that runs it.
        client: one for all requests; it opens as many connections as there are requests at a time.
        gate: the model waits for it.
        entered: set when the model has been called while the gate was closed.
    """

    url: str
    state: Any
    server: Any
    thread: threading.Thread
    client: httpx.Client
    gate: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def post(self, content: bytes, path: str = "/predict", **options: Any) -> httpx.Response:
        headers = {"Content-Type": "image/png"} | options.pop("headers", {})
        return self.client.post(f"{self.url}{path}", content=content, headers=headers, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(f"{self.url}{path}", **options)


@contextlib.contextmanager
def running(model: Any, *, local: bool = True, **options: Any) -> Iterator[Running]:
    from vitarium.serving.server import Server, bind, url_of
    from vitarium.verbs.serve import create_app

    listening = threading.Event()
    app = create_app(model, device="cpu", local=local, **options)
    with bind("127.0.0.1", 0) as made:
        server = Server(app, app.state.vitarium, listening.set)
        thread = threading.Thread(target=server.run, args=([made],), daemon=True)
        client = httpx.Client(timeout=60, verify=False)  # without TLS, whose certificates take long to read
        one = Running(url_of(made), app.state.vitarium, server, thread, client)

        def wait(*_: Any) -> None:
            if not one.gate.is_set():
                one.entered.set()
                assert one.gate.wait(60)

        one.gate.set()
        handle = model.register_forward_pre_hook(wait)
        thread.start()
        try:
            assert listening.wait(60)
            yield one
        finally:
            one.gate.set()
            client.close()
            server.stop()
            thread.join(60)
            handle.remove()
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def model() -> Any:
    torch.manual_seed(0)
    made = vitarium.create_model("swin_pico", num_classes=10)
    made.labels = [f"<i>{name}</i>" for name in "abcdefghij"]
    return made.eval()
