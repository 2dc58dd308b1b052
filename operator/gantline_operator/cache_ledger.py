"""What a cache volume holds, who uses it and who makes it: a note on the claim, kept by all services that share it.

The note is an annotation (gantline.io/cache) and is written with the claim's resourceVersion as precondition, so of two services that
decide at once one is refused and looks again. That makes it the place where use and eviction exclude each other: a service is written down
as a user before anything of its uses an artefact, and only what has no user is written down as being evicted. A note names the claim that
it is of by its uid: one that came along with a copied or restored claim tells of another volume. Functions here are pure: from one ledger
to the next.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

__all__ = ["LEDGER", "LIMIT", "Entry", "Eviction", "Ledger", "parse", "render", "user_of"]

LEDGER = "gantline.io/cache"
"""Annotation of a claim: the ledger, as JSON. Ours alone."""
LIMIT = "gantline.io/cache-limit"
"""Annotation of a claim: most bytes that artefacts may take, as a quantity. Without: the claim's capacity. An administrator's."""

MAX_ENTRIES = 128
_MAX_GONE = 64
_MAX_BYTES = 128 << 10
"""An object's annotations may have 256 KiB together."""


@dataclass(frozen=True)
class Entry:
    """One artefact by the name of its folder, `<kind>-<hash>`."""

    bytes: int = 0
    """As made; before that, as planned."""
    made: bool = False
    """Whether it was whole when somebody last looked. False: some of it may be there."""
    used: str = ""
    """When its users last changed, as metav1.Time: the order of eviction."""
    users: frozenset[str] = frozenset()
    maker: str = ""
    """The user whose Job makes it."""
    perplexity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Eviction:
    """Names that a Job removes. None of them may be used until it is over."""

    names: tuple[str, ...]
    by: str
    since: str


@dataclass(frozen=True)
class Ledger:
    entries: Mapping[str, Entry] = field(default_factory=dict)
    eviction: Eviction | None = None
    gone: Mapping[str, str] = field(default_factory=dict)
    """Evicted, and when: a service whose status still has such an artefact must make it again."""
    claim: str = ""
    """uid of the claim; empty in notes of earlier releases."""
    looked: str = ""
    """When a Job last told what the volume has, as metav1.Time."""

    def of_claim(self, uid: str) -> Ledger:
        """The ledger of the claim with this uid: nothing is known of it where the note is another claim's."""
        return replace(self, claim=uid) if self.claim in ("", uid) else Ledger(claim=uid)

    def users(self) -> set[str]:
        return {user for entry in self.entries.values() for user in entry.users}

    def has(self, name: str) -> bool | None:
        """Whether the artefact is whole; None where nothing is known of it."""
        if name in self.entries:
            return self.entries[name].made
        return False if name in self.gone else None

    def is_going(self, name: str) -> bool:
        return self.eviction is not None and name in self.eviction.names

    def use(self, user: str, name: str, now: str, *, bytes: int, made: bool | None = None) -> Ledger:
        """`user` uses it, or will once it is made. `made` None leaves that as it is known."""
        entry = self.entries.get(name) or Entry(bytes=bytes)
        known = entry.made if made is None else made
        if user in entry.users and known == entry.made:
            return self
        used = entry.used if user in entry.users else now
        return self._put(name, replace(entry, users=entry.users | {user}, made=known, used=used))

    def make(self, user: str, name: str) -> Ledger:
        """`user`, which is known to use it, makes it."""
        entry = self.entries[name]
        return self if entry.maker == user else self._put(name, replace(entry, maker=user))

    def stop_making(self, user: str, name: str) -> Ledger:
        entry = self.entries.get(name)
        return self._put(name, replace(entry, maker="")) if entry is not None and entry.maker == user else self

    def made(self, name: str, bytes: int, perplexity: Mapping[str, str]) -> Ledger:
        entry = self.entries.get(name) or Entry()
        return self._put(name, replace(entry, made=True, maker="", bytes=bytes or entry.bytes, perplexity=dict(perplexity)))

    def keep_only(self, user: str, names: Collection[str], now: str) -> Ledger:
        """`user` uses nothing but these."""
        changed = {
            name: replace(entry, users=entry.users - {user}, used=now, maker="" if entry.maker == user else entry.maker)
            for name, entry in self.entries.items()
            if user in entry.users and name not in names
        }
        return replace(self, entries={**self.entries, **changed}) if changed else self

    def without(self, users: Iterable[str], now: str) -> Ledger:
        """Services that are no more use nothing."""
        ledger = self
        for user in users:
            ledger = ledger.keep_only(user, (), now)
        return ledger

    def begin_eviction(self, names: Iterable[str], by: str, now: str) -> Ledger:
        return replace(self, eviction=Eviction(tuple(sorted(names)), by, now))

    def end_eviction(self, gone: Collection[str], now: str) -> Ledger:
        """What the Job says: names that are gone."""
        ours = set(self.eviction.names).intersection(gone) if self.eviction is not None else set()
        left = {name: entry for name, entry in self.entries.items() if name not in ours}
        tombs = {**self.gone, **dict.fromkeys(ours, now)}
        latest = dict(sorted(tombs.items(), key=lambda item: item[1])[-_MAX_GONE:])
        return replace(self, entries=left, eviction=None, gone=latest)

    def discover(self, whole: Mapping[str, int], halves: Mapping[str, int], now: str) -> Ledger:
        """What a Job found on the volume, in bytes: artefacts that are whole, and what Jobs left half made. What nobody has noted is noted
        as in nobody's use, hence the first to go."""
        news = {name: Entry(bytes=size, made=True) for name, size in whole.items() if name not in self.entries}
        news |= {name: Entry(bytes=size) for name, size in halves.items() if name not in self.entries and name not in whole}
        gone = {name: time for name, time in self.gone.items() if name not in news}
        return _bounded(replace(self, entries={**self.entries, **news}, gone=gone, looked=now))

    def lost(self, names: Iterable[str], now: str) -> Ledger:
        """Names that were in a volume which is no more, unless this one has them too: they must be made again."""
        news = [name for name in names if name not in self.entries and name not in self.gone]
        if not news:
            return self
        tombs = sorted({**self.gone, **dict.fromkeys(news, now)}.items(), key=lambda item: item[1])
        return replace(self, gone=dict(tombs[-_MAX_GONE:]))

    def _put(self, name: str, entry: Entry) -> Ledger:
        gone = {key: time for key, time in self.gone.items() if key != name}
        return _bounded(replace(self, entries={**self.entries, name: entry}, gone=gone))


def user_of(name: str, uid: str) -> str:
    """A service as the ledger names it: another one of the same name is another user."""
    return f"{name}.{uid[:8]}"


def _bounded(ledger: Ledger) -> Ledger:
    """Of more entries than fit, the unused ones longest out of use are forgotten; a later look at the volume finds them again."""
    excess = len(ledger.entries) - MAX_ENTRIES
    if excess <= 0:
        return ledger
    unused = sorted((entry.used, name) for name, entry in ledger.entries.items() if not entry.users)
    dropped = {name for _, name in unused[:excess]}
    return replace(ledger, entries={name: entry for name, entry in ledger.entries.items() if name not in dropped})


# ---- the annotation ----------------------------------------------------------------------------------------------------------------------


def render(ledger: Ledger) -> str:
    values: dict[str, Any] = {"artefacts": {name: _entry_values(entry) for name, entry in sorted(ledger.entries.items())}}
    if ledger.eviction is not None:
        values["evicting"] = {"names": list(ledger.eviction.names), "by": ledger.eviction.by, "since": ledger.eviction.since}
    if ledger.gone:
        values["evicted"] = dict(sorted(ledger.gone.items()))
    values |= {key: text for key, text in (("claim", ledger.claim), ("looked", ledger.looked)) if text}
    return json.dumps(values, separators=(",", ":"))


def _entry_values(entry: Entry) -> dict[str, Any]:
    values = {
        "bytes": entry.bytes, "made": entry.made, "used": entry.used, "users": sorted(entry.users), "maker": entry.maker,
        "perplexity": dict(entry.perplexity),
    }  # fmt: skip
    return {key: value for key, value in values.items() if value not in ("", [], {}, False)}


def parse(text: str | None) -> Ledger:
    """An empty ledger where there is none, or one that nobody of ours wrote: then no more is known than statuses say, and no more evicted
    than they allow."""
    if not text or len(text) > _MAX_BYTES:
        return Ledger()
    try:
        values = json.loads(text)
        entries = {_word(name): _entry(item) for name, item in list(values["artefacts"].items())[:MAX_ENTRIES]}
        evicting = values.get("evicting")
        eviction = Eviction(_words(evicting["names"]), _word(evicting["by"]), _word(evicting["since"])) if evicting else None
        gone = {_word(name): _word(time) for name, time in list((values.get("evicted") or {}).items())[:_MAX_GONE]}
        claim, looked = _word(values.get("claim", "")), _word(values.get("looked", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Ledger()
    return Ledger(entries, eviction, gone, claim, looked)


def _entry(values: Mapping[str, Any]) -> Entry:
    size = values.get("bytes", 0)
    if type(size) is not int or not 0 <= size < 1 << 60:
        raise ValueError("no number of bytes")
    return Entry(
        bytes=size,
        made=values.get("made") is True,
        used=_word(values.get("used", "")),
        users=frozenset(_words(values.get("users", []))),
        maker=_word(values.get("maker", "")),
        perplexity={_word(key): _word(text) for key, text in list((values.get("perplexity") or {}).items())[:2]},
    )


def _word(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 128:
        raise TypeError("no short text")
    return value


def _words(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > 1024:
        raise TypeError("no list of texts")
    return tuple(_word(value) for value in values)
