"""Brings a service's children to what is desired, and says what stood in the way.

An object is ours only if its controller reference names our parent's uid: a stranger's object of the same name is left alone and
reported, one of a deleted parent of the same name is waited for. One that has no controller and bears our labels was ours, and is adopted:
somebody took its owner away, or deleted the service with `--cascade=orphan` to make it anew without touching its pods.

    as last seen          apply, guarded by the uid and resourceVersion that it had; changed meanwhile -> as not known
    not known             get; not there -> apply unforced; ours -> apply, guarded by what was found; else -> a problem

The guard is what makes `--cascade=orphan` safe: the garbage collector takes our reference off a child while a reconcile may be about to
apply it. Without the guard the reference would come back, and the child would go with its parent. For the same reason a child is given a
reference that it lacks only after the parent was asked for once more.

Jobs and claims are immutable: they are created and never applied again. Pruning comes last and only if every apply succeeded, so a
failure half-way never removes what still serves.

The children of a paused service are only looked at: every write goes through here, and here it is left out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from gantline_operator.client import Api, ApiError, Conflict, Forbidden, Invalid, KindMissing, NotFound, Object, Resource
from gantline_operator.conditions import Reason
from gantline_operator.resources.naming import labels, owner_reference

__all__ = ["Child", "Children", "Parent", "Problem", "Version", "controller_uid", "problem_of"]

Child = tuple[str, str]
"""Kind and name; the namespace is the parent's."""
Version = tuple[str, str]
"""uid and resourceVersion."""

_IMMUTABLE = {"Job", "PersistentVolumeClaim", "ControllerRevision"}
_SLOW_RETRY_S = 60.0
_DELETION_RETRY_S = 2.0
_APPLY_TRIES = 4
"""Of a child that others change at the same time."""


@dataclass(frozen=True)
class Parent:
    """Whose children these are."""

    namespace: str
    name: str
    uid: str
    selector: str
    """Label selector that finds the children."""


@dataclass(frozen=True)
class Problem:
    """A write that the API server will go on refusing: for a condition, and another try after `retry_s`."""

    reason: Reason
    message: str
    retry_s: float = _SLOW_RETRY_S


def problem_of(error: ApiError, what: str) -> Problem | None:
    """The condition's side of `error`; None where it will pass by itself and the reconcile is to be retried instead."""
    if isinstance(error, Forbidden):
        return Problem(Reason.FORBIDDEN, f"The API server forbids {what}: {error}")
    if isinstance(error, KindMissing):
        return Problem(Reason.KIND_MISSING, f"The cluster does not know the kind of {what}: {error}")
    if isinstance(error, Invalid):
        return Problem(Reason.REJECTED, f"The API server rejects {what}: {error}")
    return None


def controller_uid(item: Object) -> str:
    """uid of the object's controller, "" without one."""
    owners = item.get("metadata", {}).get("ownerReferences") or []
    return next((str(owner.get("uid", "")) for owner in owners if owner.get("controller")), "")


def _version(item: Object) -> Version:
    return item["metadata"]["uid"], item["metadata"]["resourceVersion"]


def _was_ours(item: Object, parent: Parent) -> bool:
    """Whether nobody controls it, though it bears every label that we give to this service's children alone."""
    marks = {key: value for key, value in labels(parent.name, "server").items() if not key.endswith(("/component", "/role"))}
    return not controller_uid(item) and marks.items() <= (item["metadata"].get("labels") or {}).items()


def _orphan_of(item: Object, parent: Parent) -> bool:
    """Whether it belonged to an earlier service of the same name, and waits for the garbage collector."""
    owners = item.get("metadata", {}).get("ownerReferences") or []
    return any(o.get("kind") == "InferenceService" and o.get("name") == parent.name and o.get("uid") != parent.uid for o in owners)


async def _always() -> None:
    pass


@dataclass
class Children:
    """The children of one parent, as listed and since written. One reconcile makes one and drops it."""

    client: Api
    parent: Parent
    kinds: Sequence[Resource]
    seen: dict[Child, Version] = field(default_factory=dict)
    """What was ours when last seen: saves a look, and is no more than a guard. Outlives this object."""
    live: dict[Child, Object] = field(default_factory=dict)
    """Ours, newest known state."""
    optional: Collection[str] = ()
    """Kinds that not every cluster knows: none of them is listed there, and that is no problem."""
    paused: bool = False
    """Whether they are to be left as they are: then no method writes."""
    problems: list[Problem] = field(default_factory=list)
    count: Callable[[str, str], None] = lambda kind, verb: None
    """Told of each write."""
    confirm_parent: Callable[[], Awaitable[None]] = _always
    """Raises ApiError where the parent is no more, or is being deleted."""

    async def observe(self, *kinds: str) -> None:
        """Lists these kinds by label, or all. One that the cluster lacks, or that we may not list, is a problem, not a crash."""
        wanted = [resource for resource in self.kinds if not kinds or resource.kind in kinds]
        listed = await asyncio.gather(*(self._list(resource) for resource in wanted))
        for resource, items in zip(wanted, listed, strict=True):
            for item in items:
                item["apiVersion"], item["kind"] = resource.api_version, resource.kind
                if _was_ours(item, self.parent) and not self.paused:
                    item = await self._adopt(item)
                if controller_uid(item) == self.parent.uid:
                    self._note(item)

    async def look(self, kind: str, name: str) -> Object | None:
        """One of ours by name; None where it is not there, or not ours."""
        item = await self._find({"kind": kind, "metadata": {"name": name}})
        if item is not None and controller_uid(item) == self.parent.uid:
            self._note(item)
        return self.live.get((kind, name))

    def of_kind(self, kind: str) -> list[Object]:
        return [item for (of, _), item in sorted(self.live.items()) if of == kind]

    async def ensure(self, desired: Object) -> Object | None:
        """The live object after creating or applying `desired`; None where a problem was noted. Raises ApiError for what will pass.

        Of a paused parent the live object as it is; None where it is not there.
        """
        child = (desired["kind"], desired["metadata"]["name"])
        try:
            live = await self._bring(desired)
        except ApiError as error:
            problem = problem_of(error, f"{child[0]} {child[1]}")
            if problem is None:
                raise
            self.problems.append(problem)
            return None
        if live is not None:
            self._note(live)
        return live

    async def apply(self, desired: Iterable[Object]) -> bool:
        """Ensures all, in order; True if none was refused."""
        results = [await self.ensure(item) for item in desired]
        return all(result is not None for result in results)

    async def prune(self, keep: Iterable[Child]) -> None:
        """Deletes what is ours and not kept. Only after everything that is desired was applied."""
        if self.paused:
            return
        kept = set(keep)
        await self.observe()
        for child in sorted(set(self.live) - kept):
            await self.delete(child)

    async def delete(self, child: Child) -> None:
        """Deletes one of ours, exactly as seen: where somebody changed it since, Conflict, and it is looked at again."""
        if self.paused:
            return
        item = self.live[child]
        metadata = item["metadata"]
        if "deletionTimestamp" not in metadata:
            self.count(child[0], "delete")
            resource = self._resource(child[0])
            version = metadata["resourceVersion"]
            await self.client.delete(resource, self.parent.namespace, child[1], uid=metadata["uid"], resource_version=version)
        del self.live[child], self.seen[child]

    async def patch(self, child: Child, changes: Mapping[str, object]) -> None:
        """Merge patch of one of ours, with its uid as precondition."""
        if self.paused:
            return
        metadata = self.live[child]["metadata"]
        self.count(child[0], "patch")
        body = {**changes, "metadata": {"uid": metadata["uid"]}}
        self.live[child] = await self.client.patch(self._resource(child[0]), self.parent.namespace, child[1], body)

    async def _list(self, resource: Resource) -> list[Object]:
        try:
            return await self.client.list(resource, self.parent.namespace, labelSelector=self.parent.selector)
        except (Forbidden, KindMissing) as error:
            if resource.kind in self.optional:
                return []
            problem = problem_of(error, f"listing {resource.plural}")
            assert problem is not None
            self.problems.append(problem)
            return []

    async def _bring(self, desired: Object) -> Object | None:
        if self.paused:
            return await self.look(desired["kind"], desired["metadata"]["name"])
        return await self._create_or_keep(desired) if desired["kind"] in _IMMUTABLE else await self._apply(desired)

    async def _apply(self, desired: Object) -> Object | None:
        child = (desired["kind"], desired["metadata"]["name"])
        for tries_left in reversed(range(_APPLY_TRIES)):
            version = self.seen.get(child)
            if version is None and (found := await self._find(desired)) is not None:
                if controller_uid(found) != self.parent.uid:
                    if not _was_ours(found, self.parent):
                        self._strange(found)
                        return None
                    await self.confirm_parent()
                version = _version(found)
            guard = {"uid": version[0], "resourceVersion": version[1]} if version else {}
            body = {**desired, "metadata": {**desired["metadata"], "namespace": self.parent.namespace, **guard}}
            self.count(child[0], "apply")
            try:
                return await self.client.apply(self._resource(child[0]), body, force=version is not None)
            except Conflict:
                self.seen.pop(child, None)
                if not tries_left:
                    raise
        raise AssertionError("unreachable")

    async def _create_or_keep(self, desired: Object) -> Object | None:
        child = (desired["kind"], desired["metadata"]["name"])
        if child in self.live:
            return await self._relabel(self.live[child], desired["metadata"]["labels"])
        self.count(child[0], "create")
        try:
            return await self.client.create(self._resource(child[0]), self.parent.namespace, desired)
        except Conflict as error:
            if error.reason != "AlreadyExists":
                raise
        known = await self._find(desired)
        if known is None:
            raise Conflict(f"{child[0]} {child[1]} came and went")
        if _was_ours(known, self.parent):
            known = await self._adopt(known)
        if controller_uid(known) == self.parent.uid:
            return await self._relabel(known, desired["metadata"]["labels"])
        self._strange(known)
        return None

    async def _relabel(self, item: Object, labels: Mapping[str, str]) -> Object:
        """Somebody may have taken the labels away by which it is listed."""
        metadata = item["metadata"]
        if labels.items() <= (metadata.get("labels") or {}).items():
            return item
        self.count(item["kind"], "patch")
        body = {"metadata": {"uid": metadata["uid"], "labels": dict(labels)}}
        return await self.client.patch(self._resource(item["kind"]), self.parent.namespace, metadata["name"], body)

    async def _adopt(self, item: Object) -> Object:
        """The same object, which we control from now on; as it was, where that is refused. Raises Conflict where somebody changed it."""
        await self.confirm_parent()
        metadata, kind = item["metadata"], item["kind"]
        self.count(kind, "adopt")
        owners = [*(metadata.get("ownerReferences") or []), owner_reference(self.parent.name, self.parent.uid)]
        body = {"metadata": {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"], "ownerReferences": owners}}
        try:
            return await self.client.patch(self._resource(kind), self.parent.namespace, metadata["name"], body)
        except (Forbidden, Invalid) as error:
            problem = problem_of(error, f"adopting {kind} {metadata['name']}")
            assert problem is not None
            self.problems.append(problem)
            return item

    async def _find(self, desired: Object) -> Object | None:
        try:
            return await self.client.get(self._resource(desired["kind"]), self.parent.namespace, desired["metadata"]["name"])
        except NotFound:
            return None

    def _note(self, item: Object) -> None:
        child = (item["kind"], item["metadata"]["name"])
        self.live[child], self.seen[child] = item, _version(item)

    def _strange(self, item: Object) -> None:
        kind, name = item["kind"], item["metadata"]["name"]
        if _orphan_of(item, self.parent):
            message = f"{kind} {name} of a deleted service of the same name is still there; waiting until it is gone."
            self.problems.append(Problem(Reason.NAME_CONFLICT, message, _DELETION_RETRY_S))
            return
        message = f"{kind} {name} exists and is not ours. Delete or rename it, or give the service another name."
        self.problems.append(Problem(Reason.NAME_CONFLICT, message))

    def _resource(self, kind: str) -> Resource:
        return next(resource for resource in self.kinds if resource.kind == kind)
