"""A stand-in Hugging Face Hub on loopback: the part of the Hub's HTTP interface that pushing and loading a model use.

It keeps commits as immutable snapshots (path -> bytes), checks tokens, and checks uploaded bytes against their SHA-256.
It has no Xet storage. What it was asked is in `FakeHub.requests`.
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
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".png")
USER = "someone"
TOKEN = "hf_stand_in"


@dataclass
class Commit:
    """One revision: its hash, message, and every file."""

    sha: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository: its commits, oldest first. Creation makes the first, empty one."""

    private: bool
    commits: list[Commit] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        """The commit of a hash, or the newest for `main`."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.sha == revision), None)


class FakeHub:
    """The server's state, shared with the test."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.endpoint = ""

    def add(self, repo_id: str, files: dict[str, bytes], sha: str | None = None) -> str:
        """Commit `files` (the whole tree) to a repository, made if missing, and return the commit's hash."""
        repo = self.repos.setdefault(repo_id, Repo(private=False))
        sha = sha or hashlib.sha1(f"{repo_id}{len(repo.commits)}".encode()).hexdigest()
        repo.commits.append(Commit(sha, "add", files))
        return sha


def _is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def _etag(path: str, content: bytes) -> str:
    """What the Hub gives as ETag: the SHA-256 of a large file, git's blob hash of another."""
    if _is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/xet-write-token/.*", "no_such_thing"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)", "commit"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?P<path>/.*)?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
    WRITES = ("whoami", "create", "preupload", "commit", "lfs_batch")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((method, path))
        self.body = self._read_body()
        for wanted, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if match and wanted == ("GET" if method == "HEAD" else method):
                if name in self.WRITES and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self._error(401, "Invalid username or password.")
                found = match.groupdict()
                if "repo" in found and found["repo"] not in self.hub.repos:
                    return self._error(404, "Repository not found", "RepoNotFound")
                return getattr(self, f"_{name}")(**found)
        self._error(404, f"the stand-in Hub does not know {method} {path}")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, found: Any, status: int = 200) -> None:
        self._send(status, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers | {"Content-Type": "application/json"})

    def _commit_at(self, repo: str, revision: str | None) -> Commit | None:
        commit = self.hub.repos[repo].at(revision or "main")
        if commit is None:
            self._error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _no_such_thing(self, **_: str) -> None:
        self._error(404, "Not found")

    def _whoami(self) -> None:
        self._json({"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}})

    def _create(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or USER}/{wanted['name']}"
        exists = repo_id in self.hub.repos
        if not exists:
            self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
            self.hub.add(repo_id, {})
        self._json({"url": f"{self.hub.endpoint}/{repo_id}"}, 409 if exists else 200)

    def _validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _info(self, repo: str, revision: str | None) -> None:
        if commit := self._commit_at(repo, revision):
            siblings = [{"rfilename": path} for path in sorted(commit.files)]
            private = self.hub.repos[repo].private
            self._json({"id": repo, "modelId": repo, "sha": commit.sha, "private": private, "siblings": siblings})

    def _entry(self, commit: Commit, path: str) -> dict[str, Any]:
        content = commit.files[path]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if _is_lfs(path):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, repo: str, revision: str, path: str | None) -> None:
        if commit := self._commit_at(repo, revision):
            prefix = f"{path.strip('/')}/" if path and path.strip("/") else ""
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in {"true", "1"}
            inside = [name for name in sorted(commit.files) if name.startswith(prefix)]
            if not recursive:
                inside = [name for name in inside if "/" not in name.removeprefix(prefix)]
            if prefix and not inside:
                return self._error(404, f"{path} does not exist", "EntryNotFound")
            self._json([self._entry(commit, name) for name in inside])

    def _paths_info(self, repo: str, revision: str) -> None:
        if commit := self._commit_at(repo, revision):
            fields = self.headers.get("Content-Type", "").startswith("application/json")
            wanted = json.loads(self.body)["paths"] if fields else parse_qs(self.body.decode())["paths"]
            self._json([self._entry(commit, path) for path in wanted if path in commit.files])

    def _preupload(self, repo: str, revision: str) -> None:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if _is_lfs(file["path"]) else "regular", "shouldIgnore": False}
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": modes})

    def _lfs_batch(self, repo: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            found = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/lfs/{wanted['oid']}"
                found["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            objects.append(found)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "the bytes do not match their SHA-256")
        self.hub.objects[oid] = self.body
        self._send(200, b"")

    def _lfs_verify(self, oid: str) -> None:
        wanted = json.loads(self.body)
        kept = self.hub.objects.get(oid)
        self._json({}, 200 if kept is not None and len(kept) == wanted["size"] else 404)

    def _commit(self, repo: str, revision: str) -> None:
        files = dict(self.hub.repos[repo].commits[-1].files)
        message = ""
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                message = value["summary"]
            elif row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self._error(400, f"{value['path']}: {value['oid']} was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return self._error(400, f"the stand-in Hub does not know the operation {row['key']}")
        sha = self.hub.add(repo, files)
        self.hub.repos[repo].commits[-1].message = message
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._json({"success": True, "commitUrl": url, "commitOid": sha, "hookOutput": ""})

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if not (commit := self._commit_at(repo, revision)):
            return
        if path not in commit.files:
            return self._error(404, f"{path} does not exist", "EntryNotFound")
        content = commit.files[path]
        headers = {"ETag": f'"{_etag(path, content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            return self._send(200, content, headers)
        start, end = int(span[1]), int(span[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], headers)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve an empty Hub on a free loopback port until the block ends."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A stand-in Hub that HF_ENDPOINT points at, and no token."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with fake_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running
