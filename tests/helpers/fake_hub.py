"""A fake hub on loopback, with the part of the HTTP interface that creating a repository and a commit needs.

It keeps what a real client sends: each request, each repository, and the bytes of each committed file. It
does not support Xet, the hub's newer storage: clients set HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = (".safetensors", "tokenizer.json")  # uploaded as large files; other files are in the commit
CREATE, COMMIT = "/api/repos/create", "/commit/main"


@dataclass
class Request:
    """One request, as received."""

    method: str
    path: str
    authorization: str
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Repository:
    """A repository: whether it is private, and the files of each commit (None: deleted)."""

    private: bool
    commits: list[dict[str, bytes | None]] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        merged = {name: content for commit in self.commits for name, content in commit.items()}
        return {name: content for name, content in merged.items() if content is not None}


@dataclass
class Failure:
    """The answer to the next `times` requests whose path has this ending."""

    ending: str
    status: int
    times: int
    message: str


class FakeHub:
    """The state of the fake hub. `fake_hub()` serves it."""

    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[Request] = []
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files, by sha256
        self.failures: list[Failure] = []
        self.cuts: dict[str, int] = {}  # pattern of a path -> how many requests lose their connection
        self.held = ""  # pattern of the paths that get no answer before release()
        self.holding, self.released = threading.Event(), threading.Event()
        self.waiting = 0  # requests that are held
        self.lock = threading.Lock()

    def fail(self, status: int, ending: str = "", times: int = 1_000, message: str = "no") -> None:
        """Let the next `times` requests whose path has this ending fail."""
        self.failures.append(Failure(ending, status, times, message))

    def cut(self, pattern: str, times: int = 1_000) -> None:
        """Cut the connection of the next `times` requests whose path matches, before all data has come."""
        self.cuts[pattern] = times

    def hold(self, pattern: str) -> None:
        """Give no answer to requests whose path matches. `holding` is set once one of them has come."""
        self.held = pattern
        self.holding.clear()
        self.released.clear()

    def release(self) -> None:
        """Answer each request again, also those that wait: return when they are answered."""
        self.held = ""
        self.released.set()
        while self.waiting:
            time.sleep(0.01)

    def recover(self) -> None:
        """Fail and cut nothing any more, and answer all."""
        self.failures.clear()
        self.cuts.clear()
        self.release()

    def is_cut(self, path: str) -> bool:
        """Return whether this request loses its connection."""
        with self.lock:
            found = next((p for p, times in self.cuts.items() if times and re.search(p, path)), None)
            if found is not None:
                self.cuts[found] -= 1
            return found is not None

    @contextmanager
    def in_turn(self, path: str) -> Iterator[None]:
        """Wait while the request is held, then answer it in this block."""
        held = bool(self.held) and re.search(self.held, path) is not None
        if held:
            with self.lock:
                self.waiting += 1
            self.holding.set()
            self.released.wait()
        try:
            yield
        finally:
            if held:
                with self.lock:
                    self.waiting -= 1

    def sent(self, ending: str) -> list[Request]:
        return [request for request in self.requests if request.path.endswith(ending)]

    def answer(self, request: Request) -> tuple[int, Any]:
        """Return the status and the JSON of an answer."""
        self.requests.append(request)
        for failure in self.failures:
            if failure.times and request.path.endswith(failure.ending):
                failure.times -= 1
                return failure.status, {"error": failure.message}
        if request.path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if request.path == CREATE:
            return self.create(request.json)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)", request.path):
            return self.describe(found[1])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", request.path):
            return self.preupload(found[1], request.json)
        if request.path.endswith(".git/info/lfs/objects/batch"):
            return 200, {"transfer": "basic", "objects": [self.place(o) for o in request.json["objects"]]}
        if found := re.fullmatch(r"/objects/(\w+)", request.path):
            self.objects[found[1]] = request.body
            return 200, {}
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", request.path):
            return self.commit(found[1], request.body)
        return 404, {"error": f"the fake hub does not know {request.method} {request.path}"}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.repositories[name] = Repository(private)
        return 200, {"url": f"{self.endpoint}/{name}"}

    def describe(self, name: str) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        kept = self.repositories[name]
        siblings = [{"rfilename": file} for file in kept.files]
        return 200, {"id": name, "private": kept.private, "sha": "0" * 40, "siblings": siblings}

    def preupload(self, name: str, asked: dict[str, Any]) -> tuple[int, Any]:
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        return 200, {"files": modes}

    def place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.objects:
            return wanted
        upload = {"href": f"{self.endpoint}/objects/{wanted['oid']}", "header": {}}
        return wanted | {"actions": {"upload": upload}}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        files: dict[str, bytes | None] = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files[value["path"]] = None
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.objects[value["oid"]]
        self.repositories[name].commits.append(files)
        sha = f"{len(self.repositories[name].commits):040x}"
        return 200, {
            "commitUrl": f"{self.endpoint}/{name}/commit/{sha}",
            "commitOid": sha,
            "pullRequestUrl": None,
        }


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a fake hub at `hub.endpoint`, on a free port of 127.0.0.1, until the block ends."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self) -> None:
            path = self.path.partition("?")[0]
            if hub.is_cut(path):
                self.rfile.read(1)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            body = self._body()
            request = Request(self.command, path, self.headers.get("Authorization", ""), body)
            with hub.in_turn(path), hub.lock:
                status, value = hub.answer(request)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = handle_one

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *where: Any) -> None:
            """Ignore clients that end without closing the connection, as a process that exits does."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(*where)

    server = Server(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release()
        server.shutdown()
        server.server_close()
        thread.join()
