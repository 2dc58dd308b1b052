"""/healthz of every replica, the one that leads and the one that waits: 200, or 500 where a worker is stuck.

It is answered by the event loop that does the work, so a loop that is stuck fails it too.
"""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

__all__ = ["build_health"]


def build_health(stuck: Callable[[], str], leads: Callable[[], bool]) -> web.Application:
    """`stuck` gives a sentence about a worker that is, else an empty text."""

    async def answer(request: web.Request) -> web.Response:
        problem = stuck()
        return web.json_response({"leader": leads(), "workers": problem or "ok"}, status=500 if problem else 200)

    application = web.Application(client_max_size=1 << 10)
    application.router.add_get("/healthz", answer)
    return application
