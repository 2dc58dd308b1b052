"""The webhook's server: an AdmissionReview in, the same with warnings out. Whatever happens, the answer is yes.

It shares the event loop with the reconciles, so it is bounded: a few reviews at once, two seconds each, the plan itself in a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from gantline_operator.client import Object

__all__ = ["PATH", "build_admission"]

PATH = "/validate"

_log = logging.getLogger(__name__)

_MAX_BODY = 4 << 20
"""An object has at most 1.5 MiB, and a review carries two of them."""
_DEADLINE_S = 2.0
_AT_ONCE = 4

Judge = Callable[[Object], Awaitable[list[str]]]
"""From a review's request to warnings."""


def build_admission(judge: Judge, count: Callable[[str], None]) -> web.Application:
    """`count` is told what became of each review: warned, quiet, late, error."""
    busy = asyncio.Semaphore(_AT_ONCE)

    async def answer(request: web.Request) -> web.Response:
        review = _object(await request.read())
        asked = review.get("request")
        if not isinstance(asked, dict) or not isinstance(asked.get("uid"), str):
            raise web.HTTPBadRequest(text="no AdmissionReview")
        warnings = await _warnings(asked, judge, busy, count)
        response: Object = {"uid": asked["uid"], "allowed": True, **({"warnings": warnings} if warnings else {})}
        return web.json_response({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})

    application = web.Application(client_max_size=_MAX_BODY)
    application.router.add_post(PATH, answer)
    return application


async def _warnings(asked: Object, judge: Judge, busy: asyncio.Semaphore, count: Callable[[str], None]) -> list[str]:
    try:
        async with asyncio.timeout(_DEADLINE_S), busy:
            warnings = await judge(asked)
    except TimeoutError:
        count("late")
        return []
    except Exception:
        _log.exception("A review of %s/%s failed; it is admitted without a word", asked.get("namespace"), asked.get("name"))
        count("error")
        return []
    count("warned" if warnings else "quiet")
    return warnings


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
