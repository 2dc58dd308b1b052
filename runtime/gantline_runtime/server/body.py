"""Reads a request's body, bounded in size and time. What is in it, `body_reader.py` finds out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.events import ClientLeft

__all__ = ["BODY_TIMEOUT_S", "BodyLimits", "check_content_type", "read_body"]

BODY_TIMEOUT_S = 60.0
"""Clients that send a byte now and then must not hold connections and memory for ever."""


@dataclass(frozen=True)
class BodyLimits:
    max_bytes: int
    timeout_s: float
    """For the whole body."""
    silence_s: float
    """Within that time, for the next byte."""


def check_content_type(headers: Mapping[str, str]) -> None:
    """Raises ApiError 415."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Browsers send other types across origins without asking; a page that someone looks at must not be able to use the server.
        raise ApiError(415, f"Content-Type is {kind[:80] or 'missing'!r}; send application/json.", code="unsupported_media_type")
    coding = headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        cause = f"Content-Encoding is {coding[:80]!r}; send the body as it is."
        raise ApiError(415, cause, code="unsupported_media_type", headers={"Accept-Encoding": "identity"})


async def read_body(request: Request, limits: BodyLimits, on_growth: Callable[[int], None] | None = None) -> bytes:
    """The whole body, within `limits`. `on_growth` is told how many bytes there are whenever more have come, and may refuse them by an
    ApiError. Raises that, or ApiError 408 or 413, or ClientLeft."""
    too_large = ApiError(413, f"The body has more than {limits.max_bytes} bytes.", code="body_too_large", headers={"Connection": "close"})
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > limits.max_bytes:
        raise too_large
    chunks, size = [], 0
    loop = asyncio.get_running_loop()
    latest = loop.time() + limits.timeout_s
    try:
        async with asyncio.timeout_at(min(latest, loop.time() + limits.silence_s)) as bound:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_bytes:
                    raise too_large
                if on_growth is not None:
                    on_growth(size)
                chunks.append(chunk)
                bound.reschedule(min(latest, loop.time() + limits.silence_s))
    except ClientDisconnect:
        raise ClientLeft from None
    except TimeoutError:
        late = loop.time() >= latest
        cause = (
            f"The body did not arrive within {limits.timeout_s:g} s." if late else f"Nothing more of it came for {limits.silence_s:g} s."
        )
        raise ApiError(408, cause, code="request_timeout", headers={"Connection": "close"}) from None
    return b"".join(chunks)
