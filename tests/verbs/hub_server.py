"""A stand-in of the Hugging Face hub on this machine: the calls by which huggingface_hub creates, commits and reads a repository."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


def commit_of(files: dict[str, bytes]) -> str:
    """Return the hash of a repository's content, for that of its commit."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """State of the stand-in.

    Attributes:
        url: its address.
        repositories: name -> path -> content.
        private: names of private repositories.
        calls: "METHOD PATH" of all requests.
        messages: of the commits.
        tokens: values of the header Authorization.
        refuse: status with which writing is refused; None: it is accepted.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    refuse: int | None = None


def handler_of(hub: Hub) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, body: Any = None, headers: dict[str, str] | None = None, length: int | None = None) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content) if length is None else length), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def begin(self) -> bytes:
            hub.calls.append(f"{self.command} {self.path}")
            hub.tokens.add(self.headers.get("Authorization"))
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            body = self.begin()
            if self.path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if hub.refuse is not None:
                return self.reply(hub.refuse, {"error": "not allowed"})
            if self.path == "/api/repos/create":
                given = json.loads(body)
                name = "/".join(filter(None, (given.get("organization"), given["name"])))
                if name in hub.repositories:
                    return self.reply(409, {"error": "exists", "url": f"{hub.url}/{name}"})
                hub.repositories[name] = {}
                if given.get("private") or given.get("visibility") == "private":
                    hub.private.add(name)
                return self.reply(200, {"url": f"{hub.url}/{name}", "name": name, "id": name})
            _, _, _, owner, name, action, *_ = self.path.split("/")
            if action == "preupload":
                files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                return self.reply(200, {"files": files})
            assert action == "commit", self.path
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "header":
                    hub.messages.append(row["value"]["summary"])
                else:
                    assert row["key"] == "file"
                    assert row["value"]["encoding"] == "base64"
                    hub.repositories[f"{owner}/{name}"][row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            sha = commit_of(hub.repositories[f"{owner}/{name}"])
            url = f"{hub.url}/{owner}/{name}/commit/{sha}"
            return self.reply(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

        def do_GET(self) -> None:
            self.begin()
            parts = self.path.split("?")[0].split("/")
            if len(parts) > 4 and parts[3] == "resolve":
                files = hub.repositories.get("/".join(parts[1:3]))
                content = None if files is None else files.get("/".join(parts[5:]))
                if files is None or content is None:
                    code = "RepoNotFound" if files is None else "EntryNotFound"
                    return self.reply(404, b"", {"X-Error-Code": code, "X-Error-Message": "no such file"})
                tags = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit_of(files)}
                return self.reply(200, content, tags)
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815 - the server's name

    return Handler


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    """Run the stand-in in a thread."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
