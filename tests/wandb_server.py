"""A small W&B server: the real client talks to it over HTTP, and a test reads back what it got (checked with wandb 0.31).

It holds runs, their history, configuration, files and alerts, and artifacts. ``fail`` makes it answer the next requests
with an error, ``stall`` lets it accept requests and say nothing. ``wait_until`` waits for what the requests come to.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "tests"
KEY = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class ServedRun:
    """A run as the server has it."""

    entity: str
    project: str
    name: str
    title: str = ""
    group: str = ""
    job_type: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    alerts: list[str] = field(default_factory=list)
    exit_code: int | None = None
    starts: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines.get("wandb-history.jsonl", [])]

    def settings(self) -> dict[str, Any]:
        """The configuration as a user sees it."""
        return {name: entry["value"] for name, entry in self.config.items() if name != "_wandb"}


class WandbServer:
    """See the top of this file."""

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.artifacts: dict[str, str] = {}
        """Name and state."""
        self.requests: list[str] = []
        self.failures = 0
        self.held = 0
        """Requests that are waiting for :meth:`release`."""
        self._lock = threading.RLock()
        self._answered = threading.Condition(self._lock)
        self._faults: list[tuple[str, int, int]] = []
        self._stalled, self._stalls = "", 0.0
        self._released = threading.Event()
        self._http = _Http(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """What points a client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def fail(self, pattern: str, status: int, times: int) -> None:
        """Answer the next ``times`` requests that match with an error."""
        with self._lock:
            self._faults.append((pattern, status, times))

    def stall(self, pattern: str, times: float = math.inf) -> None:
        """Do not answer the next ``times`` requests that match, until :meth:`release`."""
        with self._lock:
            self._stalled, self._stalls = pattern, times
            self._released.clear()

    def release(self) -> None:
        """Answer what was held back, also where nobody waits for the answer any more, and stall nothing from now on."""
        with self._lock:
            self._stalls = 0
            self._released.set()
        self.wait_until(lambda: self.held == 0)

    def wait_until(self, condition: Callable[[], object], timeout: float = 600.0) -> None:
        """Wait until ``condition`` holds, looked at after each request.

        Raises:
            TimeoutError: it does not.
        """
        with self._answered:
            if not self._answered.wait_for(condition, timeout):
                raise TimeoutError(f"requests so far: {self.requests[-20:]}")

    def close(self) -> None:
        self.release()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        what = f"{method} {path}"
        request = json.loads(body) if method == "POST" else {}
        if path == "/graphql" and method == "POST":
            match = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            what = match[1] if match else "?"
        with self._answered:
            self.requests.append(what)
            held = self._stalls > 0 and re.search(self._stalled, what) is not None
            self._stalls, self.held = self._stalls - held, self.held + held
            self._answered.notify_all()
        if held:
            self._released.wait()
        with self._answered:
            try:
                return self._answer(what, method, path, request)
            finally:
                self.held -= held
                self._answered.notify_all()

    def _answer(self, what: str, method: str, path: str, request: dict[str, Any]) -> tuple[int, Any]:
        status = self._fault(what)
        if status:
            return status, {"error": "injected"}
        if path == "/graphql" and method == "POST":
            return 200, self._graphql(what, request.get("variables") or {})
        if stream := re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path):
            return 200, self._stream(self.runs[stream[3]], request)
        if upload := re.fullmatch(r"/upload/([^/]+)/(.+)", path):
            self.runs[upload[1]].files.add(upload[2])
            return 200, {}
        return (200 if method == "PUT" else 404), {}

    def _fault(self, what: str) -> int | None:
        for index, (pattern, status, times) in enumerate(self._faults):
            if times > 0 and re.search(pattern, what):
                self._faults[index] = pattern, status, times - 1
                self.failures += 1
                return status
        return None

    def _stream(self, run: ServedRun, request: dict[str, Any]) -> dict[str, Any]:
        """Lines of the history and other files: each batch says at which line it begins."""
        for name, chunk in (request.get("files") or {}).items():
            lines = run.lines.setdefault(name, [])
            begin = chunk.get("offset", len(lines))
            lines[begin : begin + len(chunk["content"])] = chunk["content"]
        if request.get("complete") is not None:
            run.exit_code = request.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def _graphql(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        answer: Callable[[dict[str, Any]], Any] | None = getattr(self, f"_on_{operation}", None)
        if answer is None:
            return {"errors": [{"message": f"the test server knows no {operation}"}], "data": None}
        return {"data": answer(variables)}

    def _on_Viewer(self, variables: dict[str, Any]) -> Any:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        return {"viewer": {"id": "u", "entity": ENTITY, "username": "u", "email": "", "flags": "{}", "teams": teams}}

    def _on_ServerFeaturesQuery(self, variables: dict[str, Any]) -> Any:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> Any:
        return {"entity": {"organization": None}}

    def _on_RunResumeStatus(self, variables: dict[str, Any]) -> Any:
        run = self.runs.get(variables["name"])
        model: dict[str, Any] = {"id": "p", "name": variables.get("project"), "entity": {"id": "e", "name": ENTITY}, "bucket": None}
        if run is not None:
            history = run.lines.get("wandb-history.jsonl", [])
            model["bucket"] = {
                "id": run.name,
                "name": run.name,
                "displayName": run.title,
                "summaryMetrics": "{}",
                "logLineCount": 0,
                "historyLineCount": len(history),
                "eventsLineCount": 0,
                "historyTail": json.dumps(history[-1:]),
                "eventsTail": "[]",
                "config": json.dumps(run.config),
                "tags": run.tags,
                "wandbConfig": json.dumps({"t": 1}),
            }
        return {"model": model}

    def _on_UpsertBucket(self, variables: dict[str, Any]) -> Any:
        name, entity, project = variables["name"], variables.get("entity") or ENTITY, variables.get("project") or "uncategorized"
        new = name not in self.runs
        run = self.runs.setdefault(name, ServedRun(entity, project, name))
        run.starts += variables.get("displayName") is not None
        run.config |= json.loads(variables.get("config") or "{}")
        for key, attribute in (("displayName", "title"), ("groupName", "group"), ("jobType", "job_type"), ("tags", "tags")):
            if variables.get(key) is not None:
                setattr(run, attribute, variables[key])
        bucket = {
            "id": name,
            "name": name,
            "displayName": run.title,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "historyLineCount": len(run.lines.get("wandb-history.jsonl", [])),
            "project": {"id": project, "name": project, "entity": {"id": entity, "name": entity}},
        }
        return {"upsertBucket": {"inserted": new, "bucket": bucket}}

    def _on_CreateRunFiles(self, variables: dict[str, Any]) -> Any:
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{variables['run']}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": variables["run"], "uploadHeaders": [], "files": files}}

    def _on_NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> Any:
        self.runs[variables["runName"]].alerts.append(f"{variables['title']} | {variables['text']}")
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_ArtifactType(self, variables: dict[str, Any]) -> Any:
        return {"project": {"artifact": None}}

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> Any:
        name = variables["input"]["artifactCollectionName"]
        self.artifacts.setdefault(name, "PENDING")
        sequence = {"id": "sequence", "latestArtifact": None}
        return {"createArtifact": {"artifact": {"id": name, "state": self.artifacts[name], "artifactSequence": sequence}}}

    def _on_CreateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(variables.get("name") or "wandb_manifest.json")}}

    def _on_UpdateArtifactManifest(self, variables: dict[str, Any]) -> Any:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest("wandb_manifest.json")}}

    def _manifest(self, name: str) -> Any:
        file = {"id": "f", "name": name, "displayName": name, "uploadUrl": f"{self.url}/artifact/{name}", "uploadHeaders": []}
        return {"id": "manifest", "file": file}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> Any:
        def node(file: dict[str, Any]) -> dict[str, Any]:
            name = file["name"]
            target = {"uploadUrl": f"{self.url}/artifact/{name}", "uploadHeaders": [], "uploadMultipartUrls": None, "storagePath": name}
            return {"node": {"id": name, "name": name, "displayName": name, **target, "artifact": {"id": file["artifactID"]}}}

        return {"createArtifactFiles": {"files": {"edges": [node(file) for file in variables["input"]["artifactFiles"]]}}}

    def _on_CommitArtifact(self, variables: dict[str, Any]) -> Any:
        self.artifacts[variables["artifactID"]] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": ""}}}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _reply(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, content = server.answer(self.command, self.path, body)
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = _reply

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients drop connections whenever they like."""
