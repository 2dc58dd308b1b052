"""Runs one stage at a time: the Job that is wanted, its record in the status, its end.

`stages.decide` says what to do; here it is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace

from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.termination import TerminationMessage

from gantline_operator import resources
from gantline_operator.client import ApiError, Forbidden, Object
from gantline_operator.conditions import Reason
from gantline_operator.events import EVENTS
from gantline_operator.eviction import claims_of_template
from gantline_operator.facts import ClusterFacts
from gantline_operator.observe import PODS
from gantline_operator.plan import Plan, Rejected, StagePlan, plan_stage
from gantline_operator.pod_state import Trouble
from gantline_operator.reconcile_pass import Pass, sentence
from gantline_operator.stages import Create, Failed, Record, Running, StageName, Step, Succeeded, decide, read_job
from gantline_operator.status import without_names, write_time

__all__ = ["StageRunner", "read_progress"]

_log = logging.getLogger(__name__)

_PODLESS_S, _PODLESS_POLL_S = 5.0, 15.0
"""A Job's age at which it should have a pod, and between two looks at why it has none."""
_PROGRESS_POLL_S = (2.0, 10.0)
"""Between two looks at a Job's log: the first while it is young, the second once it is known to run."""


class StageRunner(Pass):
    """The part of a reconcile that deals with Jobs."""

    async def _stage(self, name: StageName, digest: str, build: Callable[[int], Object]) -> TerminationMessage | None:
        """The stage's answer if its Job has completed; else None, and `_found` says where it is."""
        self._wanted_jobs.add(digest)
        record = Record.from_status(self.recorded.get("stages"))
        if self.spec.suspend:
            self._found |= {"stage": (name, None), "record": record}
            return None
        step: Step | None = self._next_step(name, digest)
        if isinstance(step, Succeeded):
            return step.answer
        if isinstance(step, Create):
            step = await self._start(step, build)
        elif isinstance(step, Running) and not any(pod.job == step.job for pod in self.pods):
            step = replace(step, trouble=await self._refusal_of_pods(step.job))
        self._found |= {"stage": (name, step), "record": self._record_of(name, digest, step, record)}
        if isinstance(step, Failed) and step.retry_at is not None:
            self._look_again(max(0.5, (step.retry_at - self.cluster.now()).total_seconds()))
        if isinstance(step, Running) and step.pod and name != "inspect":
            self._found["record"] = await self._with_progress(self._found["record"], step.pod)
        return None

    def _next_step(self, name: StageName, digest: str) -> Step:
        record = Record.from_status(self.recorded.get("stages"))
        jobs = [read_job(job) for job in self._jobs(name, digest)]
        return decide(name, digest, record, jobs, self.pods, now=self.cluster.now(), restarted_at=self.restarted_at)

    def _jobs(self, name: StageName, digest: str) -> list[Object]:
        return [job for job in self.children.of_kind("Job") if _marks(job) == (name, digest)]

    def _jobs_of_claim(self, claim: str) -> list[Object]:
        """Those whose pods mount it: a claim is not gone before the last of its pods is, be it one that has ended."""
        return [job for job in self.children.of_kind("Job") if claim in claims_of_template(job["spec"]["template"])]

    async def _refusal_of_pods(self, job: str) -> Trouble | None:
        """Why a Job has no pod (a quota, an admission policy): its controller tells that in events alone, and tries again by itself."""
        age_s = (self.cluster.now() - read_job(self.children.live[("Job", job)]).created).total_seconds()
        if age_s < _PODLESS_S:
            self._look_again(_PODLESS_S - age_s)
            return None
        self._look_again(_PODLESS_POLL_S)
        selector = f"regarding.kind=Job,regarding.name={job},reason=FailedCreate"
        try:
            events = await self.cluster.client.list(EVENTS, self.namespace, fieldSelector=selector)
        except Forbidden:  # a role of an earlier release
            cure = f"`kubectl describe job {job}` says why."
            return Trouble(Reason.FORBIDDEN, f"No pod of Job {job} has been created.", cure)
        told = max(events, key=lambda event: str(event.get("deprecatedLastTimestamp") or event.get("eventTime") or ""), default=None)
        return Trouble(Reason.FORBIDDEN, f"Pods cannot be created: {without_names(told.get('note', ''))}"[:600]) if told else None

    async def _start(self, step: Create, build: Callable[[int], Object]) -> Step | None:
        try:
            job = build(step.attempt)
        except _StageRejected as refused:
            cause = refused.rejected
            return Running("", step.attempt, Trouble(cause.reason, sentence(cause.message), cause.cure))
        before = [resources.service_account(self.owner, self.cluster.rendering), *self._surroundings()]
        ready = await self.children.apply(before)
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
        """How far the Job's log says it is, where we may read it: a download of an hour should not look like one that hangs."""
        often, seldom = _PROGRESS_POLL_S
        age_s = next(((self.cluster.now() - state.created).total_seconds() for state in self.pods if state.name == pod), 0.0)
        self._look_again(min(seldom, max(often, age_s / 5)))
        try:
            log = await self.cluster.client.text(PODS, self.namespace, pod, "log", tailLines="20", limitBytes="16384")
        except ApiError:
            return record
        return replace(record, progress=read_progress(log) or record.progress)

    def _plan_stage(self, stage: StageName, model: ModelFacts | None = None, planned: Plan | None = None) -> StagePlan:
        facts = self.cluster.facts(self.key, []) if stage == "quantize" else ClusterFacts()  # the others take no device
        decision = plan_stage(stage, self.spec, facts, self.cluster.rendering.images, facts=model, serving=planned)
        if isinstance(decision, Rejected):
            raise _StageRejected(decision)
        return decision

    async def _retire_jobs(self) -> None:
        """Jobs whose stage is over or wanted no more: finished ones get a time to live, others are deleted and free their devices."""
        of_spec = self._digests_of_spec()
        succeeded = {pod.job for pod in self.pods if pod.phase == "Succeeded"}
        for job in self.children.of_kind("Job"):
            child = ("Job", job["metadata"]["name"])
            if read_job(job).state == "Active" and child[1] in succeeded:
                continue  # it is done, and will be counted: its log stays
            if read_job(job).state == "Active":
                if self.spec.suspend or _marks(job)[1] not in of_spec:
                    await self.children.delete(child)
            elif self._is_over(job) and "ttlSecondsAfterFinished" not in job["spec"]:
                await self.children.patch(child, {"spec": {"ttlSecondsAfterFinished": self.cluster.settings.job_retention_seconds}})

    def _digests_of_spec(self) -> set[str]:
        """Of every stage that the spec may need, whatever this pass got to: a passing refusal must not stop a Job half-way. Only a plan
        that serves the model as it is says that no copy is needed, and a copy's Job may hold the GPU that it is to be served on."""
        digests = {resources.inspect_hash(self.owner), *self._wanted_jobs}
        model = self._found.get("model") or {}
        if model:
            digests.add(resources.fetch_hash(self.spec, model.get("revision") or None))
            if self.spec.quantization.method != "none" and self._found.get("quantize") is not False:
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


class _StageRejected(Exception):
    def __init__(self, rejected: Rejected) -> None:
        super().__init__(rejected.message)
        self.rejected = rejected


def read_progress(log: str) -> str:
    """The latest line of a stage's log (JSON lines) that tells a share and the seconds left, or what is waited for, in words; empty where
    none does.

    The log is a container's, so nothing in it is trusted: a word of what is done, and two numbers, are all that is taken over.
    """
    for line in reversed(log.splitlines()):
        try:
            values = json.loads(line)
            what = "".join(char for char in str(values.get("message", ""))[:80] if char.isprintable())
            if "waiting_s" in values:
                return what
            share, left = float(values["progress"]), values.get("eta_s")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        percent = f"{min(max(share, 0.0), 1.0):.0%}" if share == share else ""
        return f"{what} {percent}".strip() + (f", {left} s left" if isinstance(left, int) and left > 0 else "")
    return ""


def _marks(job: Object) -> tuple[str, str]:
    labels = job["metadata"].get("labels") or {}
    return labels.get("gantline.io/role", ""), labels.get("gantline.io/revision", "")
