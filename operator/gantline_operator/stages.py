"""What to do next about one stage's Job: inspect, fetch or quantize, or evict, which makes room for the latter.

A stage is done when `status` says so (and the artefact's manifest, which the Job itself checks); the Job is only how it gets done, and
expires. `decide` is pure: from the record in `status.stages`, the Jobs that are there and their pods, to one `Step`.

    no Job, no record ------> Create attempt 0 ------> Running ------> Succeeded: the answer goes into status
                                    ^                     |
                                    |                     +----------> Failed --+-- may pass: Create attempt n+1 when due
                                    +------------------------------------------+    cannot: stays, until the inputs change or
                                                                                    gantline.io/restartedAt is set anew

Attempts have names of their own, so a failed Job keeps its log and two operators that start one at a time make one Job, not two.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

from gantline_runtime import termination
from gantline_runtime.termination import TerminationMessage

from gantline_operator.conditions import Reason
from gantline_operator.pod_state import PodState, Trouble, parse_time

__all__ = [
    "MAX_ATTEMPTS",
    "Create",
    "Failed",
    "JobState",
    "Record",
    "Running",
    "StageName",
    "Step",
    "Succeeded",
    "decide",
    "read_job",
    "retry_delay_s",
]

StageName = Literal["inspect", "fetch", "quantize", "evict"]
Object = dict[str, Any]

MAX_ATTEMPTS = 99

_SOON_S, _SOON_CAP_S = 10.0, 600.0
_LATER_S, _LATER_CAP_S = 60.0, 1800.0

_PASSES: Mapping[Reason, tuple[float, float]] = {
    **dict.fromkeys(
        (
            Reason.DOWNLOAD_RATE_LIMITED,
            Reason.DOWNLOAD_STALLED,
            Reason.OUT_OF_MEMORY,
            Reason.CUDA_OUT_OF_MEMORY,
            Reason.CUDA_ERROR,
            Reason.POD_EVICTED,
            Reason.POD_KILLED,
            Reason.NODE_LOST,
            Reason.CONTAINER_FAILED,
            Reason.INTERNAL_ERROR,
        ),
        (_SOON_S, _SOON_CAP_S),
    ),
    # Somebody has to do something, but not to the spec: copy the model, grant access, make room.
    **dict.fromkeys((Reason.DISK_FULL, Reason.MODEL_NOT_FOUND, Reason.DOWNLOAD_UNAUTHORIZED), (_LATER_S, _LATER_CAP_S)),
}


@dataclass(frozen=True)
class Record:
    """The item of `status.stages`: the stage that is not done yet, of which there is one at most."""

    name: StageName
    hash: str
    attempt: int = 0
    state: Literal["Running", "Failed"] = "Running"
    job: str = ""
    reason: str = ""
    message: str = ""
    finished_at: str = ""
    restarted_at: str = ""
    """The restartedAt annotation that this failure has seen."""
    progress: str = ""

    def to_status(self) -> Object:
        values = {
            "name": self.name, "hash": self.hash, "attempt": self.attempt, "state": self.state, "job": self.job, "reason": self.reason,
            "message": self.message[:1024], "finishedAt": self.finished_at, "restartedAt": self.restarted_at, "progress": self.progress,
        }  # fmt: skip
        return {key: value for key, value in values.items() if value != ""}

    @staticmethod
    def from_status(stages: Sequence[Mapping[str, Any]] | None) -> Record | None:
        """None where there is none, or one that another release wrote in a way that is not understood."""
        values = stages[0] if stages else {}
        if not values or values.get("name") not in get_args(StageName) or not values.get("hash"):
            return None
        return Record(
            name=values["name"],
            hash=values["hash"],
            attempt=int(values.get("attempt", 0)),
            state="Failed" if values.get("state") == "Failed" else "Running",
            job=values.get("job", ""),
            reason=values.get("reason", ""),
            message=values.get("message", ""),
            finished_at=values.get("finishedAt", ""),
            restarted_at=values.get("restartedAt", ""),
            progress=values.get("progress", ""),
        )


@dataclass(frozen=True)
class JobState:
    """A Job of the stage, as far as `decide` looks."""

    name: str
    attempt: int
    created: datetime
    state: Literal["Active", "Complete", "Failed"]
    finished: datetime | None
    message: str


@dataclass(frozen=True)
class Create:
    """Make the Job of `attempt`."""

    attempt: int


@dataclass(frozen=True)
class Running:
    """The Job is there and not finished; `trouble` is what its pod waits for, if anything."""

    job: str
    attempt: int
    trouble: Trouble | None = None
    pod: str = ""
    """The pod that runs, whose log has the progress."""


@dataclass(frozen=True)
class Succeeded:
    job: str
    answer: TerminationMessage


@dataclass(frozen=True)
class Failed:
    """`retry_at` is None where trying again cannot help."""

    job: str
    attempt: int
    trouble: Trouble
    finished: datetime
    retry_at: datetime | None


Step = Create | Running | Succeeded | Failed


def retry_delay_s(reason: Reason, attempt: int) -> float | None:
    """Seconds from the end of failed attempt `attempt` (0, 1, ...) to the next, None where it cannot help."""
    if reason not in _PASSES or attempt >= MAX_ATTEMPTS:
        return None
    base, cap = _PASSES[reason]
    return min(cap, base * 2 ** min(attempt, 16))


def read_job(job: Object) -> JobState:
    """A Job's name ends in the hash of what it does, which is also its label, and in `-<attempt>` from the second attempt on."""
    metadata, status = job["metadata"], job.get("status") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or [] if item.get("status") == "True"}
    ended = conditions.get("Complete") or conditions.get("Failed") or {}
    created = parse_time(metadata.get("creationTimestamp"))
    assert created is not None, "the API server gives every object a creation time"
    return JobState(
        name=metadata["name"],
        attempt=_attempt(metadata["name"], (metadata.get("labels") or {}).get("gantline.io/revision", "")),
        created=created,
        state="Complete" if "Complete" in conditions else "Failed" if "Failed" in conditions else "Active",
        finished=parse_time(ended.get("lastTransitionTime")),
        message=str(ended.get("message", ""))[:300],
    )


def decide(
    name: StageName,
    digest: str,
    record: Record | None,
    jobs: Iterable[JobState],
    pods: Sequence[PodState],
    *,
    now: datetime,
    restarted_at: str = "",
) -> Step:
    """The next step of stage `name` with inputs `digest`. `jobs` are those of this stage and digest, `pods` may be any of the service."""
    mine = record if record is not None and (record.name, record.hash) == (name, digest) else None
    latest = max(jobs, key=lambda job: job.attempt, default=None)
    if latest is not None and (mine is None or latest.attempt >= mine.attempt):
        step = _of_job(latest, [pod for pod in pods if pod.job == latest.name])
    elif mine is None:
        return Create(0)
    elif mine.state == "Running":
        return Create(mine.attempt)  # the record was written, its Job was not, or somebody deleted it
    else:
        step = _of_record(mine)
    if not isinstance(step, Failed):
        return step
    seen = mine.restarted_at if mine is not None and mine.attempt == step.attempt and mine.state == "Failed" else restarted_at
    again = step.attempt < MAX_ATTEMPTS and (seen != restarted_at or (step.retry_at is not None and step.retry_at <= now))
    return Create(step.attempt + 1) if again else step


def _of_record(record: Record) -> Failed:
    """A failure whose Job has expired."""
    reason = Reason(record.reason) if record.reason in set(Reason) else Reason.INTERNAL_ERROR
    finished = parse_time(record.finished_at) or datetime.min.replace(tzinfo=UTC)
    return _failed(record.job, record.attempt, Trouble(reason, record.message), finished)


def _of_job(job: JobState, pods: Sequence[PodState]) -> Step:
    newest = max(pods, key=lambda pod: (pod.created, pod.name), default=None)
    answered = (pod.answer for pod in pods if pod.phase == "Succeeded" and pod.answer)
    answer = next((answer for answer in answered if answer.reason is termination.Reason.COMPLETED), None)
    if answer is not None and job.state != "Failed":
        return Succeeded(job.name, answer)  # also before its controller has counted the pod, which takes it a second or two
    if job.state == "Active":
        running = newest if newest is not None and newest.phase in ("Pending", "Running") else None
        return Running(job.name, job.attempt, running.trouble if running else None, running.name if running else "")
    finished = job.finished or job.created
    if job.state == "Complete":
        lost = Trouble(Reason.INTERNAL_ERROR, f"Job {job.name} completed, but its answer is gone with its pod.")
        return _failed(job.name, job.attempt, lost, finished)
    trouble = next((pod.trouble for pod in sorted(pods, key=lambda pod: pod.created, reverse=True) if pod.trouble), None)
    return _failed(job.name, job.attempt, trouble or _without_pod(job), finished)


def _without_pod(job: JobState) -> Trouble:
    return Trouble(Reason.POD_KILLED, f"Job {job.name} failed and its pod is gone. {job.message}".strip())


def _failed(job: str, attempt: int, trouble: Trouble, finished: datetime) -> Failed:
    delay_s = retry_delay_s(trouble.reason, attempt)
    return Failed(job, attempt, trouble, finished, None if delay_s is None else finished + timedelta(seconds=delay_s))


def _attempt(name: str, digest: str) -> int:
    tail = name.rpartition(f"-{digest}")[2].removeprefix("-") if digest else ""
    return int(tail) if tail.isdigit() else 0
