"""How a revision takes over from the one before: a new pod first, or an old one out of the way first. Pure.

Surge needs room for one more pod while both revisions are there; on GPUs that is a free one of the planned shape. It is decided once, when
a revision begins, and kept with it: what is free changes by the minute, and a rollout must not change its course half-way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gantline_operator.claim_sharing import Sharing
from gantline_operator.facts import ClusterFacts, NodeFacts
from gantline_operator.plan_types import Placement, Plan
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.shapes import eligible_nodes

__all__ = ["Strategy", "StrategyName", "choose_strategy"]

StrategyName = Literal["Surge", "Drain"]


@dataclass(frozen=True)
class Strategy:
    name: StrategyName
    why: str

    def to_stored(self) -> dict[str, str]:
        return {"name": self.name, "why": self.why}

    @staticmethod
    def from_stored(section: Mapping[str, Any] | None, *, on_cpu: bool) -> Strategy:
        """Of a revision that exists. One that an earlier release made has none, and goes on as that release went about it."""
        if not section or section.get("name") not in ("Surge", "Drain"):
            return Strategy("Surge" if on_cpu else "Drain", "An earlier release began this revision.")
        return Strategy(section["name"], str(section.get("why", "")))


def choose_strategy(spec: InferenceServiceSpec, planned: Plan, cluster: ClusterFacts, *, sharing: Sharing) -> Strategy:
    """`cluster`: with the service's own pods counted as they are. `sharing`: of the volume that pods mount."""
    if sharing is Sharing.ONE_POD:
        return Strategy("Drain", "Only one pod at a time can mount the volume (ReadWriteOncePod).")
    asked = spec.rollout.strategy
    if asked != "Auto":
        return Strategy(asked, "spec.rollout.strategy says so.")  # type: ignore[arg-type]
    placement = planned.placement
    if sharing is Sharing.ONE_NODE:
        return Strategy("Drain", "The volume ties all pods to one node, which may not hold one more.")
    if not placement.resource:
        return Strategy("Surge", "A further pod takes only CPU and memory.")
    nodes, _ = eligible_nodes(spec, cluster, placement.resource)
    free = {node.name: _free(node, placement) for node in nodes if _matches(node, placement)}
    if any(count is None for count in free.values()) or not free:
        return Strategy("Drain", "How many GPUs are free is not known.")
    room = max((name for name, count in free.items() if (count or 0) >= placement.count), default=None)
    what = f"{placement.count} {placement.resource}"
    if room is None:
        return Strategy("Drain", f"No node of the planned shape has {what} free.")
    return Strategy("Surge", f"Node {room} has {what} free.")


def _matches(node: NodeFacts, placement: Placement) -> bool:
    labels = dict(node.labels)
    return all(labels.get(item.key) in item.values for item in placement.node_labels)


def _free(node: NodeFacts, placement: Placement) -> int | None:
    offers = [offer for offer in node.offers if offer.device.resource == placement.resource]
    if any(offer.free is None for offer in offers):
        return None
    return sum(offer.free or 0 for offer in offers)
