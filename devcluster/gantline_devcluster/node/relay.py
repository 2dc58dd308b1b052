"""Loopback ports of the host that lead into the node's network namespace.

A socket belongs to the namespace of the thread that makes it: one thread moves into the node's namespace for good and makes the sockets,
the event loop of the host uses them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gantline_devcluster.node import linux

CHUNK_BYTES = 256 * 1024
CONNECT_TIMEOUT_S = 10.0
T = TypeVar("T")
Target = Callable[[], Awaitable[tuple[str, int]]]


class Relays:
    """The relays into the network namespace of process `pid`."""

    def __init__(self, pid: int) -> None:
        self._inside = ThreadPoolExecutor(1, "node-network", initializer=linux.enter_network_of, initargs=(pid,))
        self._servers: dict[int, asyncio.Server] = {}

    async def open(self, port: int, target: Target) -> None:
        """Listen on 127.0.0.1:`port`; `target` is asked for the address inside at each connection. Raises OSError."""

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, asyncio.CancelledError, LookupError):
                await self._relay(reader, writer, await target())
            writer.transport.abort()

        self._servers[port] = await asyncio.start_server(handle, "127.0.0.1", port, limit=CHUNK_BYTES)

    def close_port(self, port: int) -> None:
        self._servers.pop(port).close()

    def close(self) -> None:
        for port in list(self._servers):
            self.close_port(port)
        self._inside.shutdown(wait=False, cancel_futures=True)

    async def ask_udp(self, address: tuple[str, int], question: bytes, timeout_s: float = 2.0) -> bytes:
        """Send one datagram inside and wait for one answer. Raises OSError or TimeoutError."""
        loop = asyncio.get_running_loop()
        with await self._socket(socket.SOCK_DGRAM) as inside:
            await loop.sock_connect(inside, address)
            await loop.sock_sendall(inside, question)
            return await asyncio.wait_for(loop.sock_recv(inside, 4096), timeout_s)

    async def inside(self, work: Callable[[], T]) -> T:
        """What `work` returns, done in the node's network namespace."""
        return await asyncio.get_running_loop().run_in_executor(self._inside, work)

    async def _socket(self, kind: socket.SocketKind) -> socket.socket:
        made = await asyncio.get_running_loop().run_in_executor(self._inside, socket.socket, socket.AF_INET, kind)
        made.setblocking(False)
        return made

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: tuple[str, int]) -> None:
        loop = asyncio.get_running_loop()
        inside = await self._socket(socket.SOCK_STREAM)
        try:
            await asyncio.wait_for(loop.sock_connect(inside, target), CONNECT_TIMEOUT_S)
        except BaseException:
            inside.close()
            raise
        their_reader, their_writer = await asyncio.open_connection(sock=inside, limit=CHUNK_BYTES)
        for stream in (writer, their_writer):
            stream.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.gather(_pump(reader, their_writer), _pump(their_reader, writer))
        finally:
            their_writer.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Copy until the source ends, then end the sink's direction too: the other direction may go on."""
    while data := await source.read(CHUNK_BYTES):
        sink.write(data)
        await sink.drain()
    if sink.can_write_eof():
        sink.write_eof()
        await sink.drain()
