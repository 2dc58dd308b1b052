"""Every sort of device, from its nodes' labels to the pod that would run there: one golden file, so that a change of any shows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_operator import resources
from gantline_operator.facts import ClusterFacts, cluster_facts, read_node
from gantline_operator.inventory import Inventory, parse_inventory
from gantline_operator.plan import Plan, plan
from gantline_operator.plan_types import Rejected
from gantline_operator.spec import parse_spec
from gantline_runtime.config import to_arguments

from tests.operator.planning import IMAGES, MODELS, cluster_of, node_objects
from tests.operator.render_cases import Parent, Settings

Object = dict[str, Any]
GOLDEN = Path(__file__).parent / "golden" / "accelerators" / "all.yaml"
SETTINGS = Settings(version="0.1.0", images=IMAGES)


def bare(profile: str, **labels: str) -> list[Object]:
    """A profile's nodes as they are without any vendor's labeller."""
    nodes = node_objects(profile)
    for node in nodes:
        kept = {key: value for key, value in node["metadata"]["labels"].items() if "nvidia.com" not in key and "amd.com" not in key}
        node["metadata"]["labels"] = {**kept, **labels}
    return nodes


POOLS = parse_inventory(
    {
        "pools": "[{name: h100, nodeSelector: {pool: h100}, resource: nvidia.com/gpu, count: 8, product: NVIDIA-H100-80GB-HBM3, "
        'memory: 79Gi, computeCapability: "9.0"}]'
    }
)


def by_labels(profile: str, inventory: Inventory = Inventory(), **labels: str) -> ClusterFacts:
    return cluster_facts([read_node(node, inventory) for node in bare(profile, **labels)], [], inventory=inventory)


CASES: dict[str, tuple[str, ClusterFacts, Object]] = {
    "nvidia, whole GPUs split": ("70b", cluster_of("h100"), {}),
    "nvidia, MIG single": ("8b", cluster_of("mig-single"), {}),
    "nvidia, MIG single, split asked for": ("8b", cluster_of("mig-single"), {"engine": {"tensorParallel": 2}}),
    "nvidia, MIG mixed: a slice": ("tiny", cluster_of("mig-mixed"), {"accelerator": {"resource": "nvidia.com/mig-1g.10gb"}}),
    "nvidia, MIG mixed: whole GPUs beside slices": ("70b", cluster_of("mig-mixed"), {"accelerator": {"resource": "nvidia.com/gpu"}}),
    "nvidia, MIG mixed: slices are not joined": ("70b", cluster_of("mig-mixed"), {"accelerator": {"resource": "nvidia.com/mig-1g.10gb"}}),
    "nvidia, time-sliced": ("tiny", cluster_of("t4-shared"), {}),
    "nvidia, time-sliced, allowed": ("tiny", cluster_of("t4-shared"), {"accelerator": {"allowShared": True}}),
    "nvidia, a cloud's labels": ("8b", by_labels("l4", **{"cloud.google.com/gke-accelerator": "nvidia-l4"}), {}),
    "nvidia, an inventory": ("8b", by_labels("h100", POOLS, pool="h100"), {}),
    "nvidia, nobody says what it is": ("8b", by_labels("h100"), {}),
    "amd": ("70b", cluster_of("mi300x"), {}),
    "ascend": ("8b", cluster_of("ascend-910"), {}),
    "cpu nodes": ("tiny", cluster_of("cpu"), {}),
    "cpu nodes, asked for": ("tiny", cluster_of("cpu"), {"accelerator": {"resource": "cpu"}}),
    "too large for one node": ("70b", cluster_of("a10"), {}),
}


def shown(model: str, cluster: ClusterFacts, spec: Object) -> Object:
    """What is decided, and the parts of the pod that depend on the device."""
    wanted = parse_spec({"model": {"uri": "file:///models/m"}, **spec})
    answer = plan(wanted, MODELS[model], cluster, IMAGES)
    if isinstance(answer, Rejected):
        return {"reason": answer.reason.value, "message": answer.message}
    assert isinstance(answer, Plan)
    location = resources.source_location("file:///models/m")
    assert location is not None
    made = resources.serving(Parent("chat", "team", "u", wanted), answer, location, SETTINGS, strategy="Drain")
    pod = next(item for item in made if item["kind"] == "Deployment")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    return {
        "engine": " ".join(to_arguments(answer.engine)),
        "image": container["image"],
        "resources": container["resources"],
        "affinity": pod.get("affinity", {}).get("nodeAffinity", {}),
        "tolerations": pod.get("tolerations", []),
    }


def test_every_sort_of_device_is_planned_and_rendered_as_the_golden_file_says() -> None:
    text = yaml.safe_dump({name: shown(*case) for name, case in CASES.items()}, sort_keys=False, width=140)
    if os.environ.get("GANTLINE_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text(), "if that is meant: GANTLINE_UPDATE_GOLDEN=1 pytest THIS FILE, and read the diff"


@pytest.mark.parametrize("name", ["nvidia, MIG single, split asked for", "nvidia, MIG mixed: slices are not joined"])
def test_slices_are_never_joined(name: str) -> None:
    assert shown(*CASES[name])["reason"] in ("IllegalTensorParallel", "ModelTooLarge")
