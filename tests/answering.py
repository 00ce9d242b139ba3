"""A small HTTP server on loopback whose answers a test decides."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What a server answers: anything as JSON, bytes as they are. Status 0 breaks the connection in place of it."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """One request."""

    path: str
    headers: dict[str, str]
    content: Any


@dataclass
class Answering:
    """A running server."""

    url: str
    asked: list[Asked] = field(default_factory=list)
    together: int = 0
    """Requests that are being answered,"""
    most: int = 0
    """and the most of them at any time."""


@contextlib.contextmanager
def answering(answer: Callable[[Any], Any]) -> Iterator[Answering]:
    """A server that answers ``answer(content)``, an :class:`Answer` or what is to be its content."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                state.asked.append(Asked(self.path, {k.lower(): v for k, v in self.headers.items()}, content))
                state.together += 1
                state.most = max(state.most, state.together)
            found = answer(content)
            found = found if isinstance(found, Answer) else Answer(found)
            body = found.content if isinstance(found.content, bytes) else json.dumps(found.content).encode()
            with lock:
                state.together -= 1
            if not found.status:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.send_response(found.status)
                for name, value in found.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state = Answering(f"http://127.0.0.1:{server.server_address[1]}/get_reward")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
