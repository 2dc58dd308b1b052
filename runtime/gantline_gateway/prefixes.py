"""What each replica's cache holds of a prompt's beginning: what the replica tells of it, and what it was given since it last told.

Prompts are known by hashes of their beginnings (`gantline_runtime/prompt_prefixes.py`), which replicas make of the same bodies. All of this
is a hint: a wrong one costs a replica some work that another had done, and bounded load keeps it from costing more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gantline_runtime.prompt_prefixes import CUTS, MOST_TOLD, NO_PREFIXES, CachedPrefixes, PromptPrefixes, first_prefixes

from gantline_gateway.catalog import Service
from gantline_gateway.exchange import Exchange

__all__ = ["PrefixAffinity", "PrefixIndex", "is_costly", "name_replica"]

EXPECTED_S = 10.0
"""For so long a replica is taken to hold what it was given: until it has read the prompt, reported and been asked."""
MOST_EXPECTED = 1 << 14
"""Hashes that a replica was given lately; the oldest are dropped first."""

_SHORT_BYTES = 256 * 1024
_MOST_TEXTS, _MOST_NUMBERS = 100_000, 500_000
_OF_NUMBERS = b"0123456789,[]{} \n\r\t"
"""What lists of tokens consist of."""

_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/generate"})
"""Endpoints whose prompts replicas tell of."""


def name_replica(service: Service, identity: str) -> str:
    return f"{service.key}/{identity}"


@dataclass
class _Replica:
    cursor: str = ""
    present: set[int] = field(default_factory=set)
    expected: dict[int, float] = field(default_factory=dict)
    """Until when, by hash, the soonest first."""


class PrefixIndex:
    """Of all replicas, by `name_replica`. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._replicas: dict[str, _Replica] = {}

    def cursor(self, replica: str) -> str:
        """Of what the replica last told; empty if it has told nothing."""
        known = self._replicas.get(replica)
        return known.cursor if known is not None else ""

    def take(self, replica: str, told: CachedPrefixes) -> None:
        """What the replica answered to who has its `cursor`."""
        known = self._replicas.setdefault(replica, _Replica())
        if told.whole:
            known.present = set(told.added)
        else:
            known.present.update(told.added)
            known.present.difference_update(told.removed)
        known.cursor = told.cursor
        if len(known.present) > 2 * MOST_TOLD:  # more than any server tells of at once: it forgot to tell what went
            self.forget(replica)

    def expect(self, replica: str, hashes: Sequence[int]) -> None:
        """The replica is given a prompt with these beginnings."""
        expected, now = self._replicas.setdefault(replica, _Replica()).expected, self._clock()
        for name in hashes:
            expected.pop(name, None)
            expected[name] = now + EXPECTED_S
        while expected and (len(expected) > MOST_EXPECTED or next(iter(expected.values())) <= now):
            del expected[next(iter(expected))]

    def count(self, replica: str, hashes: Sequence[int]) -> int:
        """How many of `hashes`, each of a longer beginning than the one before, the replica holds. A longer one is not held without the
        shorter ones, or hardly ever: it was cached after them, and goes before them."""
        known = self._replicas.get(replica)
        if known is None:
            return 0
        low, high, now = 0, len(hashes), self._clock()
        while low < high:
            middle = (low + high) // 2
            name = hashes[middle]
            if name in known.present or known.expected.get(name, 0.0) > now:
                low = middle + 1
            else:
                high = middle
        return low

    def forget(self, replica: str) -> None:
        self._replicas.pop(replica, None)

    def forget_all_but(self, replicas: Iterable[str]) -> None:
        kept = set(replicas)
        for replica in [replica for replica in self._replicas if replica not in kept]:
            del self._replicas[replica]


@dataclass(frozen=True)
class PrefixAffinity:
    """The index, as the proxy asks it for one request."""

    index: PrefixIndex

    def known(self, exchange: Exchange, replicas: Iterable[str]) -> Mapping[str, int]:
        """How many tokens of the request's prompt each of `replicas` (identities) holds, as estimated; without those that hold none."""
        prefixes = _prefixes(exchange)
        found = {}
        for identity in replicas if prefixes.hashes else ():
            if count := self.index.count(name_replica(exchange.service, identity), prefixes.hashes):
                found[identity] = exchange.question.prompt_tokens * CUTS[count - 1] // prefixes.num_bytes
        return found

    def chosen(self, exchange: Exchange, replica: str) -> None:
        """The request goes to `replica`."""
        if hashes := _prefixes(exchange).hashes:
            self.index.expect(name_replica(exchange.service, replica), hashes)


def _prefixes(exchange: Exchange) -> PromptPrefixes:
    if exchange.prefixes is None:
        wanted = exchange.path.partition("?")[0] in _PATHS and not is_costly(exchange.body)
        exchange.prefixes = first_prefixes(exchange.body) if wanted else NO_PREFIXES
    return exchange.prefixes


def is_costly(body: bytes) -> bool:
    """Whether `body` consists of so many values that to look for its prompt would hold up the event loop: for more than some 30 ms, where
    8 MB of one text take 10. Such a prompt goes where it may. Quotes in texts are escaped, and numbers are known by a sample."""
    if len(body) < _SHORT_BYTES:
        return False
    if body.count(b'"') - body.count(b'\\"') > 2 * _MOST_TEXTS:
        return True
    middle = body[len(body) // 2 :][:64]
    return not middle.strip(_OF_NUMBERS) and body.count(b",") > _MOST_NUMBERS
