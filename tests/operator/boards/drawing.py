"""Draws a dashboard in a browser: serves the page, and says what is wrong with what is seen."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.operator.boards.browser import Page

__all__ = ["Drawing", "draw", "serving_pages"]

Object = dict[str, Any]
HTML = Path(__file__).parent / "page" / "index.html"
HEIGHT_PX = 3000
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@dataclass(frozen=True)
class Drawing:
    """`chosen`: name of a variable -> the values chosen; of the others all are."""

    name: str
    board: Object
    prometheus: str
    range: Object
    """`from` and `to` in milliseconds, `scrape_s`."""
    chosen: dict[str, list[str]] = field(default_factory=dict)

    def work(self) -> Object:
        return {"board": self.board, "source": {"url": self.prometheus, "range": self.range}, "chosen": self.chosen}


@contextmanager
def serving_pages(files: Mapping[str, Path], drawings: list[Drawing]) -> Iterator[str]:
    """Its URL; `files` by their paths."""
    works = {drawing.name: drawing.work() for drawing in drawings}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            file = {"/": HTML, **files}.get(path)
            if path == "/work":
                self._say(json.dumps(works[query]).encode(), "application/json")
            elif file is not None:
                self._say(file.read_bytes(), _TYPES.get(file.suffix, "application/octet-stream"))
            else:
                self.send_error(404)

        def _say(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def draw(page: Page, url: str, drawing: Drawing, image: Path, *, width_px: int) -> list[str]:
    """What is wrong, by panel. The picture is made in any case."""
    page.complaints.clear()
    page.open(f"{url}/?{drawing.name}", width_px, HEIGHT_PX)
    found = page.wait_value("window.findings")
    page.screenshot(image)
    return [*(f"{panel or 'board'}: {what}" for panel, what in found), *page.complaints]
