"""A small Hub on the loopback for the real client: repos in memory, their large files on "another host" (localhost),
and every way to fail that a test asks for. It counts requests and bytes.
"""

import base64
import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_secretSECRETsecretSECRET0123456789"
CHUNK = 64 << 10

Files = dict[str, bytes]


@dataclass
class Repo:
    """commits: their files by sha. refs: branches, tags, pull requests. offers: discussions as the API lists them."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    offers: list[dict[str, Any]] = field(default_factory=list)
    gated: bool = False
    private: bool = False


@dataclass
class Failure:
    """A refusal: of every request whose path holds `where`, so many `times`."""

    status: int
    message: str = ""
    code: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    times: int = 10**9


def is_large(name: str) -> bool:
    """Whether the Hub keeps a file of this name in its large storage."""
    return name.endswith((".safetensors", ".bin", ".png", ".jpg"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Httpd(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: Any) -> None:
        """A client that went away is what some tests are about."""


class HubServer:
    """The server: `add` puts a repo there. requests: (method, path) of each; bytes: sent, by file."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.failures: list[Failure] = []
        self.breaks: dict[str, list[int]] = {}  # by file: after how many bytes a connection breaks, one request each
        self.delay = 0.0  # seconds that a piece of CHUNK bytes takes
        self.token: str | None = None  # the only one that is taken; None: nobody has to be known
        self.requests: list[tuple[str, str]] = []
        self.bytes: Counter[str] = Counter()
        self.starts: list[tuple[str, int]] = []  # from which byte on files were asked for
        self.tokens_elsewhere: list[str] = []  # tokens that reached the other host
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.cards: list[str] = []
        self._httpd = _Httpd(("127.0.0.1", 0), _handler(self))
        self.port = self._httpd.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()

    def add(self, name: str, files: Mapping[str, bytes], branch: str = "main", **options: Any) -> str:
        """A commit of these files on a branch of the repo; returns its sha."""
        repo = self.repos.setdefault(name, Repo())
        for key, value in options.items():
            setattr(repo, key, value)
        listing = json.dumps({key: sha256(data) for key, data in sorted(files.items())})
        sha = hashlib.sha1(f"{name} {listing}".encode()).hexdigest()
        repo.commits[sha], repo.refs[branch] = dict(files), sha
        return sha

    def fetched(self) -> set[str]:
        """The files of which something was sent."""
        return {name for name, count in dict(self.bytes).items() if count}

    def forget(self) -> None:
        """Count from here on."""
        self.requests.clear()
        self.bytes.clear()
        self.starts.clear()


@contextmanager
def running() -> Iterator[HubServer]:
    server = HubServer()
    try:
        yield server
    finally:
        server.close()


def without_naps(monkeypatch: Any) -> None:
    """The client does not wait a second before it asks again. (`time.sleep` itself is the server's too.)"""
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda seconds: None))


def attach(server: HubServer, monkeypatch: Any, home: Path) -> None:
    """The client of this process talks to the server and keeps its cache under `home`: it read its environment when it
    was imported.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its uploads go to servers that are not played here
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK // 4)  # what of a broken connection is lost
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The same for another process."""
    off = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", **off}


def _handler(server: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        def _answer(self) -> None:
            address = urlsplit(self.path)
            self.query = parse_qs(address.query)
            size = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(size) if size else self._chunked()
            parts = [unquote(part) for part in address.path.split("/") if part]
            server.requests.append((self.command, "/".join(parts)))
            try:
                self._route(parts)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _chunked(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return b""
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _route(self, parts: list[str]) -> None:
            token = self.headers.get("Authorization")
            if parts[0] in ("cdn", "lfs") and token:
                server.tokens_elsewhere.append(token)
            if parts[0] == "cdn":
                return self._send_file(parts[2], server.blobs[parts[1]], {"ETag": f'"{parts[1]}"'})
            if parts[0] == "lfs":
                server.blobs[parts[1]] = self.body
                return self._json({})
            for failure in server.failures:
                if failure.times and failure.where in self.path:
                    failure.times -= 1
                    return self._refuse(failure.status, failure.code, failure.message, failure.headers)
            if server.token and token not in (None, f"Bearer {server.token}"):
                return self._refuse(401, "", "Invalid credentials in Authorization header")
            if parts[0] == "api":
                return self._api(parts[1:], token)
            name = "/".join(parts[:2])
            if name.endswith(".git"):
                return self._batch()
            commit = self._commit(name, parts[3], token)
            if commit is None:
                return None
            files, file = server.repos[name].commits[commit], "/".join(parts[4:])
            if file not in files:
                return self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return self._resolve(file, files[file], commit)

        def _commit(self, name: str, revision: str, token: str | None) -> str | None:
            """The commit of a revision; where it is not given out, that is answered."""
            repo = server.repos.get(name)
            if repo is None or (repo.private and not token):
                self._refuse(401 if token is None else 404, "RepoNotFound", "Repository not found")
                return None
            resolve = not self.path.startswith("/api/")
            if repo.gated and resolve and not token:
                self._refuse(401, "GatedRepo", f"Access to model {name} is restricted. You must be authenticated")
                return None
            if repo.gated and resolve:
                self._refuse(403, "GatedRepo", f"Access to model {name} is restricted and you are not in the list")
                return None
            commit = repo.refs.get(revision) or (revision if revision in repo.commits else None)
            if commit is None:
                self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return commit

        def _api(self, parts: list[str], token: str | None) -> None:
            if parts == ["whoami-v2"]:
                return self._json({"name": "someone", "type": "user", "auth": {}, "orgs": []})
            if parts == ["validate-yaml"]:
                server.cards.append(json.loads(self.body)["content"])
                return self._json({"errors": [], "warnings": []})
            if parts == ["repos", "create"]:
                wanted = json.loads(self.body)
                name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
                server.created.append(wanted)
                if name in server.repos:
                    told = {"error": "You already created this model repo", "url": f"{server.url}/{name}"}
                    return self._json(told, 409)
                server.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"})
                return self._json({"url": f"{server.url}/{name}", "name": name, "id": name})
            if parts[0] != "models":
                return self._refuse(404, "", "Not found")
            name, rest = "/".join(parts[1:3]), parts[3:]
            revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"], ["commit"], ["preupload"]) else "main"
            commit = self._commit(name, revision, token)
            if commit is None:
                return None
            repo = server.repos[name]
            files = repo.commits[commit]
            if not rest or rest[0] == "revision":
                found = {"id": name, "sha": commit, "gated": "auto" if repo.gated else False, "private": repo.private}
                return self._json({**found, "siblings": [_sibling(key, data) for key, data in files.items()]})
            if rest[0] == "tree":
                return self._json([_leaf(key, data) for key, data in files.items()])
            if rest[0] == "discussions":
                return self._json({"discussions": repo.offers, "count": len(repo.offers), "start": 0})
            if rest[0] == "preupload":
                wanted = json.loads(self.body)["files"]
                modes = [{"path": f["path"], "uploadMode": "lfs" if is_large(f["path"]) else "regular"} for f in wanted]
                return self._json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]})
            return self._add_commit(name, revision, files)

        def _add_commit(self, name: str, branch: str, files: Files) -> None:
            files = dict(files)
            for line in self.body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    files[value["path"]] = server.blobs[value["oid"]]
            sha = server.add(name, files, branch)
            self._json({"commitUrl": f"{server.url}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

        def _batch(self) -> None:
            found = []
            for wanted in json.loads(self.body)["objects"]:
                actions = {"upload": {"href": f"http://localhost:{server.port}/lfs/{wanted['oid']}"}}
                found.append({**wanted, "actions": actions} if wanted["oid"] not in server.blobs else dict(wanted))
            self._json({"transfer": "basic", "objects": found})

        def _resolve(self, file: str, data: bytes, commit: str) -> None:
            if not is_large(file):
                return self._send_file(file, data, {"ETag": f'"{git_sha(data)}"', "X-Repo-Commit": commit})
            key = sha256(data)
            server.blobs[key] = data
            self._start(
                302,
                {
                    "Location": f"http://localhost:{server.port}/cdn/{key}/{file.replace('/', '%2F')}",
                    "X-Repo-Commit": commit,
                    "X-Linked-Size": str(len(data)),
                    "X-Linked-Etag": f'"{key}"',
                },
                0,
            )

        def _send_file(self, file: str, data: bytes, headers: Mapping[str, str]) -> None:
            start, size = 0, len(data)
            wanted = self.headers.get("Range")
            if wanted and self.command == "GET":
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                start = int(first)
                data = data[start : int(last) + 1 if last else None]
                headers = {**headers, "Content-Range": f"bytes {start}-{start + len(data) - 1}/{size}"}
            self._start(206 if wanted and self.command == "GET" else 200, headers, len(data))
            if self.command == "HEAD":
                return
            server.starts.append((file, start))
            limits = server.breaks.get(file)
            limit = limits.pop(0) if limits else None
            for begin in range(0, len(data), CHUNK):
                piece = data[begin : begin + CHUNK]
                if limit is not None and begin + len(piece) > limit:
                    self.wfile.write(piece[: limit - begin])
                    server.bytes[file] += limit - begin
                    self.wfile.flush()
                    self.close_connection = True
                    self.connection.shutdown(2)
                    return
                time.sleep(server.delay)
                self.wfile.write(piece)
                server.bytes[file] += len(piece)

        def _start(self, status: int, headers: Mapping[str, str], size: int) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(size)}.items():
                self.send_header(key, value)
            self.end_headers()

        def _json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
            data = json.dumps(value).encode()
            self._start(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
            if self.command != "HEAD":
                self.wfile.write(data)

        def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
            told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
            self._json({"error": message}, status, told)

    return Handler


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": git_sha(data)}
    return (
        {**found, "lfs": {"size": len(data), "sha256": sha256(data), "pointerSize": 130}} if is_large(name) else found
    )


def _leaf(name: str, data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_sha(data)}
    return {**found, "lfs": {"size": len(data), "oid": sha256(data), "pointerSize": 130}} if is_large(name) else found
