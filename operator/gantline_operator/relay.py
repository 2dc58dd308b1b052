"""What a waiting operator does with questions that only the leader can answer: it passes them on.

The Services in front of the operators lead to each of them alike, and the autoscalers that ask there (KEDA at /load, the aggregator of
custom.metrics.k8s.io) would be answered by chance otherwise. The leader's address stands in the Lease.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import aiohttp
from yarl import URL

__all__ = ["ask_leader", "relaying"]

_CONNECT_S, _ANSWER_S, _SILENCE_S = 2.0, 5.0, 60.0
_AT_ONCE = 16
_CHUNK = 64 << 10


async def ask_leader(leader: str, port: int, path: str) -> tuple[int, bytes] | None:
    """Status and body of the leader's answer over HTTP; None where there is none."""
    limits = aiohttp.ClientTimeout(total=_ANSWER_S, sock_connect=_CONNECT_S)
    try:
        url = URL.build(scheme="http", host=leader, port=port, path=path)
        async with aiohttp.ClientSession(timeout=limits) as session, session.get(url) as answer:
            return answer.status, await answer.content.read(_CHUNK)
    except (aiohttp.ClientError, TimeoutError, OSError):
        return None


@contextlib.asynccontextmanager
async def relaying(address: str, port: int, leader: Callable[[], str]) -> AsyncIterator[None]:
    """Within the block, connections to `port` are the leader's, byte by byte: with TLS from end to end. With port 0 there are none."""
    if not port:
        yield
        return
    open_now: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_now.add(task)
        try:
            if leader() and len(open_now) <= _AT_ONCE:
                await _pass_on(reader, writer, leader(), port)
        except (OSError, TimeoutError):
            pass  # whoever asked sees a closed connection, and asks again
        finally:
            open_now.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, address, port)
    try:
        yield
    finally:
        server.close()
        for task in open_now:
            task.cancel()
        await asyncio.gather(*open_now, return_exceptions=True)


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, leader: str, port: int) -> None:
    async with asyncio.timeout(_CONNECT_S):
        theirs, ours = await asyncio.open_connection(leader, port)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_copy(reader, ours))
            tasks.create_task(_copy(theirs, writer))
    except* (OSError, TimeoutError):
        pass
    finally:
        ours.close()


async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while True:
        async with asyncio.timeout(_SILENCE_S):
            data = await source.read(_CHUNK)
        if not data:
            break
        target.write(data)
        await target.drain()
    with contextlib.suppress(OSError):
        target.write_eof()
