"""What happened to a service, its Jobs and its pods, in the order in which it did."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from gantline_operator.client import Object
from gantline_operator.kubectl.reading import Reader, age, columns
from gantline_operator.pod_state import parse_time

__all__ = ["about", "report"]

_LONGEST = 220


async def report(reader: Reader, name: str, now: datetime) -> str:
    """A table, oldest first. Raises SourceError."""
    service = await reader.service(name)
    others = {item["metadata"]["name"] for item in await reader.services()} - {name}
    found = about(await reader.events(), name, service["metadata"]["uid"], others)
    if not found:
        empty = f"No events of {name} are there: they are kept for an hour. `kubectl gantline explain {name}` says how it is now."
        return "\n".join([*reader.missing, empty])
    rows = [(age(moment, now), *_row(event)) for moment, event in found]
    return "\n".join([columns(("AGE", "OBJECT", "TYPE", "REASON", "NOTE"), rows), *reader.missing])


def about(events: Iterable[Object], name: str, uid: str, others: Collection[str]) -> list[tuple[datetime, Object]]:
    """(last time, event) of those on the service and its children, also such as are gone. `others`: services whose children these are not,
    though their names begin alike."""
    longer = [other for other in others if other.startswith(f"{name}-")]
    found = []
    for event in events:
        regarding: Mapping[str, Any] = event.get("regarding") or {}
        theirs, kind = str(regarding.get("name", "")), regarding.get("kind")
        if kind == "InferenceService":
            ours = theirs == name and regarding.get("uid", uid) == uid
        else:
            ours = (theirs == name or theirs.startswith(f"{name}-")) and not any(_child_of(theirs, other) for other in longer)
        moment = _last_time(event)
        if ours and moment is not None:
            found.append((moment, event))
    return sorted(found, key=lambda pair: (pair[0], pair[1]["metadata"]["name"]))


def _child_of(name: str, service: str) -> bool:
    return name == service or name.startswith(f"{service}-")


def _last_time(event: Object) -> datetime | None:
    series: Mapping[str, Any] = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("deprecatedLastTimestamp"), event.get("eventTime"))
    return next((moment for moment in map(parse_time, times) if moment is not None), None)


def _row(event: Object) -> tuple[str, str, str, str]:
    regarding = event.get("regarding") or {}
    count = (event.get("series") or {}).get("count") or event.get("deprecatedCount") or 1
    note = " ".join(str(event.get("note", "")).split())
    note = note if len(note) <= _LONGEST else f"{note[: _LONGEST - 1]}…"
    times = f" ({count} times)" if count > 1 else ""
    return f"{regarding.get('kind')}/{regarding.get('name')}", str(event.get("type", "")), str(event.get("reason", "")), note + times
