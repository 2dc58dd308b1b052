"""A port that admits only who shows a client certificate of an authority, which may change while it serves.

OpenSSL can add to what a context trusts, but takes nothing away, and resumes sessions without looking at the certificate again. So each
authority gets a context of its own, and each connection the context that counts when it is accepted. asyncio's servers have one context
for good, and one that is closed leaves a connection that it has just accepted without an answer; here the port is never closed in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web

from gantline_operator.certificates.pairs import Pair, load_pair

__all__ = ["AdmittingPort"]

_log = logging.getLogger(__name__)

_BACKLOG = 128
_PAUSE_S = 1.0
"""After a connection that cannot be accepted, for want of file descriptors, for instance."""


class AdmittingPort:
    """Answers with `application`, which must not be set up yet."""

    def __init__(self, application: web.Application, address: str, port: int) -> None:
        application.middlewares.insert(0, self._let_go)
        self._runner = web.AppRunner(application, access_log=None)
        self._address, self._port = address, port
        self._context = _context("")
        self._pair: Pair | None = None
        self._admits = asyncio.Event()

    def use(self, pair: Pair) -> None:
        """New connections are answered with this certificate; those that are open go on. Raises ssl.SSLError for what is none."""
        load_pair(self._context, pair)
        self._pair = pair

    def admit(self, authority: str) -> None:
        """New connections have to show a certificate of `authority` (PEM, one or more). Whoever is connected already gets one more answer
        and has to connect anew. Raises ssl.SSLError for what is no authority, which changes nothing."""
        context = _context(authority)
        if self._pair is not None:
            load_pair(context, self._pair)
        self._context = context
        self._admits.set()

    async def run(self) -> None:
        """Until cancelled; listens from the first `admit` on. Raises OSError where the port is taken."""
        await self._admits.wait()
        await self._runner.setup()
        try:
            with self._listen() as listening:
                async with asyncio.TaskGroup() as greetings:
                    while True:
                        greetings.create_task(self._greet(await _accept(listening)))
        finally:
            await self._runner.cleanup()

    def _listen(self) -> socket.socket:
        found = socket.getaddrinfo(self._address or None, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listening = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        listening.setblocking(False)
        return listening

    async def _greet(self, connection: socket.socket) -> None:
        """Whatever a stranger sends ends nothing but its connection."""
        answers = self._runner.server
        assert answers is not None, "it was set up"
        try:
            await asyncio.get_running_loop().connect_accepted_socket(answers, connection, ssl=self._context)
        except Exception as error:
            _log.debug("A connection to port %d was refused: %s", self._port, error)

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


async def _accept(listening: socket.socket) -> socket.socket:
    while True:
        try:
            connection, _ = await asyncio.get_running_loop().sock_accept(listening)
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            _log.warning("A connection cannot be accepted: %s", error)
            await asyncio.sleep(_PAUSE_S)


def _context(authority: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    if authority:
        context.load_verify_locations(cadata=authority)
    return context
