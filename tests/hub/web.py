"""A web server on this machine, with what real ones have: listings, ranges, passwords, signatures, refusals."""

from __future__ import annotations

import base64
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Web(ThreadingHTTPServer):
    """Serves a folder; `sent` counts bytes of files by path, `status` refuses everything."""

    daemon_threads = True

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.ranges: bool = settings.get("ranges", True)
        self.user: str = settings.get("user", "")
        self.token: str = settings.get("token", "")
        self.status: int = settings.get("status", 0)
        self.sent: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Handler(SimpleHTTPRequestHandler):
    server: Web

    def __init__(self, request: Any, client: Any, server: Web) -> None:
        super().__init__(request, client, server, directory=str(server.folder))

    def log_message(self, *args: object) -> None:
        return

    def send_response(self, code: int, message: str | None = None) -> None:
        super().send_response(code, message)
        self.send_header("Connection", "close")  # so that nothing answers any more when it is shut down

    def _refused(self) -> bool:
        server, expected = self.server, "Basic " + base64.b64encode(self.server.user.encode()).decode()
        token = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        wrong = (server.user and self.headers.get("Authorization") != expected) or server.token != token
        if not server.status and not wrong:
            return False
        # as careless servers do, with the address in it
        body = (
            f"<Error><Code>AccessDenied</Code><Message>no: {self.path} {dict(self.headers)}</Message></Error>".encode()
        )
        self.send_response(server.status or 403)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        return True

    def handle_expect_100(self) -> bool:
        return not self._refused() and super().handle_expect_100()

    def do_HEAD(self) -> None:
        if not self._refused():
            super().do_HEAD()

    def do_PUT(self) -> None:
        self._refused()

    do_POST = do_DELETE = do_PUT  # noqa: N815 - the names that http.server wants

    def do_GET(self) -> None:
        if self._refused():
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            super().do_GET()
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        ranged = wanted is not None and self.server.ranges
        if wanted is not None and ranged:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if ranged else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            for first in range(0, len(data), 1024):
                self.wfile.write(data[first : first + 1024])
                self.server.sent[path.name] += len(data[first : first + 1024])
        except OSError:  # the client has seen enough
            self.close_connection = True


@contextmanager
def web(folder: Path, **settings: Any) -> Iterator[Web]:
    """A server for the time of a block."""
    with Web(folder, **settings) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
