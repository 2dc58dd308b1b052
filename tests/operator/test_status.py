"""From findings to conditions: what a person reads first is what they should look at first."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gantline_operator.apply import Problem
from gantline_operator.autoscaling.policy import Policy
from gantline_operator.autoscaling.targets import Report
from gantline_operator.claim_sharing import Sharing, Tie
from gantline_operator.conditions import Reason
from gantline_operator.events import transitions
from gantline_operator.pod_state import PodState, Trouble, read_pod
from gantline_operator.stages import Create, Failed, Record, Running
from gantline_operator.status import Findings, Rollout, build_conditions, build_status, read_rollout

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
MODEL = {"source": "s", "architecture": "LlamaForCausalLM", "weightBytes": 2_000_000_000}
PLAN = {"backend": "cuda", "tensorParallel": 1}


def pod(
    name: str = "p", *, ready: bool = True, node: str = "n", role: str = "server", trouble: Trouble | None = None, **more: Any
) -> PodState:
    times = {"scheduled": NOW + timedelta(seconds=1), "started": NOW + timedelta(seconds=11), "ready_at": NOW + timedelta(seconds=41)}
    values = {
        "name": name, "uid": name, "role": role, "job": "", "revision": "r1", "node": node, "phase": "Running" if node else "Pending",
        "deleting": False, "ready": ready, "restarts": 0, "created": NOW, **times, "trouble": trouble, "answer": None, **more,
    }  # fmt: skip
    return PodState(**values)


SERVING = Findings(
    namespace="default",
    name="chat",
    generation=3,
    selector="a=b",
    model=MODEL,
    plan=PLAN,
    plan_summary="bfloat16 on 1 x H100.",
    revision="r1",
    current=True,
    rollout=Rollout(seen=True, wanted=1, replicas=1, updated=1, ready=1),
    pods=[pod()],
)
STARTING = replace(SERVING, rollout=Rollout(True, 1, 1, 1, 0), pods=[pod(ready=False)])


def conditions(found: Findings) -> dict[str, Any]:
    return {item["type"]: item for item in build_status(found, {}, NOW)["conditions"]}


def brief(found: Findings) -> dict[str, tuple[str, str]]:
    return {kind: (item["status"], item["reason"]) for kind, item in conditions(found).items()}


ASLEEP = replace(
    SERVING, rollout=Rollout(True, 0, 0, 0, 0), pods=[], scaling=Policy(min=0, max=2), rollout_record={"good": "r1"}
)  # fmt: skip


def test_a_service_that_can_be_woken_is_servable_at_zero_and_says_what_wakes_it() -> None:
    assert brief(ASLEEP)["Servable"] == ("True", "ScaledToZero") and brief(ASLEEP)["Ready"] == ("False", "ScaledToZero")
    assert brief(ASLEEP)["ScalingReady"] == ("True", "ScalingActive")
    assert "the next request starts one" in conditions(ASLEEP)["Servable"]["message"]
    assert "the next request" not in conditions(replace(ASLEEP, scaling=Policy(min=1, max=2)))["Servable"]["message"]


def test_what_stands_in_the_way_of_scaling_stands_in_its_condition_alone() -> None:
    trouble = Trouble(Reason.METRICS_UNKNOWN, "Some load is not known.")
    found = brief(replace(SERVING, scaling=Policy(max=2), scaling_report=Report(trouble=trouble)))
    assert found["ScalingReady"] == ("False", "MetricsUnknown") and found["Ready"] == ("True", "Ready") and "Degraded" not in found


def test_the_last_scaling_stays_in_the_status_for_as_long_as_the_spec_has_scaling() -> None:
    last = {"at": "2026-11-21T10:00:00Z", "from": 1, "to": 0, "reason": "Idle", "inputs": "load 0.00"}
    before = {"lastScale": last}
    assert build_status(ASLEEP, before, NOW)["lastScale"] == last
    assert "lastScale" not in build_status(SERVING, before, NOW)
    told = [(event.reason, event.note) for event in transitions({}, {"lastScale": last})]
    assert told == [("ScaledToZero", "From 1 to 0 replicas, Idle: load 0.00.")]
    assert transitions(before, before) == []


def test_a_service_that_serves_is_ready_and_has_no_inapplicable_condition() -> None:
    assert brief(SERVING) == {
        "Ready": ("True", "Ready"),
        "Servable": ("True", "Available"),
        "PlanResolved": ("True", "Planned"),
        "ModelReady": ("True", "Inspected"),
        "Scheduled": ("True", "Scheduled"),
        "Progressing": ("False", "Complete"),
    }


def failed(reason: Reason, retry: bool = False) -> Failed:
    return Failed("j", 0, Trouble(reason, "Cause.", "Cure."), NOW, NOW if retry else None)


WAITS = Trouble(Reason.WAITING_FOR_CAPACITY, "0/3 nodes are available.")
NEW = replace(SERVING, pods=[], rollout=None, revision="", current=False, model=None, plan=None)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            replace(NEW, stage=("inspect", Create(0))),
            {"Ready": "Inspecting", "ModelReady": "Inspecting", "PlanResolved": "WaitingForModel"},
        ),
        (
            replace(NEW, stage=("inspect", failed(Reason.NOT_A_MODEL))),
            {"Ready": "NotAModel", "ModelReady": "NotAModel", "Degraded": "NotAModel"},
        ),
        (replace(NEW, stage=("inspect", failed(Reason.DOWNLOAD_STALLED, True))), {"Ready": "DownloadStalled", "Progressing": "Retrying"}),
        (
            replace(NEW, stage=("fetch", Running("j", 0, WAITS)), model=MODEL, plan=PLAN, pods=[pod(role="fetch", node="", trouble=WAITS)]),
            {"Ready": "WaitingForCapacity", "ModelReady": "WaitingForCapacity", "Scheduled": "WaitingForCapacity"},
        ),
        (
            replace(NEW, stage=("quantize", Running("j", 0)), model=MODEL, plan=PLAN, quantize=True),
            {"Ready": "Quantizing", "QuantizationReady": "Quantizing"},
        ),
        (replace(NEW, stage=("fetch", Running("j", 0)), model=MODEL, plan=PLAN, quantize=True), {"QuantizationReady": "WaitingForModel"}),
        (
            replace(SERVING, current=False, quantize=True, quality_trouble=Trouble(Reason.QUALITY_GATE_FAILED, "Worse.")),
            {
                "Ready": "QualityGateFailed",
                "QuantizationReady": "QualityGateFailed",
                "Degraded": "QualityGateFailed",
                "Servable": "Available",
            },
        ),
        (
            replace(NEW, model=MODEL, plan_trouble=Trouble(Reason.NO_MATCHING_GPU, "None.")),
            {"Ready": "NoMatchingGPU", "PlanResolved": "NoMatchingGPU"},
        ),
        (
            replace(SERVING, spec_trouble=Trouble(Reason.INVALID_SPEC, "spec.x")),
            {"Ready": "InvalidSpec", "PlanResolved": "InvalidSpec", "Servable": "Available"},
        ),
        (
            replace(SERVING, problems=[Problem(Reason.NAME_CONFLICT, "Service chat exists.")]),
            {"Ready": "NameConflict", "Degraded": "NameConflict"},
        ),
        (
            replace(SERVING, suspended=True, rollout=Rollout(True, 0, 0, 0, 0), pods=[]),
            {"Ready": "Suspended", "Servable": "Suspended", "Progressing": "Suspended"},
        ),
        (replace(SERVING, paused=True), {"Ready": "Ready", "Servable": "Available", "Progressing": "Paused"}),
        (replace(SERVING, paused=True, current=False), {"Ready": "Paused", "Servable": "Available", "Progressing": "Paused"}),
        (replace(NEW, paused=True, stage=("inspect", None)), {"Ready": "Paused", "ModelReady": "Paused", "Progressing": "Paused"}),
        (
            replace(SERVING, rollout=Rollout(True, 0, 0, 0, 0), pods=[]),
            {"Ready": "ScaledToZero", "Servable": "ScaledToZero", "Progressing": "Complete"},
        ),
        (STARTING, {"Ready": "Starting", "Servable": "NotAvailable", "Progressing": "Starting"}),
        (replace(SERVING, rollout=Rollout(True, 2, 3, 1, 3)), {"Ready": "RollingOut", "Servable": "Available"}),
        (replace(SERVING, rollout=Rollout(False, 1, 1, 1, 1)), {"Ready": "RollingOut"}),
        (replace(SERVING, pods=[pod(ready=False)]), {"Ready": "Starting", "Servable": "NotAvailable"}),
        (
            replace(STARTING, pods=[pod(ready=False, node="", trouble=WAITS)]),
            {"Ready": "WaitingForCapacity", "Scheduled": "WaitingForCapacity"},
        ),
        (
            replace(STARTING, pods=[pod(ready=False, trouble=Trouble(Reason.CUDA_OUT_OF_MEMORY, "OOM."))]),
            {"Ready": "CudaOutOfMemory", "Degraded": "CudaOutOfMemory", "Scheduled": "Scheduled"},
        ),
        (
            replace(STARTING, rollout=Rollout(True, 1, 1, 1, 0, deadline_passed=True)),
            {"Ready": "ProbeTimeout", "Degraded": "ProbeTimeout", "Progressing": "ProbeTimeout"},
        ),
        (
            replace(STARTING, rollout=Rollout(True, 1, 0, 0, 0, failure='exceeded quota: "q"'), pods=[]),
            {"Ready": "Forbidden", "Degraded": "Forbidden"},
        ),
        (
            replace(
                STARTING,
                tie=Tie("chat-cache", Sharing.ONE_NODE, is_cache=True),
                rollout=Rollout(True, 2, 2, 2, 1),
                pods=[pod("a"), pod("b", ready=False, node="", trouble=WAITS)],
            ),
            {"Ready": "CacheNotShareable", "Scheduled": "CacheNotShareable", "Servable": "Available"},
        ),
        (
            replace(
                STARTING,
                tie=Tie("models", Sharing.ONE_POD),
                rollout=Rollout(True, 2, 2, 2, 1),
                pods=[pod("a"), pod("b", ready=False, node="", trouble=Trouble(Reason.WAITING_FOR_VOLUME, "Another has it."))],
            ),
            {"Ready": "SourceNotShareable", "Scheduled": "SourceNotShareable", "Servable": "Available"},
        ),
    ],
)
def test_each_finding_has_its_reason(found: Findings, expected: dict[str, str]) -> None:
    reasons = {kind: reason for kind, (_, reason) in brief(found).items()}
    assert {kind: reasons.get(kind) for kind in expected} == expected


@pytest.mark.parametrize(
    ("record", "revision", "expected"),
    [
        ({}, "r1", ("False", "it never started")),
        ({"good": "r1"}, "r1", ("True", "The last start succeeded")),
        ({"good": "r0"}, "r1", ("True", "The last start succeeded")),
        ({"good": "r0", "failed": "r1"}, "r1", ("False", "the last start failed")),
        ({"good": "r0", "failed": "r1"}, "r0", ("True", "The last start succeeded")),
    ],
)
def test_at_zero_a_service_is_servable_if_its_last_start_succeeded(
    record: dict[str, str], revision: str, expected: tuple[str, str]
) -> None:
    found = replace(SERVING, rollout=Rollout(True, 0, 0, 0, 0), pods=[], rollout_record=record, revision=revision)
    [condition] = [item for item in build_conditions(found) if item.type.value == "Servable"]
    assert condition.status == expected[0] and expected[1] in condition.message


def test_a_failed_update_says_that_the_old_revision_still_serves() -> None:
    found = replace(SERVING, current=False, stage=("quantize", failed(Reason.QUANTIZATION_FAILED)), quantize=True)
    assert conditions(found)["Ready"]["message"].endswith("The previous revision still serves.")


def test_transition_times_move_only_with_the_status_and_generations_always() -> None:
    first = build_status(STARTING, {}, NOW)
    later = build_status(replace(STARTING, generation=4), first, NOW + timedelta(hours=1))
    assert [c["lastTransitionTime"] for c in later["conditions"]] == [c["lastTransitionTime"] for c in first["conditions"]]
    assert {c["observedGeneration"] for c in later["conditions"]} == {4} == {later["observedGeneration"]}
    ready = build_status(SERVING, later, NOW + timedelta(hours=2))
    times = {c["type"]: c["lastTransitionTime"] for c in ready["conditions"]}
    assert times["Ready"] == "2026-01-01T14:00:00Z"
    assert times["PlanResolved"] == "2026-01-01T12:00:00Z"


def test_the_same_findings_give_the_same_status() -> None:
    first = build_status(SERVING, {}, NOW)
    assert build_status(SERVING, first, NOW + timedelta(days=1)) == first


def test_the_start_is_measured_once_a_revision() -> None:
    first = build_status(SERVING, {}, NOW)
    assert first["startup"] == {"revision": "r1", "scheduled": "1s", "pulled": "10s", "loaded": "30s", "total": "41s"}
    restarted = replace(SERVING, pods=[pod(ready_at=NOW + timedelta(hours=3))])
    assert build_status(restarted, first, NOW)["startup"] == first["startup"]


def test_the_scale_subresource_finds_its_numbers() -> None:
    status = build_status(SERVING, {}, NOW)
    assert (status["replicas"], status["readyReplicas"], status["selector"]) == (1, 1, "a=b")
    assert status["url"] == "http://chat.default.svc"


def test_the_last_failure_explains_a_second_attempt() -> None:
    record = Record("fetch", "h", 1, "Running", "j-1", "DownloadStalled", "The hub went silent.")
    found = replace(NEW, model=MODEL, plan=PLAN, stage=("fetch", Running("j-1", 1)), record=record)
    assert "The hub went silent." in conditions(found)["ModelReady"]["message"]


def test_a_deployments_counts_are_not_trusted_before_its_controller_has_seen_it() -> None:
    deployment = {"metadata": {"generation": 2}, "spec": {"replicas": 1}, "status": {"observedGeneration": 1, "readyReplicas": 1}}
    rollout = read_rollout(deployment)
    assert rollout is not None
    assert not rollout.seen
    assert not rollout.complete


CONTAINER = {"name": "server", "image": "i:1"}


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ({"containerStatuses": [{**CONTAINER, "state": {"waiting": {"reason": "ImagePullBackOff"}}}]}, Reason.IMAGE_PULL_FAILED),
        ({"containerStatuses": [{**CONTAINER, "state": {"waiting": {"reason": "CreateContainerConfigError"}}}]}, Reason.POD_CONFIGURATION),
        (
            {
                "containerStatuses": [
                    {**CONTAINER, "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": {"exitCode": 1}}}
                ]
            },
            Reason.ENGINE_CRASH_LOOP,
        ),
        (
            {
                "containerStatuses": [
                    {
                        **CONTAINER,
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}},
                    }
                ]
            },
            Reason.OUT_OF_MEMORY,
        ),
        (
            {
                "containerStatuses": [
                    {
                        **CONTAINER,
                        "state": {"running": {}},
                        "lastState": {"terminated": {"exitCode": 70, "message": '{"reason":"CudaError","message":"xid 79"}'}},
                    }
                ]
            },
            Reason.CUDA_ERROR,
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": 'persistentvolumeclaim "x" not found'}]},
            Reason.WAITING_FOR_VOLUME,
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: pod using ReadWriteOncePod access mode."}]},
            Reason.WAITING_FOR_VOLUME,
        ),
    ],
)
def test_a_pods_status_is_told_in_our_words(status: dict[str, Any], reason: Reason) -> None:
    body = {"metadata": {"name": "p", "uid": "u", "creationTimestamp": "2026-01-01T12:00:00Z"}, "status": {"phase": "Pending", **status}}
    trouble = read_pod(body).trouble
    assert trouble is not None
    assert trouble.reason is reason


def test_a_ready_pod_has_no_trouble_whatever_it_went_through() -> None:
    container = {**CONTAINER, "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1}}, "restartCount": 1}
    conditions_ = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T12:00:00Z"}]
    body = {
        "metadata": {"name": "p", "uid": "u", "creationTimestamp": "2026-01-01T12:00:00Z"},
        "status": {"phase": "Running", "containerStatuses": [container], "conditions": conditions_},
    }
    assert read_pod(body).trouble is None


@pytest.mark.parametrize(
    ("cause", "cure", "text"),
    [
        ("torch sees no GPU", "Give --device cpu.", "torch sees no GPU. Give --device cpu."),
        ("The claim is missing.", "Create it.", "The claim is missing. Create it."),
        ("0/1 nodes are available", "", "0/1 nodes are available"),
    ],
)
def test_cause_and_cure_are_two_sentences_whoever_wrote_them(cause: str, cure: str, text: str) -> None:
    assert Trouble(Reason.CONTAINER_FAILED, cause, cure).text == text
