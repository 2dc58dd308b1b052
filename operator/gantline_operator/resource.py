"""The InferenceService's spec as a person writes it (`resource_status.py` has the status that the operator reports).

The CustomResourceDefinition, the parser (`spec.py`) and docs/api.md are made from these dataclasses. Every field does something:
`plan.py` decides by it or `resources/` renders it. Python names are snake_case, the manifest's are camelCase. `auto` is None.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from gantline_runtime.sizing import MIN_SESSION_LEN, TENSOR_PARALLEL

from gantline_operator.fields import (
    REQUIRED,
    AutoOr,
    Choice,
    Flag,
    ListOf,
    MapOf,
    Object,
    Rule,
    Text,
    Whole,
    declare,
)
from gantline_operator.quantities import Amount, DecimalText, Duration, Quantity, parse_quantity

__all__ = [
    "GROUP",
    "KIND",
    "PLURAL",
    "SHORT_NAME",
    "VERSION",
    "AcceleratorSpec",
    "CacheSpec",
    "EngineSpec",
    "EnvVar",
    "InferenceServiceSpec",
    "IngressSpec",
    "LocalReference",
    "ModelSpec",
    "PodSpec",
    "QuantizationSpec",
    "ResourcesSpec",
    "RolloutSpec",
    "ScalingSpec",
    "Toleration",
]

GROUP = "gantline.io"
VERSION = "v1alpha1"
KIND = "InferenceService"
PLURAL = "inferenceservices"
SHORT_NAME = "gisvc"

MAX_NAME = 40
NAME_RULE = Rule(
    f"size(self.metadata.name) <= {MAX_NAME} && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    lambda name: True,  # checked by spec.parse_name: the rule stands on the whole object, of which the CRD knows no name's schema
    f"metadata.name must be a DNS label of at most {MAX_NAME} characters that starts with a letter: children carry it in theirs",
)

_OBJECT_NAME = Text(253, r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", "a lower-case DNS name of at most 253 characters", 1)
_HOST_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_HOST_NAME = rf"({_HOST_LABEL}\.)*[a-z]([-a-z0-9]{{0,61}}[a-z0-9])?"  # the last label starts with a letter: no address
_HOST = Text(253, _HOST_NAME, "a host's lower-case name such as chat.example.com, no address and no wildcard", 1)
_LABEL_VALUE = Text(63, r"([A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)?", "a label's value of at most 63 characters")
_HUB = r"hf://[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_SEGMENT = r"(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)"  # no segment starts with a dot: neither `..` nor hidden folders
_CLAIM = rf"pvc://[a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?{_SEGMENT}*/?"
_FILE = rf"file://{_SEGMENT}+/?"
_BUCKET = rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9]{_SEGMENT}*/?"
_IMAGE_PART = r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?"
_REGISTRY = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?(:[0-9]{1,5})?"
_IMAGE = rf"oci://{_REGISTRY}(/{_IMAGE_PART})+(:[A-Za-z0-9_][A-Za-z0-9_.-]{{0,127}})?(@sha256:[0-9a-f]{{64}})?"
_URI_FORMS = "hf://organization/name, s3://bucket/path, oci://registry/repository:tag, pvc://claim/path or file:///path"
_URI = Text(512, f"{_HUB}|{_BUCKET}|{_IMAGE}|{_CLAIM}|{_FILE}", _URI_FORMS, 8)
_REMOTE = ("hf://", "s3://", "oci://")
_SECRET_VARIABLES = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DOCKER_AUTH_CONFIG")


@dataclass(frozen=True, kw_only=True)
class LocalReference:
    name: str = declare(_OBJECT_NAME, "Name of an object in the same namespace.", default=REQUIRED)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Which model, and under which name clients ask for it."""

    RULES: ClassVar = (
        Rule(
            "!has(self.revision) || self.uri.startsWith('hf://')",
            lambda m: m.revision is None or m.uri.startswith("hf://"),
            "a revision belongs to hf:// sources only; an image's digest stands in its uri",
            ".revision",
        ),
        Rule(
            "!has(self.secretRef) || self.uri.matches('^(hf|s3|oci)://')",
            lambda m: m.secret_ref is None or m.uri.startswith(_REMOTE),
            "a secretRef belongs to hf://, s3:// and oci:// sources only",
            ".secretRef",
        ),
        Rule(
            "self.delivery == 'files' || self.uri.startsWith('oci://')",
            lambda m: m.delivery == "files" or m.uri.startswith("oci://"),
            "a delivery other than files belongs to oci:// sources only",
            ".delivery",
        ),
    )

    uri: str = declare(
        _URI,
        "Where the model lies: hf://organization/name on a hub, s3://bucket/path in a bucket, oci://registry/repository:tag (or "
        "@sha256:digest) in an image registry, pvc://claim/path on a volume of this namespace, or file:///path in the runtime's image.",
        default=REQUIRED,
    )
    revision: str | None = declare(
        Text(128, r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*", "a branch, tag or commit", 1),
        "Branch, tag or commit of a hub's model; a commit never changes underneath you. Without: main.",
    )
    served_name: str | None = declare(
        Text(128, r"[A-Za-z0-9]([A-Za-z0-9_./:-]*[A-Za-z0-9])?", "a name of letters, digits and _ . / : -", 1),
        "Name that clients put into `model`. Without: the service's name.",
    )
    secret_ref: LocalReference | None = declare(
        Object(LocalReference),
        "Secret of this namespace that opens the source. hf: its key HF_TOKEN; s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, where "
        "needed, AWS_SESSION_TOKEN, AWS_ENDPOINT_URL, AWS_REGION, AWS_S3_ADDRESSING_STYLE; oci: .dockerconfigjson, as in pull secrets. "
        "ca.crt, where it is there, holds certificates to trust.",
    )
    delivery: str = declare(
        Choice(("files", "image", "auto")),
        "How an oci:// source reaches pods: files, fetched into the cache volume; image, mounted by the nodes' container runtime without a "
        "copy in the cache; auto, as an image where source, API server and all nodes are known to allow it, else as files.",
        default="files",
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec:
    """Whether and how the weights are quantized before they are served."""

    RULES: ClassVar = (
        Rule(
            "self.method != 'none' || !has(self.maxPerplexityIncrease)",
            lambda q: q.method != "none" or q.max_perplexity_increase is None,
            "a limit needs a method other than none",
            ".maxPerplexityIncrease",
        ),
    )

    method: str = declare(
        Choice(("none", "awq")),
        "none serves the checkpoint as it is (also one that is quantized already); awq makes a 4-bit copy in the cache volume, once.",
        default="none",
    )
    policy: str = declare(
        Choice(("Always", "IfNeeded")),
        "Always quantizes; IfNeeded only where the model as it is fits none of the cluster's known shapes of node.",
        default="Always",
    )
    bits: int = declare(Choice((4,)), "Bits of one quantized weight.", default=4)
    group_size: int = declare(Choice((32, 64, 128)), "Input channels that share one scale and zero point.", default=128)
    max_perplexity_increase: float | None = declare(
        DecimalText("0", "1000"),
        'Largest accepted increase of the held-out perplexity, as a share of the original\'s: "0.05" is 5 percent. A worse copy is never '
        "served (QualityGateFailed). Without: no limit.",
    )


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """How the engine runs the model."""

    backend: str = declare(
        Choice(("auto", "cuda", "triton", "torch")),
        "Kernels to use. auto: cuda on NVIDIA GPUs of compute capability 8.0 and newer, triton on AMD, torch elsewhere.",
        default="auto",
    )
    tensor_parallel: int | None = declare(
        AutoOr(Whole(1, 8, TENSOR_PARALLEL)),
        "GPUs of one node that share each layer. auto: the smallest number that the model's heads allow and its memory fits.",
        default="auto",
    )
    dtype: str = declare(
        Choice(("auto", "float32", "bfloat16", "float16")),
        "Type of activations and of weights that are not quantized. auto: the checkpoint's; float16 for a copy that AWQ makes and on "
        "GPUs without bfloat16; float32 on a CPU.",
        default="auto",
    )
    session_len: int | None = declare(
        AutoOr(Whole(MIN_SESSION_LEN, 1 << 24)),
        "Longest prompt plus output, in tokens, that must fit. auto: the model's limit, or what the chosen GPUs hold.",
        default="auto",
    )
    max_batch_size: int | None = declare(
        AutoOr(Whole(1, 4096)), "Most requests that run at once; more wait. auto: 256 on GPUs, 32 on a CPU.", default="auto"
    )
    cache_max_entry_count: float = declare(
        DecimalText("0", "1", open_ends=True),
        "Share of the memory free after loading that the KV cache takes.",
        default="0.8",
    )
    enable_prefix_caching: bool = declare(Flag(), "Reuse the cached keys and values of a prompt's beginning.", default=True)


@dataclass(frozen=True, kw_only=True)
class AcceleratorSpec:
    """Which devices the planner may use."""

    RULES: ClassVar = (
        Rule(
            "self.resource != 'cpu' || !has(self.minMemory)",
            lambda a: a.resource != "cpu" or a.min_memory is None,
            "a CPU has no GPU memory: set pod.resources instead",
            ".minMemory",
        ),
        Rule(
            "self.resource != 'cpu' || !has(self.products)",
            lambda a: a.resource != "cpu" or a.products is None,
            "products name GPUs, and resource is cpu",
            ".products",
        ),
        Rule(
            "self.resource != 'cpu' || !self.allowShared",
            lambda a: a.resource != "cpu" or not a.allow_shared,
            "allowShared is about GPUs, and resource is cpu",
            ".allowShared",
        ),
    )

    resource: str = declare(
        Text(
            128,
            r"auto|cpu|[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?",
            "auto, cpu, or a resource's name such as nvidia.com/gpu",
        ),
        "Resource that pods ask for. auto: whatever GPUs there are, never silently a CPU; cpu: no GPU; or one by name, such as "
        "nvidia.com/gpu.",
        default="auto",
    )
    min_memory: int | None = declare(Quantity(), "Least memory of one GPU. Without: whatever the model needs.")
    products: tuple[str, ...] | None = declare(
        ListOf(_LABEL_VALUE, 32),
        "GPU products to choose from, as the nodes' labels name them, such as NVIDIA-H100-80GB-HBM3. Without: any.",
    )
    node_selector: Mapping[str, str] | None = declare(
        MapOf(_LABEL_VALUE), "Labels that a node must have, for the server and for the Jobs that prepare its model."
    )
    allow_shared: bool = declare(
        Flag(),
        "Use time-sliced GPUs too. Their memory is not isolated, so that another tenant can starve the service; never with tensor "
        "parallelism.",
        default=False,
    )


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The volume for what Gantline makes: fetched models and quantized copies."""

    RULES: ClassVar = (
        Rule(
            "!has(self.claimName) || !has(self.storageClassName)",
            lambda c: c.claim_name is None or c.storage_class_name is None,
            "claimName names a claim of yours, and storageClassName makes a new one",
            ".storageClassName",
        ),
        Rule(
            "!has(self.claimName) || self.size == 'auto'",
            lambda c: c.claim_name is None or c.size is None,
            "the size of a claim of yours is its own",
            ".size",
        ),
    )

    claim_name: str | None = declare(_OBJECT_NAME, "A PersistentVolumeClaim of yours; several services may share it. Without: one is made.")
    storage_class_name: str | None = declare(_OBJECT_NAME, "StorageClass of the claim that is made. Without: the cluster's default.")
    size: int | None = declare(
        Quantity(auto=True), "Size of the claim that is made. auto: what the model and its quantized copy need.", default="auto"
    )
    access_mode: str = declare(
        Choice(("ReadWriteOnce", "ReadWriteMany")),
        "Of the claim that is made. ReadWriteOnce keeps all replicas on one node; ReadWriteMany needs a storage that several nodes can"
        " mount. A claim that is there, yours or one made before, goes by its own.",
        default="ReadWriteOnce",
    )


@dataclass(frozen=True, kw_only=True)
class RolloutSpec:
    """How pods are replaced by those of another revision."""

    strategy: str = declare(
        Choice(("Auto", "Surge", "Drain")),
        "Surge: a new pod is ready before an old one goes, which takes a free place. Drain: an old pod goes first. "
        "Auto: Surge where a place is free when the revision begins, else Drain; status.rollout says which, and why.",
        default="Auto",
    )
    auto_rollback: bool = declare(
        Flag(), "Return to the revision that was ready last when a new one does not come up; changing the spec tries again.", default=True
    )
    drain_timeout: float = declare(Duration(86400), "How long running streams of a pod that is replaced may go on.", default="120s")


@dataclass(frozen=True, kw_only=True)
class ScalingSpec:
    """Replicas by load. Leave spec.replicas out of manifests then: its owner is the controller that is named here."""

    RULES: ClassVar = (
        Rule("self.min <= self.max", lambda s: s.min <= s.max, "min is at most max", ".min"),
        Rule(
            "self.metric != 'kvCache' || type(self.target) == string || self.target <= 100",
            lambda s: s.metric != "kvCache" or s.target is None or s.target <= 100,
            "a target for kvCache is a percentage",
            ".target",
        ),
        Rule(
            "self.controller == 'Gantline' || duration(self.downAfter) <= duration('1h')",
            lambda s: s.controller == "Gantline" or s.down_after <= 3600,
            "a HorizontalPodAutoscaler looks back for an hour at most",
            ".downAfter",
        ),
    )

    controller: str = declare(
        Choice(("Gantline", "HPA", "KEDA")),
        "Who writes spec.replicas: Gantline from min to max; HPA from one replica on, with Gantline between zero and one; KEDA alone.",
        default="Gantline",
    )
    min: int = declare(Whole(0, 1000), "Fewest replicas; 0 needs the gateway, which holds requests and wakes the service.", default=1)
    max: int = declare(Whole(1, 1000), "Most replicas.", default=REQUIRED)
    metric: str = declare(
        Choice(("queue", "kvCache", "inflight")),
        "What load is. inflight: requests that run or wait; kvCache: how full replicas' caches are; queue: requests that wait while "
        "replicas run nearly all they can.",
        default="inflight",
    )
    target: int | None = declare(
        AutoOr(Whole(1, 10_000)),
        "Load that one replica is meant to carry: requests, percent of the cache, or requests that wait. auto: of the requests that it can "
        "run at once the more, the sooner another one starts; 80; or 4.",
        default="auto",
    )
    down_after: float = declare(Duration(86400), "How long load must have allowed for fewer replicas before there are.", default="5m")
    zero_after: float = declare(
        Duration(604800), "How long nobody must have asked before the last replica goes, where min is 0.", default="15m"
    )
    on_unknown: str = declare(
        Choice(("Hold", "Max")),
        "When replicas' load is not known there are never fewer. Hold: as many as there are; Max: max, once that of none is known.",
        default="Hold",
    )


@dataclass(frozen=True, kw_only=True)
class IngressSpec:
    """An Ingress that leads from a host to the service's paths under /v1."""

    host: str = declare(_HOST, "Name under which clients outside the cluster ask for the service.", default=REQUIRED)
    class_name: str | None = declare(_OBJECT_NAME, "IngressClass of the controller that shall serve it. Without: the cluster's default.")


@dataclass(frozen=True, kw_only=True)
class Toleration:
    """As in a pod."""

    RULES: ClassVar = (
        Rule(
            "has(self.key) || self.operator == 'Exists'",
            lambda t: t.key is not None or t.operator == "Exists",
            "without a key the operator must be Exists",
            ".operator",
        ),
        Rule(
            "self.operator != 'Exists' || !has(self.value)",
            lambda t: t.operator != "Exists" or t.value is None,
            "Exists takes no value",
            ".value",
        ),
        Rule(
            "!has(self.tolerationSeconds) || (has(self.effect) && self.effect == 'NoExecute')",
            lambda t: t.toleration_seconds is None or t.effect == "NoExecute",
            "tolerationSeconds needs the effect NoExecute",
            ".tolerationSeconds",
        ),
    )

    key: str | None = declare(
        Text(317, r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?", "a taint's key", 1),
        "Key of the taint. Without: every taint.",
    )
    operator: str = declare(Choice(("Equal", "Exists")), "Exists tolerates every value.", default="Equal")
    value: str | None = declare(_LABEL_VALUE, "Value of the taint.")
    effect: str | None = declare(Choice(("NoSchedule", "PreferNoSchedule", "NoExecute")), "Effect of the taint. Without: all.")
    toleration_seconds: int | None = declare(Whole(0, 1 << 31), "How long a NoExecute taint is tolerated. Without: for ever.")


@dataclass(frozen=True, kw_only=True)
class EnvVar:
    name: str = declare(
        Text(128, r"[A-Za-z_][A-Za-z0-9_]*", "a variable's name of letters, digits and _", 1),
        "Name of the variable; GANTLINE_* and what holds a secret of the source are the operator's own.",
        default=REQUIRED,
        rules=(
            Rule(
                f"!self.startsWith('GANTLINE_') && !(self in {list(_SECRET_VARIABLES)})",
                lambda name: not name.startswith("GANTLINE_") and name not in _SECRET_VARIABLES,
                f"GANTLINE_* and {', '.join(_SECRET_VARIABLES)} are the operator's own (secrets of the source belong into model.secretRef)",
            ),
        ),
    )
    value: str = declare(Text(4096), "Value of the variable.", default="")


def _request_within_limit(name: str) -> Rule:
    request, limit = (f"self.{part}.{name.replace('-', '__dash__')}" for part in ("requests", "limits"))
    known = f"has(self.requests) && has(self.limits) && has({request}) && has({limit})"

    def holds(resources: ResourcesSpec) -> bool:
        requests, limits = resources.requests or {}, resources.limits or {}
        return name not in requests or name not in limits or parse_quantity(requests[name]) <= parse_quantity(limits[name])

    within = f"quantity(string({request})).compareTo(quantity(string({limit}))) <= 0"
    return Rule(f"!({known}) || {within}", holds, f"more {name} is requested than the limit allows", ".requests")


@dataclass(frozen=True, kw_only=True)
class ResourcesSpec:
    """Requests and limits of the runtime's container, beside the GPUs, which the plan sets."""

    RULES: ClassVar = tuple(_request_within_limit(name) for name in ("cpu", "memory", "ephemeral-storage"))

    requests: Mapping[str, str] | None = declare(MapOf(Amount(), keys=("cpu", "memory", "ephemeral-storage")), "What is set aside.")
    limits: Mapping[str, str] | None = declare(MapOf(Amount(), keys=("cpu", "memory", "ephemeral-storage")), "What is allowed.")


@dataclass(frozen=True, kw_only=True)
class PodSpec:
    """A short subset of a pod's fields, for the server's pods; tolerations, classes, secrets and variables also for the Jobs'."""

    tolerations: tuple[Toleration, ...] = declare(
        ListOf(Object(Toleration), 16), "Taints to tolerate; one that is named like the GPU's resource is tolerated anyway.", default=[]
    )
    priority_class_name: str | None = declare(_OBJECT_NAME, "PriorityClass of the pods.")
    runtime_class_name: str | None = declare(_OBJECT_NAME, "RuntimeClass of the pods, such as nvidia.")
    image_pull_secrets: tuple[LocalReference, ...] = declare(
        ListOf(Object(LocalReference), 8, key="name"), "Secrets for the registry of the runtime's image.", default=[]
    )
    env: tuple[EnvVar, ...] = declare(ListOf(Object(EnvVar), 32, key="name"), "Further environment variables.", default=[])
    resources: ResourcesSpec = declare(Object(ResourcesSpec), "CPU and memory, instead of what the plan works out.", default={})


@dataclass(frozen=True, kw_only=True)
class InferenceServiceSpec:
    """A model to be served, and within which limits the operator may choose how."""

    RULES: ClassVar = (
        Rule(
            "self.accelerator.resource != 'cpu' || self.engine.backend in ['auto', 'torch']",
            lambda s: s.accelerator.resource != "cpu" or s.engine.backend in ("auto", "torch"),
            "a CPU runs the torch backend only",
            ".engine.backend",
        ),
        Rule(
            "!self.accelerator.resource.startsWith('amd.com/') || self.engine.backend != 'cuda'",
            lambda s: not s.accelerator.resource.startswith("amd.com/") or s.engine.backend != "cuda",
            "the cuda backend needs an NVIDIA GPU",
            ".engine.backend",
        ),
        Rule(
            "!self.accelerator.resource.startsWith('huawei.com/') || self.engine.backend in ['auto', 'torch']",
            lambda s: not s.accelerator.resource.startswith("huawei.com/") or s.engine.backend in ("auto", "torch"),
            "Ascend runs the torch backend only",
            ".engine.backend",
        ),
        Rule(
            "!self.accelerator.resource.startsWith('nvidia.com/mig-') || type(self.engine.tensorParallel) == string "
            "|| self.engine.tensorParallel == 1",
            lambda s: not s.accelerator.resource.startswith("nvidia.com/mig-") or s.engine.tensor_parallel in (None, 1),
            "tensor parallelism never spans MIG slices",
            ".engine.tensorParallel",
        ),
    )

    model: ModelSpec = declare(Object(ModelSpec), ModelSpec.__doc__ or "", default=REQUIRED)
    quantization: QuantizationSpec = declare(Object(QuantizationSpec), QuantizationSpec.__doc__ or "", default={})
    engine: EngineSpec = declare(Object(EngineSpec), EngineSpec.__doc__ or "", default={})
    accelerator: AcceleratorSpec = declare(Object(AcceleratorSpec), AcceleratorSpec.__doc__ or "", default={})
    replicas: int = declare(Whole(0, 1000), "Pods that serve; kubectl scale and autoscalers write here.", default=1)
    scaling: ScalingSpec | None = declare(Object(ScalingSpec), f"{ScalingSpec.__doc__} Without: nobody changes replicas.")
    cache: CacheSpec = declare(Object(CacheSpec), CacheSpec.__doc__ or "", default={})
    rollout: RolloutSpec = declare(Object(RolloutSpec), RolloutSpec.__doc__ or "", default={})
    ingress: IngressSpec | None = declare(Object(IngressSpec), f"{IngressSpec.__doc__} Without: none.")
    pod: PodSpec = declare(Object(PodSpec), PodSpec.__doc__ or "", default={})
    suspend: bool = declare(Flag(), "Run no pod and no Job, and keep everything that was made.", default=False)
