"""What is done about a stage's Job: created once, its answer taken over, failures retried only where that can help."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gantline_operator.conditions import Reason
from gantline_operator.pod_state import read_pod
from gantline_operator.stages import Create, Failed, JobState, Record, Running, Succeeded, decide, read_job, retry_delay_s
from gantline_runtime import termination
from gantline_runtime.termination import TerminationMessage

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
HASH = "0123456789"


def stamp(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def job(attempt: int = 0, state: str = "Active", finished: float = -1) -> JobState:
    name = f"chat-quantize-{HASH}" + (f"-{attempt}" if attempt else "")
    return JobState(name, attempt, NOW - timedelta(minutes=5), state, None if state == "Active" else NOW + timedelta(seconds=finished), "")  # type: ignore[arg-type]


def pod(job_name: str, *, phase: str = "Running", terminated: dict[str, Any] | None = None, **status: Any) -> Any:
    container = {"name": "quantize", "state": {"terminated": terminated} if terminated else {"running": {"startedAt": stamp(-60)}}}
    body = {
        "metadata": {
            "name": f"{job_name}-x",
            "uid": job_name,
            "creationTimestamp": stamp(-100),
            "labels": {"batch.kubernetes.io/job-name": job_name, "gantline.io/role": "quantize"},
        },
        "spec": {"nodeName": "n"},
        "status": {"phase": phase, "containerStatuses": [container], **status},
    }
    return read_pod(body)


def ended(reason: termination.Reason, message: str = "cause", code: int = 1) -> dict[str, Any]:
    text = termination.encode(TerminationMessage(reason, message, "cure."))
    return {"exitCode": code, "reason": "Error" if code else "Completed", "message": text}


def step(record: Record | None, jobs: list[JobState], pods: list[Any], now: datetime = NOW, restarted_at: str = "") -> Any:
    return decide("quantize", HASH, record, jobs, pods, now=now, restarted_at=restarted_at)


def test_without_job_and_record_the_first_attempt_is_made() -> None:
    assert step(None, [], []) == Create(0)


def test_a_record_of_another_hash_counts_for_nothing() -> None:
    assert step(Record("quantize", "other", 4, "Failed", reason="InvalidCheckpoint"), [], []) == Create(0)


def test_a_job_that_somebody_deleted_is_made_again_under_the_same_attempt() -> None:
    assert step(Record("quantize", HASH, 3, "Running"), [], []) == Create(3)


def test_a_running_job_is_left_alone() -> None:
    assert isinstance(step(None, [job()], [pod(job().name)]), Running)


def test_a_waiting_pod_says_what_it_waits_for() -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
    found = step(None, [job()], [pod(job().name, phase="Pending", conditions=[condition])])
    assert found.trouble.reason is Reason.WAITING_FOR_CAPACITY


def test_the_answer_of_a_pod_that_succeeded_is_taken_over_whether_or_not_its_job_has_counted_it() -> None:
    done = pod(job().name, phase="Succeeded", terminated=ended(termination.Reason.COMPLETED, code=0))
    assert isinstance(step(None, [job(state="Complete")], [done]), Succeeded)
    assert isinstance(step(None, [job()], [done]), Succeeded)


def test_a_pod_that_still_holds_its_devices_is_waited_for() -> None:
    ending = pod(job().name, phase="Running", terminated=ended(termination.Reason.COMPLETED, code=0))
    assert isinstance(step(None, [job()], [ending]), Running)


def test_a_completed_job_whose_answer_is_gone_is_done_again() -> None:
    found = step(None, [job(state="Complete")], [])
    assert isinstance(found, Failed)
    assert found.retry_at == NOW + timedelta(seconds=9)
    assert step(None, [job(state="Complete")], [], NOW + timedelta(seconds=10)) == Create(1)


@pytest.mark.parametrize(
    "reason",
    [
        Reason.NOT_A_MODEL,
        Reason.INVALID_CHECKPOINT,
        Reason.UNSAFE_WEIGHTS,
        Reason.UNSUPPORTED_ARCHITECTURE,
        Reason.QUALITY_GATE_FAILED,
        Reason.INVALID_CONFIGURATION,
    ],
)
def test_what_cannot_pass_is_not_tried_again(reason: Reason) -> None:
    found = step(None, [job(state="Failed")], [pod(job().name, phase="Failed", terminated=ended(termination.Reason(reason.value)))])
    assert found.trouble.reason is reason
    assert found.retry_at is None
    assert isinstance(step(None, [job(state="Failed")], [], NOW), Failed)


@pytest.mark.parametrize(
    ("terminated", "status", "reason"),
    [
        (ended(termination.Reason.DOWNLOAD_RATE_LIMITED), {}, Reason.DOWNLOAD_RATE_LIMITED),
        (ended(termination.Reason.DOWNLOAD_STALLED), {}, Reason.DOWNLOAD_STALLED),
        ({"exitCode": 137, "reason": "OOMKilled"}, {}, Reason.OUT_OF_MEMORY),
        ({"exitCode": 137, "reason": "Error"}, {}, Reason.POD_KILLED),
        (ended(termination.Reason.DISK_FULL), {}, Reason.DISK_FULL),
        (None, {"reason": "Evicted", "message": "The node was low on resource: ephemeral-storage."}, Reason.POD_EVICTED),
        (None, {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}]}, Reason.NODE_LOST),
        ({"exitCode": 3, "reason": "Error", "message": "Traceback ..."}, {}, Reason.CONTAINER_FAILED),
    ],
)
def test_what_may_pass_is_tried_again_under_a_new_name(terminated: Any, status: dict[str, Any], reason: Reason) -> None:
    pods = [pod(job().name, phase="Failed", terminated=terminated, **status)]
    found = step(None, [job(state="Failed", finished=0)], pods)
    assert found.trouble.reason is reason
    assert step(None, [job(state="Failed", finished=0)], pods, found.retry_at) == Create(1)


def test_attempts_back_off_and_stop_at_a_cap() -> None:
    delays = [retry_delay_s(Reason.DOWNLOAD_STALLED, attempt) for attempt in (0, 1, 2, 50)]
    assert delays == [10, 20, 40, 600]
    assert retry_delay_s(Reason.DOWNLOAD_STALLED, 99) is None
    assert retry_delay_s(Reason.INVALID_CHECKPOINT, 0) is None


def test_a_permanent_failure_outlives_its_job_and_ends_with_a_new_restarted_at() -> None:
    record = Record("quantize", HASH, 2, "Failed", "j", "QualityGateFailed", "worse", stamp(-9999), "monday")
    assert step(record, [], [], restarted_at="monday").retry_at is None
    assert step(record, [], [], restarted_at="tuesday") == Create(3)


def test_a_passing_failure_outlives_its_job_and_is_retried_when_due() -> None:
    record = Record("quantize", HASH, 0, "Failed", "j", "DownloadStalled", "slow", stamp(-5))
    assert isinstance(step(record, [], []), Failed)
    assert step(record, [], [], NOW + timedelta(seconds=5)) == Create(1)


def test_the_latest_attempt_counts() -> None:
    assert step(None, [job(0, "Failed"), job(1)], []) == Running(job(1).name, 1)


def test_an_attempt_that_is_recorded_but_not_made_yet_is_made() -> None:
    record = Record("quantize", HASH, 1, "Running")
    assert step(record, [job(0, "Failed")], []) == Create(1)


def test_a_record_survives_the_status() -> None:
    record = Record("fetch", HASH, 2, "Failed", "j", "DiskFull", "full", stamp(0), "monday", "45 %")
    assert Record.from_status([record.to_status()]) == record
    assert Record.from_status([]) is None
    assert Record.from_status([{"name": "bake", "hash": "x"}]) is None


@pytest.mark.parametrize(("suffix", "attempt"), [("", 0), ("-1", 1), ("-42", 42)])
def test_a_jobs_attempt_is_read_from_its_name(suffix: str, attempt: int) -> None:
    metadata = {"name": f"chat-7-inspect-{HASH}{suffix}", "creationTimestamp": stamp(0), "labels": {"gantline.io/revision": HASH}}
    assert read_job({"metadata": metadata}).attempt == attempt
