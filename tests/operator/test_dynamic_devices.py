"""GPUs by Dynamic Resource Allocation: read from slices, asked for by a resource's name, claimed by the real scheduler."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster, add_nodes
from gantline_operator.accelerators import DEVICE_CLASS_PREFIX
from gantline_operator.conditions import Reason
from gantline_operator.dynamic_devices import DynamicFacts, read_claim, read_class, read_slice
from gantline_operator.facts import ClusterFacts, cluster_facts, read_node
from hypothesis import given
from hypothesis import strategies as st

from tests.operator.harness import (
    TINY,
    apply,
    fates,
    inspected,
    install_crd,
    patch,
    remove_gpu_nodes,
    server_pods,
    service,
    serving,
    status,
    wait,
    wait_reason,
)
from tests.operator.planning import accepted, node_objects, rejected

Object = dict[str, Any]
RESOURCE = "deviceclass.resource.kubernetes.io/gpu.nvidia.com"
API = "/apis/resource.k8s.io/v1"


def gpu(name: str, product: str = "NVIDIA H100 80GB HBM3", memory: str = "81559Mi", **more: Any) -> Object:
    attributes = {
        "type": {"string": "gpu"},
        "productName": {"string": product},
        "cudaComputeCapability": {"version": "9.0.0"},
        "driverVersion": {"version": "580.82.7"},
    }
    return {"name": name, "attributes": attributes, "capacity": {"memory": {"value": memory}}, **more}


def resource_slice(node: str, *devices: Object, generation: int = 1, driver: str = "gpu.nvidia.com") -> Object:
    pool = {"name": node, "generation": generation, "resourceSliceCount": 1}
    spec = {"driver": driver, "nodeName": node, "pool": pool, "devices": list(devices)}
    return {"metadata": {"name": f"{node}-{driver}-{generation}"}, "spec": spec}


CLASS = {
    "metadata": {"name": "gpu.nvidia.com"},
    "spec": {"selectors": [{"cel": {"expression": "device.driver == 'gpu.nvidia.com'"}}]},
}


def facts(*slices: Object, claims: tuple[Object, ...] = (), classes: tuple[Object, ...] = (CLASS,), any_class: bool = True) -> DynamicFacts:
    return DynamicFacts(
        [found for item in slices if (found := read_slice(item)) is not None],
        [found for item in classes if (found := read_class(item)) is not None],
        [found for item in claims if (found := read_claim(item)) is not None],
        any_class=any_class,
    )


def cluster(dynamic: DynamicFacts, nodes: list[Object] | None = None) -> ClusterFacts:
    read = [dynamic.add_to(read_node(node)) for node in nodes or node_objects("cpu*2")]
    return cluster_facts(read, dynamic.uses)


def claim(*devices: str, pool: str = "cpu-0", uid: str = "c", **annotations: str) -> Object:
    results = [{"driver": "gpu.nvidia.com", "pool": pool, "device": name, "request": "r"} for name in devices]
    return {"metadata": {"uid": uid, "annotations": annotations}, "status": {"allocation": {"devices": {"results": results}}}}


def test_a_slices_gpus_are_planned_for_like_others_and_asked_for_by_the_class() -> None:
    answer = accepted("70b", cluster(facts(resource_slice("cpu-0", *(gpu(f"gpu-{n}") for n in range(4))))))
    assert (answer.placement.resource, answer.placement.count, answer.product) == (RESOURCE, 4, "NVIDIA-H100-80GB-HBM3")
    assert answer.engine.backend == "cuda" and answer.placement.node_labels == () and not answer.placement.waiting


def test_a_class_that_names_a_resource_is_asked_for_by_that_name_and_others_need_a_scheduler_that_claims_for_them() -> None:
    named = {**CLASS, "spec": {**CLASS["spec"], "extendedResourceName": "nvidia.com/gpu"}}
    one = resource_slice("cpu-0", gpu("gpu-0"))
    assert accepted("8b", cluster(facts(one, classes=(named,), any_class=False))).placement.resource == "nvidia.com/gpu"
    assert rejected("8b", cluster(facts(one, any_class=False))).reason is Reason.NO_MATCHING_GPU
    assert rejected("8b", cluster(facts(one, classes=()))).reason is Reason.NO_MATCHING_GPU


def test_what_claims_of_others_hold_is_not_free_and_what_the_scheduler_claims_for_pods_is_counted_there() -> None:
    one = resource_slice("cpu-0", gpu("gpu-0"), gpu("gpu-1"))
    free = [cluster(facts(one, claims=claims)).nodes[0].offers[0].free for claims in ((), (claim("gpu-0"),), (claim("gpu-0", "gpu-1"),))]
    assert free == [2, 1, 0]
    own = claim("gpu-0", **{"resource.kubernetes.io/extended-resource-claim": "true"})
    assert read_claim(own) is None and read_claim({"metadata": {"uid": "c"}}) is None
    assert accepted("8b", cluster(facts(one, claims=(claim("gpu-0", "gpu-1"),)))).placement.waiting


def test_products_are_told_apart_by_a_label_where_there_are_several() -> None:
    nodes = copy.deepcopy(node_objects("cpu*2"))
    nodes[1]["metadata"]["labels"]["nvidia.com/gpu.product"] = "NVIDIA-L4"
    nodes[0]["metadata"]["labels"]["kubernetes.io/hostname"] = "cpu-0"
    found = cluster(facts(resource_slice("cpu-0", gpu("a")), resource_slice("cpu-1", gpu("a", "NVIDIA L4", "23034Mi"))), nodes)
    labels = [node.offers[0].device.labels for node in found.nodes]
    assert labels == [(("kubernetes.io/hostname", ("cpu-0",)),), (("nvidia.com/gpu.product", ("NVIDIA-L4",)),)]


def test_what_is_no_usable_device_of_a_node_is_left_out() -> None:
    mig = gpu("mig-0", attributes={"type": {"string": "mig"}, "cudaComputeCapability": {"version": "9.0.0"}}, consumesCounters=[{}])
    old = resource_slice("cpu-0", gpu("gone"), generation=1)
    new = resource_slice("cpu-0", gpu("gpu-0"), gpu("bad", taints=[{"effect": "NoExecute", "key": "xid"}]), mig, generation=2)
    other = resource_slice("cpu-0", gpu("tpu"), driver="tpu.example")
    assert [offer.count for offer in cluster(facts(old, new, other)).nodes[0].offers] == [1]
    whole = read_node(profiles.load("h100")[0])
    assert facts(resource_slice(whole.name, gpu("gpu-0"))).add_to(whole) == whole, "the same GPUs, offered twice"


def test_a_static_mig_device_is_a_slice() -> None:
    mig = gpu("m", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", "9728Mi")
    mig["attributes"]["type"] = {"string": "mig"}
    found = facts(resource_slice("cpu-0", mig), classes=({"metadata": {"name": "mig.nvidia.com"}},))
    device = found.add_to(read_node(node_objects("cpu")[0])).offers[0].device
    assert (device.resource, device.product) == (f"{DEVICE_CLASS_PREFIX}mig.nvidia.com", "NVIDIA-A100-SXM4-80GB-MIG-1g.10gb")
    assert device.sliced and device.memory_bytes == 9728 << 20 and (device.compute, device.driver) == ((9, 0), (580, 82, 7))


_PLAIN = st.none() | st.booleans() | st.integers() | st.text()
_KEYS = st.text() | st.sampled_from(["taints", "attributes", "capacity", "memory", "value", "type", "name", "annotations"])
_JSON = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_KEYS, inner, max_size=3), max_leaves=6)


@given(_JSON, _JSON)
def test_any_json_is_a_slice_a_class_and_a_claim_or_none(device: Any, status: Any) -> None:
    read_slice({"spec": {"driver": "gpu.nvidia.com", "nodeName": "n", "pool": device, "devices": [device]}})
    read_class({"metadata": device, "spec": status})
    read_claim({"metadata": device, "status": {"allocation": {"devices": {"results": [status, device]}}}})


@pytest.fixture
def dynamic_node(api_cluster: ApiCluster, namespace: str) -> Iterator[str]:
    """A node with two GPUs that only a slice tells of."""
    node = profiles.load("cpu", 1)[0]
    name = node["metadata"]["name"] = f"dra-{namespace.removeprefix('test-')}"
    node["metadata"]["labels"] |= {"for": namespace, "kubernetes.io/hostname": name}
    add_nodes(api_cluster.client, [node])
    api_cluster.client.post(f"{API}/deviceclasses", CLASS)
    api_cluster.client.post(f"{API}/resourceslices", resource_slice(name, gpu("gpu-0"), gpu("gpu-1")))
    yield name
    remove_gpu_nodes(api_cluster, namespace)
    api_cluster.kubectl("delete", "deviceclass/gpu.nvidia.com", f"resourceslice/{name}-gpu.nvidia.com-1", "--ignore-not-found")


def test_the_scheduler_claims_what_the_plan_asked_for_and_a_third_replica_waits(
    api_cluster: ApiCluster, namespace: str, dynamic_node: str
) -> None:
    if int(api_cluster.client.get("/version")["minor"]) < 36:
        pytest.skip("a claim by a resource's name needs Kubernetes 1.36")
    install_crd(api_cluster)
    fates(api_cluster, inspected(claimed=TINY))
    with serving(api_cluster, namespace):
        place = {"resource": "auto", "nodeSelector": {"for": namespace}}
        apply(api_cluster, service("claimed", namespace, accelerator=place, replicas=2))
        wait_reason(api_cluster, "claimed", namespace, "Ready")
        planned = status(api_cluster, "claimed", namespace)["plan"]
        assert (planned["resource"], planned["count"], planned["product"]) == (RESOURCE, 1, "NVIDIA-H100-80GB-HBM3")
        assert {pod["spec"]["nodeName"] for pod in server_pods(api_cluster, "claimed", namespace)} == {dynamic_node}
        claims = api_cluster.client.get(f"{API}/namespaces/{namespace}/resourceclaims")["items"]
        held = [result["device"] for item in claims for result in item["status"]["allocation"]["devices"]["results"]]
        assert sorted(held) == ["gpu-0", "gpu-1"]
        patch(api_cluster, "claimed", namespace, {"replicas": 3})
        wait_reason(api_cluster, "claimed", namespace, "WaitingForCapacity")
        wait(lambda: len(server_pods(api_cluster, "claimed", namespace)) == 3)
