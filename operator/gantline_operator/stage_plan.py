"""Where the Jobs of a model's stages run, and what they take there: memory, a GPU where that saves hours, room in the cache volume.

A volume that binds late binds where its first pod runs. So the Jobs that write into it go to the nodes of the server's plan, with its
labels and tolerations, even where they need no GPU themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from gantline_runtime import sizing
from gantline_runtime.model_facts import ModelFacts
from gantline_runtime.sizing import GIB

from gantline_operator.accelerators import vendor_of
from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts
from gantline_operator.plan_types import Plan, Rejected, StagePlan, Turned
from gantline_operator.resource import InferenceServiceSpec

__all__ = ["MIN_CACHE_BYTES", "cache_size", "disk_bytes", "plan_stage", "quantize_memory"]

Stage = Literal["inspect", "fetch", "quantize", "evict"]

MIN_CACHE_BYTES = GIB
_MIB = 1 << 20
_SPARE = 1.05  # tokenizer, config and file system beside the weights
_INSPECT_BYTES, _FETCH_BYTES = 512 * _MIB, GIB
_QUANTIZE_BYTES = 3 * GIB // 2  # Python, torch and the tokenizer
_WINDOW_TOKENS = 32 * 512  # of the calibration text, and of the held-out text that is taken through the original and through the copy
_CHUNK_TOKENS = 4 * 512  # that run through a layer at once, and that the scale search looks at
_MERGE_BYTES = GIB  # copies up to this size are joined into one file at the end, and are there twice for a moment


def plan_stage(
    stage: Stage,
    spec: InferenceServiceSpec,
    cluster: ClusterFacts,
    images: Mapping[str, str],
    *,
    facts: ModelFacts | None = None,
    serving: Plan | None = None,
) -> StagePlan | Rejected:
    """The placement of a stage's Job. `fetch` and `quantize` need the facts and the server's plan, `inspect` comes before both; `evict`
    takes no more than a look at files."""
    if stage == "inspect":
        return _small(stage, spec, images, None, _INSPECT_BYTES, 100, 0)
    if stage == "evict":
        return _small(stage, spec, images, serving, _INSPECT_BYTES, 100, 0)
    assert facts is not None and serving is not None, f"{stage} is planned after the model was inspected and its server planned"
    if stage == "fetch":
        return _small(stage, spec, images, serving, _FETCH_BYTES, 500, disk_bytes(stage, facts, spec))
    return _plan_quantize(spec, cluster, images, facts, serving)


def _small(
    stage: Stage, spec: InferenceServiceSpec, images: Mapping[str, str], serving: Plan | None, memory: int, cpu_millis: int, disk: int
) -> StagePlan | Rejected:
    """Without a GPU: the CPU's image where there is one, else the server's."""
    image = "cpu" if images.get("cpu") else serving.placement.image if serving else next((key for key in sorted(images) if images[key]), "")
    if not image:
        turned = Turned(stage, Reason.NO_RUNTIME_IMAGE, "no image of the runtime is configured in the operator")
        return Rejected(turned.reason, turned.message, "Name one in the chart's runtime.images.", (turned,))
    wanted = spec.accelerator.resource
    return StagePlan(
        image=image,
        resource="",
        count=0,
        node_labels=serving.placement.node_labels if serving else (),
        memory_bytes=memory,
        cpu_millis=cpu_millis,
        waiting=False,
        tolerated=serving.placement.tolerated if serving else (wanted,) if vendor_of(wanted) else (),
        stage=stage,
        disk_bytes=disk,
    )


def _plan_quantize(
    spec: InferenceServiceSpec, cluster: ClusterFacts, images: Mapping[str, str], facts: ModelFacts, serving: Plan
) -> StagePlan | Rejected:
    """On one of the server's own GPUs, or on a CPU where the server runs on one."""
    placement, disk = serving.placement, disk_bytes("quantize", facts, spec)
    if not placement.resource:
        return _small("quantize", spec, images, serving, quantize_memory(facts), max(500, placement.cpu_millis), disk)
    labels = [(label.key, label.values) for label in placement.node_labels]
    free = [
        offer.free for node in cluster.nodes for offer in node.offers
        if offer.device.resource == placement.resource and node.matches(labels, spec.accelerator.node_selector)
    ]  # fmt: skip
    return StagePlan(
        image=placement.image,
        resource=placement.resource,
        count=1,
        node_labels=placement.node_labels,
        memory_bytes=quantize_memory(facts) + 2 * GIB,
        cpu_millis=2000,
        waiting=cluster.nodes_known and not any(amount is None or amount > 0 for amount in free),
        tolerated=placement.tolerated,
        stage="quantize",
        disk_bytes=disk,
    )


def quantize_memory(facts: ModelFacts) -> int:
    """Host memory of the quantize Job, in bytes: one layer in float32 with the copies that its search makes, the embedding or the head with
    its rounded copy, three sets of windows before and after a layer, and the activations inside it."""
    layer = sizing.linear_parameters(facts) // facts.num_layers
    embedding = facts.vocab_size * facts.hidden_size
    activations = 6 * _WINDOW_TOKENS * facts.hidden_size + 8 * _CHUNK_TOKENS * facts.intermediate_size
    total = _QUANTIZE_BYTES + 4 * (4 * layer + 2 * embedding + activations)
    return -(-total // (64 * _MIB)) * 64 * _MIB


def disk_bytes(stage: Stage, facts: ModelFacts, spec: InferenceServiceSpec) -> int:
    """Room in the cache volume for what the stage makes."""
    wish = spec.quantization
    size = facts.weight_bytes
    if stage == "quantize":
        size = sizing.awq_weight_bytes(facts, bits=wish.bits, group_size=wish.group_size)
        size *= 2 if size <= _MERGE_BYTES else 1
    elif spec.model.uri.startswith("oci://"):
        size *= 2  # a layer is there beside the files that are taken out of it
    return int(size * _SPARE) + 128 * _MIB


def cache_size(spec: InferenceServiceSpec, facts: ModelFacts, quantize: bool, *, mounted: bool = False) -> int:
    """Size of the claim that is made, in bytes: the user's, or what the stages need with a fifth to spare, at least 1 GiB. `mounted`: the
    source is an image volume, and nothing is fetched."""
    if spec.cache.size is not None:
        return spec.cache.size
    remote = spec.model.uri.startswith(("hf://", "s3://", "oci://")) and not mounted
    fetch = disk_bytes("fetch", facts, spec) if remote else 0
    copy = disk_bytes("quantize", facts, spec) if quantize else 0
    return max(MIN_CACHE_BYTES, -(-int((fetch + copy) * 1.2) // GIB) * GIB)
