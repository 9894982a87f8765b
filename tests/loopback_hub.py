"""A Hugging Face hub on this machine: what its client asks to fetch a file, over real HTTP.

The hub of data_prep's tests, which lists the files of a data set, is made of the same parts.
"""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = re.compile(r"/(cdn/)?((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class LoopbackServer:
    """A server on this machine, until it is closed; its handler knows it as ``self.server.hub``."""

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"  # for HF_ENDPOINT
        serve = {"target": self._server.serve_forever, "kwargs": {"poll_interval": 0.02}}
        threading.Thread(**serve, daemon=True).start()

    def be_the_hub(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let huggingface_hub in this process know of no other hub; its cache is empty."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)  # who downloads has to see to it
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class ReplyHandler(BaseHTTPRequestHandler):
    """Answers HEAD as GET, without the body, and logs nothing."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


class LoopbackHub(LoopbackServer):
    """Serves files of repositories at one commit, which is ``main``, from a second address as the hub does.

    Attributes:
        files: content by repository and file name.
        refused: status and error code by repository, in place of its files.
        cut: repositories of which half a file arrives.
        swapped: repositories that send as many other bytes.
        asked: method, path and User-Agent of every request so far.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], bytes] = {}
        self.refused: dict[str, tuple[int, str]] = {}
        self.cut: set[str] = set()
        self.swapped: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        super().__init__(Handler)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body for a path."""
        match = PATH.fullmatch(path)
        if match is None:
            return 404, {}, b""
        cdn, repository, revision, name = match.groups()
        names = {file for owner, file in self.files if owner == repository}
        if repository in self.refused or not names:
            status, code = self.refused.get(repository, (401, "RepoNotFound"))
            return status, {"X-Error-Code": code}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name not in names:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = self.files[repository, name]
        if cdn:
            sent = bytes(len(content)) if repository in self.swapped else content
            return 200, {}, sent[: len(content) // 2] if repository in self.cut else sent
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(content))}
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        elsewhere = self.url.replace("127.0.0.1", "localhost")
        return 302, {**headers, "Location": f"{elsewhere}/cdn{path}"}, b""


class Handler(ReplyHandler):
    """Sends what its server's ``hub`` answers."""

    def do_GET(self) -> None:
        hub: LoopbackHub = self.server.hub
        hub.asked.append((self.command, self.path, self.headers.get("User-Agent", "")))
        self.reply(*hub.answer(self.path))
