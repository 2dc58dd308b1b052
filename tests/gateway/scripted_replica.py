"""A replica that misbehaves on demand: over real connections, since that is where it hurts."""

from __future__ import annotations

import contextlib
import json
import socketserver
import threading
from collections.abc import Iterator

__all__ = ["ScriptedReplica", "closed_url", "scripted"]


def _error(status: str, code: str, headers: str = "") -> bytes:
    body = json.dumps({"error": {"message": f"scripted {code}", "type": "server_error", "param": None, "code": code}}).encode()
    return f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_EVENT = b'data: {"choices":[]}\n\n'
ANSWERS = {
    "reset": b"",
    "draining": _error("503 Service Unavailable", "draining", "Retry-After: 1\r\n"),
    "loading": _error("503 Service Unavailable", "not_ready", "Retry-After: 5\r\n"),
    "busy": _error("429 Too Many Requests", "queue_full", "Retry-After: 7\r\n"),
    "half-head": _STREAM,
    "half-stream": _STREAM + b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT),
    "half-answer": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"id":',
    "odd": b"HTTP/1.1 500 Oops\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\noops",
}
"""What is said before the connection is closed, by the script's name."""


class ScriptedReplica(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, script: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.requests = ANSWERS[script], 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(socketserver.StreamRequestHandler):
    server: ScriptedReplica

    def handle(self) -> None:
        length, asked = 0, self.rfile.readline().startswith(b"POST")  # else it is only asked what its cache holds
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        self.rfile.read(length)
        self.server.requests += asked
        self.wfile.write(self.server.answer)


@contextlib.contextmanager
def scripted(*scripts: str) -> Iterator[dict[str, ScriptedReplica]]:
    """One replica for each script, by its name."""
    with contextlib.ExitStack() as stack:
        replicas = {script: stack.enter_context(ScriptedReplica(script)) for script in scripts}
        for replica in replicas.values():
            threading.Thread(target=replica.serve_forever, args=(0.05,), daemon=True).start()
            stack.callback(replica.shutdown)
        yield replicas


def closed_url() -> str:
    """Where nobody listens."""
    with socketserver.TCPServer(("127.0.0.1", 0), _Handler) as server:
        return f"http://127.0.0.1:{server.server_address[1]}"
