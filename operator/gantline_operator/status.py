"""An InferenceService's whole status from what one reconcile found. Pure: the same findings give the same status.

Each condition is decided by a short list of cases in order; `Ready` is the first thing that stands in the way. A condition that does not
apply is left out. `merge_conditions` keeps the transition times of what did not change, so at rest nothing is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from gantline_operator.apply import Problem
from gantline_operator.autoscaling.policy import Policy
from gantline_operator.autoscaling.targets import Report
from gantline_operator.claim_sharing import Sharing, Tie
from gantline_operator.conditions import Condition, ConditionType, Reason, unique
from gantline_operator.pod_state import PodState, Trouble
from gantline_operator.stages import Create, Failed, Record, Running, StageName, Step

__all__ = [
    "UNPLACED",
    "Findings",
    "Rollout",
    "build_conditions",
    "build_status",
    "first_started",
    "merge_conditions",
    "read_rollout",
    "without_names",
    "write_time",
]

Object = dict[str, Any]

_UNDER_WAY = {"inspect": Reason.INSPECTING, "fetch": Reason.FETCHING, "quantize": Reason.QUANTIZING, "evict": Reason.EVICTING}
UNPLACED = {Reason.WAITING_FOR_CAPACITY, Reason.WAITING_FOR_VOLUME, Reason.CACHE_NOT_SHAREABLE, Reason.SOURCE_NOT_SHAREABLE}
"""A pod's troubles that are only a wait for a node."""
_CROWDED = {Sharing.ONE_NODE: {Reason.WAITING_FOR_CAPACITY}, Sharing.ONE_POD: {Reason.WAITING_FOR_CAPACITY, Reason.WAITING_FOR_VOLUME}}
"""What a pod waits for whose volume others of its service have."""
_DOING = {
    "inspect": "The model's files are being read.",
    "fetch": "The model is being downloaded into the cache volume.",
    "quantize": "The model is being quantized.",
    "evict": "Models that nothing uses are being removed from the cache volume, to make room.",
}

_PAUSED = "Paused: nothing is changed until the annotation gantline.io/paused is taken away."


@dataclass(frozen=True)
class Rollout:
    """A Deployment's progress. The counts are trusted only where the Deployment's controller has `seen` the newest spec."""

    seen: bool
    wanted: int
    replicas: int
    updated: int
    ready: int
    failure: str = ""
    """Why pods cannot be created, in the API server's words (a quota, an admission webhook)."""
    deadline_passed: bool = False

    @property
    def complete(self) -> bool:
        return self.seen and self.wanted == self.replicas == self.updated == self.ready


@dataclass(frozen=True)
class Findings:
    """All that one reconcile found out about a service."""

    namespace: str
    name: str
    generation: int
    selector: str
    suspended: bool = False
    paused: bool = False
    """Nothing of the service is changed for now, whatever its spec asks for."""
    spec_trouble: Trouble | None = None
    stage: tuple[StageName, Step | None] | None = None
    """The stage that is not done, and its step; None where all are. A step of None: not looked at (suspended, paused, refused)."""
    record: Record | None = None
    model: Mapping[str, Any] | None = None
    artefacts: Sequence[Mapping[str, Any]] = ()
    cache: Mapping[str, str] | None = None
    """The claim that was looked at, by name and uid; None: not in this pass."""
    plan: Mapping[str, Any] | None = None
    plan_summary: str = ""
    plan_trouble: Trouble | None = None
    quantize: bool = False
    quality_trouble: Trouble | None = None
    """The copy is worse than the spec allows."""
    quality_summary: str = ""
    problems: Sequence[Problem] = ()
    revision: str = ""
    """The revision that was rolled out last."""
    current: bool = False
    """Whether that is the one that the spec asks for."""
    rollout: Rollout | None = None
    rollout_record: Mapping[str, str] = field(default_factory=dict)
    """`status.rollout`: the strategy, the last good revision, and the one that was given up."""
    rolled_back: Trouble | None = None
    """The revision that the spec asks for was given up, and the last good one serves."""
    tie: Tie | None = None
    """The volume, where it ties all replicas to one node, or to one pod."""
    scaling: Policy | None = None
    """Absent where the spec has none."""
    scaling_trouble: Trouble | None = None
    """The autoscaler's object that the spec asks for cannot be made."""
    scaling_report: Report = field(default_factory=Report)
    pods: Sequence[PodState] = field(default=())
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the start of the revision's first pod, as its server measured them."""

    @property
    def server_pods(self) -> list[PodState]:
        return [pod for pod in self.pods if pod.role == "server" and not pod.deleting]

    @property
    def servable(self) -> bool:
        return any(pod.ready for pod in self.server_pods)


def write_time(moment: datetime) -> str:
    """As metav1.Time is written: UTC, whole seconds."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def without_names(refusal: object) -> str:
    """What the API server says of pods that it refuses, without their names: each try has another, and a status should not follow them."""
    return re.sub(r'pods "[^"]*"', "pods", str(refusal))


def read_rollout(deployment: Object | None) -> Rollout | None:
    if deployment is None:
        return None
    spec, status = deployment.get("spec") or {}, deployment.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    failure = conditions.get("ReplicaFailure", {})
    return Rollout(
        seen=status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0),
        wanted=spec.get("replicas", 1),
        replicas=status.get("replicas", 0),
        updated=status.get("updatedReplicas", 0),
        ready=status.get("readyReplicas", 0),
        failure=without_names(failure.get("message", ""))[:600] if failure.get("status") == "True" else "",
        deadline_passed=conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded",
    )


def build_status(found: Findings, previous: Mapping[str, Any], now: datetime) -> Object:
    """The full status; `previous` is the one that stands, for transition times and the measured start."""
    conditions = merge_conditions(build_conditions(found), previous.get("conditions") or [], found.generation, now)
    values = {
        "observedGeneration": found.generation,
        "replicas": found.rollout.replicas if found.rollout else 0,
        "readyReplicas": sum(pod.ready for pod in found.server_pods),
        "selector": found.selector,
        "url": f"http://{found.name}.{found.namespace}.svc" if found.revision else None,
        "revision": found.revision or None,
        "model": dict(found.model) if found.model else None,
        "plan": dict(found.plan) if found.plan else None,
        "stages": [found.record.to_status()] if found.record else None,
        "artefacts": [dict(item) for item in found.artefacts] or None,
        "cache": dict(found.cache) if found.cache else previous.get("cache"),
        "rollout": dict(found.rollout_record) or None,
        "lastScale": (found.scaling_report.last_scale or previous.get("lastScale")) if found.scaling or found.spec_trouble else None,
        "startup": _startup(found, previous.get("startup")),
        "conditions": conditions,
    }
    return {key: value for key, value in values.items() if value is not None}


def merge_conditions(
    conditions: Iterable[Condition], previous: Iterable[Mapping[str, Any]], generation: int, now: datetime
) -> list[Object]:
    """metav1 conditions: all are of this `generation`; a transition is a change of status, not of reason or text."""
    before = {item["type"]: item for item in previous}
    merged = []
    for condition in unique(conditions).values():
        old = before.get(condition.type.value, {})
        same = old.get("status") == condition.status and old.get("lastTransitionTime")
        item = {
            "type": condition.type.value,
            "status": condition.status,
            "reason": condition.reason.value,
            "message": condition.message[:4096],
            "observedGeneration": generation,
            "lastTransitionTime": old["lastTransitionTime"] if same else write_time(now),
        }
        merged.append(item)
    return merged


def build_conditions(found: Findings) -> list[Condition]:
    """Those that apply, Ready first."""
    parts = [_plan_resolved(found), _model_ready(found), _quantization_ready(found)]
    scheduled = _scheduled(found)
    blocking = [part for part in parts if part is not None]
    ready = _ready(found, blocking, scheduled)
    rest = [_servable(found), *blocking, scheduled, _scaling_ready(found), _progressing(found, ready), _degraded(found)]
    return [ready, *(part for part in rest if part is not None)]


def _model_ready(found: Findings) -> Condition | None:
    if found.spec_trouble:
        return None
    if found.stage is not None and found.stage[0] in ("inspect", "fetch", "evict"):
        return _of_stage(ConditionType.MODEL_READY, found, *found.stage)
    if found.model is None:
        return Condition(ConditionType.MODEL_READY, "False", Reason.INSPECTING, _DOING["inspect"])
    fetched = any(item.get("kind") == "fetch" for item in found.artefacts)
    return Condition(ConditionType.MODEL_READY, "True", Reason.FETCHED if fetched else Reason.INSPECTED, _model_summary(found.model))


def _plan_resolved(found: Findings) -> Condition:
    kind = ConditionType.PLAN_RESOLVED
    if found.spec_trouble:
        return Condition(kind, "False", Reason.INVALID_SPEC, found.spec_trouble.text)
    if found.plan_trouble:
        return Condition(kind, "False", found.plan_trouble.reason, found.plan_trouble.text)
    if found.plan is None:
        return Condition(kind, "Unknown", Reason.WAITING_FOR_MODEL, "Planning waits for the model's facts.")
    return Condition(kind, "True", Reason.PLANNED, found.plan_summary)


def _quantization_ready(found: Findings) -> Condition | None:
    kind = ConditionType.QUANTIZATION_READY
    if not found.quantize or found.spec_trouble:
        return None
    if found.quality_trouble:
        return Condition(kind, "False", found.quality_trouble.reason, found.quality_trouble.text)
    if found.stage is None:
        return Condition(kind, "True", Reason.QUANTIZED, found.quality_summary)
    if found.stage[0] == "quantize":
        return _of_stage(kind, found, *found.stage)
    return Condition(kind, "False", Reason.WAITING_FOR_MODEL, "Quantization waits for the model.")


def _of_stage(kind: ConditionType, found: Findings, name: StageName, step: Step | None) -> Condition:
    if isinstance(step, Failed):
        text = step.trouble.text
        if step.retry_at is not None:
            text = f"{text} Trying again at {write_time(step.retry_at)}."
        return Condition(kind, "False", step.trouble.reason, text)
    if step is None and found.paused:
        return Condition(kind, "False", Reason.PAUSED, "Paused before this was done.")
    if step is None and found.suspended:
        return Condition(kind, "False", Reason.SUSPENDED, "Suspended before this was done.")
    if isinstance(step, Running) and step.trouble is not None:
        return Condition(kind, "False", step.trouble.reason, step.trouble.text)
    last = found.record.message if found.record is not None and isinstance(step, (Create, Running)) else ""
    return Condition(kind, "False", _UNDER_WAY[name], f"{_DOING[name]} {last}".strip())


def _scheduled(found: Findings) -> Condition | None:
    """Of every pod that should run, the stages' among them. Absent while there is none."""
    pods = [pod for pod in found.pods if not pod.deleting and pod.phase in ("Pending", "Running")]
    if not pods:
        return None
    unplaced = [pod for pod in pods if pod.trouble and pod.trouble.reason in UNPLACED]
    if not unplaced:
        homeless = sum(not pod.node for pod in pods)
        if homeless:
            text = f"{homeless} of {len(pods)} pods wait for the scheduler."
            return Condition(ConditionType.SCHEDULED, "False", Reason.STARTING, text)
        return Condition(ConditionType.SCHEDULED, "True", Reason.SCHEDULED, f"{_pods(len(pods))} placed{_together(found)}.")
    trouble = _placement_trouble(found, unplaced)
    text = f"{len(unplaced)} of {len(pods)} pods wait: {trouble.text}"
    return Condition(ConditionType.SCHEDULED, "False", trouble.reason, text)


def _placement_trouble(found: Findings, unplaced: Sequence[PodState]) -> Trouble:
    first = min(unplaced, key=lambda pod: pod.name)
    assert first.trouble is not None, "only pods with trouble are unplaced"
    placed = any(pod.node for pod in found.server_pods)
    if found.tie and placed and first.role == "server" and first.trouble.reason in _CROWDED[found.tie.sharing]:
        return Trouble(found.tie.reason, f"{found.tie.effect}: {first.trouble.message}", found.tie.cure)
    return first.trouble


def _together(found: Findings) -> str:
    """What somebody who wants several replicas should know while all of them run."""
    nodes = [pod.node for pod in found.server_pods]
    if found.tie is None or len(nodes) < 2 or len(set(nodes)) > 1:
        return ""
    return f", the server's all on the node that has claim {found.tie.claim}"


def _servable(found: Findings) -> Condition:
    kind = ConditionType.SERVABLE
    ready = sum(pod.ready for pod in found.server_pods)
    if ready:
        return Condition(kind, "True", Reason.AVAILABLE, f"{_pods(ready)} answering.")
    if found.suspended:
        return Condition(kind, "False", Reason.SUSPENDED, "Suspended.")
    if found.rollout is not None and found.rollout.wanted == 0:
        return _servable_at_zero(found)
    return Condition(kind, "False", Reason.NOT_AVAILABLE, "No pod answers yet.")


def _servable_at_zero(found: Findings) -> Condition:
    """Whoever holds a request may wake the service, and expect an answer, if its last start succeeded."""
    good, failed = found.rollout_record.get("good", ""), found.rollout_record.get("failed", "")
    wakes = found.scaling is not None and found.scaling.min == 0
    what = "Asleep at zero replicas: the next request starts one" if wakes else "Scaled to zero replicas"
    if good and (not failed or found.revision == good):
        return Condition(ConditionType.SERVABLE, "True", Reason.SCALED_TO_ZERO, f"{what}. The last start succeeded.")
    last = "the last start failed" if failed else "it never started"
    return Condition(ConditionType.SERVABLE, "False", Reason.SCALED_TO_ZERO, f"Scaled to zero replicas; {last}.")


def _scaling_ready(found: Findings) -> Condition | None:
    kind = ConditionType.SCALING_READY
    policy = found.scaling
    if policy is None or found.spec_trouble:
        return None
    trouble = found.scaling_trouble or found.scaling_report.trouble or _beyond_volume(found, policy)
    if trouble is not None:
        return Condition(kind, "False", trouble.reason, trouble.text)
    span = f"{policy.min} to {policy.max} replicas by {policy.metric}, target {policy.target or 'auto'}"
    return Condition(kind, "True", Reason.SCALING_ACTIVE, f"{policy.controller} keeps {span}.")


def _beyond_volume(found: Findings, policy: Policy) -> Trouble | None:
    if found.tie is None or found.tie.sharing is not Sharing.ONE_POD or policy.max <= 1:
        return None
    return Trouble(found.tie.reason, f"{found.tie.effect}, and scaling.max is {policy.max}.", found.tie.cure)


def _ready(found: Findings, blocking: Sequence[Condition], scheduled: Condition | None) -> Condition:
    kind = ConditionType.READY
    after = " The previous revision still serves." if found.servable and not found.current and not found.rolled_back else ""
    for reason, message in _obstacles(found, blocking, scheduled):
        return Condition(kind, "False", reason, f"{message}{after}".strip())
    assert found.rollout is not None, "without an obstacle there is a Deployment"
    return Condition(kind, "True", Reason.READY, f"{_pods(found.rollout.ready)} of the current revision ready.")


def _obstacles(found: Findings, blocking: Sequence[Condition], scheduled: Condition | None) -> Iterable[tuple[Reason, str]]:
    """What stands between the service and Ready, most fundamental first."""
    if found.spec_trouble:
        yield Reason.INVALID_SPEC, found.spec_trouble.text
    for problem in found.problems:
        yield problem.reason, problem.message
    if found.paused and not found.current:
        yield Reason.PAUSED, f"What the spec asks for waits. {_PAUSED}"
    if found.suspended:
        yield Reason.SUSPENDED, "Suspended: set spec.suspend to false to serve again."
    # The model comes before the plan: without the one there is no other.
    for condition in sorted(blocking, key=lambda part: part.type is not ConditionType.MODEL_READY):
        if condition.status != "True":
            yield condition.reason, condition.message
    if found.rolled_back:
        yield Reason.ROLLED_BACK, found.rolled_back.text
    trouble = _serving_trouble(found)
    if trouble is not None:
        yield trouble.reason, trouble.text
    if scheduled is not None and scheduled.status != "True" and any(not pod.node for pod in found.server_pods):
        yield scheduled.reason, scheduled.message
    rollout = found.rollout
    if not found.current or rollout is None or not rollout.seen:
        yield Reason.ROLLING_OUT, "The new revision is being rolled out."
    elif rollout.wanted == 0:
        yield Reason.SCALED_TO_ZERO, "Scaled to zero replicas."
    elif not rollout.complete:
        reason = Reason.ROLLING_OUT if rollout.replicas > rollout.updated else Reason.STARTING
        yield reason, f"{rollout.ready} of {rollout.wanted} replicas ready, {rollout.updated} of the current revision."
    elif not found.servable:  # the Deployment was read at another moment than its pods
        yield Reason.STARTING, "No pod answers yet, or any more."


def _serving_trouble(found: Findings) -> Trouble | None:
    """What is wrong with the server's pods, apart from waiting for a node."""
    rollout = found.rollout
    if rollout is not None and rollout.failure and rollout.wanted > rollout.replicas:
        return Trouble(Reason.FORBIDDEN, f"Pods cannot be created: {rollout.failure}")
    broken = [pod for pod in found.server_pods if pod.trouble and pod.trouble.reason not in UNPLACED and pod.phase != "Failed"]
    newest_first = sorted(broken, key=lambda pod: (pod.revision != found.revision, pod.name))
    if newest_first:
        return _with_node(newest_first[0])
    late = rollout is not None and rollout.deadline_passed and not rollout.complete
    if late and any(pod.phase == "Running" and not pod.ready for pod in found.server_pods):
        cure = "See the pod's log; a slower volume than planned for is the usual cause."
        return Trouble(Reason.PROBE_TIMEOUT, "A pod runs but has not become ready within the predicted time.", cure)
    return None


def _with_node(pod: PodState) -> Trouble | None:
    """Of a GPU that failed it is of interest where it is: the pod is somewhere else soon."""
    trouble = pod.trouble
    if trouble is None or trouble.reason is not Reason.CUDA_ERROR:
        return trouble
    cure = f"{trouble.cure} The pod is replaced; see the kernel's log of the node (Xid), and drain it if this repeats.".strip()
    return Trouble(trouble.reason, f"A GPU of node {pod.node} failed: {trouble.message}", cure)


def _progressing(found: Findings, ready: Condition) -> Condition:
    kind = ConditionType.PROGRESSING
    if found.paused:
        return Condition(kind, "False", Reason.PAUSED, _PAUSED)
    if ready.status == "True" or ready.reason is Reason.SCALED_TO_ZERO:
        return Condition(kind, "False", Reason.COMPLETE, "Nothing is left to do.")
    if found.suspended or found.spec_trouble or found.problems or found.plan_trouble or found.quality_trouble or found.rolled_back:
        return Condition(kind, "False", ready.reason, ready.message)
    if found.stage is not None and isinstance(found.stage[1], Failed):
        retries = found.stage[1].retry_at is not None
        return Condition(kind, "True" if retries else "False", Reason.RETRYING if retries else ready.reason, ready.message)
    if found.rollout is not None and found.rollout.deadline_passed and found.stage is None:
        return Condition(kind, "False", ready.reason, ready.message)
    return Condition(kind, "True", ready.reason, ready.message)


def _degraded(found: Findings) -> Condition | None:
    for trouble in _troubles(found):
        return Condition(ConditionType.DEGRADED, "True", trouble.reason, trouble.text)
    return None


def _troubles(found: Findings) -> Iterable[Trouble]:
    for problem in found.problems:
        yield Trouble(problem.reason, problem.message)
    if found.quality_trouble:
        yield found.quality_trouble
    if found.rolled_back:
        yield found.rolled_back
    step = found.stage[1] if found.stage is not None else None
    if isinstance(step, Failed):
        yield step.trouble
    if isinstance(step, Running) and step.trouble is not None and step.trouble.reason not in {*UNPLACED, *_UNDER_WAY.values()}:
        yield step.trouble
    serving = _serving_trouble(found)
    if serving is not None:
        yield serving


def _startup(found: Findings, previous: Mapping[str, Any] | None) -> Object | None:
    """Phases of the revision's first ready pod, measured once: a restart later is another matter than a start."""
    phases = {name: f"{seconds:.1f}s" for name, seconds in sorted(found.phases.items()) if name != "total"}
    if previous and previous.get("revision") == found.revision:
        return {**({"phases": phases} if phases else {}), **previous}
    pod = first_started(found.server_pods, found.revision)
    if pod is None or not (pod.scheduled and pod.started and pod.ready_at):
        return None
    seconds = {
        "scheduled": (pod.scheduled - pod.created).total_seconds(),
        "pulled": (pod.started - pod.scheduled).total_seconds(),
        "loaded": (pod.ready_at - pod.started).total_seconds(),
        "total": (pod.ready_at - pod.created).total_seconds(),
    }
    return {"revision": found.revision, **{name: f"{max(0.0, value):.0f}s" for name, value in seconds.items()}}


def first_started(pods: Iterable[PodState], revision: str) -> PodState | None:
    """The first pod of a revision that became ready, of those that started only once."""
    ready = (pod for pod in pods if pod.ready and not pod.restarts and not pod.deleting and pod.revision == revision)
    return min(ready, key=lambda pod: (pod.created, pod.name), default=None)


def _model_summary(model: Mapping[str, Any]) -> str:
    size = int(model.get("weightBytes", 0))
    text = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    why = model.get("fallbackReason")
    runs = f" transformers' own implementation runs it: {why}." if why else ""
    return f"{model.get('architecture', 'A model')} with {text} of weights.{runs}"


def _pods(count: int) -> str:
    return f"{count} pod" if count == 1 else f"{count} pods"
