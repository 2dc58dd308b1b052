"""Asks replicas what their caches hold (GET /internal/prefixes), about once a second, while there are requests that have a choice.

A replica that tells nothing (another version, or one that wants an internal API key) is left alone for a minute: requests go where others
with their beginning went, as they do without any of this.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import quote

import msgspec
from gantline_runtime import logs
from gantline_runtime.prompt_prefixes import MOST_TOLD, SCHEME, CachedPrefixes

from gantline_gateway.catalog import Replica, Service
from gantline_gateway.directory import Directory
from gantline_gateway.prefixes import PrefixIndex, name_replica
from gantline_gateway.traffic import Traffic
from gantline_gateway.upstream import Broken, Unreachable, Upstream

__all__ = ["PrefixPoller"]

PERIOD_S = 1.0
"""Between two rounds; each differs by up to a fifth, so that gateways do not ask all at once."""
IDLE_S = 15.0
"""After the last request of a service its replicas are asked no more."""
SILENT_S = 60.0
"""For so long a replica is not asked again that does not tell."""

_TIMEOUT_S = 2.0
_AT_ONCE = 16
_MOST_BYTES = 64 + 18 * MOST_TOLD

log = logging.getLogger("gantline.gateway")
_decoder = msgspec.json.Decoder(CachedPrefixes)


class _Refused(Exception):
    """The replica does not tell, and why."""


@dataclass
class PrefixPoller:
    directory: Directory
    traffic: Traffic
    upstream: Upstream
    index: PrefixIndex
    _silent: dict[str, float] = field(default_factory=dict)
    """Replicas that do not tell, and until when they are left alone."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S * random.uniform(0.8, 1.2))
            await self.poll()

    async def poll(self) -> None:
        """One round: every replica of services that have several and had requests lately."""
        catalog, now = self.directory.catalog, self.traffic.clock()
        self.index.forget_all_but(name_replica(service, replica.identity) for service in catalog.services for replica in service.usable)
        self._silent = {name: until for name, until in self._silent.items() if until > now}
        room = asyncio.Semaphore(_AT_ONCE)

        async def ask(service: Service, replica: Replica) -> None:
            async with room:
                await self._ask(name_replica(service, replica.identity), replica)

        await asyncio.gather(*(ask(service, replica) for service, replica in self._worth_asking(now)))

    def _worth_asking(self, now: float) -> Iterator[tuple[Service, Replica]]:
        for key, traffic in self.traffic.known():
            service = self.directory.catalog.find(key)
            if service is None or len(service.usable) < 2 or traffic.last_request_at is None or traffic.last_request_at < now - IDLE_S:
                continue
            yield from ((service, item) for item in service.usable if name_replica(service, item.identity) not in self._silent)

    async def _ask(self, name: str, replica: Replica) -> None:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                self.index.take(name, await self._fetch(replica, self.index.cursor(name)))
        except _Refused as error:
            log.warning("a replica does not tell what it has cached", extra=logs.fields(replica=name, cause=str(error)))
            self._silent[name] = self.traffic.clock() + SILENT_S
            self.index.forget(name)
        except (Broken, Unreachable, TimeoutError) as error:
            log.debug("a replica could not be asked what it has cached", extra=logs.fields(replica=name, cause=str(error)))

    async def _fetch(self, replica: Replica, cursor: str) -> CachedPrefixes:
        answer = await self.upstream.send(replica, "GET", f"/internal/prefixes?since={quote(cursor)}", {}, b"")
        try:
            if answer.status != 200:
                raise _Refused(f"status {answer.status}")
            if answer.length is None or answer.length > _MOST_BYTES:
                raise _Refused(f"an answer of {answer.length} bytes")
            told = _decoder.decode(await answer.read())
        except msgspec.DecodeError as error:
            raise _Refused(f"an answer that is not understood: {str(error)[:200]}") from None
        finally:
            answer.close()
        if told.scheme != SCHEME:
            raise _Refused(f"scheme {told.scheme}; {SCHEME} is understood here")
        return told
