"""One reconcile of one service, from its GET to its status.

    observe   children by label, pods
    inspect   Job, unless status.model has the facts of this source
    plan      pure; what was planned before stands as long as it fits
    prepare   fetch and quantize Jobs, unless status.artefacts has their results
    roll out  Service, Deployment, ... of the revision; or, until that is ready, the previous revision as it was
    clean up  prune, and a time to live for finished Jobs
    status    written only if it changed

Everything is decided by what is there, never by what happened; a reconcile that is killed anywhere is finished by the next. What later
steps rely on (facts, a plan, an artefact) is written into the status before they act on it.

A paused service (gantline.io/paused) goes the same way, but none of its children is written: `apply.py` only looks at them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gantline_operator import resources
from gantline_operator.client import Object
from gantline_operator.conditions import Reason
from gantline_operator.plan import Plan
from gantline_operator.plan_status import to_status
from gantline_operator.pod_state import Trouble
from gantline_operator.preparation import Preparation
from gantline_operator.reconcile_pass import CHILD_KINDS, sentence
from gantline_operator.resources import ModelLocation
from gantline_operator.spec import SpecError, parse_service

__all__ = ["Reconcile"]

_REVISIONS = next(kind for kind in CHILD_KINDS if kind.kind == "ControllerRevision")
_KEPT_REVISIONS = 3
"""The current one, the one it replaces, and one more for a look back."""


class Reconcile(Preparation):
    """One pass. `run` returns the seconds after which to look again, None if an event will do."""

    async def run(self) -> float | None:
        try:
            _, spec = parse_service(self.parent)
        except SpecError as error:
            self._found["spec_trouble"] = Trouble(Reason.INVALID_SPEC, sentence(str(error)), error.cure)
            await self._look()
            await self.children.look("Deployment", self.name)
            await self._write_status()
            return None
        self.spec = spec
        self.owner = resources.Parent(self.name, self.namespace, self.uid, spec, self.restarted_at)
        await self._look()
        await self._act()
        await self._write_status()
        for problem in self.children.problems:
            self._look_again(problem.retry_s)
        return self.again_s

    async def _act(self) -> None:
        """From the model to what serves; each step either has its result or says in `_found` what it waits for."""
        self._found["suspended"] = self.spec.suspend
        try:
            model = await self._inspect()
            planned = self._plan(model) if model is not None else None
            location = await self._prepare(model, planned) if model is not None and planned is not None else None
            if location is not None and planned is not None:
                await self._roll_out(planned, location)
            else:
                await self._keep_serving()
        except resources.MissingImage as error:
            self._found["plan_trouble"] = Trouble(Reason.NO_RUNTIME_IMAGE, sentence(str(error)))
            await self._keep_serving()
        await self._retire_jobs()

    async def _roll_out(self, planned: Plan, location: ModelLocation) -> None:
        mark = resources.revision(self.owner, planned, location)
        if self.paused:
            self._found |= {"one_node": location.one_node, "current": await self._serves(mark)}
            return
        stored = self._revision(mark)
        template = stored["data"].get("template") if stored else None
        objects = resources.serving(self.owner, planned, location, self.cluster.rendering, template=template)
        if stored is None:
            template = next(item for item in objects if item["kind"] == "Deployment")["spec"]["template"]
            await self.children.ensure(self._build_revision(mark, {"template": template, "objects": objects, "plan": to_status(planned)}))
        self._found["one_node"] = location.one_node
        self._found["revision"] = mark
        applied = await self.children.apply(objects)
        self._found["current"] = applied
        generation = self.parent["metadata"].get("generation", 0)
        if applied and not self.children.problems and self.memory.pruned != (generation, mark):
            await self.children.prune(self._kept(objects, mark))
            self.memory.pruned = (generation, mark)

    async def _keep_serving(self) -> None:
        """While the new revision is being prepared, or cannot be: the previous one as it was, at the scale that is asked for now."""
        mark = self.recorded.get("revision", "")
        stored = self._revision(mark)
        if stored is None:
            if mark:
                await self.children.look("Deployment", self.name)
            return
        self._found["revision"] = mark
        objects = [dict(item) for item in stored["data"].get("objects") or []]
        for item in objects:
            if item["kind"] == "Deployment":
                item["spec"] = {**item["spec"], "replicas": resources.replicas(self.owner)}
        await self.children.apply(objects)

    async def _serves(self, mark: str) -> bool:
        """Whether what is there is already what the spec asks for."""
        deployment = await self.children.look("Deployment", self.name)
        if deployment is None:
            return False
        marks = deployment["spec"]["template"]["metadata"].get("labels") or {}
        return marks.get("gantline.io/revision") == mark and deployment["spec"]["replicas"] == resources.replicas(self.owner)

    def _build_revision(self, mark: str, data: Mapping[str, Any]) -> Object:
        return {
            "apiVersion": _REVISIONS.api_version,
            "kind": _REVISIONS.kind,
            "metadata": {
                "name": f"{self.name}-{mark}",
                "namespace": self.namespace,
                "labels": resources.labels(self.name, "server", revision=mark),
                "ownerReferences": [self.owner.owner],
            },
            "revision": self.parent["metadata"].get("generation", 1),
            "data": dict(data),
        }

    def _kept(self, objects: list[Object], mark: str) -> set[tuple[str, str]]:
        """What pruning leaves: the desired objects, a cache that is in use, Jobs (which have a time to live), the latest revisions."""
        kept = {(item["kind"], item["metadata"]["name"]) for item in objects}
        kept |= {("Job", job["metadata"]["name"]) for job in self.children.of_kind("Job")}
        if resources.source_location(self.spec.model.uri) is None or self._found.get("quantize"):
            kept.add(("PersistentVolumeClaim", resources.cache_claim_name(self.name)))
        revisions = sorted(self.children.of_kind("ControllerRevision"), key=_age, reverse=True)
        current = ("ControllerRevision", f"{self.name}-{mark}")
        others = [("ControllerRevision", item["metadata"]["name"]) for item in revisions]
        return kept | {current, *[item for item in others if item != current][: _KEPT_REVISIONS - 1]}


def _age(item: Object) -> tuple[int, str, str]:
    return item.get("revision", 0), item["metadata"].get("creationTimestamp", ""), item["metadata"]["name"]
