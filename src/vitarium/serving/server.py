"""The socket, the signals and the timers of the server."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import ipaddress
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vitarium.errors import UsageError
from vitarium.serving.state import State

HEAD_SECONDS = 15.0
"""Seconds after which a connection that has begun no (further) request is closed."""
DISCARDED = 2**24
"""Bytes of a body that are received and thrown away after its refusal, while the client reads the reason; then the connection is closed. A
body of an accepted size is received to its end: many clients read no answer before."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose client is slow to begin a request, or goes on to send a large body that was refused.

    Args:
        most: bytes of a refused body that are received.
        given: see `H11Protocol`.
    """

    timer: asyncio.TimerHandle | None = None
    discarded = 0

    def __init__(self, *given: Any, most: int = DISCARDED, **named: Any):
        super().__init__(*given, **named)
        self.most = most

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._arm(None)

    def data_received(self, data: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self.discarded += len(data)
            if self.discarded > self.most:
                self.transport.close()
                return
        super().data_received(data)

    def on_response_complete(self) -> None:
        self.discarded = 0
        cycle = self.cycle
        super().on_response_complete()
        self._arm(cycle)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        super().connection_lost(exc)

    def _arm(self, cycle: Any) -> None:
        """Close the connection after a while, unless another request than `cycle` has begun."""
        if self.timer is not None:
            self.timer.cancel()
        self.timer = self.loop.call_later(HEAD_SECONDS, lambda: self.transport.close() if self.cycle is cycle else None)


class Server(uvicorn.Server):
    """Server that ends in order at SIGINT or SIGTERM: requests that run are answered, new ones are refused. A second signal interrupts.

    Args:
        app: see `make_app`.
        state: of the same server.
        announce: called when the server listens.
    """

    def __init__(self, app: Any, state: State, announce: Callable[[], None] = lambda: None):
        limits = state.limits
        super().__init__(
            uvicorn.Config(
                app,
                http=functools.partial(TimedProtocol, most=max(DISCARDED, limits.body_bytes)),  # type: ignore[arg-type]
                ws="none",
                lifespan="on",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=int(limits.timeout + limits.body_timeout) + 5,
            )
        )
        self.state, self.announce = state, announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.announce()

    def stop(self) -> None:
        """Answer what runs, and end."""
        self.state.stopping = True
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs; in other threads than the main one the program's handlers stay."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop at the first signal, interrupt at the second."""
        if self.should_exit:
            raise KeyboardInterrupt
        self.stop()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to an address; it listens when the server starts. Port 0 is one that is free.

    Raises:
        UsageError: the port is taken or not allowed, or the machine does not have the address.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"host must be an address or a name of this machine, got {host!r} ({error})") from error
    made = socket.socket(family, kind, protocol)
    try:
        # on Windows, SO_REUSEADDR would let two programs share a port, without an error for either
        exclusive = getattr(socket, "SO_EXCLUSIVEADDRUSE", None)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR if exclusive is None else exclusive, 1)
        made.bind(address)
    except OSError as error:
        made.close()
        taken = error.errno == errno.EADDRINUSE
        hint = "another program uses it; take another --port, or 0 for a free one" if taken else error.strerror
        raise UsageError(f"cannot listen on {host}:{port}: {hint}") from error
    return made


def url_of(made: socket.socket) -> str:
    """Return the address of a bound socket for a browser."""
    host, port = made.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def is_loopback(made: socket.socket) -> bool:
    """Return whether only programs of this machine reach a socket."""
    return ipaddress.ip_address(made.getsockname()[0].partition("%")[0]).is_loopback
