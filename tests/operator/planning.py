"""Helpers of the planner's tests: models by name, nodes from the simulated profiles, a spec in one line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from gantline_devcluster import profiles
from gantline_operator.facts import ClusterFacts, NodeFacts, PodUse, Reservation, cluster_facts, read_node
from gantline_operator.inventory import Inventory
from gantline_operator.plan import Plan, Rejected, plan
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.spec import parse_spec
from gantline_runtime.model_facts import ModelFacts, Quantization

IMAGES = {"cuda": "runtime:cuda", "cpu": "runtime:cpu", "rocm": "runtime:rocm", "ascend": "runtime:ascend"}
AWQ = Quantization(method="awq", bits=4, group_size=128, version="gemm")

_BASE = ModelFacts(
    architecture="LlamaForCausalLM", family="llama", supported=True, num_layers=32, hidden_size=4096, intermediate_size=14336,
    num_heads=32, num_kv_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072, sliding_window=None,
    tie_word_embeddings=False, dtype="bfloat16", weight_bytes=16_060_522_496, quantization=None, name="8b", revision="main",
    fingerprint="8b",
)  # fmt: skip


def _model(name: str, **changes: Any) -> ModelFacts:
    return replace(_BASE, name=name, fingerprint=name, **changes)


MODELS = {
    "8b": _BASE,
    "32b": _model(
        "32b", family="qwen2", num_layers=64, hidden_size=5120, intermediate_size=27648, num_heads=40, weight_bytes=65_527_752_704
    ),
    "70b": _model("70b", num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64, weight_bytes=141_107_412_992),
    "70b-awq": _model(
        "70b-awq", num_layers=80, hidden_size=8192, intermediate_size=28672, num_heads=64, weight_bytes=39_765_000_000, quantization=AWQ
    ),
    "72b-awq": _model(
        "72b-awq", family="qwen2", num_layers=80, hidden_size=8192, intermediate_size=29568, num_heads=64, weight_bytes=41_600_000_000,
        quantization=AWQ,
    ),
    "mqa": _model("mqa", num_kv_heads=1),
    "odd": _model("odd", num_heads=25, num_kv_heads=5, head_dim=160, hidden_size=4000, intermediate_size=13824),
    "half-b": _model(
        "half-b", family="qwen2", num_layers=24, hidden_size=896, intermediate_size=4864, num_heads=14, num_kv_heads=2, head_dim=64,
        vocab_size=151936, max_position_embeddings=32768, tie_word_embeddings=True, weight_bytes=988_065_664,
    ),
    "tiny": _model(
        "tiny", num_layers=6, hidden_size=256, intermediate_size=768, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=4096,
        max_position_embeddings=2048, weight_bytes=13_000_000,
    ),
}  # fmt: skip


def spec_of(**sections: Any) -> InferenceServiceSpec:
    return parse_spec({"model": {"uri": "hf://org/model"}, **sections})


def node_objects(*names: str, count: int | None = None) -> list[dict[str, Any]]:
    """Node objects of the profiles, `h100` or `h100*3`; the same profile twice is the same nodes."""
    objects = []
    for name in names:
        profile, _, times = name.partition("*")
        objects += profiles.load(profile, count=int(times) if times else count)
    return copy.deepcopy(objects)


def nodes_of(*names: str, inventory: Inventory = Inventory()) -> list[NodeFacts]:
    return [read_node(node, inventory) for node in node_objects(*names)]


def cluster_of(*names: str, used: dict[str, int] | None = None, reservations: Sequence[Reservation] = (), **kwargs: Any) -> ClusterFacts:
    """A cluster of profiles. `used`: GPUs that pods hold, by node; keys may be `node/resource`, nvidia.com/gpu without."""
    return cluster_facts(nodes_of(*names), pods_of(used or {}), reservations=reservations, **kwargs)


def pods_of(used: dict[str, int]) -> list[PodUse]:
    pods = []
    for key, count in used.items():
        node, _, resource = key.partition("/")
        pods.append(PodUse(f"uid-{key}", node, ((resource or "nvidia.com/gpu", count),)))
    return pods


def planned(model: str | ModelFacts, cluster: ClusterFacts, images: dict[str, str] | None = None, **sections: Any) -> Plan | Rejected:
    facts = MODELS[model] if isinstance(model, str) else model
    return plan(spec_of(**sections), facts, cluster, IMAGES if images is None else images)


def accepted(model: str | ModelFacts, cluster: ClusterFacts, **sections: Any) -> Plan:
    answer = planned(model, cluster, **sections)
    assert isinstance(answer, Plan), f"{answer.reason}: {answer.message}"
    return answer


def rejected(model: str | ModelFacts, cluster: ClusterFacts, images: dict[str, str] | None = None, **sections: Any) -> Rejected:
    answer = planned(model, cluster, images, **sections)
    assert isinstance(answer, Rejected), answer
    return answer
