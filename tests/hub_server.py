"""A fake of the Hugging Face hub: the real client (huggingface_hub 2.4) talks to it over HTTP, and a test reads back what it got.

It has what the client asks for when it creates repositories and branches, commits files (small ones in the commit, others by LFS), lists
them and downloads them: enough for this client, and nothing that is known about the hub's own server. A repository is a list of
commits; nothing of an upload is in it before its commit.

    with fake_hub(tmp_path) as hub:        the client's endpoint, cache and token are those of this hub
        hub.repos["me/emoji"].head         files by name
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

WRITER = "hf_writer"
"""A token that may read and write everything."""
LFS_FROM = 4096
"""Bytes from which on a file goes by LFS."""
REPO = r"(?P<repo>[^/]+/[^/]+)"
Answer = tuple[int, dict[str, str], bytes]


def failed(status: int, code: str, message: str = "") -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message or code}, b"{}"


def as_json(value: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[self.branches["main"]]


class FakeHub(ThreadingHTTPServer):
    """See the top of this file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        """Large files that were uploaded, in a commit or not."""
        self.downloads: list[str] = []
        self.damaged: set[str] = set()
        """Files whose bytes arrive changed."""
        self.hold = threading.Event()
        """While it is clear, no upload of a large file ends."""
        self.hold.set()
        self.uploading = threading.Event()

    def add(self, name: str, files: dict[str, bytes], **kind: Any) -> str:
        """A repository that somebody else made; its commit."""
        self.repos[name] = Repo(**kind)
        return self.repos[name].commit("main", files)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_POST(self) -> None:
        self.answer("POST")

    def do_PUT(self) -> None:
        self.answer("PUT")

    def answer(self, method: str) -> None:
        body = self.body()
        for verbs, pattern, action in ROUTES:
            found = re.fullmatch(pattern, urlsplit(self.path).path)
            if found and method in verbs:
                status, headers, data = action(self, body, **{name: unquote(text) for name, text in found.groupdict().items() if text})
                break
        else:
            status, headers, data = failed(404, "NotInThisFake", f"{method} {self.path}")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    @property
    def hub(self) -> FakeHub:
        return cast(FakeHub, self.server)

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITER}"

    def visible(self, repo: str) -> Repo | Answer:
        """A repository, or why it is not shown: a private one is not told from one that there is not."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.known):
            return failed(404 if self.known else 401, "RepoNotFound", "Repository not found")
        if found.gated:
            return failed(403 if self.known else 401, "GatedRepo", f"Access to model {repo} is restricted")
        return found

    def info(self, body: bytes, repo: str, revision: str = "main") -> Answer:
        found = self.visible(repo)
        if not isinstance(found, Repo):
            return found
        oid = found.resolve(revision)
        if oid is None:
            return failed(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        siblings = [{"rfilename": name} for name in sorted(found.commits[oid])]
        return as_json({"id": repo, "sha": oid, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, repo: str, revision: str) -> Answer:
        found = self.visible(repo)
        if not isinstance(found, Repo):
            return found
        return as_json([entry(name, data) for name, data in sorted(found.commits[found.resolve(revision) or ""].items())])

    def file(self, body: bytes, repo: str, revision: str, name: str) -> Answer:
        found = self.visible(repo)
        if not isinstance(found, Repo):
            return found
        oid = found.resolve(revision)
        if oid is None:
            return failed(404, "RevisionNotFound")
        data = found.commits[oid].get(name)
        if data is None:
            status, headers, empty = failed(404, "EntryNotFound", "Entry not found")
            return status, {**headers, "X-Repo-Commit": oid}, empty
        if self.command == "GET":
            self.hub.downloads.append(name)
        sent = bytes([data[0] ^ 1]) + data[1:] if name in self.hub.damaged else data
        tag = entry(name, data).get("lfs", {"oid": git_oid(data)})["oid"]
        return 200, {"X-Repo-Commit": oid, "ETag": f'"{tag}"', "X-Linked-Size": str(len(data))}, sent

    def create(self, body: bytes) -> Answer:
        if not self.known:
            return failed(401, "Unauthorized", "Invalid credentials in Authorization header")
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        there = name in self.hub.repos
        if not there:
            self.hub.add(name, {".gitattributes": b""}, private=asked.get("visibility") == "private")
        return as_json({"url": f"{self.hub.url}/{name}"}, 409 if there else 200)

    def branch(self, body: bytes, repo: str, branch: str) -> Answer:
        found = self.hub.repos[repo]
        if branch in found.branches:
            return failed(409, "Conflict")
        found.branches[branch] = found.branches["main"]
        return as_json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        if not self.known:
            return failed(403, "Forbidden")
        modes = [
            {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
            for each in json.loads(body)["files"]
        ]
        return as_json({"files": modes})

    def lfs_batch(self, body: bytes, repo: str) -> Answer:
        objects = [{**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}} for each in json.loads(body)["objects"]]
        return as_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> Answer:
        self.hub.uploading.set()
        self.hub.hold.wait(60)
        if hashlib.sha256(body).hexdigest() != oid:
            return failed(400, "BadHash")
        self.hub.stored[oid] = body
        return as_json({})

    def commit(self, body: bytes, repo: str, revision: str) -> Answer:
        found, lines = self.hub.repos[repo], [json.loads(line) for line in body.splitlines()]
        if lines[0]["value"].get("parentCommit") not in (None, found.branches[revision]):
            return failed(412, "PreconditionFailed", "A commit has happened since.")
        files = dict(found.commits[found.branches[revision]])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.hub.stored[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = found.commit(revision, files)
        return as_json({"commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "success": True})

    def validate(self, body: bytes) -> Answer:
        return as_json({"errors": [], "warnings": []})

    def log_message(self, format: str, *arguments: object) -> None:
        pass


ROUTES = [
    (("POST",), "/api/validate-yaml", Handler.validate),
    (("POST",), "/api/repos/create", Handler.create),
    (("GET",), rf"/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    (("GET",), rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    (("POST",), rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", Handler.branch),
    (("POST",), rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (("POST",), rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", Handler.commit),
    (("POST",), rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.file),
]


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name: str, data: bytes) -> dict[str, Any]:
    """A file in a listing."""
    plain = {"type": "file", "path": name, "size": len(data), "oid": git_oid(data)}
    if len(data) < LFS_FROM:
        return plain
    return {**plain, "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}}


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """A hub, and a client that knows no other: logged in, with an empty cache below ``folder``."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setenv("HF_TOKEN", WRITER)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            yield hub
        finally:
            hub.hold.set()
            hub.shutdown()
            hub.server_close()
            thread.join()
