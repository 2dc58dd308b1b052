"""Nodes and pods, as clusters really write them, become facts; nothing odd in them raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from gantline_devcluster import profiles
from gantline_operator.accelerators import Device, numbers, read_devices
from gantline_operator.facts import NodeFacts, PodUse, Reservation, cluster_facts, read_node, reduce_pod, untolerated
from gantline_operator.fields import SpecError
from gantline_operator.inventory import Inventory, parse_inventory
from gantline_operator.resource import Toleration
from gantline_runtime.sizing import GIB
from hypothesis import given
from hypothesis import strategies as st

MIB = 1 << 20


def _device(profile: str, resource: str = "") -> Device:
    offers = read_node(profiles.load(profile)[0]).offers
    return next(offer.device for offer in offers if not resource or offer.device.resource == resource)


@pytest.mark.parametrize(
    ("profile", "resource", "product", "memory", "compute", "replicas", "sliced"),
    [
        ("a10", "nvidia.com/gpu", "NVIDIA-A10", 23028 * MIB, (8, 6), 1, False),
        ("l4", "nvidia.com/gpu", "NVIDIA-L4", 23034 * MIB, (8, 9), 1, False),
        ("a100-80", "nvidia.com/gpu", "NVIDIA-A100-SXM4-80GB", 81920 * MIB, (8, 0), 1, False),
        ("h100", "nvidia.com/gpu", "NVIDIA-H100-80GB-HBM3", 81559 * MIB, (9, 0), 1, False),
        ("h200", "nvidia.com/gpu", "NVIDIA-H200", 143771 * MIB, (9, 0), 1, False),
        ("t4-shared", "nvidia.com/gpu", "Tesla-T4-SHARED", 15360 * MIB // 4, (7, 5), 4, False),
        ("mig-single", "nvidia.com/gpu", "NVIDIA-A100-SXM4-80GB-MIG-3g.40gb", 40192 * MIB, (8, 0), 1, True),
        ("mig-mixed", "nvidia.com/gpu", "NVIDIA-A100-SXM4-80GB", 81920 * MIB, (8, 0), 1, False),
        ("mig-mixed", "nvidia.com/mig-1g.10gb", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", 9728 * MIB, (8, 0), 1, True),
        ("mi300x", "amd.com/gpu", "AMD_Instinct_MI300X_OAM", 192 * GIB, (), 1, False),
        ("ascend-910", "huawei.com/Ascend910", "910B3", 64 * GIB, (), 1, False),
    ],
)
def test_each_profile_is_read_as_what_it_is(
    profile: str, resource: str, product: str, memory: int, compute: tuple[int, ...], replicas: int, sliced: bool
) -> None:
    device = _device(profile, resource)
    assert (device.product, device.memory_bytes, device.compute) == (product, memory, compute)
    assert (device.replicas, device.sliced) == (replicas, sliced)
    assert device.labels


def test_a_node_without_accelerators_offers_none() -> None:
    node = read_node(profiles.load("cpu")[0])
    assert node.offers == () and node.available and node.cpu_millis == 32000 and node.memory_bytes == 128 * GIB


@pytest.mark.parametrize(
    ("labels", "memory", "compute", "replicas", "sliced"),
    [
        ({"cloud.google.com/gke-accelerator": "nvidia-l4"}, 23034 * MIB, (8, 9), 1, False),
        ({"cloud.google.com/gke-accelerator": "nvidia-h100-mega-80gb"}, 81559 * MIB, (9, 0), 1, False),
        (
            {"cloud.google.com/gke-accelerator": "nvidia-tesla-t4", "cloud.google.com/gke-gpu-sharing-strategy": "time-sharing",
             "cloud.google.com/gke-max-shared-clients-per-gpu": "3"},
            15360 * MIB // 3, (7, 5), 3, False,
        ),
        (
            {"cloud.google.com/gke-accelerator": "nvidia-tesla-a100", "cloud.google.com/gke-gpu-partition-size": "1g.5gb"},
            5 * 1024 * 95 // 100 * MIB, (8, 0), 1, True,
        ),
        (
            {"karpenter.k8s.aws/instance-gpu-name": "a100", "karpenter.k8s.aws/instance-gpu-memory": "81920"},
            81920 * 95 // 100 * MIB, (8, 0), 1, False,
        ),
        ({"karpenter.k8s.aws/instance-gpu-name": "l40s"}, 46068 * MIB, (8, 9), 1, False),
        ({"node.kubernetes.io/instance-type": "p5.48xlarge"}, 81559 * MIB, (9, 0), 1, False),
        ({"node.kubernetes.io/instance-type": "p5en.48xlarge"}, 143771 * MIB, (9, 0), 1, False),
        ({"node.kubernetes.io/instance-type": "Standard_NC24ads_A100_v4"}, 81251 * MIB, (8, 0), 1, False),
        ({"node.kubernetes.io/instance-type": "Standard_ND96isr_H100_v5"}, 81559 * MIB, (9, 0), 1, False),
    ],
)  # fmt: skip
def test_the_clouds_labels_stand_in_for_the_vendors(
    labels: dict[str, str], memory: int, compute: tuple[int, int], replicas: int, sliced: bool
) -> None:
    (device,) = read_devices(labels, {"nvidia.com/gpu": "1"})
    assert (device.memory_bytes, device.compute, device.replicas, device.sliced) == (memory, compute, replicas, sliced)
    assert all(labels[key] == value for key, (value,) in device.labels)


@pytest.mark.parametrize(
    "labels",
    [
        {},
        {"cloud.google.com/gke-accelerator": "nvidia-future"},
        {"kubernetes.azure.com/accelerator": "nvidia"},
        {"nvidia.com/gpu.product": "X"},
    ],
)
def test_what_nobody_explains_is_there_without_memory(labels: dict[str, str]) -> None:
    (device,) = read_devices(labels, {"nvidia.com/gpu": "2", "cpu": "4"})
    assert device.memory_bytes is None and device.resource == "nvidia.com/gpu"


@pytest.mark.parametrize(
    ("chip", "gib"), [("910B3", 64), ("910B4", 32), ("Ascend910A", 32), ("310P3", 24), ("huawei-Ascend910", 32), ("Ascend999", None)]
)
def test_ascends_memory_comes_from_a_table(chip: str, gib: int | None) -> None:
    (device,) = read_devices({"node.kubernetes.io/npu.chip.name": chip}, {"huawei.com/Ascend910": "8"})
    assert device.memory_bytes == (gib * GIB if gib else None)


def test_amds_older_labels_are_read_too() -> None:
    (device,) = read_devices({"beta.amd.com/gpu.vram": "64G"}, {"amd.com/gpu": "4"})
    assert device.memory_bytes == 64 * GIB


def test_versions_are_numbers() -> None:
    assert numbers("10.0") > numbers("9.0") and numbers("550.54.15") == (550, 54, 15) and numbers("7.x") == (7,) and numbers("") == ()


def test_the_older_spelling_of_the_drivers_labels_is_read() -> None:
    labels = {"nvidia.com/gpu.product": "X", "nvidia.com/gpu.memory": "1000", "nvidia.com/cuda.driver.major": "535"}
    labels |= {"nvidia.com/cuda.driver.minor": "104", "nvidia.com/cuda.driver.rev": "05"}
    (device,) = read_devices(labels, {"nvidia.com/gpu": "1"})
    assert device.driver == (535, 104, 5)


def test_sharing_that_only_the_products_name_tells_is_still_sharing() -> None:
    labels = {"nvidia.com/gpu.product": "Tesla-T4-SHARED", "nvidia.com/gpu.memory": "15360"}
    (device,) = read_devices(labels, {"nvidia.com/gpu": "8"})
    assert device.replicas == 2


# -- pods ------------------------------------------------------------------------------------------------------------------------------


def _pod(
    containers: list[int], init: Sequence[tuple[int, bool]] = (), phase: str = "Running", node: str | None = "n", **meta: Any
) -> dict[str, Any]:
    def container(count: int, always: bool = False) -> dict[str, Any]:
        resources = {"limits": {"nvidia.com/gpu": str(count), "cpu": "1"}} if count else {}
        return {"name": "c", "resources": resources, **({"restartPolicy": "Always"} if always else {})}

    spec = {"containers": [container(count) for count in containers], "initContainers": [container(*item) for item in init]}
    return {"metadata": {"uid": "u", **meta}, "spec": {**spec, **({"nodeName": node} if node else {})}, "status": {"phase": phase}}


@pytest.mark.parametrize(
    ("pod", "count"),
    [
        (_pod([1]), 1), (_pod([1, 2]), 3), (_pod([0]), None), (_pod([2], phase="Pending"), 2), (_pod([2], phase="Unknown"), 2),
        (_pod([2], phase="Succeeded"), None), (_pod([2], phase="Failed"), None), (_pod([2], node=None), None),
        (_pod([1], [(4, False)]), 4), (_pod([3], [(1, False)]), 3), (_pod([1], [(1, True)]), 2), (_pod([1], [(1, True), (4, False)]), 5),
        (_pod([2], deletionTimestamp="2026-01-01T00:00:00Z"), 2),
    ],
)  # fmt: skip
def test_a_pod_holds_what_the_scheduler_counts_until_it_is_gone(pod: dict[str, Any], count: int | None) -> None:
    use = reduce_pod(pod)
    assert (dict(use.requests)["nvidia.com/gpu"] if use else None) == count


def test_a_pod_of_ours_names_its_service() -> None:
    use = reduce_pod(_pod([1], namespace="team", labels={"gantline.io/service": "chat"}))
    assert use is not None and use.service == "team/chat"


def test_free_is_allocatable_less_pods_and_never_less_than_none() -> None:
    node = read_node(profiles.load("h100")[0])
    for used, free in ((0, 8), (3, 5), (9, 0)):
        facts = cluster_facts([node], [PodUse("u", "h100-0", (("nvidia.com/gpu", used),)), PodUse("v", "gone", (("nvidia.com/gpu", 8),))])
        assert [offer.free for offer in facts.nodes[0].offers] == [free]
    assert cluster_facts([node], None).nodes[0].offers[0].free is None


_WHO = st.tuples(
    st.sampled_from(["nvidia.com/gpu", "amd.com/gpu"]),
    st.integers(1, 8),
    st.integers(1, 4),
    st.sampled_from([(), (("zone", "a"),), (("zone", "b"),)]),
)


@given(st.lists(_WHO, max_size=12), st.lists(st.integers(0, 8), min_size=9, max_size=9))
def test_planned_pods_take_the_fullest_nodes_that_hold_them(wanted: list[Any], used: list[int]) -> None:
    """As if the nodes were looked through anew for each pod."""
    nodes = [read_node(node) for name in ("h100", "a10", "mi300x") for node in profiles.load(name, 3)]
    nodes = [replace(node, labels=node.labels | {("zone", "ab"[number % 2])}) for number, node in enumerate(nodes)]
    pods = [PodUse(f"u{n}", node.name, ((node.offers[0].device.resource, used[n]),)) for n, node in enumerate(nodes) if used[n]]
    reservations = [
        Reservation(f"ns/{n}", resource, count, number, node_selector=zone) for n, (resource, count, number, zone) in enumerate(wanted)
    ]
    free = {node.name: max(0, node.offers[0].count - used[number]) for number, node in enumerate(nodes)}
    for item in sorted(reservations, key=lambda item: (-item.count, item.service)):
        for _ in range(item.pods):
            fits = [node for node in nodes if _has(node, item) and free[node.name] >= item.count]
            if fits:
                free[min(fits, key=lambda node: (free[node.name], node.name)).name] -= item.count
    found = cluster_facts(nodes, pods, reservations=reservations).nodes
    assert {node.name: node.offers[0].free for node in found} == free


def _has(node: NodeFacts, item: Reservation) -> bool:
    return node.offers[0].device.resource == item.resource and node.matches((), dict(item.node_selector))


def test_equal_facts_are_equal_and_hashable() -> None:
    one, two = (cluster_facts([read_node(node) for node in profiles.load("mig-mixed")], []) for _ in range(2))
    assert one == two and len({one, two}) == 1


@pytest.mark.parametrize(
    ("toleration", "tolerated"),
    [
        ({"operator": "Exists"}, True), ({"key": "team", "operator": "Exists"}, True), ({"key": "team", "value": "a"}, True),
        ({"key": "team", "value": "b"}, False), ({"key": "other", "operator": "Exists"}, False),
        ({"key": "team", "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": "team", "value": "a", "effect": "NoSchedule"}, True),
    ],
)  # fmt: skip
def test_taints_are_tolerated_as_the_scheduler_does(toleration: dict[str, str], tolerated: bool) -> None:
    node = profiles.load("h100")[0]
    node["spec"]["taints"] = [
        {"key": "team", "value": "a", "effect": "NoSchedule"},
        {"key": "soft", "effect": "PreferNoSchedule"},
        {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"},
    ]
    taint = untolerated(read_node(node), [Toleration(**{"operator": "Equal", **toleration})])
    assert (taint is None) is tolerated


# -- the inventory ---------------------------------------------------------------------------------------------------------------------

POOLS = """
- name: gpus
  nodeSelector: {pool: gpus}
  resource: nvidia.com/gpu
  count: 4
  product: A10
  memory: 22Gi
  computeCapability: "8.6"
  driver: "580.1"
- {name: cpus, nodeSelector: {pool: cpus}, resource: cpu, hostCpu: 16, hostMemory: 64Gi}
"""
BARE = {"metadata": {"name": "n", "labels": {"pool": "gpus"}}, "status": {"allocatable": {"nvidia.com/gpu": "4"}}}


def test_the_inventory_explains_nodes_whose_labels_do_not() -> None:
    inventory = parse_inventory({"pools": POOLS})
    (offer,) = read_node(BARE, inventory).offers
    assert (offer.device.product, offer.device.memory_bytes, offer.count) == ("A10", 22 * GIB, 4)
    assert offer.device.labels == (("pool", ("gpus",)),)


def test_labels_are_better_witnesses_than_the_inventory() -> None:
    node = profiles.load("h100")[0]
    node["metadata"]["labels"]["pool"] = "gpus"
    (offer,) = read_node(node, parse_inventory({"pools": POOLS})).offers
    assert offer.device.product == "NVIDIA-H100-80GB-HBM3"
    assert offer.device.labels == (("pool", ("gpus",)),), "only the pool's labels are on nodes that an autoscaler adds"


def test_a_pool_is_a_node_only_while_it_has_none() -> None:
    inventory = parse_inventory({"pools": POOLS})
    assert [node.name for node in cluster_facts([], [], inventory=inventory).nodes] == ["pool gpus", "pool cpus"]
    living = read_node(BARE, inventory)
    assert [node.name for node in cluster_facts([living], [], inventory=inventory).nodes] == ["n", "pool cpus"]


@pytest.mark.parametrize(
    ("pools", "path"),
    [
        ("{", "pools"), ("a: 1", "pools"), ("[1]", "pools[0]"), ("[{name: x, resource: cpu}]", "pools[0].nodeSelector"),
        ("[{name: x, nodeSelector: {}, resource: cpu}]", "pools[0].nodeSelector"),
        ("[{name: x, nodeSelector: {a: b}, resource: example.com/tpu, memory: 1Gi}]", "pools[0].resource"),
        ("[{name: x, nodeSelector: {a: b}, resource: amd.com/gpu}]", "pools[0].memory"),
        ("[{name: x, nodeSelector: {a: b}, resource: nvidia.com/gpu, memory: 1Gi}]", "pools[0].computeCapability"),
        ("[{name: x, nodeSelector: {a: b}, resource: cpu, colour: red}]", "pools[0].colour"),
    ],
)  # fmt: skip
def test_a_wrong_inventory_is_refused_by_path(pools: str, path: str) -> None:
    with pytest.raises(SpecError) as error:
        parse_inventory({"pools": pools})
    assert error.value.path == path


def test_no_inventory_is_an_empty_one() -> None:
    assert parse_inventory({}) == Inventory() and parse_inventory({"pools": "[]"}) == Inventory()


# -- anything --------------------------------------------------------------------------------------------------------------------------

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
JSON = st.recursive(SCALARS, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=8)
KEYS = sorted({key for name in profiles.names() for node in profiles.load(name) for key in node["metadata"]["labels"]})
LABELS = st.dictionaries(st.sampled_from(KEYS), st.text())


@given(LABELS, st.dictionaries(st.sampled_from(["nvidia.com/gpu", "nvidia.com/mig-1g.10gb", "amd.com/gpu", "huawei.com/Ascend910"]), JSON))
def test_any_labels_and_amounts_are_read(labels: dict[str, str], allocatable: dict[str, Any]) -> None:
    node = read_node({"metadata": {"name": "n", "labels": labels}, "status": {"allocatable": allocatable}})
    assert all(offer.count > 0 for offer in node.offers)


@given(JSON, JSON, JSON)
def test_any_json_is_a_node_and_a_pod(metadata: Any, spec: Any, status: Any) -> None:
    thing = {"metadata": metadata, "spec": spec, "status": status}
    read_node(thing)
    reduce_pod({**thing, "spec": {"nodeName": "n", "containers": spec, "initContainers": status}})
