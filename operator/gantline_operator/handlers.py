"""kopf's side: every event of a service becomes a key in the queue, whatever kind of event it was.

Only raw events are watched: no change handlers, so kopf writes neither annotations nor finalizers. Children are `child_watch.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kopf

from gantline_operator.reconcile_pass import SERVICES

__all__ = ["Tell", "register"]

Tell = Callable[[tuple[str, str], str, str], None]
"""(namespace and name of the service that is to be reconciled; uid and resourceVersion of the object that the event is about)."""


def register(registry: kopf.OperatorRegistry, tell: Tell) -> None:
    """The handler of one operator. It is a coroutine: kopf would run a plain function in a thread, and the queue is the loop's."""

    async def on_service(namespace: str | None, name: str | None, uid: str | None, meta: Mapping[str, Any], **_: Any) -> None:
        tell((str(namespace), str(name)), str(uid), str(meta.get("resourceVersion", "")))

    group, version = SERVICES.api_version.split("/")
    kopf.on.event(group, version, SERVICES.plural, id="service", registry=registry)(on_service)
