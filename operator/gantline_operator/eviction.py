"""What to remove from a cache volume so that something else fits: what nobody uses, longest out of use first. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gantline_operator.cache_ledger import Entry, Ledger

__all__ = ["Room", "artefacts_of_pods", "artefacts_of_template", "claims_of_template", "plan_eviction", "template_of"]

_MOUNT = "/mnt/cache/"
_MAX_AT_ONCE = 64
"""Names that one Job is given."""


@dataclass(frozen=True)
class Room:
    """`evict` makes room, or nothing has to go. `missing_bytes`: what would lack even without all that is unused; then nothing goes."""

    evict: tuple[str, ...] = ()
    missing_bytes: int = 0
    in_use_bytes: int = 0
    """Of artefacts that must stay."""

    @property
    def needed(self) -> bool:
        return bool(self.evict or self.missing_bytes)


def plan_eviction(ledger: Ledger, target: str, needed_bytes: int, limit_bytes: int | None, protected: Collection[str]) -> Room:
    """Room for `needed_bytes` of `target` on a volume of which artefacts may take `limit_bytes`.

    None: however much it may hold, it is full (a Job said so), and as much as is needed has to go. `protected` stays beside what has users.
    """
    others = {name: entry for name, entry in ledger.entries.items() if name != target}
    free = {name: entry for name, entry in others.items() if not entry.users and name not in protected}
    in_use = sum(entry.bytes for name, entry in others.items() if name not in free)
    excess = needed_bytes if limit_bytes is None else sum(entry.bytes for entry in others.values()) + needed_bytes - limit_bytes
    if excess <= 0:
        return Room(in_use_bytes=in_use)
    chosen: list[str] = []
    freed = 0
    for name in sorted(free, key=lambda name: (free[name].used, name)):
        if freed >= excess or len(chosen) == _MAX_AT_ONCE:
            break
        chosen.append(name)
        freed += free[name].bytes
    if freed < excess:
        return Room(missing_bytes=excess - freed, in_use_bytes=in_use)
    return Room(evict=tuple(_spare(chosen, free, freed - excess)), in_use_bytes=in_use)


def _spare(chosen: list[str], entries: Mapping[str, Entry], surplus: int) -> list[str]:
    """Without those that turn out not to be needed, the most recently used first."""
    kept = []
    for name in reversed(chosen):
        if entries[name].bytes <= surplus:
            surplus -= entries[name].bytes
        else:
            kept.append(name)
    return sorted(kept)


def artefacts_of_pods(pods: Collection[Mapping[str, Any]]) -> set[str]:
    """Names in the cache that pods serve, read or make, but for pods that have ended."""
    running = (pod for pod in pods if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"))
    return {name for pod in running for name in _artefacts_of_spec(pod.get("spec") or {})}


def artefacts_of_template(template: Mapping[str, Any], claim: str) -> set[str]:
    """Names in the cache `claim` that pods of this template serve."""
    return _artefacts_of_spec(template.get("spec") or {}) if claim in claims_of_template(template) else set()


def claims_of_template(template: Mapping[str, Any]) -> set[str]:
    """Claims that pods of this template mount."""
    volumes = (template.get("spec") or {}).get("volumes") or []
    return {volume["persistentVolumeClaim"]["claimName"] for volume in volumes if volume.get("persistentVolumeClaim")}


def template_of(revision: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A revision's pod template. What an earlier release stored may lack it."""
    return ((revision or {}).get("data") or {}).get("template") or {}


def _artefacts_of_spec(spec: Mapping[str, Any]) -> set[str]:
    arguments = [str(text) for container in spec.get("containers") or [] for text in container.get("args") or []]
    return {text.removeprefix(_MOUNT).partition("/")[0] for text in arguments if text.startswith(_MOUNT)}
