"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html) for clients that may leave at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gantline_runtime.server.errors import ApiError, translate
from gantline_runtime.server.events import DONE, ClientLeft, encode_event

__all__ = ["DONE", "ClientLeft", "EventStream", "encode_event", "unless_client_leaves"]

T = TypeVar("T")
log = logging.getLogger("gantline.server")


class EventStream(Response):
    """Sends the events that `events` yields, then `ending`.

    An error in mid-stream becomes the event that `failure` makes of it, usually with the error's body, and then the stream ends without
    `ending`: it did not complete. `close` is called on every way out, also when the client left before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        close: Callable[[], None],
        *,
        ending: bytes = DONE,
        failure: Callable[[ApiError], bytes] = lambda error: encode_event(error.body()),
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._close = close
        self._ending, self._failure = ending, failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send_events(send))
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._events.aclose()
            self._close()
        if not sending.cancelled():
            sending.result()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = self._ending
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            known = translate(error)
            if known is None:
                log.exception("a stream failed")
            last = self._failure(known or ApiError(500, "The server failed; its log says more.", code="internal_error"))
        await send({"type": "http.response.body", "body": last, "more_body": False})


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first; then ClientLeft is raised. The body must have been read."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
