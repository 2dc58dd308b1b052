"""When a revision is given up, and which one serves instead. Pure.

    a revision is wholly ready          -> it is the last good one
    it fails, another was good before   -> that one serves again, as its ControllerRevision has it; `status.rollout.failed` remembers
    the spec asks for another revision  -> that one is tried; the failed one is not tried again before

A revision fails if none of its pods ever answered and one of them keeps ending, cannot start at all, or the time predicted for its start is
over. Waiting for a node is no failure: nothing is wrong with the revision, and the one before might not find a node either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gantline_operator.conditions import Reason
from gantline_operator.pod_state import PodState, Trouble
from gantline_operator.status import UNPLACED, Rollout

__all__ = ["RolloutRecord", "advance", "failure"]

_RESTARTS = 3
"""Of a container that ends for a reason that may pass; with Kubernetes' back-off that is about a minute."""
_FINAL = {
    Reason.INVALID_CONFIGURATION, Reason.INVALID_CHECKPOINT, Reason.INVALID_QUANTIZATION, Reason.MODEL_NOT_FOUND, Reason.NOT_A_MODEL,
    Reason.UNSUPPORTED_ARCHITECTURE, Reason.UNSAFE_WEIGHTS, Reason.POD_CONFIGURATION, Reason.SMOKE_REQUEST_FAILED,
}  # fmt: skip
"""What another start cannot mend."""


@dataclass(frozen=True)
class RolloutRecord:
    """What `status.rollout` keeps."""

    good: str = ""
    """The revision that was wholly ready last."""
    failed: str = ""
    """The revision that was given up for it."""
    cause: str = ""
    """Why, as a sentence."""

    @staticmethod
    def from_status(section: Mapping[str, Any] | None) -> RolloutRecord:
        values = section or {}
        return RolloutRecord(str(values.get("good", "")), str(values.get("failed", "")), str(values.get("cause", "")))

    def to_status(self) -> dict[str, str]:
        return {name: value for name, value in vars(self).items() if value}

    def gives_up(self, mark: str) -> bool:
        return bool(mark) and self.failed == mark and bool(self.good)


def advance(record: RolloutRecord, mark: str, rollout: Rollout | None, pods: Sequence[PodState]) -> RolloutRecord:
    """The record after a look at revision `mark`, which is being rolled out or serves; `pods` are the server's."""
    if rollout is None or not rollout.seen or rollout.wanted == 0:
        return record
    if rollout.complete:
        return RolloutRecord(good=mark)
    trouble = failure(mark, rollout, pods)
    if trouble is None or record.good in ("", mark):
        return record
    return replace(record, failed=mark, cause=trouble.text)


def failure(mark: str, rollout: Rollout, pods: Sequence[PodState]) -> Trouble | None:
    """Why revision `mark` will not come up, or None while it may."""
    own = [pod for pod in pods if pod.revision == mark and not pod.deleting]
    if any(pod.ready for pod in own):
        return None
    for pod in sorted(own, key=lambda pod: pod.name):
        trouble = pod.trouble
        if trouble is not None and trouble.reason not in UNPLACED and pod.restarts >= (1 if trouble.reason in _FINAL else _RESTARTS):
            return trouble
    if not rollout.deadline_passed or not own or all(pod.trouble is not None and pod.trouble.reason in UNPLACED for pod in own):
        return None
    troubles = [pod.trouble for pod in own if pod.trouble is not None and pod.trouble.reason not in UNPLACED]
    return troubles[0] if troubles else Trouble(Reason.PROBE_TIMEOUT, "No pod of it became ready within the predicted time.")
