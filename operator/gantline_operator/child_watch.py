"""Whose child changed: all children of all services, watched by our label, each reduced to its service and its version.

    list by pages -> watch from that version -> every change, and what a new list finds changed or gone, is told by its service's key

One that loses its label comes as a deletion, which is a change like any other. Of an object no more than its head is parsed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from gantline_operator import resources
from gantline_operator.client import Client, Head, Raw, read_head
from gantline_operator.handlers import Tell
from gantline_operator.observe import PODS, Mirror
from gantline_operator.reconcile_pass import CHILD_KINDS, OPTIONAL_KINDS, SERVICES

__all__ = ["ChildWatch", "child_key"]

_WATCHED = (*(kind for kind in CHILD_KINDS if kind.kind not in OPTIONAL_KINDS), PODS)
_SERVICE_LABEL = "gantline.io/service"

_Seen = tuple[tuple[str, str], str]
"""A child's service and the child's resourceVersion."""


def child_key(head: Head) -> tuple[str, str] | None:
    """Namespace and name of the service that an object belongs to, by its controller reference, else by its label."""
    for owner in head.owner_references or ():
        if owner.controller and owner.kind == SERVICES.kind:
            return head.namespace, owner.name
    name = (head.labels or {}).get(_SERVICE_LABEL)
    return (head.namespace, name) if name else None


class ChildWatch:
    """Of these namespaces, or of all; `tell` hears of every change."""

    def __init__(self, client: Client, namespaces: Sequence[str], tell: Tell) -> None:
        self._tell = tell
        self._mirrors = [
            Mirror(client, kind, _reduce, self._changed, namespace=namespace, selector=resources.SELECTOR)
            for kind in _WATCHED
            for namespace in namespaces or (None,)
        ]

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for mirror in self._mirrors:
                tasks.create_task(mirror.run())

    async def known(self) -> None:
        """Waits until every kind was listed, or refused: what changes from then on is told."""
        for mirror in self._mirrors:
            await mirror.known.wait()

    def _changed(self, before: Mapping[str, _Seen], after: Mapping[str, _Seen]) -> None:
        for uid, (key, _) in before.items():
            if uid not in after:
                self._tell(key, uid, "")
        for uid, (key, version) in after.items():
            self._tell(key, uid, version)


def _reduce(raw: Raw) -> _Seen | None:
    head = read_head(raw)
    key = child_key(head)
    return None if key is None else (key, head.resource_version)
