"""Cross-origin requests (https://fetch.spec.whatwg.org/#http-cors-protocol): pages of which other web origins may ask, and read answers."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

__all__ = ["cross_origin"]


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """What goes around everything else, so that preflights need no API key and pages can read errors too; nothing for no `origins`.

    `*` stands for all. Cookies play no part here, so whoever may ask may send any header: OpenAI's client for browsers sends a dozen.
    """
    if not origins:
        return []
    exposed = ["X-Request-Id", "Retry-After"]
    return [
        Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=exposed)
    ]
