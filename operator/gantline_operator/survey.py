"""All children of all services, listed once, kind by kind: what a look at every service is made from.

A reconcile that finds all as it should be asks the API server two dozen times, mostly for what one list of a kind would tell of every
service. So whoever is to look at all of them, after a start or at a resync, takes a survey first, and reconciles each service against what
was listed for it:

    take ---> Surveyed   answers reads as the API server did when the survey was taken; an apply that would change nothing is answered too
          |                 -> the pass comes to its end: nothing is to be done, and nobody was asked
          |                 -> the pass would write: WouldWrite, and it is made anew with the API server itself
          +-> None       too old, taken before, or an event told of another version since: a pass as always

So nothing is ever written, and no decision that is acted upon is ever made, from what was listed. Children are watched before they are
listed here, so that what changes after the listing comes as an event, as ever. The watch of services begins when it likes, by telling of
all that are there: what was deleted before that no event tells, and is `untold`.

An object that lost our labels is in no listing; it is asked for by name, as always. Kinds that are not watched are listed without a
label, so that it is known what is *not* there: an autoscaler that nobody wants must be found without its labels too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gantline_operator import resources
from gantline_operator.apply import Child
from gantline_operator.child_watch import child_key
from gantline_operator.client import (
    FIELD_MANAGER,
    Api,
    Client,
    Conflict,
    Forbidden,
    Head,
    KindMissing,
    NotFound,
    Object,
    Raw,
    Resource,
    parse,
    read_head,
)
from gantline_operator.observe import PODS
from gantline_operator.reconcile_pass import CHILD_KINDS, OPTIONAL_KINDS, SERVICES
from gantline_operator.unchanged import apply_changes_nothing

__all__ = ["MAX_AGE_S", "TOLD_AFTER_S", "Survey", "Surveyed", "WouldWrite"]

Key = tuple[str, str]
"""Namespace and name of a service."""

_log = logging.getLogger(__name__)

MAX_AGE_S = 60.0
"""From the beginning of the listing; what is older is asked for anew."""
TOLD_AFTER_S = 120.0
"""By when the watch of services has told of all that are there, also on a busy machine."""
_LISTS_AT_ONCE = 4
_KINDS = {kind.kind: kind for kind in (*CHILD_KINDS, PODS)}


class WouldWrite(Exception):
    """A pass against a survey has found something to do."""


@dataclass
class _Bundle:
    """What was listed for one service, as JSON: parsed it would take ten times the memory, until its turn comes."""

    parent: bytes = b""
    children: dict[Child, bytes] = field(default_factory=dict)
    """With its pods, by kind and name."""


class Survey:
    """One listing of everything, and what events have told since it began."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._complete = self._closed = False
        self._bundles: defaultdict[Key, _Bundle] = defaultdict(_Bundle)
        self._taken: set[Key] = set()
        self._listed: dict[str, str] = {}
        """resourceVersion of each object, by uid."""
        self._services: dict[str, Key] = {}
        """By uid."""
        self._told: defaultdict[Key, dict[str, str]] = defaultdict(dict)
        """The latest resourceVersion that an event told, by uid."""
        self._answers: dict[str, str | None] = {}
        """What listing each kind came to, by kind: None, or how the cluster lacks it. Those that may not be listed are missing."""

    async def collect(self, client: Client, namespaces: Sequence[str]) -> None:
        """Lists everything, in these namespaces or in all. Raises ApiError for what will pass."""
        gate = asyncio.Semaphore(_LISTS_AT_ONCE)
        async for head, item in _list(client, SERVICES, namespaces, ""):
            key = (head.namespace, head.name)
            self._services[head.uid] = key
            self._file(key, head).parent = bytes(item)
        await asyncio.gather(*(self._collect_kind(client, kind, namespaces, gate) for kind in (*CHILD_KINDS, PODS)))
        self._complete = True
        _log.debug("surveyed %d services in %.1f s", len(self._bundles), self._clock() - self._began)

    async def _collect_kind(self, client: Client, kind: Resource, namespaces: Sequence[str], gate: asyncio.Semaphore) -> None:
        selector = "" if kind.kind in OPTIONAL_KINDS else resources.SELECTOR
        try:
            async with gate:
                async for head, item in _list(client, kind, namespaces, selector):
                    if (key := child_key(head)) is not None:
                        self._file(key, head).children[(kind.kind, head.name)] = bytes(item)
        except KindMissing as error:
            self._answers[kind.kind] = str(error)
        except Forbidden as error:
            _log.debug("%s are asked for one by one: %s", kind.plural, error)
        else:
            self._answers[kind.kind] = None

    def _file(self, key: Key, head: Head) -> _Bundle:
        self._listed[head.uid] = head.resource_version
        return self._bundles[key]

    def tell(self, key: Key, uid: str, version: str) -> bool:
        """Notes what an event says of an object of the service; whether it is news, that is not what was listed."""
        if self._closed:
            return True
        self._told[key][uid] = version
        return not self._complete or self._listed.get(uid) != version

    def take(self, key: Key, client: Api) -> Surveyed | None:
        """The service as it was surveyed, once, unless the API server has to be asked; `client` answers what was not surveyed."""
        fresh = self._complete and self._clock() - self._began <= MAX_AGE_S and key not in self._taken
        self._taken.add(key)
        bundle = self._bundles.pop(key, None)
        if not fresh or bundle is None or not bundle.parent:
            return None
        parent = _whole(SERVICES, bundle.parent)
        if "deletionTimestamp" in parent["metadata"] or not parent.get("status"):
            return None  # there is something to do
        if any(self._listed.get(uid) != version for uid, version in self._told[key].items()):
            return None
        children = {(kind, name): _whole(_KINDS[kind], item) for (kind, name), item in bundle.children.items()}
        return Surveyed(client, parent, children, self._answers)

    def close(self) -> None:
        """Forgets what was listed: from now on nothing is taken, and every event is news."""
        self._complete, self._closed = False, True
        for part in (self._bundles, self._taken, self._listed, self._services, self._told):
            part.clear()

    def untold(self) -> set[Key]:
        """Services of which no event has told, though they were listed."""
        return {key for uid, key in self._services.items() if uid not in self._told.get(key, ())}


async def _list(client: Client, resource: Resource, namespaces: Sequence[str], selector: str) -> AsyncIterator[tuple[Head, Raw]]:
    query = {"labelSelector": selector} if selector else {}
    for namespace in namespaces or (None,):
        async for page in client.pages(resource, namespace, **query):
            for item in page.items or ():
                yield read_head(item), item


def _whole(resource: Resource, item: bytes) -> Object:
    """Lists leave out what all their objects have in common."""
    return {"apiVersion": resource.api_version, "kind": resource.kind, **parse(item)}


class Surveyed:
    """The API server, as it answered for one service when that was surveyed. Writes nothing: what would change anything is WouldWrite."""

    def __init__(self, client: Api, parent: Object, children: Mapping[Child, Object], answers: Mapping[str, str | None]) -> None:
        self.parent = parent
        self._client = client
        self._children = children
        self._answers = answers
        self._name = parent["metadata"]["name"]
        self._selector = resources.child_selector(self._name)
        self._labels = dict(pair.split("=") for pair in self._selector.split(","))

    async def get(self, resource: Resource, namespace: str | None, name: str, *, subresource: str = "") -> Object:
        if subresource:
            return await self._client.get(resource, namespace, name, subresource=subresource)
        if (resource, name) == (SERVICES, self._name):
            return self.parent
        if (found := self._children.get((resource.kind, name))) is not None:
            return found
        if resource.kind in OPTIONAL_KINDS and self._knows(resource):
            raise NotFound(f"{resource.plural} {name!r} was not there", status=404)
        return await self._client.get(resource, namespace, name)

    async def list(self, resource: Resource, namespace: str | None = None, **query: str) -> list[Object]:
        if query != {"labelSelector": self._selector} or not self._knows(resource):
            return await self._client.list(resource, namespace, **query)
        listed = [item for (kind, _), item in self._children.items() if kind == resource.kind]
        return [item for item in listed if self._labels.items() <= _labels(item).items()]

    async def text(self, resource: Resource, namespace: str, name: str, subresource: str, **query: str) -> str:
        return await self._client.text(resource, namespace, name, subresource, **query)

    async def create(self, resource: Resource, namespace: str | None, body: Object) -> Object:
        if (resource.kind, body["metadata"]["name"]) in self._children:
            raise Conflict(f"{resource.plural} {body['metadata']['name']!r} is there", status=409, reason="AlreadyExists")
        raise WouldWrite(f"create {resource.plural} {body['metadata']['name']}")

    async def try_out(self, resource: Resource, namespace: str, body: Object) -> Object:
        return await self._client.try_out(resource, namespace, body)

    async def apply(self, resource: Resource, body: Object, *, subresource: str = "", force: bool = True) -> Object:
        live, metadata = self._children.get((resource.kind, body["metadata"]["name"])), body["metadata"]
        if live is None or subresource or not apply_changes_nothing(body, live, FIELD_MANAGER):
            raise WouldWrite(f"apply {resource.plural} {metadata['name']}")
        if any(metadata.get(part, live["metadata"][part]) != live["metadata"][part] for part in ("uid", "resourceVersion")):
            raise WouldWrite(f"{resource.plural} {metadata['name']} has changed")
        return live

    async def patch(
        self, resource: Resource, namespace: str, name: str, body: Object, *, subresource: str = "", manager: str = FIELD_MANAGER
    ) -> Object:
        raise WouldWrite(f"patch {resource.plural} {name}")

    async def delete(self, resource: Resource, namespace: str, name: str, *, uid: str, resource_version: str = "") -> None:
        raise WouldWrite(f"delete {resource.plural} {name}")

    def _knows(self, resource: Resource) -> bool:
        """Whether the kind was surveyed. Raises KindMissing where the cluster lacks it."""
        answer = self._answers.get(resource.kind)
        if answer is not None:
            raise KindMissing(answer, status=404)  # another each time: one that is raised again holds all that ever raised it
        return resource.kind in self._answers


def _labels(item: Object) -> Mapping[str, str]:
    found: Mapping[str, str] = item["metadata"].get("labels") or {}
    return found
