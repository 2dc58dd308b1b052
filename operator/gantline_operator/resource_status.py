"""The InferenceService's status, as the operator reports it; the dataclasses of `resource.py` are its other half.

`status.py` fills it, `crd.py` makes the schema from it. Everything is optional but what makes an item of a list whole, so that a status
may grow step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gantline_operator.fields import REQUIRED, Choice, Flag, ListOf, MapOf, Object, Text, Whole, declare

__all__ = [
    "ArtefactStatus",
    "CacheStatus",
    "ConditionStatus",
    "FactsStatus",
    "InferenceServiceStatus",
    "LastScaleStatus",
    "MemoryStatus",
    "ModelStatus",
    "PerplexityStatus",
    "PlanStatus",
    "QuantizationFactsStatus",
    "RejectedStatus",
    "RequirementStatus",
    "RolloutStatus",
    "StageStatus",
    "StartupStatus",
]

_WORD = Text(128)
_SENTENCE = Text(1024)
_NUMBER = Text(32)  # floats are written as text, as everywhere in Kubernetes' API
_TIME = Text(32)
_BYTES = Whole(0, 1 << 60)
_COUNT = Whole(0, 1 << 31)


@dataclass(frozen=True, kw_only=True)
class QuantizationFactsStatus:
    method: str = declare(_WORD, "How the weights are stored, such as awq.", default=REQUIRED)
    bits: int = declare(_COUNT, "Bits of one weight.", default=REQUIRED)
    group_size: int = declare(_COUNT, "Input channels that share a scale.", default=REQUIRED)
    version: str = declare(_WORD, "Name of the layout, such as gemm.", default=REQUIRED)


@dataclass(frozen=True, kw_only=True)
class FactsStatus:
    """What a checkpoint is (`gantline_runtime.model_facts.ModelFacts`)."""

    name: str | None = declare(Text(256), "The model's own name.")
    revision: str | None = declare(Text(256), "The commit that was found, or what the spec named.")
    fingerprint: str | None = declare(Text(256), "Hash over config.json and the headers of all weight files.")
    architecture: str | None = declare(Text(256), "Class that config.json names.")
    family: str | None = declare(_WORD, "Family of models whose implementation runs it.")
    supported: bool | None = declare(Flag(), "Whether this release's engine runs it.")
    num_layers: int | None = declare(_COUNT, "Layers.")
    hidden_size: int | None = declare(_COUNT, "Width of the residual stream.")
    intermediate_size: int | None = declare(_COUNT, "Width inside the feed-forward layers.")
    num_heads: int | None = declare(_COUNT, "Attention heads.")
    num_kv_heads: int | None = declare(_COUNT, "Key/value heads.")
    head_dim: int | None = declare(_COUNT, "Width of one head.")
    vocab_size: int | None = declare(_COUNT, "Tokens of the vocabulary.")
    max_position_embeddings: int | None = declare(_COUNT, "Longest session that the model was made for, in tokens.")
    sliding_window: int | None = declare(_COUNT, "Tokens that attention looks back, where limited.")
    tie_word_embeddings: bool | None = declare(Flag(), "Whether embedding and head are one matrix.")
    dtype: str | None = declare(_WORD, "Type of the weights that are not quantized.")
    weight_bytes: int | None = declare(_BYTES, "Bytes of all weights.")
    quantization: QuantizationFactsStatus | None = declare(Object(QuantizationFactsStatus), "How the weights are quantized, if they are.")
    image_folder: str | None = declare(
        Text(256), "Folder of an oci:// image that holds it, empty for its root. Absent for what is no image."
    )
    fallback_reason: str | None = declare(Text(256), "Why transformers' own implementation runs it, where it does.")


@dataclass(frozen=True, kw_only=True)
class ModelStatus(FactsStatus):
    """What the inspection of the source found."""

    inputs: str | None = declare(Text(64), "Hash of what was inspected; another source or revision is inspected anew.")


@dataclass(frozen=True, kw_only=True)
class PerplexityStatus:
    before: str | None = declare(_NUMBER, "Held-out perplexity of the original.")
    after: str | None = declare(_NUMBER, "Held-out perplexity of the copy.")


@dataclass(frozen=True, kw_only=True)
class ArtefactStatus:
    """Something that a Job made in the cache volume, or an image that is mounted instead."""

    kind: str = declare(_WORD, "fetch, awq or image.", default=REQUIRED)
    hash: str = declare(Text(64), "Hash of what it was made from.", default=REQUIRED)
    path: str | None = declare(Text(512), "Folder inside the pods.")
    claim: str | None = declare(Text(253), "Claim that holds it.")
    claim_uid: str | None = declare(Text(64), "Its uid: a claim made anew under the same name is another volume.")
    bytes: int | None = declare(_BYTES, "Bytes of its weights.")
    facts: FactsStatus | None = declare(Object(FactsStatus), "Facts of the copy, read from its files.")
    perplexity: PerplexityStatus | None = declare(Object(PerplexityStatus), "Quality of a quantized copy.")


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """The claim for artefacts, as it was last looked at. Another uid under the same name is another volume."""

    claim: str = declare(Text(253), "Its name.", default=REQUIRED)
    claim_uid: str = declare(Text(64), "Its uid.", default=REQUIRED)


@dataclass(frozen=True, kw_only=True)
class MemoryStatus:
    """Bytes of one GPU (of one process on a CPU), as promised by the plan."""

    weights: int | None = declare(_BYTES, "Weights.")
    workspace: int | None = declare(_BYTES, "Activations, libraries, captured graphs.")
    cache: int | None = declare(_BYTES, "KV cache that the plan requires.")
    total: int | None = declare(_BYTES, "Their sum.")
    usable: int | None = declare(_BYTES, "What the device offers.")
    capacity_tokens: int | None = declare(_BYTES, "Tokens that the cache can hold.")
    cache_bytes_per_token: int | None = declare(_BYTES, "Bytes of a token in the cache.")


@dataclass(frozen=True, kw_only=True)
class RejectedStatus:
    """An option that the planner turned down."""

    option: str = declare(Text(256), "The option.", default=REQUIRED)
    reason: str = declare(Text(64), "Why, as one word.", default=REQUIRED)
    message: str | None = declare(Text(512), "Why, as a sentence.")


@dataclass(frozen=True, kw_only=True)
class RequirementStatus:
    key: str = declare(Text(317), "Label of the node.", default=REQUIRED)
    values: tuple[str, ...] = declare(ListOf(Text(63), 32), "Values that it may have.", default=REQUIRED)


@dataclass(frozen=True, kw_only=True)
class PlanStatus:
    """What was decided, and what was turned down. It stays until the spec or the model changes, or it no longer fits any known node."""

    inputs: str | None = declare(Text(64), "Hash of the spec's and the model's parts that the plan depends on.")
    backend: str | None = declare(_WORD, "Kernels.")
    device: str | None = declare(_WORD, "cuda or cpu.")
    image: str | None = declare(_WORD, "Which runtime image: cuda, cpu, rocm or ascend.")
    tensor_parallel: int | None = declare(_COUNT, "GPUs (or processes) of one replica.")
    dtype: str | None = declare(_WORD, "Type of activations and of weights that are not quantized.")
    precision: str | None = declare(_WORD, "Precision of the weights served, such as bfloat16 or awq4.")
    quantize: bool | None = declare(Flag(), "Whether a Job quantizes the model first.")
    session_len: int | None = declare(_COUNT, "Longest session, in tokens.")
    max_batch_size: int | None = declare(_COUNT, "Most requests that run at once.")
    cache_blocks: int | None = declare(_COUNT, "Size of the KV cache in blocks, where it is fixed: on a CPU, and on a GPU that is shared.")
    resource: str | None = declare(Text(256), "Resource that a pod asks for; empty on a CPU.")
    count: int | None = declare(_COUNT, "How many of it.")
    product: str | None = declare(_WORD, "The GPU.")
    node_labels: tuple[RequirementStatus, ...] | None = declare(
        ListOf(Object(RequirementStatus), 16), "Labels that tie the pods to the chosen shape of node."
    )
    tolerated: tuple[str, ...] | None = declare(ListOf(Text(317), 4), "Keys of taints that such nodes have by custom, and pods tolerate.")
    memory: MemoryStatus | None = declare(Object(MemoryStatus), MemoryStatus.__doc__ or "")
    memory_bytes: int | None = declare(_BYTES, "Memory of the pod, in bytes.")
    cpu_millis: int | None = declare(_COUNT, "CPU of the pod, in thousandths.")
    load_seconds: int | None = declare(_COUNT, "Predicted time from the container's start to ready, in seconds.")
    calibration: str | None = declare(Text(256), "What earlier starts of the model measured, where the plan goes by it.")
    waiting: bool | None = declare(Flag(), "Whether too few of the devices were free when this was planned.")
    rejected: tuple[RejectedStatus, ...] | None = declare(ListOf(Object(RejectedStatus), 32), RejectedStatus.__doc__ or "")


@dataclass(frozen=True, kw_only=True)
class StartupStatus:
    """Measured phases of the start of the revision's first pod."""

    revision: str | None = declare(Text(64), "Whose pod was measured.")
    scheduled: str | None = declare(_TIME, "From the pod's creation to its node, such as 2s.")
    pulled: str | None = declare(_TIME, "From its node to the container's start.")
    loaded: str | None = declare(_TIME, "From the container's start to ready.")
    total: str | None = declare(_TIME, "From the pod's creation to ready.")
    phases: Mapping[str, str] | None = declare(MapOf(_TIME), "Parts of `loaded`, as the server measured them.")


@dataclass(frozen=True, kw_only=True)
class RolloutStatus:
    """How revisions follow one another."""

    strategy: str | None = declare(_WORD, "Surge or Drain, for the current revision.")
    why: str | None = declare(_SENTENCE, "Why this strategy.")
    good: str | None = declare(Text(64), "The revision that was wholly ready last.")
    failed: str | None = declare(Text(64), "The revision that was given up; it is not tried again before the spec asks for another.")
    cause: str | None = declare(_SENTENCE, "Why it was given up.")


@dataclass(frozen=True, kw_only=True)
class LastScaleStatus:
    """The last change of replicas that Gantline made."""

    at: str = declare(_TIME, "When it was written.", default=REQUIRED)
    from_: int = declare(_COUNT, "Replicas before.", default=REQUIRED)
    to: int = declare(_COUNT, "Replicas after.", default=REQUIRED)
    reason: str = declare(Text(64), "Why, as one word.", default=REQUIRED)
    inputs: str | None = declare(Text(512), "What it was decided from.")


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """The stage that is not done yet: its Job is under way, or failed."""

    name: str = declare(_WORD, "inspect, fetch, quantize or evict.", default=REQUIRED)
    hash: str = declare(Text(64), "Hash of what the stage does; other inputs start it anew.", default=REQUIRED)
    state: str = declare(Choice(("Running", "Failed")), "Whether its last Job is under way or failed.", default=REQUIRED)
    attempt: int | None = declare(_COUNT, "How often it was tried anew.")
    job: str | None = declare(Text(63), "The Job.")
    reason: str | None = declare(Text(64), "Why it failed, as one word.")
    message: str | None = declare(_SENTENCE, "Why it failed.")
    finished_at: str | None = declare(Text(32), "When it failed; a further attempt counts from here.")
    restarted_at: str | None = declare(Text(256), "The annotation gantline.io/restartedAt at that time; another value tries anew.")
    progress: str | None = declare(Text(256), "How far it is.")


@dataclass(frozen=True, kw_only=True)
class ConditionStatus:
    """As metav1.Condition, each with its own observedGeneration."""

    type: str = declare(Text(64, min_length=1), "What is stated.", default=REQUIRED)
    status: str = declare(Choice(("True", "False", "Unknown")), "Whether it holds.", default=REQUIRED)
    reason: str = declare(Text(64, min_length=1), "Why, as one word; docs/operations.md has each one's cure.", default=REQUIRED)
    message: str | None = declare(Text(4096), "Cause and cure.")
    observed_generation: int | None = declare(Whole(0, 1 << 53), "Generation of the spec that it is about.")
    last_transition_time: str = declare(_TIME, "When the status last changed.", default=REQUIRED)


@dataclass(frozen=True, kw_only=True)
class InferenceServiceStatus:
    """What the operator found and did; written by nobody else."""

    observed_generation: int | None = declare(Whole(0, 1 << 53), "Generation of the spec that the operator acted upon.")
    replicas: int | None = declare(_COUNT, "Pods that exist.")
    ready_replicas: int | None = declare(_COUNT, "Pods that answer.")
    selector: str | None = declare(_SENTENCE, "Selects the pods, for autoscalers.")
    url: str | None = declare(Text(512), "Address inside the cluster.")
    revision: str | None = declare(Text(64), "The revision that was rolled out last; its objects stand in a ControllerRevision.")
    model: ModelStatus | None = declare(Object(ModelStatus), ModelStatus.__doc__ or "")
    plan: PlanStatus | None = declare(Object(PlanStatus), PlanStatus.__doc__ or "")
    stages: tuple[StageStatus, ...] | None = declare(ListOf(Object(StageStatus), 8, key="name"), StageStatus.__doc__ or "")
    artefacts: tuple[ArtefactStatus, ...] | None = declare(ListOf(Object(ArtefactStatus), 8, key="kind"), ArtefactStatus.__doc__ or "")
    cache: CacheStatus | None = declare(Object(CacheStatus), CacheStatus.__doc__ or "")
    rollout: RolloutStatus | None = declare(Object(RolloutStatus), RolloutStatus.__doc__ or "")
    last_scale: LastScaleStatus | None = declare(Object(LastScaleStatus), LastScaleStatus.__doc__ or "")
    startup: StartupStatus | None = declare(Object(StartupStatus), StartupStatus.__doc__ or "")
    conditions: tuple[ConditionStatus, ...] | None = declare(ListOf(Object(ConditionStatus), 16, key="type"), "Findings, one of each type.")
