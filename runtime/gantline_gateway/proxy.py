"""One request from its question to the end of its answer: pick a replica, hold while there is none, send, try again, pass on.

What has not begun to stream may be sent to another replica: after a refused connection and after a 503, which a replica answers before it
does anything, as often as there are others; after a 429 twice; after a broken connection, which may have been this very request's fault, at
most `max_resets` times. After the first byte nothing is tried again: a stream ends with an error event.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.usage_reports import HEADER

from gantline_gateway.answer import without
from gantline_gateway.balance import Candidate, choose
from gantline_gateway.catalog import Replica, Service
from gantline_gateway.errors import read_error, replica_failed
from gantline_gateway.exchange import Exchange
from gantline_gateway.holding import KEEP_ALIVE_S, Ticket, WaitingRoom
from gantline_gateway.metering import Meter, read_report
from gantline_gateway.prefixes import PrefixAffinity
from gantline_gateway.traffic import ServiceTraffic, Traffic
from gantline_gateway.upstream import Broken, Unreachable, Upstream, UpstreamAnswer

__all__ = ["Proxy"]

T = TypeVar("T")

_PAUSE_S = 1.0
"""Before replicas that could not be reached are tried again, unless the catalog changes earlier."""
_SUSPICION_S = 5.0
"""For so long a replica that could not be reached is asked only where there is no other."""
_WHOLE_BYTES = 1 << 20
"""Answers up to this size are taken in whole before anything is sent on, so that they can be had from another replica."""
_MOST_BUSY = 2
"""After so many full queues, the next one's refusal is passed on: where all are full, asking all of them makes it worse."""
_QUEUE_FULL, _ENGINE_DEAD = "queue_full", "engine_dead"
_NOT_NOW = frozenset({"draining", "not_ready", "shutting_down", _ENGINE_DEAD})
"""Codes of a 503 with which a replica has done nothing for the request."""
_NOT_PASSED_ON = frozenset({HEADER.encode(), b"x-request-id", b"date", b"server"})
"""Of the replica's headers: ours has its own."""


@dataclass
class _Attempts:
    """What one request has tried."""

    failed: dict[str, str] = field(default_factory=dict)
    """Replicas that are not asked again before something changes, and why."""
    resets: int = 0
    num_busy: int = 0
    refusal: tuple[UpstreamAnswer, bytes] | None = None
    """The latest 429: it is passed on where nobody else has room."""


@dataclass
class Proxy:
    traffic: Traffic
    waiting: WaitingRoom
    upstream: Upstream
    affinity: PrefixAffinity
    max_resets: int = 2
    _suspects: dict[str, float] = field(default_factory=dict)
    _turn: int = 0

    async def forward(self, exchange: Exchange) -> None:
        """Answers the exchange. Raises ApiError for what it has not answered."""
        key, attempts = exchange.service.key, _Attempts()
        ticket = self.waiting.ticket(len(exchange.body))
        while True:
            exchange.service = await self._find_replica(exchange, ticket, attempts)
            replica = self._pick(exchange, attempts)
            if replica is None:
                if attempts.refusal is not None:
                    await self._pass_on_whole(exchange, *attempts.refusal)
                    return
                attempts.failed.clear()
                continue
            if await self._try(exchange, replica, attempts, self.traffic.of(key)):
                return

    # ---- whom to ask

    async def _find_replica(self, exchange: Exchange, ticket: Ticket, attempts: _Attempts) -> Service:
        def ready(service: Service) -> bool:
            return attempts.refusal is not None or any(replica.identity not in attempts.failed for replica in service.usable)

        pause_s = _PAUSE_S if attempts.failed else math.inf
        stream = exchange.question.stream
        try:
            return await self.waiting.wait(exchange.service.key, ticket, exchange.answer, stream=stream, ready=ready, pause_s=pause_s)
        finally:
            exchange.held_s = ticket.waited_s

    def _pick(self, exchange: Exchange, attempts: _Attempts) -> Replica | None:
        usable = {item.identity: item for item in exchange.service.usable if item.identity not in attempts.failed}
        now = self.traffic.clock()
        trusted = {name: item for name, item in usable.items() if self._suspects.get(name, 0.0) <= now} or usable
        if not trusted:
            return None
        outstanding = self.traffic.of(exchange.service.key).outstanding
        known = self.affinity.known(exchange, trusted) if len(trusted) > 1 else {}
        self._turn += 1
        candidates = [Candidate(name, outstanding[name], known.get(name, 0)) for name in trusted]
        chosen = choose(candidates, prefix=exchange.question.prefix, session=exchange.session, turn=self._turn)
        if len(usable) > 1:
            self.affinity.chosen(exchange, chosen.identity)
        return trusted[chosen.identity]

    # ---- one attempt

    async def _try(self, exchange: Exchange, replica: Replica, attempts: _Attempts, traffic: ServiceTraffic) -> bool:
        """Whether the exchange is over. Raises ApiError where it failed for good."""
        question = exchange.question
        cost = traffic.predict_tokens(question.prompt_tokens, question.max_tokens, question.choices)
        exchange.replica = replica.identity
        exchange.attempts += 1
        if exchange.attempts == 1:
            traffic.added_s.observe(self.traffic.clock() - exchange.began_at - exchange.held_s)
        traffic.charge(replica.identity, cost)
        answer = None
        try:
            answer = await self._patiently(exchange, self.upstream.send(replica, "POST", exchange.path, exchange.headers, exchange.body))
            return await self._take(exchange, replica, answer, attempts, traffic)
        except Unreachable as error:
            self._suspect(replica)
            _give_up(attempts, replica, traffic, "unreachable", str(error))
        except Broken as error:
            attempts.resets += 1
            if attempts.resets > self.max_resets:
                raise replica_failed(replica.identity, error) from error
            _give_up(attempts, replica, traffic, "reset", str(error))
        finally:
            traffic.discharge(replica.identity, cost)
            if answer is not None:
                answer.close()
        return False

    async def _take(
        self, exchange: Exchange, replica: Replica, answer: UpstreamAnswer, attempts: _Attempts, traffic: ServiceTraffic
    ) -> bool:
        if answer.is_stream and answer.status == 200:
            await self._pass_on_stream(exchange, replica, answer)
            return True
        if answer.length is None or answer.length > _WHOLE_BYTES:
            await self._pass_on_parts(exchange, replica, answer)
            return True
        body = await self._patiently(exchange, answer.read())
        code = read_error(answer.status, body).code if answer.status >= 400 else ""
        if answer.status == 500 and code == _ENGINE_DEAD:
            raise Broken("its engine died")
        if answer.status == 503 and code in _NOT_NOW:
            _give_up(attempts, replica, traffic, "not_ready", code)
            return False
        if answer.status == 429 and code == _QUEUE_FULL and attempts.num_busy < _MOST_BUSY:
            attempts.refusal, attempts.num_busy = (answer, body), attempts.num_busy + 1
            _give_up(attempts, replica, traffic, "busy", code)
            return False
        await self._pass_on_whole(exchange, answer, body)
        return True

    def _suspect(self, replica: Replica) -> None:
        now = self.traffic.clock()
        self._suspects = {name: until for name, until in self._suspects.items() if until > now}
        self._suspects[replica.identity] = now + _SUSPICION_S

    async def _patiently(self, exchange: Exchange, work: Awaitable[T]) -> T:
        """The result of `work`; a stream that is being kept alive goes on being it."""
        if not exchange.answer.kept_alive:
            return await work
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait((task,), timeout=KEEP_ALIVE_S))[0]:
                await exchange.answer.keep_alive(f"{exchange.service.model} has the request")
            return task.result()
        finally:
            task.cancel()

    # ---- passing on

    async def _pass_on_whole(self, exchange: Exchange, answer: UpstreamAnswer, body: bytes) -> None:
        if exchange.answer.kept_alive:
            raise read_error(answer.status, body)
        exchange.usage = read_report(answer.header(HEADER))
        await _start(exchange, answer, is_stream=False)
        await exchange.answer.write(body, more=False)

    async def _pass_on_parts(self, exchange: Exchange, replica: Replica, answer: UpstreamAnswer) -> None:
        """An answer of unknown or great length that is no stream of events: if it breaks off, so does ours."""
        if exchange.answer.kept_alive:
            raise ApiError(502, f"The replica {replica.identity!r} answered a stream with something else.", code="bad_gateway")
        exchange.usage = read_report(answer.header(HEADER))
        await _start(exchange, answer, is_stream=False)
        try:
            async for chunk in answer.chunks():
                await exchange.answer.write(chunk)
        except Broken as error:
            raise replica_failed(replica.identity, error) from error
        await exchange.answer.write(b"", more=False)

    async def _pass_on_stream(self, exchange: Exchange, replica: Replica, answer: UpstreamAnswer) -> None:
        meter, began = Meter(exchange.question), False
        chunks = answer.chunks()
        try:
            first = await self._patiently(exchange, anext(chunks, b""))
            began = True
            await _start(exchange, answer, is_stream=True)
            await exchange.answer.write(meter.take(first))
            async for chunk in chunks:
                await exchange.answer.write(meter.take(chunk))
        except Broken as error:
            if began:
                raise replica_failed(replica.identity, error) from error
            raise
        finally:
            exchange.usage = meter.usage()
            await chunks.aclose()
        await exchange.answer.write(b"", more=False)


async def _start(exchange: Exchange, answer: UpstreamAnswer, *, is_stream: bool) -> None:
    """From here on there is no other attempt."""
    exchange.drop_body()
    await exchange.answer.start(answer.status, without(answer.headers, _NOT_PASSED_ON), is_stream=is_stream)


def _give_up(attempts: _Attempts, replica: Replica, traffic: ServiceTraffic, why: str, cause: str) -> None:
    attempts.failed[replica.identity] = cause
    traffic.retries[why] += 1
