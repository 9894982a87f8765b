"""A Hugging Face hub on this machine: what its client asks to fetch a file, over real HTTP."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = re.compile(r"/(cdn/)?((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class LoopbackHub:
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
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

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

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Sends what its server's ``hub`` answers."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub: LoopbackHub = self.server.hub
        hub.asked.append((self.command, self.path, self.headers.get("User-Agent", "")))
        status, headers, body = hub.answer(self.path)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass
