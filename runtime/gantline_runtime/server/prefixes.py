"""GET /internal/prefixes: which beginnings of prompts the cache holds, for gateways that choose among replicas by it."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.callers import current_caller
from gantline_runtime.server.service import Service

__all__ = ["list_prefixes"]


async def list_prefixes(request: Request) -> Response:
    """With `?since=CURSOR` of an earlier answer, only what has changed. Raises ApiError 403 for an API key that is not `internal`: who
    knows a text could find out that somebody asked for it."""
    if not current_caller.get().internal:
        message = "This API key may not read what concerns all callers. Mark the gateway's key as internal."
        raise ApiError(403, message, code="not_internal")
    service: Service = request.app.state.service
    answer = service.prefixes.since(request.query_params.get("since", ""))
    return Response(msgspec.json.encode(answer), media_type="application/json")
