"""kopf's side: every event becomes a key in the queue, whatever kind of event it was.

Only raw events are watched: no change handlers, so kopf writes neither annotations nor finalizers. Children are watched by label
on the server's side; one that loses its label comes as a deletion, which is an event like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from gantline_operator.observe import PODS
from gantline_operator.reconcile_pass import CHILD_KINDS, OPTIONAL_KINDS, SERVICES

__all__ = ["WATCHED", "Tell", "child_key", "register"]

Tell = Callable[[tuple[str, str], Mapping[str, Any]], None]
"""(namespace and name of the service that is to be reconciled, the object that the event is about)."""

WATCHED = (*(kind for kind in CHILD_KINDS if kind.kind not in OPTIONAL_KINDS), PODS)
_SERVICE_LABEL = "gantline.io/service"


def child_key(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """Namespace and name of the service that an object belongs to, by its controller reference, else by its label."""
    metadata = body.get("metadata") or {}
    for owner in metadata.get("ownerReferences") or []:
        if owner.get("controller") and owner.get("kind") == SERVICES.kind:
            return metadata["namespace"], owner["name"]
    name = (metadata.get("labels") or {}).get(_SERVICE_LABEL)
    return (metadata["namespace"], name) if name else None


def register(registry: kopf.OperatorRegistry, tell: Tell) -> None:
    """The handlers of one operator. They are coroutines: kopf would run plain functions in threads, and the queue is the loop's."""

    async def on_service(namespace: str | None, name: str | None, body: Mapping[str, Any], **_: Any) -> None:
        tell((str(namespace), str(name)), body)

    async def on_child(body: Mapping[str, Any], **_: Any) -> None:
        if (key := child_key(body)) is not None:
            tell(key, body)

    group, version = SERVICES.api_version.split("/")
    kopf.on.event(group, version, SERVICES.plural, id="service", registry=registry)(on_service)
    for kind in WATCHED:
        group, _, version = kind.api_version.rpartition("/")
        kopf.on.event(group, version, kind.plural, id=f"child-{kind.plural}", registry=registry)(on_child)
