"""A stand-in for W&B's server on loopback, which W&B's own client talks to: no account is needed to see what arrives.

It knows the queries that `retrace publish` causes and no other, keeps what it is sent, and answers from that. What W&B
itself makes of it is not tested.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = "retrace"  # the only one that it has
PAGE = {"__typename": "PageInfo", "endCursor": "c", "hasNextPage": False}
KEY = "a1" * 20  # W&B takes keys of 40 characters
INTERNAL_ID = base64.b64encode(b"ProjectInternalId:1").decode()


class Kept:
    """What arrived. `refuse`: runs whose metrics are not kept, as where an upload breaks off."""

    def __init__(self) -> None:
        self.url = ""
        self.runs: dict[str, dict[str, Any]] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.uploads: list[str] = []  # of runs, by id, in order
        self.refuse: set[str] = set()
        self.lock = threading.Lock()

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL query."""
        project = {"id": "UA==", "internalId": INTERNAL_ID, "name": PROJECT, "entity": {"id": "RQ==", "name": "me"}}
        if "viewer" in query:
            teams = {"edges": [{"node": {"name": "team"}}]}
            names = {"id": "VQ==", "name": "Me", "username": "me", "entity": "me", "email": "me@here"}
            more = {"admin": False, "flags": "{}", "deletedAt": None, "apiKeys": {"edges": []}}
            return {"viewer": {**names, **more, "teams": teams}}
        if "mutation UpsertBucket" in query:
            run = self.runs.setdefault(given["name"], {"summary": {}, "history": {}})
            run |= {key: given[key] for key in ("config", "displayName", "groupName", "jobType", "tags") if given[key]}
            bucket = {"id": "Qg==", "name": given["name"], "displayName": run.get("displayName"), "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}
        if "mutation CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/put"} for name in given["files"]]
            return {"createRunFiles": {"runID": "Qg==", "uploadHeaders": [], "files": files}}
        if "upsertView" in query:
            found = given.get("id") or f"Vmlld{len(self.views):03}"
            self.views[found] = {**given, "id": found}
            view = {"id": found, "name": given["name"], "displayName": given["displayName"], "type": given["type"]}
            view |= {"spec": given["spec"], "description": "", "updatedAt": "2026-01-01T00:00:00", "project": project}
            return {"upsertView": {"view": view, "inserted": True}}
        if "allViews" in query:
            kind, name = given.get("viewType") or "runs", given.get("viewName")
            edges = [{"node": self._view(v), "cursor": "c"} for v in self.views.values() if v["type"] == kind
                     and name in (None, v["name"])]  # fmt: skip
            return {"project": {**project, "allViews": {"edges": edges, "pageInfo": PAGE}}}
        if "query Runs" in query:
            if not self.runs:
                return {"project": None}
            edges = [{"node": self._run(name, run), "cursor": "c"} for name, run in self.runs.items()]
            runs = {"edges": edges, "pageInfo": PAGE}
            return {"project": {**project, "runCount": len(edges), "readOnly": False, "runs": runs}}
        if "models(" in query:
            made = {"entityName": "me", "createdAt": "2026-01-01T00:00:00", "isBenchmark": False, "user": None}
            edges = [{"node": {**project, **made}}] if self.runs else []
            return {"models": {"edges": edges, "pageInfo": PAGE}}
        raise NotImplementedError(query)

    def _view(self, view: dict[str, Any]) -> dict[str, Any]:
        dates = {"createdAt": "2026-01-01T00:00:00", "updatedAt": "2026-01-01T00:00:00"}
        user = {"user": {"id": "VQ==", "name": "Me", "username": "me", "photoUrl": "", "email": "", "admin": False}}
        shown = {key: view[key] for key in ("id", "name", "displayName", "type", "spec")}
        return {**shown, **dates, **user, "description": "", "previewUrl": None, "viewCount": 0, "locked": False}

    def _run(self, name: str, run: dict[str, Any]) -> dict[str, Any]:
        shown = {"id": "Qg==", "name": name, "displayName": run.get("displayName"), "tags": run.get("tags", [])}
        shown |= {"state": "finished", "config": run["config"], "summaryMetrics": json.dumps(run["summary"])}
        shown |= {"systemMetrics": "{}", "createdAt": "2026-01-01T00:00:00", "projectId": "1", "sweepName": None}
        return {**shown, "user": {"name": "Me", "username": "me"}, "historyLineCount": len(run["history"])}

    def stream(self, run_id: str, files: dict[str, Any]) -> None:
        """Lines of metrics: each file's content replaces what was there from its offset on."""
        if run_id in self.refuse:
            return
        run = self.runs[run_id]
        for at, line in enumerate(files.get("wandb-history.jsonl", {}).get("content", [])):
            run["history"][files["wandb-history.jsonl"]["offset"] + at] = json.loads(line)
        for line in files.get("wandb-summary.json", {}).get("content", []):
            run["summary"] = json.loads(line)


@contextlib.contextmanager
def wandb_server() -> Iterator[Kept]:
    """A server that keeps what it is sent, while the block runs."""
    kept = Kept()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """No lines in the tests' output."""

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self._send({})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.path == "/sdk/otel/v1/metrics":  # the client's own
                return self._send({})
            content = json.loads(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            with kept.lock:
                if self.path == "/graphql":
                    return self._send({"data": kept.answer(content["query"], content.get("variables") or {})})
                run_id = self.path.split("/")[-2]
                kept.stream(run_id, content.get("files") or {})
                if content.get("complete"):
                    kept.uploads.append(run_id)
            self._send({})

        def _send(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    class Server(ThreadingHTTPServer):
        request_queue_size = 64  # several uploads at once, a connection each

    server = Server(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield kept
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
