"""Services with their plans, and all objects that are made for each: for golden files, for properties, and for the API server to judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from gantline_operator import resources
from gantline_operator.plan_types import Placement, Plan, Requirement
from gantline_operator.resources import ModelLocation, Object, Parent, Settings
from gantline_operator.rollout_strategy import StrategyName
from gantline_operator.spec import parse_service
from gantline_runtime.config import EngineConfig
from gantline_runtime.sizing import MemoryEstimate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
GIB = 1 << 30
FINGERPRINT = "sha256:" + "ab" * 32

SETTINGS = Settings(
    version="0.1.0",
    images={"cuda": "registry.example/runtime:0.1.0", "cpu": "registry.example/runtime-cpu:0.1.0"},
    image_pull_secrets=("installation",),
    hf_endpoint="https://hub.example",
)
CPU_STAGE = Placement(image="cpu", resource="", count=0, node_labels=(), memory_bytes=2 * GIB, cpu_millis=500, waiting=False)
CPU_PLAN = Plan(
    inputs="0123456789",
    placement=replace(CPU_STAGE, memory_bytes=3 * GIB, cpu_millis=1000),
    engine=EngineConfig(backend="torch", device="cpu", dtype="float32", session_len=2048, max_batch_size=32, num_cache_blocks=256),
    product="",
    precision="awq4",
    quantize=True,
    memory=MemoryEstimate(
        weights=GIB, workspace=GIB, cache=GIB // 2, total=GIB * 5 // 2, usable=3 * GIB, capacity_tokens=16384, cache_bytes_per_token=4096
    ),
    load_seconds=20.0,
)
GPU_STAGE = Placement(
    image="cuda",
    resource="nvidia.com/gpu",
    count=1,
    node_labels=(Requirement("nvidia.com/gpu.product", ("NVIDIA-A10",)),),
    memory_bytes=24 * GIB,
    cpu_millis=2000,
    waiting=False,
    tolerated=("nvidia.com/gpu",),
)
GPU_PLAN = replace(
    CPU_PLAN,
    placement=replace(GPU_STAGE, count=2, cpu_millis=4000),
    engine=EngineConfig(
        backend="cuda", device="cuda", dtype="bfloat16", tp=2, session_len=16384, max_batch_size=256, cache_max_entry_count=0.85
    ),
    product="NVIDIA-A10",
    precision="bfloat16",
    quantize=False,
    load_seconds=141.5,
)

FULL_SPEC: Object = {
    "model": {"uri": "hf://org/name", "revision": "v1.0", "servedName": "org/name:v1", "secretRef": {"name": "hub"}},
    "quantization": {"method": "awq", "groupSize": 64, "maxPerplexityIncrease": "0.05"},
    "engine": {"tensorParallel": 2, "cacheMaxEntryCount": "0.85"},
    "accelerator": {"resource": "nvidia.com/gpu", "nodeSelector": {"pool": "inference"}},
    "replicas": 3,
    "cache": {"claimName": "shared-artefacts", "accessMode": "ReadWriteMany"},
    "rollout": {"drainTimeout": "5m"},
    "ingress": {"host": "chat.example.com", "className": "nginx"},
    "pod": {
        "tolerations": [{"key": "dedicated", "value": "llm", "effect": "NoExecute", "tolerationSeconds": 60}, {"operator": "Exists"}],
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "imagePullSecrets": [{"name": "installation"}, {"name": "team"}],
        "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "HF_ENDPOINT", "value": "https://mirror.example"}],
        "resources": {"requests": {"cpu": "8", "memory": "48Gi"}, "limits": {"cpu": "16", "ephemeral-storage": "20Gi"}},
    },
}


@dataclass(frozen=True)
class Case:
    """A service, the stages' placements, the server's plan, and which stages it goes through."""

    parent: Parent
    plan: Plan
    stage: Placement
    fetched: bool
    quantized: bool
    makes_claim: bool
    policies: bool = False

    def source(self) -> ModelLocation:
        """Where the model lies once it is fetched, if it has to be."""
        if self.fetched:
            return resources.cache_location(self.parent, "fetch", resources.fetch_hash(self.parent.spec, "c0ffee"))
        location = resources.source_location(self.parent.spec.model.uri)
        assert location is not None
        return location

    def model(self) -> ModelLocation:
        """Where the server finds it."""
        if not self.quantized:
            return self.source()
        return resources.cache_location(self.parent, "awq", resources.quantize_hash(self.parent.spec, FINGERPRINT))

    def jobs(self) -> list[Object]:
        parent, source = self.parent, self.source()
        jobs = [resources.inspect_job(parent, CPU_STAGE, SETTINGS)]
        if self.fetched:
            jobs.append(resources.fetch_job(parent, self.stage, SETTINGS, revision="c0ffee"))
        if self.quantized:
            jobs.append(resources.quantize_job(parent, self.stage, SETTINGS, source=source, fingerprint=FINGERPRINT, attempt=2))
        return jobs

    def objects(self) -> list[Object]:
        claim = [resources.cache_claim(self.parent, SETTINGS, 3 * GIB // 2)] if self.makes_claim else []
        strategy: StrategyName = "Drain" if self.plan.placement.resource or self.model().one_node else "Surge"
        served = resources.serving(self.parent, self.plan, self.model(), SETTINGS, strategy=strategy)
        policies = resources.network_policies(self.parent, replace(SETTINGS, network_policies=self.policies))
        return [*policies, *claim, *self.jobs(), *served, *resources.ingress(self.parent, SETTINGS)]


def parent_of(manifest: Mapping[str, Any], *, namespace: str = "team", restarted_at: str = "") -> Parent:
    name, spec = parse_service(manifest)
    return Parent(name, namespace, "11111111-2222-3333-4444-555555555555", spec, restarted_at)


def service(spec: Mapping[str, Any], name: str = "chat") -> Object:
    return {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": dict(spec)}


def example(name: str) -> Object:
    documents = yaml.safe_load_all((EXAMPLES / name).read_text())
    return next(item for item in documents if item["kind"] == "InferenceService")


LONGEST = "a" * 40

CASES: dict[str, Case] = {
    "quickstart": Case(parent_of(example("quickstart.yaml")), CPU_PLAN, CPU_STAGE, fetched=False, quantized=True, makes_claim=True),
    "cpu-from-image": Case(
        parent_of(service({"model": {"uri": "file:///opt/models/tiny"}, "accelerator": {"resource": "cpu"}, "replicas": 2}, LONGEST)),
        replace(CPU_PLAN, quantize=False), CPU_STAGE, fetched=False, quantized=False, makes_claim=False,
    ),
    "gpu-from-claim": Case(parent_of(example("pvc.yaml")), GPU_PLAN, GPU_STAGE, fetched=False, quantized=False, makes_claim=False),
    "hub-to-gpu": Case(parent_of(example("hf-awq.yaml")), GPU_PLAN, GPU_STAGE, fetched=True, quantized=True, makes_claim=True),
    "every-field": Case(
        parent_of(service(FULL_SPEC), restarted_at="2026-11-21T10:00:00Z"), GPU_PLAN, GPU_STAGE,
        fetched=True, quantized=True, makes_claim=False, policies=True,
    ),
    "suspended": Case(
        parent_of({**example("quickstart.yaml"), "spec": {**example("quickstart.yaml")["spec"], "suspend": True, "replicas": 4}}),
        CPU_PLAN, CPU_STAGE, fetched=False, quantized=True, makes_claim=True,
    ),
}  # fmt: skip
