"""The decision: which precision, how many GPUs, which sort of node. Pure: equal arguments give an equal answer.

    spec + model facts ----------> variants (as it is; awq4), in the order in which they are wanted
    spec + cluster + images -----> shapes that pass every screen (shapes.py)
    each variant on each shape --> smallest legal tensor parallelism that fits (candidates.py)
    all that fit ----------------> the one that can start now, on the fewest GPUs, the smallest such GPU

Every option that was turned down is in the answer, with a reason of the closed set. A known shape that fits but has nothing free is
planned and `waiting`: the pods are created, and a cluster autoscaler sees them. Only where no known shape fits is the answer `Rejected`.

A plan stands (is *sticky*) until the spec or the model changes, or its shape no longer fits: labels that vanish for a minute, nodes that
cannot be read, or a better GPU that comes free restart no pod.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gantline_runtime import sizing
from gantline_runtime.model_facts import ModelFacts

from gantline_operator.calibration import Calibration, Measurement, bounded_load_s
from gantline_operator.candidates import Candidate, Variant, assess, assess_cpu
from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts, Reservation
from gantline_operator.plan_types import Placement, Plan, Rejected, Requirement, StagePlan, Turned
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.shapes import Shape, eligible_nodes, find_shapes
from gantline_operator.stage_plan import cache_size, plan_stage

__all__ = [
    "Placement",
    "Plan",
    "Rejected",
    "Requirement",
    "StagePlan",
    "Turned",
    "cache_size",
    "plan",
    "plan_inputs",
    "plan_stage",
    "reservation",
    "screen",
    "stands",
]

_CURES: Mapping[Reason, str] = {
    Reason.NO_MATCHING_GPU: "Add such GPUs, widen spec.accelerator, or set accelerator.resource: cpu to serve without a GPU.",
    Reason.NO_MATCHING_NODE: "Widen accelerator.nodeSelector or add pod.tolerations.",
    Reason.GPU_LABELS_MISSING: "Install GPU Feature Discovery or AMD's node labeller, or describe the pool in the inventory.",
    Reason.NO_RUNTIME_IMAGE: "Name the image in the chart's runtime.images, or choose other GPUs in spec.accelerator.",
    Reason.UNSUPPORTED_GPU: "Use NVIDIA GPUs of compute capability 7.5 or newer, or change engine.backend or engine.dtype.",
    Reason.DRIVER_TOO_OLD: "Update the nodes' NVIDIA driver.",
    Reason.INVALID_QUANTIZATION: "Use another groupSize, quantization.method: none, or a checkpoint that is not quantized yet.",
    Reason.ILLEGAL_TENSOR_PARALLEL: "Leave engine.tensorParallel at auto, or choose a number that divides the model's heads and groups.",
    Reason.MODEL_TOO_LARGE: "Lower engine.sessionLen or engine.maxBatchSize, allow quantization (method: awq), or use larger or more GPUs.",
    Reason.NEEDS_SEVERAL_NODES: "Use nodes with more GPU memory, allow quantization (method: awq), or lower engine.sessionLen.",
    Reason.UNSUPPORTED_ARCHITECTURE: "Use a decoder-only language model with standard attention.",
    Reason.INVALID_CONFIGURATION: "Lower engine.sessionLen, or leave it at auto.",
}

_NOTHING_KNOWN = Calibration()

_PROGRESS = (
    Reason.NO_MATCHING_NODE,
    Reason.NO_MATCHING_GPU,
    Reason.GPU_LABELS_MISSING,
    Reason.NO_RUNTIME_IMAGE,
    Reason.UNSUPPORTED_GPU,
    Reason.DRIVER_TOO_OLD,
    Reason.INVALID_QUANTIZATION,
    Reason.ILLEGAL_TENSOR_PARALLEL,
    Reason.MODEL_TOO_LARGE,
    Reason.NEEDS_SEVERAL_NODES,
)
"""How far an option came before it was turned down; a rejection speaks of those that came furthest."""


def plan(
    spec: InferenceServiceSpec,
    facts: ModelFacts,
    cluster: ClusterFacts,
    images: Mapping[str, str],
    previous: Plan | None = None,
    *,
    started: bool = True,
    calibration: Calibration = _NOTHING_KNOWN,
) -> Plan | Rejected:
    """The plan for a service whose source has these facts.

    `images`: the runtime's images by cuda, cpu, rocm, ascend; one that is missing or empty rules its devices out. `previous` is the plan
    that stands; with `started` False (none of its pods ever ran) a plan that waits gives way to one that need not. What starts measured
    (`calibration`) counts for new plans alone: a plan that stands is judged by what it was made from.
    """
    inputs = plan_inputs(spec, facts)
    standing = previous if previous is not None and previous.inputs == inputs else None
    variants, turned = _variants(spec, facts)
    if not variants:
        return _reject(turned)
    if facts.family == "transformers":
        turned = [*turned, _no_own_implementation(facts)]
    shapes, screened = ([], []) if _on_cpu(spec) else find_shapes(spec, cluster, images)
    fresh: Plan | Rejected
    if not shapes and not screened and not _on_cpu(spec):
        fresh = _reject([*turned, _no_accelerator(cluster)])
    else:
        fresh = _decide(spec, variants, cluster, shapes, images, turned + screened, inputs, calibration)
    if standing is None:
        return fresh
    kept = _keep(standing, spec, variants, cluster, shapes, images, fresh)
    if kept is None:
        return fresh
    better = isinstance(fresh, Plan) and kept.placement.waiting and not fresh.placement.waiting
    return fresh if better and not started else kept


def stands(previous: Plan, spec: InferenceServiceSpec, facts: ModelFacts, fleet: ClusterFacts, images: Mapping[str, str]) -> Plan | None:
    """The plan that stands, of a service whose pods all have their nodes: whether they still could have them. None: that takes `plan`.

    What is free makes no difference to it, so that all services can be judged by one and the same `fleet`, made once.
    """
    if _on_cpu(spec) or previous.inputs != plan_inputs(spec, facts) or not images.get(previous.placement.image):
        return None
    variants, _ = _variants(spec, facts)
    shapes, _ = find_shapes(spec, fleet, images)
    return _waiting(previous, False) if _still_fits(previous, spec, variants, shapes) is not None else None


def screen(spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str]) -> Rejected | list[Shape]:
    """What can be said before the model is known: the shapes that it may be tried on (none for a CPU), or why there is none."""
    if _on_cpu(spec):
        turned = _barred_from_cpu(spec, cluster, images)
        return _reject(turned) if turned else []
    shapes, screened = find_shapes(spec, cluster, images)
    return shapes or _reject(screened or [_no_accelerator(cluster)])


def plan_inputs(spec: InferenceServiceSpec, facts: ModelFacts) -> str:
    """Hash of what a plan depends on beside the cluster. Replicas, names and the operator's version are no part of it."""
    parts = {
        "model": [facts.fingerprint, facts.weight_bytes],
        "quantization": {key: value for key, value in _given(spec.quantization).items() if key != "max_perplexity_increase"},
        "engine": _given(spec.engine),
        "accelerator": _given(spec.accelerator),
        "tolerations": [_given(toleration) for toleration in spec.pod.tolerations],
        "resources": _given(spec.pod.resources),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _given(section: Any) -> dict[str, Any]:
    """Fields of a section of the spec that differ from their default: one that a later release adds must not change today's hashes."""
    default = {
        item.name: item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default
        for item in dataclasses.fields(section)
    }
    return {name: value for name, value in dataclasses.asdict(section).items() if value != default[name]}


def reservation(service: str, spec: InferenceServiceSpec, planned: Plan, pods: int) -> Reservation:
    """What `pods` pods of a plan will take that have no node yet; `service` is `namespace/name`."""
    placement = planned.placement
    return Reservation(
        service=service,
        resource=placement.resource,
        count=placement.count,
        pods=pods if placement.resource else 0,
        node_labels=tuple((label.key, label.values) for label in placement.node_labels),
        node_selector=tuple(sorted((spec.accelerator.node_selector or {}).items())),
        tolerations=spec.pod.tolerations,
    )


def _on_cpu(spec: InferenceServiceSpec) -> bool:
    return spec.accelerator.resource == "cpu"


def _variants(spec: InferenceServiceSpec, facts: ModelFacts) -> tuple[list[Variant], list[Turned]]:
    """Precisions in the order in which they are wanted, and why others are out; none: the model cannot be served at all."""
    if not facts.supported:
        return [], [Turned(facts.name, Reason.UNSUPPORTED_ARCHITECTURE, f"{facts.architecture} is not implemented")]
    session, limit = spec.engine.session_len, facts.max_position_embeddings
    if session is not None and session > limit:
        message = f"engine.sessionLen is {session}, and the model was made for {limit} tokens"
        return [], [Turned(facts.name, Reason.INVALID_CONFIGURATION, message)]
    wish = spec.quantization
    if wish.method == "none":
        return [Variant(facts, False)], []
    if facts.quantization is not None and facts.quantization.method == wish.method:
        return [Variant(facts, False)], [Turned("awq", Reason.NOT_PREFERRED, "the checkpoint is quantized with awq already")]
    illegal = sizing.illegal_quantization(facts, wish.group_size)
    copy = sizing.awq_facts(facts, bits=wish.bits, group_size=wish.group_size)
    as_it_is = [Variant(facts, False)] if wish.policy == "IfNeeded" else []
    if illegal is not None:
        return as_it_is, [Turned("awq", Reason.INVALID_QUANTIZATION, illegal)]
    return [*as_it_is, Variant(copy, True)], []


def _no_own_implementation(facts: ModelFacts) -> Turned:
    why = facts.fallback_reason or f"there is none of {facts.architecture}"
    message = f"{why}: transformers' own runs it over the paged cache, on one device, without CUDA graphs"
    return Turned("Gantline's implementation", Reason.UNSUPPORTED_ARCHITECTURE, message)


def _decide(
    spec: InferenceServiceSpec,
    variants: Sequence[Variant],
    cluster: ClusterFacts,
    shapes: Sequence[Shape],
    images: Mapping[str, str],
    turned: list[Turned],
    inputs: str,
    calibration: Calibration,
) -> Plan | Rejected:
    """The first variant that fits anywhere, on the best place for it."""
    turned = list(turned)
    for index, variant in enumerate(variants):
        if _on_cpu(spec):
            found, refused = _try_cpu(spec, variant, cluster, images, calibration)
        else:
            found, refused = _try_shapes(spec, variant, shapes, calibration)
        turned += [row for row in refused if row not in turned]
        if found:
            best, *others = sorted(found, key=lambda candidate: _rank(candidate, spec))
            spared = [Turned("awq", Reason.NOT_PREFERRED, "the model fits as it is, and quantization.policy is IfNeeded")]
            turned += [_not_preferred(other, best) for other in others] + (spared if index + 1 < len(variants) else [])
            return _make_plan(spec, best, inputs, turned)
    return _reject(turned)


def _no_accelerator(cluster: ClusterFacts) -> Turned:
    if cluster.nodes_known:
        return Turned("any accelerator", Reason.NO_MATCHING_GPU, "no node of the cluster has one")
    return Turned("any accelerator", Reason.GPU_LABELS_MISSING, "nodes may not be read, and no inventory names any")


def _try_shapes(
    spec: InferenceServiceSpec, variant: Variant, shapes: Sequence[Shape], calibration: Calibration
) -> tuple[list[Candidate], list[Turned]]:
    """On each shape the smallest tensor parallelism that fits, and what was tried before it."""
    found: list[Candidate] = []
    turned: list[Turned] = []
    choices = sizing.TENSOR_PARALLEL if spec.engine.tensor_parallel is None else (spec.engine.tensor_parallel,)
    for shape in shapes:
        for tp in choices:
            verdict = assess(spec, variant, shape, tp, calibration)
            if isinstance(verdict, Candidate):
                found.append(verdict)
                break
            turned.append(verdict)
            slices = tp > 1 and (shape.device.sliced or shape.device.replicas > 1)
            if slices or verdict.reason is Reason.NO_MATCHING_GPU:  # more of what cannot be joined, or of what a node has too few of
                break
    return found, turned


def _try_cpu(
    spec: InferenceServiceSpec, variant: Variant, cluster: ClusterFacts, images: Mapping[str, str], calibration: Calibration
) -> tuple[list[Candidate], list[Turned]]:
    barred = _barred_from_cpu(spec, cluster, images)
    if barred:
        return [], barred
    nodes, _ = eligible_nodes(spec, cluster)
    verdict = assess_cpu(spec, variant, nodes, bool(nodes), calibration)
    return ([verdict], []) if isinstance(verdict, Candidate) else ([], [verdict])


def _barred_from_cpu(spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str]) -> list[Turned]:
    """Why no node's CPU can be used; empty where one can."""
    if not images.get("cpu"):
        return [Turned("CPU", Reason.NO_RUNTIME_IMAGE, "no cpu image of the runtime is configured in the operator")]
    nodes, barred = eligible_nodes(spec, cluster)
    if nodes or not cluster.nodes_known:
        return []
    return barred or [Turned("CPU", Reason.NO_MATCHING_NODE, "the cluster has no nodes")]


def _rank(candidate: Candidate, spec: InferenceServiceSpec) -> tuple[int, int, int, str, tuple[Requirement, ...] | str]:
    """Least first: can all replicas start now, can any, how many GPUs each takes, how large those are, then a name to break ties."""
    wanted = max(1, spec.replicas)
    startable = wanted if candidate.placeable is None else min(wanted, candidate.placeable)
    return -startable, candidate.placement.count, candidate.device_bytes, candidate.product, repr(candidate.placement.node_labels)


def _is_waiting(candidate: Candidate, spec: InferenceServiceSpec) -> bool:
    return candidate.placeable is not None and candidate.placeable < max(1, spec.replicas)


def _not_preferred(other: Candidate, best: Candidate) -> Turned:
    if other.placeable is not None and (best.placeable is None or other.placeable < best.placeable) and _size(other) <= _size(best):
        return Turned(other.option, Reason.INSUFFICIENT_FREE_GPU, f"it fits, but {other.placeable} replicas could start there now")
    if other.placement.count > best.placement.count:
        return Turned(other.option, Reason.NOT_PREFERRED, f"it fits too, but {best.option} takes fewer GPUs")
    return Turned(other.option, Reason.NOT_PREFERRED, f"it fits too, but {best.option} is free, or the smaller GPU")


def _size(candidate: Candidate) -> tuple[int, int]:
    return candidate.placement.count, candidate.device_bytes


def _make_plan(spec: InferenceServiceSpec, best: Candidate, inputs: str, turned: Sequence[Turned]) -> Plan:
    device = "cuda" if best.placement.resource else "cpu"
    estimated_s = float(math.ceil(sizing.load_seconds(best.variant.facts, tp=best.engine.tp, device=device)))
    return Plan(
        inputs=inputs,
        placement=replace(best.placement, waiting=_is_waiting(best, spec)),
        engine=best.engine,
        product=best.product,
        precision=best.precision,
        quantize=best.variant.quantize,
        memory=best.memory,
        load_seconds=bounded_load_s(best.measured, estimated_s),
        rejected=tuple(turned),
        calibration=_tell(best.measured) if best.measured is not None else "",
    )


def _tell(measured: Measurement) -> str:
    parts = [f"{part} {ratio:.2f} of the formula's bytes" for part, ratio in sorted(measured.ratios.items())]
    loaded = [f"ready after {measured.load_s:.0f} s"] if measured.load_s else []
    return f"{', '.join([*parts, *loaded])}; measured in {measured.starts} start{'s' if measured.starts > 1 else ''}."


def _reject(turned: Sequence[Turned]) -> Rejected:
    """The reason of the options that came furthest, and a sentence that names some of them."""
    known = [row for row in turned if row.reason in _PROGRESS]
    reason = max((row.reason for row in known), key=_PROGRESS.index) if known else turned[0].reason
    rows = [row for row in turned if row.reason is reason]
    shown = "; ".join(f"{row.option}: {row.message}" for row in rows[-2:])
    more = f" (and {len(rows) - 2} more options)" if len(rows) > 2 else ""
    return Rejected(reason, shown + more, _CURES[reason], tuple(turned))


# -- stickiness ----------------------------------------------------------------------------------------------------------------------


def _keep(
    standing: Plan,
    spec: InferenceServiceSpec,
    variants: Sequence[Variant],
    cluster: ClusterFacts,
    shapes: Sequence[Shape],
    images: Mapping[str, str],
    fresh: Plan | Rejected,
) -> Plan | None:
    """The standing plan with `waiting` as of now, or None where it no longer fits."""
    if _on_cpu(spec):
        return _keep_on_cpu(standing, fresh)
    if not images.get(standing.placement.image):
        return None
    still = _still_fits(standing, spec, variants, shapes)
    if still is not None:
        return _waiting(standing, _is_waiting(still, spec))
    return _waiting(standing, True) if _nothing_contradicts(standing, cluster, fresh) else None


def _waiting(standing: Plan, waiting: bool) -> Plan:
    return replace(standing, placement=replace(standing.placement, waiting=waiting))


def _keep_on_cpu(standing: Plan, fresh: Plan | Rejected) -> Plan | None:
    """On CPUs a plan depends on the cluster only in whether a node is large enough."""
    return standing if isinstance(fresh, Plan) and fresh.precision == standing.precision else None


def _still_fits(standing: Plan, spec: InferenceServiceSpec, variants: Sequence[Variant], shapes: Sequence[Shape]) -> Candidate | None:
    """The standing plan's option, found anew among today's shapes."""
    labels = [(label.key, label.values) for label in standing.placement.node_labels]
    for shape in shapes:
        same = (shape.device.resource, shape.device.product, shape.backend, shape.image) == (
            standing.placement.resource, standing.product, standing.engine.backend, standing.placement.image,
        )  # fmt: skip
        if not same or not any(slot.node.matches(labels) for slot in shape.slots):
            continue
        for variant in variants:
            verdict = assess(spec, variant, shape, standing.engine.tp)
            if isinstance(verdict, Candidate) and verdict.precision == standing.precision and variant.quantize == standing.quantize:
                return verdict
    return None


def _nothing_contradicts(standing: Plan, cluster: ClusterFacts, fresh: Plan | Rejected) -> bool:
    """Whether it is only knowledge that is missing: nodes unreadable, labels gone, or the last such node away for now."""
    if not cluster.nodes_known:
        return True
    offers = [offer.device for node in cluster.nodes for offer in node.offers if offer.device.resource == standing.placement.resource]
    if any(device.memory_bytes is None for device in offers):
        return True
    return isinstance(fresh, Rejected) and not any(device.product == standing.product for device in offers)
