"""A hub of one dataset on this machine, which the real clients (`datasets`, `huggingface_hub`) find by HF_ENDPOINT.

It answers the few requests that reading a dataset as a stream makes, and can be stopped and started on the same port.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`sent` lists the files that were sent, in order; with `last` of them the hub dies of being asked for another."""

    def __init__(self, dataset: str, files: Mapping[str, bytes]) -> None:
        self.dataset, self.files = dataset, dict(files)
        self.sent: list[str] = []
        self.last: int | None = None
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()

    def info(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        names = json.loads(sent)["paths"] if sent.startswith("{") else parse_qs(sent).get("paths", [])
        self._json([self.hub.info(name) for name in names if name in self.hub.files])

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        hub, api = self.hub, f"/api/datasets/{self.hub.dataset}"
        resolve = f"/datasets/{hub.dataset}/resolve/{COMMIT}/"
        if path == "/":
            self._send(200, b"", body=body)
        elif path in (api, f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in hub.files]
            self._json(
                {"id": hub.dataset, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}, body=body
            )
        elif path == f"{api}/tree/{COMMIT}":  # all files lie side by side
            self._json([hub.info(name) for name in hub.files], body=body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
            self._file(path.removeprefix(resolve), body=body)
        else:
            self._send(404, b"{}", body=body, headers={"X-Error-Code": "EntryNotFound"})

    def _file(self, name: str, *, body: bool) -> None:
        content, status = self.hub.files[name], 200
        headers = {"ETag": f'"{self.hub.info(name)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if body and len(self.hub.sent) == self.hub.last:
            threading.Thread(target=self.hub.stop, daemon=True).start()
            return  # the connection ends without an answer
        if body:
            self.hub.sent.append(name)
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(status, content, body=body, headers=headers)

    def _json(self, value: Any, *, body: bool = True) -> None:
        self._send(200, json.dumps(value).encode(), body=body, headers={"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, *, body: bool, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)
