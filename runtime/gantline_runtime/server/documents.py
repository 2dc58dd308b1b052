"""GET /openapi.json and GET /docs"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from gantline_runtime.server.errors import json_response
from gantline_runtime.server.openapi import build_document, build_page

__all__ = ["show_docs", "show_openapi"]

_NOTHING_FROM_ELSEWHERE = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


async def show_openapi(request: Request) -> Response:
    return json_response(build_document(request.app.state.routes, request.app.state.version))


async def show_docs(request: Request) -> Response:
    page = build_page(build_document(request.app.state.routes, request.app.state.version))
    return HTMLResponse(page, headers={"Content-Security-Policy": _NOTHING_FROM_ELSEWHERE})
