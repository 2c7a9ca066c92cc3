"""A small hub on this machine: what huggingface_hub asks the real one for, downloads and uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@dataclass
class Repo:
    """What the hub holds under one name, and how it answers."""

    files: dict[str, bytes]
    token: str | None = None
    status: int | None = None
    error_code: str | None = None
    page: bytes | None = None
    stalled_file: str | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    main: str = COMMITS["main"]
    drops_commits: bool = False
    damaged_file: str | None = None


class Hub:
    """A hub on this machine; `requests` is its log, `large` the large files that were uploaded, by SHA-256."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.large: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        for repo in self.repos.values():
            repo.released.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, files: dict[str, bytes], **answers: Any) -> str:
        """The id of a new repo, unknown to every cache."""
        name = f"org/repo{len(self.repos)}"
        self.repos[name] = Repo(files, **answers)
        return name

    def asked(self, name: str) -> list[Request]:
        return [request for request in self.requests if f"/{name}/" in request.path]

    def downloaded(self, name: str) -> set[str]:
        """The files of a repo whose content was asked for."""
        paths = (request.path for request in self.asked(name) if request.method == "GET")
        return {match[1] for path in paths if (match := re.search(r"/resolve/[^/]+/(.*)", path))}


@dataclass(frozen=True, kw_only=True)
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        authorization = self.headers.get("Authorization")
        asked = Request(method=self.command, path=path, authorization=authorization, range=self.headers.get("Range"))
        self.served.requests.append(asked)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/(.+)", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        repo = self.served.repos.get(match[1]) if match else None
        if match is None or repo is None:
            self._answer(404, {"X-Error-Code": "RepoNotFound"})
        elif repo.page is not None:
            self._answer(200, {"Content-Type": "text/html"}, repo.page)
        elif repo.status is not None:
            self._answer(repo.status, {"X-Error-Code": repo.error_code} if repo.error_code else {})
        elif repo.token is not None and authorization != f"Bearer {repo.token}":
            self._answer(401, {"X-Error-Code": "GatedRepo"})
        elif (commit := _commit(repo, match[3] if api else match[2])) is None:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        elif api:
            self._answer(200, {}, _tree(repo) if match[2] == "tree" else _info(repo, match[1], commit))
        elif match[3] not in repo.files:
            self._answer(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._file(repo, commit, match[3])

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        """What an upload consists of: a repo made, files announced, large ones asked about, and all committed."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorization = self.headers.get("Authorization")
        self.served.requests.append(Request(method="POST", path=path, authorization=authorization))
        if path == "/api/validate-yaml":
            self._answer(200, {}, b'{"errors": [], "warnings": []}')
        elif path == "/api/repos/create":
            self._create(json.loads(body), authorization)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {}, json.dumps({"files": [file | {"shouldIgnore": False} for file in files]}).encode())
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.served.address}/large/{match[1]}/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {}, json.dumps({"transfer": "basic", "objects": objects}).encode())
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit_files(match[1], body)
        else:
            self._answer(404, {})

    def do_PUT(self) -> None:
        """A large file."""
        match = re.fullmatch(r"/large/([^/]+/[^/]+)/([0-9a-f]{64})", self.path)
        assert match
        self.served.large[match[2]] = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {})

    def _create(self, asked: dict[str, Any], authorization: str | None) -> None:
        name = f"{asked.get('organization') or 'user'}/{asked['name']}"
        repo = self.served.repos.setdefault(name, Repo({}))
        if authorization is None or repo.status is not None:
            self._answer(repo.status or 401, {}, b'{"error": "no"}')
        else:
            self._answer(200, {}, json.dumps({"url": f"{self.served.address}/{name}", "id": name}).encode())

    def _commit_files(self, name: str, body: bytes) -> None:
        repo = self.served.repos[name]
        if repo.drops_commits:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.served.large[value["oid"]]
        answer = {"commitUrl": f"{self.served.address}/{name}/commit/{repo.main}", "commitOid": repo.main}
        self._answer(200, {}, json.dumps({**answer, "success": True, "hookOutput": ""}).encode())

    def _file(self, repo: Repo, commit: str, path: str) -> None:
        data = repo.files[path]
        headers = {"ETag": f'"{etag_of(path, data)}"', "X-Repo-Commit": commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        is_part = wanted is not None and bool(wanted[2])
        status = 200 if wanted is None else 206
        if path == repo.damaged_file:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if wanted is not None:
            first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data = data[first : last + 1]
        if path != repo.stalled_file or is_part or self.command == "HEAD" or repo.released.is_set():
            self._answer(status, headers, data)
            return
        self._answer(status, headers, data, sent_len=len(data) // 2)
        repo.stalled.set()
        repo.released.wait(120)
        self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], data: bytes = b"", *, sent_len: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:sent_len])

    def log_message(self, *args: object) -> None:
        pass


def _commit(repo: Repo, revision: str) -> str | None:
    commits = {**COMMITS, "main": repo.main}
    return commits.get(revision, revision if revision in commits.values() else None)


def etag_of(path: str, data: bytes) -> str:
    """What the hub calls a file's content: large ones by their SHA-256."""
    return (hashlib.sha256 if path.endswith(".safetensors") else hashlib.sha1)(data).hexdigest()


def _info(repo: Repo, name: str, commit: str) -> bytes:
    siblings = []
    for path, data in repo.files.items():
        sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if path.endswith(".safetensors"):
            sibling["lfs"] = {"sha256": etag_of(path, data), "size": len(data), "pointerSize": 130}
        siblings.append(sibling)
    return json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode()


def _tree(repo: Repo) -> bytes:
    files = (
        {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for path, data in repo.files.items()
    )
    return json.dumps(list(files)).encode()
