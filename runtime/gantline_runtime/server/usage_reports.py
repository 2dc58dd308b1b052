"""What a request used, told to whoever asks for it: a gateway counts tokens without reading the answers that it passes on.

A request with the header `X-Gantline-Usage: report` gets, if tokens were made or read for it, the header `X-Gantline-Usage: 12,34,5`
(tokens of the prompt, of the answer, and of the prompt those that the cache held); a stream ends with them as a comment instead.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["COMMENT", "HEADER", "UsageReports"]

HEADER = "x-gantline-usage"
COMMENT = b": gantline-usage "


class UsageReports:
    """Inside of whatever sets `state.generation`'s reader: it adds to answers and hides nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or Headers(scope=scope).get(HEADER) != "report":
            await self._app(scope, receive, send)
            return
        streams = False

        async def reporting_send(message: Message) -> None:
            nonlocal streams
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                streams = any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in headers)
                if not streams and (report := _report(scope)):
                    headers.append((HEADER.encode(), report))
            elif streams and not message.get("more_body") and (report := _report(scope)):
                message = {**message, "body": message.get("body", b"") + COMMENT + report + b"\n\n"}
            await send(message)

        await self._app(scope, receive, reporting_send)


def _report(scope: Scope) -> bytes:
    generation = scope.get("state", {}).get("generation")
    if generation is None:
        return b""
    usage = generation.usage()
    counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["prompt_tokens_details"]["cached_tokens"])
    return ",".join(map(str, counts)).encode()
