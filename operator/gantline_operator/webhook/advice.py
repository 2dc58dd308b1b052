"""What a person should know of a service before it is stored: what `gantline plan` would answer, where that is no plain yes. Pure.

Nothing is said of a service that one device serves as it was asked for: a warning that always comes is read by nobody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gantline_runtime.model_facts import ModelFacts

from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts
from gantline_operator.plan import Plan, Rejected, plan, screen
from gantline_operator.resource import InferenceServiceSpec

__all__ = ["LONGEST", "MOST", "advise"]

MOST = 5
"""Warnings on one service."""
LONGEST = 250
"""Characters of one: the API server may cut longer ones than 256, and drops all beyond 4096."""


def advise(spec: InferenceServiceSpec, model: ModelFacts | None, cluster: ClusterFacts, images: Mapping[str, str]) -> list[str]:
    """Warnings, the most important first. `model` None: nobody has looked at it yet, so only devices, labels and images are judged."""
    if spec.suspend or spec.replicas == 0:
        return []
    if model is None:
        return _cut(_before_inspection(spec, cluster, images))
    answer = plan(spec, model, cluster, images)
    return _cut(_rejection(answer) if isinstance(answer, Rejected) else _surprises(spec, model, answer))


def _before_inspection(spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str]) -> Iterable[str]:
    found = screen(spec, cluster, images)
    if isinstance(found, Rejected):
        yield from _rejection(found)
    elif found and all(shape.placeable(spec.engine.tensor_parallel or 1) == 0 for shape in found):
        titles = ", ".join(dict.fromkeys(shape.device.title for shape in found))
        yield f"{Reason.WAITING_FOR_CAPACITY}: nothing is free now of {titles}; pods will wait for a node."


def _rejection(answer: Rejected) -> Iterable[str]:
    first, *rest = answer.message.split("; ")
    yield f"{answer.reason}: no pod would be started: {first}"
    yield from (f"{answer.reason}: {text}" for text in rest)
    yield answer.cure


def _surprises(spec: InferenceServiceSpec, model: ModelFacts, answer: Plan) -> Iterable[str]:
    placement, engine = answer.placement, answer.engine
    where = f"{placement.count} x {answer.product or placement.resource}" if placement.resource else "a CPU"
    if placement.waiting:
        free = f"too few are free now for {spec.replicas} replicas on {where} each"
        yield f"{Reason.WAITING_FOR_CAPACITY}: {free}; pods will wait for a node."
    chosen = []
    if placement.count > 1 and spec.engine.tensor_parallel is None:
        chosen.append(f"tensor parallelism {engine.tp}: each replica takes {where}")
    if answer.quantize and spec.quantization.policy == "IfNeeded":
        chosen.append(f"a Job makes a copy in {answer.precision} first, since the model does not fit as it is")
    if spec.engine.session_len is None and engine.session_len is not None and engine.session_len < model.max_position_embeddings:
        chosen.append(f"sessions of up to {engine.session_len} of the model's {model.max_position_embeddings} tokens")
    if chosen:
        yield f"{Reason.PLANNED}: {'; '.join(chosen)}."


def _cut(warnings: Iterable[str]) -> list[str]:
    texts = list(warnings)[:MOST]
    return [text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…" for text in texts]
