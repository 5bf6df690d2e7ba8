"""A stand-in for the Hugging Face hub: its HTTP protocol, as far as huggingface_hub speaks it, for models in memory.

The client is the real library; nothing of it is replaced, it is only told another address. As on the hub, large files
(`LARGE`) lie in Git LFS: their name is answered with a redirect to a storage host, which may not see the token, and
they are uploaded to one by their SHA-256 before the commit names them.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LARGE = (".safetensors", ".bin", ".data", ".onnx")
WRITER, READER = "hf_writer", "hf_reader"
TOKENS = {WRITER: ("maker", "write"), READER: ("maker", "read")}
_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """Commits by their hash, each with the content of all files, and the branches that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Add a commit to a branch; returns its hash."""
        content = repr([(name, hashlib.sha1(data).hexdigest()) for name, data in sorted(files.items())])
        commit = hashlib.sha1(f"{self.branches}{content}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.branches[branch] = commit
        return commit

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a branch or commit holds."""
        return self.commits[self.branches.get(revision, revision)]


@dataclass(frozen=True)
class Request:
    """What was asked for: the token and the byte range as the client sent them."""

    method: str
    path: str
    range: str | None
    token: str | None


@dataclass
class Hub:
    """The state of a server, and what was asked of it.

    Attributes:
        url: its address, for HF_ENDPOINT.
        repos: by owner/name.
        stored: large files by SHA-256.
        requests: in order.
        cuts: file name -> bytes after which the connection is dropped, the next time that the file is sent.
        refused: large files that the storage does not give.
        claimed: sizes that the hub states instead of the true ones.
        full: an upload of more bytes than that is refused.
        down: every request is answered with 503.
    """

    url: str
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    cuts: dict[str, int] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    claimed: dict[str, int] = field(default_factory=dict)
    full: int | None = None
    down: bool = False

    @property
    def storage(self) -> str:
        """The address of the large files: the same server by another name, so that the client takes it for another."""
        return self.url.replace("127.0.0.1", "localhost")

    def add(self, repo: str, files: Mapping[str, bytes], **options: bool) -> str:
        """Publish a repository, or another commit of it; returns the commit's hash."""
        return self.repos.setdefault(repo, Repo(**options)).commit(files)

    def sent(self, pattern: str = ".*", method: str = "GET") -> list[Request]:
        """Requests for files whose name matches, at the hub or at its storage."""
        names = {digest_of(data): name for repo in self.repos.values() for files in repo.commits.values()
                 for name, data in files.items()}  # fmt: skip
        found = []
        for request in self.requests:
            place = re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", request.path)
            name = place[1] if place else names.get(request.path.removeprefix("/storage/"))
            if request.method == method and name is not None and re.fullmatch(pattern, name):
                found.append(request)
        return found


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


def digest_of(data: bytes) -> str:
    """SHA-256, the name of a large file."""
    return hashlib.sha256(data).hexdigest()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _oid(name: str, data: bytes) -> str:
    return digest_of(data) if name.endswith(LARGE) else _git_id(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""

    def do_GET(self) -> None:
        self._answer("GET", _GET)

    def do_HEAD(self) -> None:
        self._answer("HEAD", _GET)

    def do_POST(self) -> None:
        self._answer("POST", _POST)

    def do_PUT(self) -> None:
        self._answer("PUT", _PUT)

    def _answer(self, method: str, routes: Mapping[str, str]) -> None:
        path = unquote(urlsplit(self.path).path)
        self.token = (self.headers.get("authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append(Request(method, path, self.headers.get("range"), self.token))
        self.body = b"".join(self._chunks())
        try:
            if self.hub.down:
                raise _RefusedError(503, "the hub is being mended")
            if self.token is not None:
                self._person()
            for pattern, name in routes.items():
                found = re.fullmatch(pattern, path)
                if found:
                    getattr(self, name)(**found.groupdict())
                    return
            raise _RefusedError(404, f"there is no {path}", "EntryNotFound")
        except _RefusedError as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(json.dumps({"error": str(refused)}).encode(), status=refused.status, headers=headers)

    def _chunks(self) -> Iterator[bytes]:
        if self.headers.get("transfer-encoding") != "chunked":
            yield self.rfile.read(int(self.headers.get("content-length") or 0))
            return
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _send(self, data: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None, cut: int = -1) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(data if cut < 0 else data[:cut])
        if cut >= 0:
            self.wfile.flush()
            self.close_connection = True

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def _person(self) -> tuple[str, str]:
        if self.token not in TOKENS:
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return TOKENS[self.token]

    def _repo(self, repo: str) -> Repo:
        found = self.hub.repos.get(repo)
        if found is None or (found.private and self.token not in TOKENS):
            status, message = (404, "Repository not found") if self.token else (401, "Invalid username or password.")
            raise _RefusedError(status, message, "RepoNotFound")
        return found

    def _commit_of(self, repo: Repo, revision: str | None) -> str:
        commit = repo.branches.get(revision or "main", revision)
        if commit not in repo.commits:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self) -> None:
        name, role = self._person()
        self._json({"name": name, "orgs": [{"name": "makers"}], "auth": {"accessToken": {"role": role}}})

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo)
        commit = self._commit_of(found, revision)
        files = [
            {"rfilename": name, "size": self.hub.claimed.get(name, len(data)), "blobId": _git_id(data)}
            for name, data in found.commits[commit].items()
        ]
        self._json({"id": repo, "sha": commit, "private": found.private, "siblings": files})

    def tree(self, repo: str, revision: str) -> None:
        found = self._repo(repo)
        files = found.commits[self._commit_of(found, revision)]
        self._json([{"type": "file", "path": n, "size": len(d), "oid": _git_id(d)} for n, d in files.items()])

    def resolve(self, repo: str, revision: str, name: str) -> None:
        found = self._repo(repo)
        if found.gated and self.token not in TOKENS:
            raise _RefusedError(401, "Access to this model is restricted.", "GatedRepo")
        commit = self._commit_of(found, revision)
        data = found.commits[commit].get(name)
        if data is None:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_oid(name, data)}"', "Accept-Ranges": "bytes"}
        if name.endswith(LARGE):
            self.hub.stored[digest_of(data)] = data
            linked = {"X-Linked-Etag": f'"{digest_of(data)}"', "X-Linked-Size": str(len(data))}
            there = {"Location": f"{self.hub.storage}/storage/{digest_of(data)}"}
            self._send(b"", status=302, headers=headers | linked | there)
        else:
            self._send_range(data, headers, cut=self._cut(name))

    def storage(self, digest: str) -> None:
        data = self.hub.stored.get(digest)
        if data is None:
            raise _RefusedError(404, "no such object")
        files = [files for repo in self.hub.repos.values() for files in repo.commits.values()]
        names = {name for content in files for name, held in content.items() if held is data}
        if names & self.hub.refused:
            raise _RefusedError(403, "the signature is too old")
        cut = max((self._cut(name) for name in names), default=-1)
        self._send_range(data, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, cut=cut)

    def _cut(self, name: str) -> int:
        return -1 if self.command == "HEAD" else self.hub.cuts.pop(name, -1)

    def _send_range(self, data: bytes, headers: dict[str, str], cut: int) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if asked is None:
            self._send(data, headers=headers, cut=cut)
            return
        begin, end = int(asked[1]), min(int(asked[2] or len(data) - 1), len(data) - 1)
        part = {"Content-Range": f"bytes {begin}-{end}/{len(data)}"}
        self._send(data[begin : end + 1], status=206, headers=headers | part, cut=cut)

    def create(self) -> None:
        name, role = self._person()
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or name
        if role != "write" or owner not in (name, "makers"):
            raise _RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{wanted['name']}"
        there = repo in self.hub.repos
        if not there:
            self.hub.add(repo, {".gitattributes": b"*.safetensors filter=lfs"})
            self.hub.repos[repo].private = wanted.get("visibility") == "private"
        url = json.dumps({"url": f"{self.hub.url}/{repo}"}).encode()
        self._send(url, status=409 if there else 200, headers={"Content-Type": "application/json"})

    def validate(self) -> None:
        front = json.loads(self.body)["content"].split("---\n")[1]
        assert isinstance(yaml.safe_load(front), dict)
        self._json({"warnings": [], "errors": []})

    def preupload(self, repo: str, revision: str) -> None:
        files = self._repo(repo).files(revision)
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        rows = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LARGE) else "regular",
                "shouldIgnore": False,
                "oid": _oid(path, files[path]) if path in files else None,
            }
            for path in asked
        ]
        self._json({"files": rows})

    def batch(self, repo: str) -> None:
        self._repo(repo)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.storage}/storage/{wanted['oid']}", "header": {}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.stored else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def put(self, digest: str) -> None:
        if self.hub.full is not None and len(self.body) > self.hub.full:
            raise _RefusedError(403, "the storage is full")
        assert digest_of(self.body) == digest
        self.hub.stored[digest] = self.body
        self._send(b"")

    def commit(self, repo: str, revision: str) -> None:
        if self._person()[1] != "write":
            raise _RefusedError(403, "this token may only read")
        found = self._repo(repo)
        files = dict(found.files(revision))
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif row["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif row["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert row["key"] == "header", row
        commit = found.commit(files, revision)
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit, "success": True})


_FILE = r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)"
_GET = {
    "/api/whoami-v2": "whoami",
    _MODEL: "info",
    rf"{_MODEL}/revision/(?P<revision>[^/]+)": "info",
    rf"{_MODEL}/tree/(?P<revision>[^/]+)": "tree",
    "/storage/(?P<digest>[0-9a-f]+)": "storage",
    _FILE: "resolve",
}
_POST = {
    "/api/repos/create": "create",
    "/api/validate-yaml": "validate",
    rf"{_MODEL}/preupload/(?P<revision>[^/]+)": "preupload",
    rf"{_MODEL}/commit/(?P<revision>[^/]+)": "commit",
    r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch": "batch",
}
_PUT = {"/storage/(?P<digest>[0-9a-f]+)": "put"}


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port, for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.daemon_threads = True
    hub = Hub(url=f"http://127.0.0.1:{server.server_port}")
    server.RequestHandlerClass.hub = hub  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
