"""A Hugging Face Hub on this machine: serves folders, and fails as requested."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """root/datasets/ORG/NAME and root/models/ORG/NAME hold the files of repositories.

    Attributes:
        statuses: a path's pattern -> statuses to answer with before the real answer, each once.
        cut: a path's pattern -> how many answers break off in the middle of the body.
        asked: every request, with the token that it brought.
    """

    def __init__(self, root: Path):
        self.root, self.url = root, ""
        self.statuses: dict[str, list[int]] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str | None]] = []

    def repo(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return None

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

    def _answer(self, body: dict | None = None) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((f"{self.command} {path}", self.headers.get("Authorization")))
        for pattern, statuses in self.hub.statuses.items():
            if statuses and re.search(pattern, path):
                self._send(json.dumps({"error": "as requested"}).encode(), statuses.pop(0))
                return
        if found := re.fullmatch(
            r"/api/(datasets|models)/([\w-]+/[\w-]+)(?:/(revision|tree|paths-info)/([\w-]+)(?:/(.*))?)?", path
        ):
            kind, name, what, _, below = found.groups()
            repo = self.hub.repo(kind, name)
            if not repo.is_dir():
                self._send(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})
            elif what == "tree":
                self._json([entry for entry in self._entries(repo, below or "")])
            elif what == "paths-info":
                given = (body or {}).get("paths", [])
                entries = [e for e in self._entries(repo, "") if e["path"] in (given if isinstance(given, list) else [given])]
                self._json(entries)
            else:
                files = [{"rfilename": e["path"]} for e in self._entries(repo, "") if e["type"] == "file"]
                self._json(
                    {"_id": "1", "id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": [], "downloads": 0}
                )
            return
        if found := re.fullmatch(r"/(datasets/)?([\w-]+/[\w-]+)/resolve/[\w-]+/(.*)", path):
            file = self.hub.repo("datasets" if found[1] else "models", found[2]) / found[3]
            if file.is_file():
                self._file(file, path)
            else:
                self._send(b"Entry not found", 404, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(b'{"error": "no such path"}', 404)

    def _entries(self, repo: Path, below: str) -> list[dict]:
        found = []
        for path in sorted((repo / below).rglob("*")):
            name = path.relative_to(repo).as_posix()
            if path.is_dir():
                found.append({"type": "directory", "path": name, "oid": "0" * 40, "size": 0})
            else:
                oid = hashlib.sha1(path.read_bytes()).hexdigest()
                found.append({"type": "file", "path": name, "oid": oid, "size": path.stat().st_size})
        return found

    def _json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _file(self, file: Path, path: str) -> None:
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        cut = next((p for p, n in self.hub.cut.items() if n and self.command == "GET" and re.search(p, path)), None)
        if cut is None:
            self._send(data, status, headers)
            return
        self.hub.cut[cut] -= 1
        self._send(data[: len(data) // 2], status, headers, length=len(data))
        self.close_connection = True

    def _send(self, data: bytes, status: int, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
