"""A port that admits only who shows a client certificate of an authority, which may change while it serves.

OpenSSL can add to what a context trusts, but takes nothing away, and resumes sessions without looking at the certificate again. So each
authority gets a context of its own, and each connection the context that counts when it is accepted. asyncio's servers have one context
for good, and one that is closed leaves a connection that it has just accepted without an answer; here the port is never closed in between.

    authority added     whoever is connected gets one more answer, and connects anew
    authority removed   whoever it admitted is cut off: at once, or after the answer that it is waiting for
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable

from aiohttp import web
from cryptography import x509
from cryptography.exceptions import InvalidSignature

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
        self._authorities: list[x509.Certificate] = []
        self._answering: set[asyncio.BaseTransport | None] = set()
        """Connections with a request that has no answer yet; each carries one at a time."""
        self._pair: Pair | None = None
        self._admits = asyncio.Event()

    def use(self, pair: Pair) -> None:
        """New connections are answered with this certificate; those that are open go on. Raises ssl.SSLError for what is none."""
        load_pair(self._context, pair)
        self._pair = pair

    def admit(self, authority: str) -> None:
        """New connections have to show a certificate of `authority` (PEM, one or more). Whoever is connected already, by a certificate of
        it, gets one more answer and has to connect anew; whoever is by another's is cut off. Raises ssl.SSLError for what is no authority,
        which changes nothing."""
        context = _context(authority)
        if self._pair is not None:
            load_pair(context, self._pair)
        self._context, self._authorities = context, _certificates(authority)
        self._admits.set()
        self._cut_off()

    def _cut_off(self) -> None:
        for connection in self._runner.server.connections if self._runner.server is not None else ():
            transport = connection.transport
            if transport is not None and not self._admits_still(transport.get_extra_info("ssl_object")):
                if transport in self._answering:
                    connection.close()  # with the answer
                else:
                    connection.force_close()

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
        if self._is_former(request) and not self._admits_still(request.get_extra_info("ssl_object")):
            refused = web.Response(status=403, text="the authority of this connection's certificate is not admitted any more")
            refused.force_close()  # its handshake was under way when that changed
            return refused
        connection = request.transport
        self._answering.add(connection)
        try:
            response = await handler(request)
        except web.HTTPException as failure:
            if self._is_former(request):
                failure.force_close()
            raise
        finally:
            self._answering.discard(connection)
        if self._is_former(request):
            response.force_close()
        return response

    def _is_former(self, request: web.Request) -> bool:
        """Whether it came over a connection that other authorities admitted."""
        return request.get_extra_info("sslcontext") is not self._context

    def _admits_still(self, connection: ssl.SSLObject) -> bool:
        """Whether one of today's authorities signed the certificate that was shown. One with another between them connects anew."""
        shown = x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")
        return any(_is_signed_by(shown, authority) for authority in self._authorities)


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


def _certificates(authority: str) -> list[x509.Certificate]:
    """Of PEM that OpenSSL has read. What only OpenSSL can read admits nobody who is connected: they connect anew."""
    try:
        return x509.load_pem_x509_certificates(authority.encode())
    except ValueError:
        return []


def _is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
