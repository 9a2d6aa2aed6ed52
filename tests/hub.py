"""A server on the loopback that answers like the hub and misbehaves on cue.

It serves one data set repository from files in memory: what `datasets` asks for when it lists and streams them.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Hub:
    """What is served, what was asked, and what goes wrong next."""

    def __init__(self, repository: str, files: dict[str, bytes], commit: str = COMMIT) -> None:
        self.repository, self.files, self.commit = repository, files, commit
        self.faults: list[Any] = []
        """For the requests of data that come next: a status, "reset", "cut" (less than was promised), "short" (less, and no
        more promised), "junk" (other bytes), "hang", or "loop" (redirected for ever); None is an answer."""
        self.fault_of: Callable[[int], Any] = lambda _: None
        """The fault of each request of any kind, by its number from 0 on; None is an answer."""
        self.released = threading.Event()
        """Ends what hangs."""
        self.data = ".parquet"
        """How the names of files end whose requests `faults` are for."""
        self.down = False
        """Whether every connection is refused."""
        self.requests: list[str] = []
        self.bytes_sent = 0
        self._sockets: set[socket.socket] = set()

    def cut_connections(self) -> None:
        """End the connections that are kept alive, as an outage does."""
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def environment(self, port: int, home: Path) -> dict[str, str]:
        """Variables with which a process takes this server for the hub."""
        cleared = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
        return {
            **cleared,
            "HF_ENDPOINT": f"http://127.0.0.1:{port}",
            "HF_HOME": str(home),
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    fault: Any = None

    def setup(self) -> None:
        super().setup()
        self.hub._sockets.add(self.connection)

    def finish(self) -> None:
        self.hub._sockets.discard(self.connection)
        super().finish()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        hub = self.hub
        path = urllib.parse.unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        self.fault = "reset" if hub.down else hub.fault_of(len(hub.requests) - 1)
        if self._fails_whole(self.fault):
            return
        resolve = re.fullmatch(rf"/datasets/{hub.repository}/resolve/([^/]+)/(.*)", path)
        tree = re.fullmatch(rf"/api/datasets/{hub.repository}/tree/{hub.commit}/?(.*)", path)
        if resolve and resolve[1] in {"main", hub.commit} and resolve[2] in hub.files:
            self._file(resolve[2], body=body)
        elif tree is not None:
            self._json(self._tree(tree[1]))
        elif re.fullmatch(rf"/api/datasets/{hub.repository}(/revision/(main|{hub.commit}))?", path):
            self._json({"id": hub.repository, "sha": hub.commit, "siblings": [{"rfilename": name} for name in hub.files]})
        else:
            known = hub.repository in path and (not resolve or resolve[1] in {"main", hub.commit})
            self._send(404, b"", {"X-Error-Code": "EntryNotFound" if known else "RepoNotFound", "X-Repo-Commit": hub.commit})

    def _tree(self, folder: str) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        prefix = folder.rstrip("/") + "/" if folder else ""
        for name, content in self.hub.files.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                path = prefix + rest.partition("/")[0]
                kind = "directory" if "/" in rest else "file"
                entries[path] = {"type": kind, "oid": "0" * 40, "size": 0 if kind == "directory" else len(content), "path": path}
        return list(entries.values())

    def _json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", "X-Repo-Commit": self.hub.commit})

    def _file(self, name: str, *, body: bool) -> None:
        content = self.hub.files[name]
        headers = {"ETag": f'"{len(content)}"', "X-Repo-Commit": self.hub.commit, "Accept-Ranges": "bytes"}
        if not body:
            self._send(200, b"", {**headers, "Content-Length": str(len(content))})
            return
        if self.fault is None and self.hub.faults and name.endswith(self.hub.data):
            self.fault = self.hub.faults.pop(0)
        if self.fault == "loop" or self.path.endswith("again"):
            self._send(302, b"", {"Location": f"{self.path.partition('?')[0]}?again"})
            return
        if self._fails_whole(self.fault):
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status, part = 200, content
        if asked:
            end = min(int(asked[2] or len(content) - 1), len(content) - 1)
            status, part = 206, content[int(asked[1]) : end + 1]
            headers["Content-Range"] = f"bytes {asked[1]}-{end}/{len(content)}"
        self._send(status, part, headers)

    def _fails_whole(self, fault: Any) -> bool:
        """Do what a fault of a whole request is; False if there is none."""
        if isinstance(fault, int):
            self._send(fault, b"", {"Retry-After": "0"})
            return True
        if fault not in {"hang", "reset"}:
            return False
        self.close_connection = True
        if fault == "hang":
            self.hub.released.wait(30)
        else:
            self.connection.shutdown(socket.SHUT_RDWR)
        return True

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        half, promised = content[: len(content) // 2], len(content)
        if self.fault == "junk":
            content = bytes(len(content))
        elif self.fault == "short":
            content, promised = half, len(half)
        elif self.fault == "cut":
            content = half
        self.send_response(status)
        for name, value in {"Content-Length": str(promised), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
            self.hub.bytes_sent += len(content)
        if self.fault == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Broken connections are what this server is for."""


@contextmanager
def serving(hub: Hub, port: int = 0) -> Iterator[int]:
    """Serve `hub` on `port`, or on any that is free; yields the port."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", port), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        hub.released.set()
        server.shutdown()
        hub.cut_connections()
        server.server_close()
        thread.join()
