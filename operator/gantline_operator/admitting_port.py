"""A port that admits only who shows a client certificate of an authority, which may change while it serves.

OpenSSL can add to what a context trusts, but takes nothing away, and resumes sessions without looking at the certificate again. So each
authority gets a context of its own, and the listening socket, whose queue of new connections lives on, is handed to it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from gantline_operator.certificates.pairs import Pair, load_pair

__all__ = ["AdmittingPort"]


class AdmittingPort:
    """Answers with `application`, which must not be set up yet. It listens from the first `admit` on."""

    def __init__(self, application: web.Application, address: str, port: int) -> None:
        application.middlewares.insert(0, self._let_go)
        self._runner = web.AppRunner(application, access_log=None)
        self._address, self._port = address, port
        self._context = _context("")
        self._pair: Pair | None = None
        self._servers: list[asyncio.Server] = []

    def use(self, pair: Pair) -> None:
        """New connections are answered with this certificate; those that are open go on. Raises ssl.SSLError for what is none."""
        load_pair(self._context, pair)
        self._pair = pair

    async def admit(self, authority: str) -> None:
        """New connections have to show a certificate of `authority` (PEM, one or more). Whoever is connected already gets one more answer
        and has to connect anew. Raises ssl.SSLError for what is no authority, which changes nothing; OSError where the port is taken."""
        context = _context(authority)
        if self._pair is not None:
            load_pair(context, self._pair)
        former = self._servers
        self._servers = await self._listen(context)
        self._context = context
        for server in former:
            server.close()

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        await self._runner.cleanup()

    async def _listen(self, context: ssl.SSLContext) -> list[asyncio.Server]:
        if self._runner.server is None:
            await self._runner.setup()
        answers = self._runner.server
        assert answers is not None, "it was set up"
        loop = asyncio.get_running_loop()
        if not self._servers:
            return [await loop.create_server(answers, self._address, self._port, ssl=context)]
        sockets = [socket for server in self._servers for socket in server.sockets]
        return [await loop.create_server(answers, sock=socket.dup(), ssl=context) for socket in sockets]

    @web.middleware
    async def _let_go(self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as failure:
            if self._is_former(request):
                failure.force_close()
            raise
        if self._is_former(request):
            response.force_close()
        return response

    def _is_former(self, request: web.Request) -> bool:
        """Whether it came over a connection that another authority admitted."""
        return request.get_extra_info("sslcontext") is not self._context


def _context(authority: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    if authority:
        context.load_verify_locations(cadata=authority)
    return context
