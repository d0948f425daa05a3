"""An S3 server that fails when it is told to: a proxy in front of the test server."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

from sf_pipelines.snapshot.config import S3Options

# A number is the status of the answer; for connections that are refused see ``FlakyServer.refusing``.
Fault = int | Literal["reset", "hang", "truncate", "garble", "drip"]

# What ``drip`` sends in a tenth of a second.
DRIP_BYTES = 100_000

# Headers that belong to one connection.
_OF_THE_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass
class _Rule:
    """Requests that fail."""

    keys: re.Pattern[str]
    fault: Fault
    released: threading.Event = field(default_factory=threading.Event)
    hits: int = 0


class FlakyServer:
    """A proxy on 127.0.0.1.

    Args:
        behind: options of the server behind it.

    Attributes:
        options: of this one; a failing request is not repeated, and given up after two seconds.
    """

    def __init__(self, behind: S3Options) -> None:
        assert behind.endpoint_url is not None
        self.target = urlsplit(behind.endpoint_url).netloc
        self.rules: list[_Rule] = []
        self.requests: list[str] = []
        self._server = self._listen(0)
        self.port: int = self._server.server_address[1]
        self.options = behind.model_copy(
            update={"endpoint_url": f"http://127.0.0.1:{self.port}", "timeout": 2.0, "retries": 0}
        )

    @contextmanager
    def failing(self, keys: str, fault: Fault) -> Iterator[_Rule]:
        """Reading objects whose address matches fails for as long as the block lasts; what hangs is then answered."""
        rule = _Rule(re.compile(keys), fault)
        self.rules.append(rule)
        try:
            yield rule
        finally:
            self.rules.remove(rule)
            rule.released.set()

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Nobody listens for as long as the block lasts."""
        self.stop()
        try:
            yield
        finally:
            self._server = self._listen(self.port)

    def stop(self) -> None:
        """Ends listening; lets go of what hangs."""
        for rule in self.rules:
            rule.released.set()
        self._server.shutdown()
        self._server.server_close()

    def _listen(self, port: int) -> ThreadingHTTPServer:
        flaky = self

        class Handler(_Proxy):
            """Of this server."""

            owner = flaky

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return server


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on. Each connection serves one, so that none outlives a fault."""

    owner: FlakyServer

    def __getattr__(self, name: str) -> Callable[[], None]:
        # Every verb: the base class looks for ``do_GET`` and the like.
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def log_message(self, *args: object, **more: object) -> None:
        del args, more

    def _answer(self) -> None:
        path = unquote(self.path)
        self.owner.requests.append(f"{self.command} {path}")
        read = self.command in {"GET", "HEAD"}
        rule = next((rule for rule in self.owner.rules if read and rule.keys.search(path)), None)
        fault = None if rule is None else rule.fault
        if rule is not None:
            rule.hits += 1
            if fault == "hang":
                rule.released.wait(30)
        if fault == "reset":
            # Closing without the usual goodbye.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        if isinstance(fault, int):
            self._send(fault, [], b"<Error><Code>Told</Code><Message>told to fail</Message></Error>")
            return
        status, headers, body = self._fetch()
        if fault == "garble":
            body = bytes([byte ^ 0x55 for byte in body[:64]]) + body[64:]
        self._send(
            status,
            headers,
            body,
            sent=len(body) // 2 if fault == "truncate" else None,
            pace=DRIP_BYTES if fault == "drip" else 0,
        )

    def _fetch(self) -> tuple[int, list[tuple[str, str]], bytes]:
        behind = HTTPConnection(self.owner.target, timeout=30)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        behind.request(self.command, self.path, body=data or None, headers=dict(self.headers.items()))
        found = behind.getresponse()
        body = found.read()
        headers = [(name, value) for name, value in found.getheaders() if name.lower() not in _OF_THE_HOP]
        if self.command == "HEAD":
            headers.append(("Content-Length", found.getheader("Content-Length", "0")))
        behind.close()
        return found.status, headers, body

    def _send(
        self, status: int, headers: list[tuple[str, str]], body: bytes, sent: int | None = None, pace: int = 0
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = body[:sent]
        step = pace or len(body) or 1
        with suppress(ConnectionError):
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if pace:
                    time.sleep(0.1)
