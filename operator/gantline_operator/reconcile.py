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
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from gantline_runtime.errors import CheckpointError
from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.termination import TerminationMessage

from gantline_operator import resources
from gantline_operator.apply import Children, Problem
from gantline_operator.apply import Parent as ApplyParent
from gantline_operator.client import ApiError, Client, NotFound, Object, Resource
from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts
from gantline_operator.observe import PODS
from gantline_operator.plan import Plan, Rejected, StagePlan, cache_size, plan, plan_inputs, plan_stage
from gantline_operator.plan_status import from_status, rejected_status, to_status
from gantline_operator.pod_state import PodState, Trouble, read_pod
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resources import ModelLocation
from gantline_operator.settings import OperatorSettings
from gantline_operator.spec import SpecError, parse_service
from gantline_operator.stages import Create, Failed, Record, Running, StageName, Step, Succeeded, decide, read_job
from gantline_operator.status import Findings, build_status, read_rollout, write_time

__all__ = ["CHILD_KINDS", "SERVICES", "Cluster", "Memory", "Reconcile"]

_log = logging.getLogger(__name__)

SERVICES = Resource("gantline.io/v1alpha1", "InferenceService", "inferenceservices")
_REVISIONS = Resource("apps/v1", "ControllerRevision", "controllerrevisions")
CHILD_KINDS = tuple(Resource(kind.api_version, kind.kind, kind.plural) for kind in resources.MANAGED_KINDS)
_CLAIMS = next(kind for kind in CHILD_KINDS if kind.kind == "PersistentVolumeClaim")

_PROGRESS_POLL_S = 10.0
_MISSING_POLL_S = 30.0
_KEPT_REVISIONS = 3
"""The current one, the one it replaces, and one more for a look back."""


@dataclass
class Memory:
    """What one operator remembers of a service between reconciles. Losing it costs a few requests, nothing else."""

    uid: str
    uids: dict[tuple[str, str], str] = field(default_factory=dict)
    """Of its children."""
    pruned: tuple[int, str] = (0, "")
    """Generation and revision that were pruned last."""
    planned: tuple[int, str] = (0, "")
    """Generation and inputs of the plan whose pods have their nodes."""

    def forget_checks(self) -> None:
        """The next reconcile looks at everything again."""
        self.pruned = self.planned = (0, "")


@dataclass(frozen=True)
class Cluster:
    """What a reconcile needs of the rest of the operator."""

    client: Client
    settings: OperatorSettings
    rendering: resources.Settings
    facts: Callable[[str, Collection[str]], ClusterFacts]
    """(service `namespace/name`, uids of its own pods) -> the cluster, less what others have planned."""
    reserve: Callable[[str, InferenceServiceSpec, Plan | None], None]
    """Records what the service's pods will take; None: nothing."""
    count: Callable[[str, str], None]
    """(kind, verb) of each write."""
    memory: Callable[[str, str], Memory]
    """(service, uid) -> what is remembered of it."""
    time_plan: Callable[[], AbstractContextManager[Any]] = nullcontext
    now: Callable[[], datetime] = lambda: datetime.now(UTC)


@dataclass
class Reconcile:
    """One pass. `run` returns the seconds after which to look again, None if an event will do."""

    cluster: Cluster
    parent: Object
    status: Object = field(default_factory=dict)
    """The status as it stands after the pass."""
    children: Children = field(init=False)
    pods: list[PodState] = field(default_factory=list)
    artefacts: dict[str, Object] = field(default_factory=dict)
    again_s: float | None = None
    _found: dict[str, Any] = field(default_factory=dict)
    _wanted_jobs: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        metadata = self.parent["metadata"]
        self.namespace, self.name, self.uid = metadata["namespace"], metadata["name"], metadata["uid"]
        self.key = f"{self.namespace}/{self.name}"
        self.status = dict(self.parent.get("status") or {})
        self.recorded = dict(self.status)
        """The status as this pass found it: what is in it survived whatever happened before."""
        self.restarted_at = str((metadata.get("annotations") or {}).get(resources.RESTARTED_AT, ""))[:256]
        owner = ApplyParent(self.namespace, self.name, self.uid, resources.child_selector(self.name))
        self.memory = self.cluster.memory(self.key, self.uid)
        self.children = Children(self.cluster.client, owner, CHILD_KINDS, self.memory.uids, count=self.cluster.count)
        self.artefacts = {item["kind"]: item for item in self.recorded.get("artefacts") or []}

    async def run(self) -> float | None:
        try:
            _, spec = parse_service(self.parent)
        except SpecError as error:
            self._found["spec_trouble"] = Trouble(Reason.INVALID_SPEC, _sentence(str(error)), error.cure)
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

    async def _look(self) -> None:
        """What decisions need. A service without a status is new: what a killed operator may have made for it is found by name."""
        if not self.recorded:
            return
        selector = resources.child_selector(self.name)
        listing = self.cluster.client.list(PODS, self.namespace, labelSelector=selector)
        _, pods = await asyncio.gather(self.children.observe("Job", "ControllerRevision"), listing)
        self.pods = [read_pod(pod) for pod in pods]

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
            self._found["plan_trouble"] = Trouble(Reason.NO_RUNTIME_IMAGE, _sentence(str(error)))
            await self._keep_serving()
        await self._retire_jobs()

    # ---- inspect -------------------------------------------------------------------------------------------------------------------

    async def _inspect(self) -> ModelFacts | None:
        digest = resources.inspect_hash(self.spec)
        known = self.recorded.get("model") or {}
        if known.get("inputs") != digest:
            if await self._source_missing():
                return None

            def build(attempt: int) -> Object:
                placement = self._plan_stage("inspect")
                return resources.inspect_job(self.owner, placement, self.cluster.rendering, attempt=attempt)

            answer = await self._stage("inspect", digest, build)
            if answer is None:
                return None
            known = {"inputs": digest, **answer.facts}
        try:
            model = ModelFacts.from_json({key: value for key, value in known.items() if key != "inputs"})
        except CheckpointError as error:
            self._refuse_stage("inspect", digest, Trouble(Reason.INTERNAL_ERROR, _sentence(str(error)), error.cure))
            return None
        self._found["model"] = known
        return model

    async def _source_missing(self) -> bool:
        """Whether a pvc:// source names a claim that is not there: its Job would hang, and say so only to the scheduler."""
        location = resources.source_location(self.spec.model.uri)
        for mount in location.mounts if location else ():
            if not await self._claim_exists(mount.claim):
                cure = "Create it, or correct spec.model.uri."
                trouble = Trouble(Reason.MODEL_NOT_FOUND, f"PersistentVolumeClaim {mount.claim} does not exist.", cure)
                self._found["stage"] = ("inspect", Running("", 0, trouble))
                self._look_again(_MISSING_POLL_S)
                return True
        return False

    async def _claim_exists(self, name: str) -> bool:
        try:
            await self.cluster.client.get(_CLAIMS, self.namespace, name)
        except NotFound:
            return False
        return True

    # ---- plan ----------------------------------------------------------------------------------------------------------------------

    def _plan(self, model: ModelFacts) -> Plan | None:
        """No await between looking at what others reserved and reserving: two services never count on the same device.

        A plan whose pods have their nodes stands until the spec changes or the resync asks again whether it still fits.
        """
        previous = self._previous_plan()
        started = any(pod.node for pod in self.pods if pod.role == "server")
        generation = self.parent["metadata"].get("generation", 0)
        inputs = plan_inputs(self.spec, model)
        decision: Plan | Rejected
        if previous is not None and started and previous.inputs == inputs and self.memory.planned == (generation, inputs):
            decision = previous
        else:
            facts = self.cluster.facts(self.key, [pod.uid for pod in self.pods])
            with self.cluster.time_plan():
                decision = plan(self.spec, model, facts, self.cluster.rendering.images, previous, started=started)
        if isinstance(decision, Rejected):
            self._found["plan"] = rejected_status(decision)
            self._found["plan_trouble"] = Trouble(decision.reason, _sentence(decision.message), decision.cure)
            return None
        # As the status will give it back, so that the next pass renders the same.
        decision = from_status(to_status(decision), self.spec) or decision
        self.memory.planned = (generation, decision.inputs) if started else (0, "")
        self.cluster.reserve(self.key, self.spec, decision)
        self._found |= {"plan": to_status(decision), "plan_summary": summarize(decision), "quantize": decision.quantize}
        return decision

    def _previous_plan(self) -> Plan | None:
        """What stands in the status; after a rejection, what still serves."""
        stored = from_status(self.recorded.get("plan") or {}, self.spec)
        if stored is not None:
            return stored
        revision = self._revision(self.recorded.get("revision", ""))
        return from_status(revision["data"].get("plan") or {}, self.spec) if revision else None

    # ---- fetch and quantize ----------------------------------------------------------------------------------------------------------

    async def _prepare(self, model: ModelFacts, planned: Plan) -> ModelLocation | None:
        """Where the files to be served lie, once they are there."""
        await self._checkpoint()
        location = resources.source_location(self.spec.model.uri)
        if location is not None and not planned.quantize:
            return location
        if not await self._cache_ready(model, planned):
            return None
        if location is None:
            location = await self._fetch(model, planned)
        if location is None or not planned.quantize:
            return location
        return await self._quantize(model, planned, location)

    async def _cache_ready(self, model: ModelFacts, planned: Plan) -> bool:
        stage: StageName = "quantize" if resources.source_location(self.spec.model.uri) else "fetch"
        claim = self.spec.cache.claim_name
        if claim is None:
            size = cache_size(self.spec, model, planned.quantize)
            return await self._ensure(resources.cache_claim(self.owner, self.cluster.rendering, size), stage)
        if await self._claim_exists(claim):
            return True
        cure = "Create it, or leave spec.cache.claimName out to have one made."
        trouble = Trouble(Reason.CACHE_MISSING, f"PersistentVolumeClaim {claim} does not exist.", cure)
        self._found["stage"] = (stage, Running("", 0, trouble))
        self._look_again(_MISSING_POLL_S)
        return False

    async def _ensure(self, desired: Object, stage: StageName) -> bool:
        if await self.children.ensure(desired) is not None:
            return True
        self._found["stage"] = (stage, None)
        return False

    async def _fetch(self, model: ModelFacts, planned: Plan) -> ModelLocation | None:
        revision = model.revision or None
        digest = resources.fetch_hash(self.spec, revision)
        location = resources.cache_location(self.owner, "fetch", digest)
        if self._has_artefact("fetch", digest):
            return location

        def build(attempt: int) -> Object:
            placement = self._plan_stage("fetch", model, planned)
            return resources.fetch_job(self.owner, placement, self.cluster.rendering, revision=revision, attempt=attempt)

        answer = await self._stage("fetch", digest, build)
        if answer is None:
            return None
        self._record_artefact("fetch", digest, answer)
        await self._checkpoint()
        return location

    async def _quantize(self, model: ModelFacts, planned: Plan, source: ModelLocation) -> ModelLocation | None:
        method = self.spec.quantization.method
        digest = resources.quantize_hash(self.spec, model.fingerprint)
        location = resources.cache_location(self.owner, method, digest)
        if not self._has_artefact(method, digest):

            def build(attempt: int) -> Object:
                placement = self._plan_stage("quantize", model, planned)
                return resources.quantize_job(
                    self.owner, placement, self.cluster.rendering, source=source, fingerprint=model.fingerprint, attempt=attempt
                )

            answer = await self._stage("quantize", resources.quantize_job_hash(self.spec, model.fingerprint), build)
            if answer is None:
                return None
            self._record_artefact(method, digest, answer)
            await self._checkpoint()
        trouble, self._found["quality_summary"] = judge(self.artefacts[method], self.spec.quantization.max_perplexity_increase)
        if trouble is not None:
            self._found["quality_trouble"] = trouble
            return None
        return location

    def _plan_stage(self, stage: StageName, model: ModelFacts | None = None, planned: Plan | None = None) -> StagePlan:
        facts = self.cluster.facts(self.key, []) if stage == "quantize" else ClusterFacts()  # the others take no device
        decision = plan_stage(stage, self.spec, facts, self.cluster.rendering.images, facts=model, serving=planned)
        if isinstance(decision, Rejected):
            raise _StageRejected(decision)
        return decision

    def _has_artefact(self, kind: str, digest: str) -> bool:
        item = self.artefacts.get(kind, {})
        return bool(item.get("hash") == digest and item.get("claim", self.owner.cache_claim) == self.owner.cache_claim)

    def _record_artefact(self, kind: str, digest: str, answer: TerminationMessage) -> None:
        facts = answer.artefact.get("facts")
        perplexity = answer.artefact.get("perplexity")
        location = resources.cache_location(self.owner, kind, digest)
        item: Object = {"kind": kind, "hash": digest, "path": location.path, "claim": self.owner.cache_claim}
        size = answer.artefact.get("weight_bytes", answer.artefact.get("bytes"))
        if isinstance(size, int):
            item["bytes"] = size
        if isinstance(perplexity, dict):
            item["perplexity"] = {key: f"{perplexity[key]:.6g}" for key in ("before", "after") if _is_number(perplexity.get(key))}
        if isinstance(facts, dict):
            item["facts"] = facts
        self.artefacts[kind] = item

    # ---- one stage -------------------------------------------------------------------------------------------------------------------

    async def _stage(self, name: StageName, digest: str, build: Callable[[int], Object]) -> TerminationMessage | None:
        """The stage's answer if its Job has completed; else None, and `_found` says where it is."""
        self._wanted_jobs.add(digest)
        record = Record.from_status(self.recorded.get("stages"))
        if self.spec.suspend:
            self._found |= {"stage": (name, None), "record": record}
            return None
        jobs = [read_job(job) for job in self._jobs(name, digest)]
        step: Step | None = decide(name, digest, record, jobs, self.pods, now=self.cluster.now(), restarted_at=self.restarted_at)
        if isinstance(step, Succeeded):
            return step.answer
        if isinstance(step, Create):
            step = await self._start(step, build)
        self._found |= {"stage": (name, step), "record": self._record_of(name, digest, step, record)}
        if isinstance(step, Failed) and step.retry_at is not None:
            self._look_again(max(0.5, (step.retry_at - self.cluster.now()).total_seconds()))
        if isinstance(step, Running) and step.pod and name != "inspect":
            self._found["record"] = await self._with_progress(self._found["record"], step.pod)
        return None

    def _jobs(self, name: StageName, digest: str) -> list[Object]:
        return [job for job in self.children.of_kind("Job") if _marks(job) == (name, digest)]

    async def _start(self, step: Create, build: Callable[[int], Object]) -> Step | None:
        try:
            job = build(step.attempt)
        except _StageRejected as refused:
            cause = refused.rejected
            return Running("", step.attempt, Trouble(cause.reason, _sentence(cause.message), cause.cure))
        ready = await self.children.apply([resources.service_account(self.owner, self.cluster.rendering)])
        if not ready or await self.children.ensure(job) is None:
            return None
        _log.info("%s: started Job %s", self.key, job["metadata"]["name"])
        return Running(job["metadata"]["name"], step.attempt)

    def _record_of(self, name: StageName, digest: str, step: Step | None, before: Record | None) -> Record | None:
        mine = before if before is not None and (before.name, before.hash) == (name, digest) else None
        if isinstance(step, Running):
            # The last failure stays in the record, so that a second attempt says why there is one.
            base = mine or Record(name, digest)
            progress = base.progress if (base.attempt, base.state) == (step.attempt, "Running") else ""
            return replace(base, attempt=step.attempt, state="Running", job=step.job, progress=progress)
        if isinstance(step, Failed):
            known = mine is not None and (mine.attempt, mine.state) == (step.attempt, "Failed")
            seen = mine.restarted_at if known and mine is not None else self.restarted_at
            finished = write_time(step.finished)
            return Record(name, digest, step.attempt, "Failed", step.job, step.trouble.reason.value, step.trouble.text, finished, seen)
        return mine

    def _refuse_stage(self, name: StageName, digest: str, trouble: Trouble) -> None:
        now = self.cluster.now()
        step = Failed("", 0, trouble, now, None)
        self._found |= {"stage": (name, step), "record": Record(name, digest, 0, "Failed", "", trouble.reason.value, trouble.text)}

    async def _with_progress(self, record: Record, pod: str) -> Record:
        """The last line of the Job's log, where we may read it: a download of an hour should not look like one that hangs."""
        self._look_again(_PROGRESS_POLL_S)
        try:
            log = await self.cluster.client.text(PODS, self.namespace, pod, "log", tailLines="1", limitBytes="2048")
        except ApiError:
            return record
        lines = [line for line in log.replace("\r", "\n").splitlines() if line.strip()]
        text = "".join(char for char in lines[-1] if char.isprintable()).strip()[:200] if lines else record.progress
        return replace(record, progress=text)

    # ---- serving ---------------------------------------------------------------------------------------------------------------------

    async def _roll_out(self, planned: Plan, location: ModelLocation) -> None:
        mark = resources.revision(self.owner, planned, location)
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

    def _revision(self, mark: str) -> Object | None:
        return self.children.live.get(("ControllerRevision", f"{self.name}-{mark}")) if mark else None

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

    async def _retire_jobs(self) -> None:
        """Jobs whose stage is over or wanted no more: finished ones get a time to live, others are deleted and free their devices."""
        of_spec = self._digests_of_spec()
        for job in self.children.of_kind("Job"):
            child = ("Job", job["metadata"]["name"])
            if read_job(job).state == "Active":
                if self.spec.suspend or _marks(job)[1] not in of_spec:
                    await self.children.delete(child)
            elif self._is_over(job) and "ttlSecondsAfterFinished" not in job["spec"]:
                await self.children.patch(child, {"spec": {"ttlSecondsAfterFinished": self.cluster.settings.job_retention_seconds}})

    def _digests_of_spec(self) -> set[str]:
        """Of every stage that the spec may need, whatever this pass got to: a passing refusal must not stop a Job half-way."""
        digests = {resources.inspect_hash(self.spec), *self._wanted_jobs}
        model = self._found.get("model") or {}
        if model:
            digests.add(resources.fetch_hash(self.spec, model.get("revision") or None))
            if self.spec.quantization.method != "none":
                digests.add(resources.quantize_job_hash(self.spec, model.get("fingerprint", "")))
        return digests

    def _is_over(self, job: Object) -> bool:
        """Whether a finished Job's outcome was in the status before this pass, or is of no interest."""
        name, digest = _marks(job)
        if digest not in self._wanted_jobs:
            return True
        record, attempt = Record.from_status(self.recorded.get("stages")), read_job(job).attempt
        if record is None or (record.name, record.hash) != (name, digest):
            return False
        return record.attempt > attempt or (record.attempt == attempt and record.state == "Failed")

    # ---- status ----------------------------------------------------------------------------------------------------------------------

    async def _checkpoint(self) -> None:
        """Writes down what later steps build on, if it is new: a restart in between must come to the same decision."""
        built = self._build_status()
        if any(built.get(part) != self.status.get(part) for part in ("model", "plan", "artefacts")):
            await self._write_status()

    async def _write_status(self) -> None:
        built = self._build_status()
        if built == self.status:
            return
        metadata = {"name": self.name, "namespace": self.namespace, "uid": self.uid}
        body = {"apiVersion": SERVICES.api_version, "kind": SERVICES.kind, "metadata": metadata, "status": built}
        self.cluster.count(SERVICES.kind, "apply")
        await self.cluster.client.apply(SERVICES, body, subresource="status")
        self.status = built

    def _build_status(self) -> Object:
        problems: list[Problem] = list(self.children.problems)
        deployment = self.children.live.get(("Deployment", self.name))
        values = {"revision": self.recorded.get("revision", ""), "model": self.recorded.get("model"), **self._found}
        if "current" not in self._found:
            values.setdefault("record", Record.from_status(self.recorded.get("stages")))
        if "spec_trouble" in self._found:
            values.setdefault("plan", self.recorded.get("plan"))
        findings = Findings(
            namespace=self.namespace,
            name=self.name,
            generation=self.parent["metadata"].get("generation", 0),
            selector=",".join(f"{key}={value}" for key, value in resources.pod_selector(self.name, "server").items()),
            artefacts=[self.artefacts[kind] for kind in sorted(self.artefacts)],
            problems=problems,
            rollout=read_rollout(deployment),
            pods=self.pods,
            **values,
        )
        return build_status(findings, self.status, self.cluster.now())

    def _look_again(self, seconds: float) -> None:
        self.again_s = seconds if self.again_s is None else min(self.again_s, seconds)


class _StageRejected(Exception):
    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.message)
        self.rejected = rejected


def judge(artefact: Mapping[str, Any], limit: float | None) -> tuple[Trouble | None, str]:
    """Whether a quantized copy is good enough, and a sentence about it. Checked again here: the limit may be newer than the copy."""
    perplexity = artefact.get("perplexity") or {}
    before, after = _number(perplexity.get("before")), _number(perplexity.get("after"))
    if before is None or after is None:
        if limit is None:
            return None, "Quantized."
        cure = "Quantize again, or take spec.quantization.maxPerplexityIncrease away."
        return Trouble(Reason.QUALITY_GATE_FAILED, "The quantized copy came without a measured perplexity.", cure), ""
    text = f"Perplexity {before:.3f} before, {after:.3f} after."
    # Written so that a NaN fails.
    if limit is not None and not after <= before * (1 + limit):
        cure = "Raise spec.quantization.maxPerplexityIncrease, use a smaller groupSize, or serve the original."
        return Trouble(Reason.QUALITY_GATE_FAILED, f"The quantized copy is worse than the {limit:.1%} allowed. {text}", cure), text
    return None, text


def summarize(planned: Plan) -> str:
    """One sentence for PlanResolved."""
    status = to_status(planned)
    where = f"{status.get('count')} x {status.get('product') or status.get('resource')}" if status.get("resource") else "a CPU"
    return f"{status.get('precision')} on {where}, backend {status.get('backend')}, sessions of {status.get('sessionLen')} tokens."


def _marks(job: Object) -> tuple[str, str]:
    labels = job["metadata"].get("labels") or {}
    return labels.get("gantline.io/role", ""), labels.get("gantline.io/revision", "")


def _age(item: Object) -> tuple[int, str, str]:
    return item.get("revision", 0), item["metadata"].get("creationTimestamp", ""), item["metadata"]["name"]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:
        return None


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."
