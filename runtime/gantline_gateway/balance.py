"""Which replica gets a request. Pure: equal arguments give an equal answer, so that every gateway chooses alike.

In this order, and only among replicas that are not much busier than the others:

1. a session goes where it went before (rendezvous hashing of its name);
2. a prompt of which somebody holds a beginning goes where least is to be computed for it: what waits there already, and `CACHE_WEIGHT`
   times what of the prompt is not held there. So what all prompts have in common (a system prompt, tools) draws none of them to one
   replica once the others hold it too, and what few have in common keeps them together unless others have far less to do;
3. a prompt with a beginning worth it goes where others with that beginning go (rendezvous hashing of the beginning);
4. whoever has least to do.

"Busy" is the number of tokens that a replica still has to read and to write for requests of this gateway, as predicted. Bounded load
(https://arxiv.org/abs/1608.01350): a replica is not chosen for its cache while it has more than `LOAD_FACTOR` times the mean and
`SLACK_TOKENS` beside; then the next one in its order is. Rendezvous hashing moves only the keys of a replica that comes or goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

__all__ = ["CACHE_WEIGHT", "LOAD_FACTOR", "SLACK_TOKENS", "Candidate", "choose"]

LOAD_FACTOR = 1.25
"""More spreads less and fits more into caches; 1.25 keeps the busiest replica within a quarter of the mean."""
SLACK_TOKENS = 4096
"""What a replica may have beyond that: with few requests, each is a large part of the mean."""
CACHE_WEIGHT = 8
"""What computing a token again elsewhere costs, in tokens of waiting: it also takes the place of what is cached there, for all that
follow. Measured (docs/perf-log.md): with 4, beginnings wander from cache to cache; with 16, what is common to all draws them together."""


@dataclass(frozen=True)
class Candidate:
    """A replica as a request sees it."""

    identity: str
    outstanding: int = 0
    """Predicted tokens of what it has been given and has not finished."""
    num_cached: int = 0
    """Leading tokens of the request's prompt that it is known to hold; 0 is unknown."""


def choose(candidates: Sequence[Candidate], *, prefix: bytes = b"", session: bytes = b"", turn: int = 0) -> Candidate:
    """One of `candidates`, of which there must be some.

    `prefix` identifies the beginning of a prompt, empty where it is not worth it; `session` a conversation, empty where none is named.
    `turn` decides among those that are equally good: give each request another.
    """
    assert candidates, "there is nothing to choose from"
    if len(candidates) == 1:
        return candidates[0]
    limit = LOAD_FACTOR * sum(candidate.outstanding for candidate in candidates) / len(candidates) + SLACK_TOKENS
    free = [candidate for candidate in candidates if candidate.outstanding <= limit]  # never empty: somebody is at or below the mean
    if session:
        return _rendezvous(free, session)
    if any(candidate.num_cached for candidate in free):
        return min(free, key=lambda candidate: (candidate.outstanding - CACHE_WEIGHT * candidate.num_cached, candidate.identity))
    if prefix:
        return _rendezvous(free, prefix)
    least = min(candidate.outstanding for candidate in candidates)
    return _rendezvous([candidate for candidate in candidates if candidate.outstanding == least], turn.to_bytes(8, "big"))


def _rendezvous(candidates: Sequence[Candidate], key: bytes) -> Candidate:
    """The candidate whose hash with `key` is highest (https://en.wikipedia.org/wiki/Rendezvous_hashing)."""
    return max(candidates, key=lambda candidate: (_weight(candidate.identity, key), candidate.identity))


def _weight(identity: str, key: bytes) -> bytes:
    return blake2b(identity.encode() + b"\0" + key, digest_size=8).digest()
