"""Which pods may mount a claim at the same time, as its access modes say. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from gantline_operator.client import Object
from gantline_operator.conditions import Reason

__all__ = ["Sharing", "Tie", "sharing_of"]


class Sharing(Enum):
    ANY = "any"
    ONE_NODE = "those of one node"
    ONE_POD = "one alone"


@dataclass(frozen=True)
class Tie:
    """The claim that a service's pods mount, where it keeps them from being anywhere."""

    claim: str
    sharing: Sharing
    is_cache: bool = False
    """Else it is a source, which pods only read."""

    @property
    def reason(self) -> Reason:
        return Reason.CACHE_NOT_SHAREABLE if self.is_cache else Reason.SOURCE_NOT_SHAREABLE

    @property
    def effect(self) -> str:
        if self.sharing is Sharing.ONE_POD:
            return f"Only one pod at a time can mount claim {self.claim} (ReadWriteOncePod)"
        return f"Claim {self.claim} ties all replicas to one node"

    @property
    def cure(self) -> str:
        modes = "ReadWriteMany" if self.is_cache else "ReadOnlyMany or ReadWriteMany"
        return f"Use a claim with the access mode {modes}, or fewer replicas."


def sharing_of(claim: Object, *, read_only: bool) -> Sharing:
    """Who may mount the claim at once, to read or to write. Its spec counts, which never changes, and not what its volume could do beside
    that: a claim that is bound late would replace the pods that bound it."""
    modes: Sequence[str] = (claim.get("spec") or {}).get("accessModes") or ()
    if "ReadWriteMany" in modes or (read_only and "ReadOnlyMany" in modes):
        return Sharing.ANY
    return Sharing.ONE_POD if "ReadWriteOncePod" in modes else Sharing.ONE_NODE
