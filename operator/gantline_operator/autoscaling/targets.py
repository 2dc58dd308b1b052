"""What reconciles tell the autoscaling loop, and what it tells them: the loop neither lists services and pods nor writes any status."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from gantline_operator.autoscaling.policy import Policy
from gantline_operator.pod_state import PodState, Trouble

__all__ = ["Report", "Target", "Targets"]


@dataclass(frozen=True)
class Target:
    """One service with `scaling`, as its last reconcile saw it."""

    namespace: str
    name: str
    uid: str
    revision: str
    policy: Policy
    current: int
    """spec.replicas."""
    generation: int = 0
    """Of the spec that `policy` and `current` are from."""
    pods: tuple[PodState, ...] = ()
    """That serve, or will."""
    rolling: bool = False
    paused: bool = False
    """Paused, suspended, or not yet Gantline's to scale: nothing is to be changed."""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Report:
    """What the next status says of a service's scaling."""

    last_scale: Mapping[str, Any] | None = None
    """`status.lastScale`, where this operator has scaled the service."""
    trouble: Trouble | None = None
    """Why replicas are not what load asks for."""


class Targets:
    """By `namespace/name`. Reconciles and the loop share one thread."""

    def __init__(self) -> None:
        self.all: dict[str, Target] = {}
        self._reports: dict[str, Report] = {}

    def note(self, key: str, target: Target | None) -> None:
        """The service as it is now; None where it has no scaling, or is no more."""
        if target is None:
            self.all.pop(key, None)
            self._reports.pop(key, None)
        else:
            if key in self.all and self.all[key].uid != target.uid:
                self._reports.pop(key, None)
            self.all[key] = target

    def report(self, key: str) -> Report:
        return self._reports.get(key, Report())

    def scaled(self, target: Target, replicas: int, reason: str, inputs: str, at: datetime) -> None:
        """The loop has written `replicas`."""
        last = {"at": at.strftime("%Y-%m-%dT%H:%M:%SZ"), "from": target.current, "to": replicas, "reason": reason, "inputs": inputs[:512]}
        self._reports[target.key] = replace(self.report(target.key), last_scale=last)

    def trouble(self, key: str, trouble: Trouble | None) -> bool:
        """Notes what stands in the way; True where that is news."""
        if self.report(key).trouble == trouble:
            return False
        self._reports[key] = replace(self.report(key), trouble=trouble)
        return True
