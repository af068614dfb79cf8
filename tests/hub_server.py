"""A small Hub on loopback: what `huggingface_hub` asks for to make, fill and read a repository."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http


OWNER = "someone"
WRITE, READ = "hf_writes", "hf_reads"  # tokens
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png", ".webp")


class Hub:
    """
    The repositories of one user, and what goes wrong.

    Attributes:
        endpoint: Its address.
        files: The files of each repository, by name: `files["someone/red"]["README.md"]`.
        commits: The summary and the paths of each commit, in their order.
        requests: Method, path and token of each request, in their order.
        faults: The part of a path, and what its requests get: a status, or `"drop"` for a closed connection.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[tuple[str, list[str]]] = []
        self.requests: list[tuple[str, str, str | None]] = []
        self.bodies: list[bytes] = []
        self.faults: dict[str, int | str] = {}
        self.objects: dict[str, bytes] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A [`Hub`] that this process's client talks to, without its waits before another try."""
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # whose servers speak a protocol of their own
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made anew, with this endpoint
    monkeypatch.setenv("HF_TOKEN", WRITE)
    sleep = time.sleep
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    yield hub
    hub.close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def serve(self) -> None:
        body = self.read_body()
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.hub.requests.append((self.command, path, token))
        self.hub.bodies.append(body)
        for part, fault in self.hub.faults.items():
            if part in path:
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                return self.answer(int(fault), {"error": f"a fault of this test: {fault}"})
        if path.startswith("/api/") and token not in (WRITE, READ):
            return self.answer(401, {"error": "Invalid username or password."})
        for pattern, method in self.ROUTES.items():
            if (found := re.fullmatch(pattern, path)) is not None:
                return getattr(self, method)(*found.groups(), body=body, token=token)
        self.answer(404, {"error": f"no {path}"})

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- What the client asks for ----

    ROUTES = {
        r"/api/whoami-v2": "who",
        r"/api/repos/create": "create",
        r"/api/validate-yaml": "validate",
        r"/api/models/([\w.-]+/[\w.-]+)/auth-check/write": "check",
        r"/api/models/([\w.-]+/[\w.-]+)/preupload/[^/]+": "preupload",
        r"/api/models/([\w.-]+/[\w.-]+)/commit/[^/]+": "commit",
        r"/api/models/([\w.-]+/[\w.-]+)(?:/revision/[^/]+)?": "describe",
        r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch": "batch",
        r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/verify": "verify",
        r"/lfs/([0-9a-f]{64})": "upload",
        r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.+)": "resolve",
    }

    def who(self, body: bytes, token: str) -> None:
        self.answer(200, {"name": OWNER, "type": "user", "orgs": []})

    def create(self, body: bytes, token: str) -> None:
        given = json.loads(body)
        name = f"{given['organization'] or OWNER}/{given['name']}"
        if token != WRITE or given["organization"] not in (None, OWNER):
            return self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        is_new = name not in self.hub.files
        self.hub.files.setdefault(name, {})
        self.hub.private.setdefault(name, given.get("visibility") == "private")
        self.answer(200 if is_new else 409, {"url": f"{self.hub.endpoint}/{name}"})

    def check(self, name: str, body: bytes, token: str) -> None:
        status = 404 if name not in self.hub.files else 200 if token == WRITE else 403
        self.answer(status, {})

    def validate(self, body: bytes, token: str) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def describe(self, name: str, body: bytes, token: str) -> None:
        if name not in self.hub.files:
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": path} for path in self.hub.files[name]]
        self.answer(200, {"id": name, "sha": self.hub.sha, "siblings": files, "private": self.hub.private[name]})

    def preupload(self, name: str, body: bytes, token: str) -> None:
        files = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
        self.answer(200, {"files": files})

    def batch(self, name: str, body: bytes, token: str) -> None:
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"}
                wanted |= {"actions": {"upload": upload, "verify": verify}}
            objects.append(wanted)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str, body: bytes, token: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self.answer(400, {"error": "another content than its hash says"})
        self.hub.objects[oid] = body
        self.answer(200, {})

    def verify(self, name: str, body: bytes, token: str) -> None:
        given = json.loads(body)
        self.answer(200 if len(self.hub.objects[given["oid"]]) == given["size"] else 400, {})

    def commit(self, name: str, body: bytes, token: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        new = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                new[value["path"]] = self.hub.objects[value["oid"]]
            else:
                new[value["path"]] = base64.b64decode(value["content"])
        self.hub.files[name] |= new
        self.hub.commits.append((lines[0]["value"]["summary"], sorted(new)))
        url = f"{self.hub.endpoint}/{name}/commit/{self.hub.sha}"
        self.answer(200, {"success": True, "commitOid": self.hub.sha, "commitUrl": url})

    def resolve(self, name: str, path: str, body: bytes, token: str) -> None:
        data = self.hub.files.get(name, {}).get(path)
        if data is None:
            return self.answer(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.hub.sha})
