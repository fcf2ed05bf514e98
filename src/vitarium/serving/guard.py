"""Checks and headers of every request: the token, the sender's origin, headers of responses, counts, and the last resort for errors."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from vitarium.serving.refusals import GONE, Gone, Refusal
from vitarium.serving.state import State

log = logging.getLogger("vitarium")

OPEN = ("/", "/healthz")
"""Routes that need no token: the page, which asks for it, and the check of a supervisor."""
POLICY = "default-src 'none'; frame-ancestors 'none'"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
WRITING = 60.0
"""Seconds that a client has to read a response, in addition to the limits."""


class Guard:
    """ASGI middleware around all routes.

    Args:
        app: what it wraps.
        state: of the server.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], state: State):
        self.app, self.state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                names = {name.lower() for name, _ in message["headers"]}
                more = {**HEADERS, "Content-Security-Policy": POLICY}
                message["headers"] += [(n.lower().encode(), v.encode()) for n, v in more.items() if n.lower().encode() not in names]
            await send(message)

        limits = self.state.limits
        try:
            self._check(scope)
            async with asyncio.timeout(limits.timeout + limits.body_timeout + WRITING):
                await self.app(scope, receive, sending)
        except Gone:
            status = GONE
        except Refusal as refusal:
            await refuse(sending, refusal)
        except Exception as error:
            if isinstance(error, TimeoutError) and status:
                raise  # the client does not read; uvicorn closes the connection
            log.exception("%s %s failed: %s: %s", scope["method"], self._route(scope), type(error).__name__, error)
            if status:
                raise
            await refuse(sending, Refusal(500, "the server failed; its log has the reason"))
        finally:
            self.state.metrics.count_request(self._route(scope), status, time.perf_counter() - begin)

    def _route(self, scope: Any) -> str:
        return scope["path"] if scope["path"] in self.state.routes else "other"

    def _check(self, scope: Any) -> None:
        """Raise Refusal for a request without the token, or from a page of another site."""
        headers = Headers(scope=scope)
        if self.state.stopping:
            raise Refusal(503, "the server is stopping", retry=5)
        host, origin = headers.get("host", ""), headers.get("origin")
        if headers.get("sec-fetch-site") == "cross-site" and scope["method"] != "GET":
            raise Refusal(403, "requests from pages of other sites are not accepted")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            raise Refusal(403, "requests from pages of other sites are not accepted")
        if self.state.token is None:
            if self.state.hosts is not None and host_name(host) not in self.state.hosts:
                raise Refusal(403, "this server answers under its own address only; other names need a token")
        elif scope["path"] not in OPEN:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self.state.token}".encode()):
                raise Refusal(401, "a token is needed: send the header Authorization: Bearer TOKEN")


def host_name(host: str) -> str:
    """Return the name of a Host header, without the port."""
    return host.partition("]")[0].lstrip("[").lower() if host.startswith("[") else host.partition(":")[0].lower()


async def refuse(send: Any, refusal: Refusal) -> None:
    """Send a refusal as JSON: {"error": reason}."""
    body = json.dumps({"error": refusal.reason}, ensure_ascii=True).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **refusal.headers}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
