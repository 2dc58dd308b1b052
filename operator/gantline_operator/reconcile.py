"""One reconcile of one service, from its GET to its status.

    observe   children by label, pods
    inspect   Job, unless status.model has the facts of this source
    plan      pure; what was planned before stands as long as it fits
    prepare   fetch and quantize Jobs, unless status.artefacts has their results
    roll out  Service, Deployment, ... of the revision; or, until that can be or once it has failed, the previous revision as it was
    clean up  prune, and a time to live for finished Jobs
    status    written only if it changed

Everything is decided by what is there, never by what happened; a reconcile that is killed anywhere is finished by the next. What later
steps rely on (facts, a plan, an artefact) is written into the status before they act on it.

A paused service (gantline.io/paused) goes the same way, but none of its children is written: `apply.py` only looks at them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gantline_runtime.model_facts import ModelFacts

from gantline_operator import resources
from gantline_operator.calibration import key_of
from gantline_operator.claim_sharing import Sharing, Tie
from gantline_operator.client import Forbidden, KindMissing, Object
from gantline_operator.conditions import Reason
from gantline_operator.eviction import claims_of_template, template_of
from gantline_operator.measuring import Start
from gantline_operator.observe import PODS
from gantline_operator.plan import Plan
from gantline_operator.plan_status import from_status, to_status
from gantline_operator.pod_state import Trouble
from gantline_operator.preparation import Preparation
from gantline_operator.reconcile_pass import CHILD_KINDS, sentence
from gantline_operator.replacement import choose_replacement
from gantline_operator.resources import ModelLocation
from gantline_operator.rollback import RolloutRecord, advance
from gantline_operator.rollout_strategy import Strategy, choose_strategy
from gantline_operator.spec import SpecError, parse_service
from gantline_operator.status import first_started, read_rollout, write_time

__all__ = ["Reconcile"]

_log = logging.getLogger(__name__)

_REVISIONS = next(kind for kind in CHILD_KINDS if kind.kind == "ControllerRevision")
_BY_CLAIM = "sharedByClaim"
"""Key of a revision's data that those of releases lack which did not ask claims whether they are shared."""
_HAND_OVER_POLL_S = 1.0
_KEPT_REVISIONS = 3
"""The current one, the one it replaces, and one more for a look back."""


class Reconcile(Preparation):
    """One pass. `run` returns the seconds after which to look again, None if an event will do."""

    async def run(self) -> float | None:
        try:
            _, spec = parse_service(self.parent)
        except SpecError as error:
            self._found["spec_trouble"] = Trouble(Reason.INVALID_SPEC, sentence(str(error)), error.cure)
            self.cluster.scaling.note(self.key, None)
            await self._look()
            await self.children.look("Deployment", self.name)
            await self._write_status()
            return None
        self.spec = spec
        self.owner = resources.Parent(self.name, self.namespace, self.uid, spec, self.restarted_at)
        self._found["scaling"] = self._read_policy()
        await self._look()
        await self._act()
        self._note_scaling()
        await self._write_status()
        for problem in self.children.problems:
            self._look_again(problem.retry_s)
        return self.again_s

    async def welcome(self) -> None:
        """The first child of a service that is new, which depends on nothing but its name; the rest follows in `run`."""
        self.memory.welcomed = True
        try:
            _, spec = parse_service(self.parent)
        except SpecError:
            return
        owner = resources.Parent(self.name, self.namespace, self.uid, spec, self.restarted_at)
        await self.children.ensure(resources.service_account(owner, self.cluster.rendering))

    @property
    def is_new(self) -> bool:
        return not self.recorded and not self.memory.welcomed

    async def _act(self) -> None:
        """From the model to what serves; each step either has its result or says in `_found` what it waits for."""
        self._found["suspended"] = self.spec.suspend
        try:
            model = await self._inspect()
            planned = self._plan(model) if model is not None else None
            location = await self._prepare(model, planned) if model is not None and planned is not None else None
            if location is not None and planned is not None and model is not None:
                await self._roll_out(planned, location)
                self._learn(model, planned)
            else:
                await self._keep_serving()
        except resources.MissingImage as error:
            self._found["plan_trouble"] = Trouble(Reason.NO_RUNTIME_IMAGE, sentence(str(error)))
            await self._keep_serving()
        await self._replace_broken()
        await self._autoscale()
        await self._let_go()
        await self._retire_jobs()

    async def _roll_out(self, planned: Plan, location: ModelLocation) -> None:
        location = self._as_it_began(planned, location)
        mark = resources.revision(self.owner, planned, location)
        self._found["tie"] = self._tie(location)
        record = RolloutRecord.from_status(self.recorded.get("rollout"))
        if self._is_rolled_back(record, mark):
            await self._roll_back(record)
            return
        if self.paused:
            self._found["current"] = await self._serves(mark)
            return
        await self._advance(mark, planned, location)
        record = advance(record, mark, read_rollout(self.children.live.get(("Deployment", self.name))), self.server_pods)
        self._found["rollout_record"] = {**self._found["rollout_record"], **record.to_status()}
        if self._is_rolled_back(record, mark):
            self._look_again(0.0)  # the decision is written down first: a restart in between must come to the same

    def _as_it_began(self, planned: Plan, location: ModelLocation) -> ModelLocation:
        """Earlier releases took it from the spec whether the cache ties pods to one node, and a source tied none. A revision of theirs
        stays as it is."""
        other = replace(location, sharing=Sharing.ANY if location.one_node else Sharing.ONE_NODE)
        mark = resources.revision(self.owner, planned, other)
        stored = self._revision(mark)
        tried = (self.recorded.get("revision"), RolloutRecord.from_status(self.recorded.get("rollout")).failed)
        return other if stored is not None and _BY_CLAIM not in stored["data"] and mark in tried else location

    def _tie(self, location: ModelLocation) -> Tie | None:
        if not location.one_node:
            return None
        (mount,) = location.mounts
        return Tie(mount.claim, location.sharing, is_cache=mount.claim == self.owner.cache_claim)

    def _is_rolled_back(self, record: RolloutRecord, mark: str) -> bool:
        """Whether another revision than `mark`, which the spec asks for, is to serve."""
        return self.spec.rollout.auto_rollback and record.gives_up(mark) and self._revision(record.good) is not None

    async def _replace_broken(self) -> None:
        """A pod whose GPU failed goes, so that its successor gets another one."""
        pod = choose_replacement(self.server_pods) if not (self.paused or self.spec.suspend) else None
        if pod is None:
            return
        now = self.cluster.now()
        due = self.memory.replacements.due(now)
        if due > now:
            self._look_again((due - now).total_seconds())
            return
        self.cluster.count(PODS.kind, "delete")
        try:
            await self.cluster.client.delete(PODS, self.namespace, pod.name, uid=pod.uid)
        except Forbidden as error:  # a role of an earlier release: the kubelet restarts it in place, as it did then
            _log.warning("%s: pod %s is not replaced: %s", self.key, pod.name, error)
            return
        self.memory.replacements = self.memory.replacements.after(now)
        self.cluster.device_failed(pod.node)
        _log.warning("%s: replaced pod %s, whose GPU failed on node %s", self.key, pod.name, pod.node)

    def _learn(self, model: ModelFacts, planned: Plan) -> None:
        """How the revision's first pod came up, from itself. Once it is in the status nobody is asked again."""
        mark, startup = self._found.get("revision", ""), self.recorded.get("startup") or {}
        pod = first_started(self.server_pods, mark)
        known = startup.get("revision") == mark and "phases" in startup
        if known or pod is None or not pod.address or pod.started is None or pod.ready_at is None or not self._found.get("current"):
            return
        engine = planned.engine
        # Of a device that others share, what they hold is measured too.
        shared = engine.device == "cuda" and engine.num_cache_blocks is not None
        key = key_of(model.fingerprint, planned.product, engine.tp, planned.precision, engine.dtype)
        load_s, ready_at = (pod.ready_at - pod.started).total_seconds(), write_time(pod.ready_at)
        start = Start(self.namespace, self.name, mark, pod.address, "" if shared else key, load_s, ready_at)
        report = self.cluster.report(start)
        if report is not None:
            self._found["phases"] = report.phases

    async def _advance(self, mark: str, planned: Plan, location: ModelLocation) -> None:
        """Apply revision `mark`, whose template and strategy are those that it began with."""
        # By name where it was not listed: without its labels it is still what the pods were made from.
        listed = self._revision(mark)
        stored = listed or await self.children.look("ControllerRevision", f"{self.name}-{mark}")
        data: Mapping[str, Any] = stored["data"] if stored else {}
        strategy = self._strategy(stored, planned, location)
        objects = resources.serving(
            self.owner, planned, location, self.cluster.rendering, strategy=strategy.name, template=data.get("template")
        )
        if listed is None:
            template = next(item for item in objects if item["kind"] == "Deployment")["spec"]["template"]
            parts = {"template": template, "objects": objects, "plan": to_status(planned), "strategy": strategy.to_stored()}
            await self.children.ensure(self._build_revision(mark, data or {**parts, _BY_CLAIM: True}))
        objects = [*self._surroundings(), *objects, *self._doors()]
        self._found |= {"revision": mark, "rollout_record": {"strategy": strategy.name, "why": strategy.why}}
        applied = await self.children.apply(objects)
        self._found["current"] = applied
        good = RolloutRecord.from_status(self.recorded.get("rollout")).good
        pruned = self.parent["metadata"].get("generation", 0), mark, good
        if applied and not self.children.problems and self.memory.pruned != pruned:
            await self.children.prune(self._kept(objects, mark, good))
            self.memory.pruned = pruned

    def _strategy(self, stored: Object | None, planned: Plan, location: ModelLocation) -> Strategy:
        """Chosen from the facts of the moment in which a revision begins, with the service's own pods where they are; then it stands."""
        if stored is not None:
            on_cpu = not planned.placement.resource and not location.one_node
            return Strategy.from_stored(stored["data"].get("strategy"), on_cpu=on_cpu)
        return choose_strategy(self.spec, planned, self.cluster.facts(self.key, ()), sharing=location.sharing)

    async def _roll_back(self, record: RolloutRecord) -> None:
        """The last good revision serves until the spec asks for another one than that which failed."""
        cure = "Change the spec, or set the annotation gantline.io/restartedAt, to try again."
        message = f"Revision {record.failed} was given up, and {record.good} serves instead: {record.cause}"
        self._found |= {"rolled_back": Trouble(Reason.ROLLED_BACK, message, cure), "rollout_record": record.to_status()}
        good = self._revision(record.good)
        self.cluster.reserve(self.key, self.spec, from_status(good["data"].get("plan") or {}, self.spec) if good else None)
        await self._keep_serving(record.good)

    async def _keep_serving(self, mark: str = "") -> None:
        """While the new revision is being prepared, or cannot be: the previous one (or `mark`) as it was, at the scale asked for now."""
        mark = mark or self.recorded.get("revision", "")
        stored = self._revision(mark)
        if stored is None:
            if mark:
                await self.children.look("Deployment", self.name)
            return
        self._found["revision"] = mark
        kept = [dict(item) for item in stored["data"].get("objects") or [] if item["kind"] != "PodDisruptionBudget"]
        objects = [*kept, *resources.disruption_budgets(self.owner, self.cluster.rendering)]  # of the replicas of today
        count = resources.replicas(self.owner) if await self._hold_served(stored) else 0  # pods would find no model
        for item in objects:
            if item["kind"] == "Deployment":
                item["spec"] = {**item["spec"], "replicas": count}
        await self.children.apply([*self._surroundings(), *objects, *self._doors()])
        # Pruning waits for the revision that the spec asks for; who closes the door does not want to.
        if self.spec.ingress is None and await self.children.look("Ingress", self.name) is not None:
            await self.children.delete(("Ingress", self.name))

    async def _serves(self, mark: str) -> bool:
        """Whether what is there is already what the spec asks for."""
        deployment = await self.children.look("Deployment", self.name)
        if deployment is None:
            return False
        marks = deployment["spec"]["template"]["metadata"].get("labels") or {}
        return marks.get("gantline.io/revision") == mark and deployment["spec"]["replicas"] == resources.replicas(self.owner)

    async def _autoscale(self) -> None:
        """The autoscaler that the spec asks for, and no other. What stands in its way is a matter of `ScalingReady` alone."""
        wanted = resources.autoscalers(self.owner, self.cluster.rendering, self._found["scaling"])
        generation = self.parent["metadata"].get("generation", 0)
        if self.memory.handed_over != generation and not self.paused:
            for kind in sorted(resources.AUTOSCALER_KINDS - {item["kind"] for item in wanted}):
                if not await self._remove_autoscaler(kind):
                    self._wait_for_hand_over(kind)
                    return
            self.memory.handed_over = generation
        if not wanted or not (self._found.get("revision") or self.recorded.get("revision")):
            return
        known = len(self.children.problems)
        await self.children.apply(wanted)
        problems = self.children.problems[known:]
        del self.children.problems[known:]
        for problem in problems:
            self._look_again(problem.retry_s)
            self._found["scaling_trouble"] = Trouble(problem.reason, problem.message)
        missing = self._missing_metrics(wanted[0]["kind"])
        if missing and not problems:
            self._found["scaling_trouble"] = missing

    async def _remove_autoscaler(self, kind: str) -> bool:
        """Whether it is gone: its controller may have to end something first, and has a finalizer for that."""
        with contextlib.suppress(KindMissing, Forbidden):  # then there is none of ours
            if await self.children.look(kind, self.name) is not None:
                await self.children.delete((kind, self.name))
                return await self.children.look(kind, self.name) is None
        return True

    def _wait_for_hand_over(self, kind: str) -> None:
        """Two owners of `replicas` would undo each other's writes, so nobody comes before the former one is gone."""
        self.handing_over = True
        message = f"{kind} {self.name} of the former controller is being deleted; replicas are left as they are until it is gone."
        cure = "Where that controller was uninstalled, take the object's finalizers away." if kind == "ScaledObject" else ""
        self._found["scaling_trouble"] = Trouble(Reason.HANDING_OVER, message, cure)
        self._look_again(_HAND_OVER_POLL_S)

    def _missing_metrics(self, kind: str) -> Trouble | None:
        """What the installation lacks for others' autoscalers to know the load."""
        settings = self.cluster.settings
        if kind == "HorizontalPodAutoscaler" and not settings.custom_metrics_port:
            cure = "Set the chart's customMetrics.enabled, or scaling.controller to Gantline."
            return Trouble(Reason.CUSTOM_METRICS_MISSING, "The operator does not serve the metric that the autoscaler follows.", cure)
        if kind == "ScaledObject" and not settings.load_url:
            cure = "Set the chart's metrics.service, or scaling.controller to Gantline."
            return Trouble(Reason.CUSTOM_METRICS_MISSING, "The operator has no address at which KEDA could ask it for the load.", cure)
        return None

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

    def _kept(self, objects: list[Object], mark: str, good: str) -> set[tuple[str, str]]:
        """What pruning leaves: the desired objects, a cache that is in use, Jobs (which have a time to live, but keep no cache that goes),
        the latest revisions; and the last good one, however many have failed since, with the cache that its pods mount: it may have to
        serve again."""
        objects = [*objects, *resources.autoscalers(self.owner, self.cluster.rendering, self._found["scaling"])]
        kept = {(item["kind"], item["metadata"]["name"]) for item in objects}
        if resources.source_location(self.spec.model.uri) is None or self._found.get("quantize"):
            kept.add(("PersistentVolumeClaim", resources.cache_claim_name(self.name)))
        kept |= {("PersistentVolumeClaim", claim) for claim in claims_of_template(template_of(self._revision(good)))}
        cache = resources.cache_claim_name(self.name)
        holding = {job["metadata"]["name"] for job in self._jobs_of_claim(cache)} if ("PersistentVolumeClaim", cache) not in kept else set()
        kept |= {("Job", name) for kind, name in self.children.live if kind == "Job" and name not in holding}
        revisions = sorted(self.children.of_kind("ControllerRevision"), key=_age, reverse=True)
        current = ("ControllerRevision", f"{self.name}-{mark}")
        others = [("ControllerRevision", item["metadata"]["name"]) for item in revisions]
        latest = [item for item in others if item != current][: _KEPT_REVISIONS - 1]
        return kept | {current, ("ControllerRevision", f"{self.name}-{good}"), *latest}


def _age(item: Object) -> tuple[int, str, str]:
    return item.get("revision", 0), item["metadata"].get("creationTimestamp", ""), item["metadata"]["name"]
