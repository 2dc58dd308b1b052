"""What the planner decides, in tables: models by shapes of node by how full they are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gantline_operator import plan as planner
from gantline_operator.conditions import Reason
from gantline_operator.facts import ClusterFacts, cluster_facts, read_node
from gantline_operator.inventory import parse_inventory
from gantline_operator.plan import Plan, plan, reservation
from gantline_operator.shapes import MIN_DRIVER
from gantline_runtime.sizing import GIB, TENSOR_PARALLEL, legal_tensor_parallel

from tests.operator.planning import IMAGES, MODELS, accepted, cluster_of, node_objects, nodes_of, planned, rejected, spec_of

AWQ_ALWAYS = {"method": "awq"}
AWQ_IF_NEEDED = {"method": "awq", "policy": "IfNeeded"}


def _shape(answer: Plan) -> tuple[int, str]:
    return answer.engine.tp, answer.precision


@pytest.mark.parametrize(
    ("model", "profile", "expected"),
    [
        # The table worked out by hand for eight sessions of 8192 tokens.
        ("8b", "a10", (2, "bfloat16")), ("8b", "h100", (1, "bfloat16")), ("8b", "h200", (1, "bfloat16")), ("8b", "l4", (2, "bfloat16")),
        ("32b", "h100", (2, "bfloat16")), ("32b", "h200", (1, "bfloat16")), ("32b", "a100-80", (2, "bfloat16")),
        ("70b", "h100", (4, "bfloat16")), ("70b", "h200", (2, "bfloat16")), ("70b", "mi300x", (1, "bfloat16")),
        ("70b-awq", "a10", (4, "awq4")), ("70b-awq", "h100", (1, "awq4")), ("70b-awq", "h200", (1, "awq4")),
        ("72b-awq", "h100", (1, "awq4")),
        ("mqa", "a10", (1, "bfloat16")), ("mqa", "h100", (1, "bfloat16")),
        ("odd", "h100", (1, "bfloat16")),
        ("half-b", "l4", (1, "bfloat16")),
        ("8b", "mig-single", (1, "bfloat16")), ("8b", "mig-mixed", (1, "bfloat16")), ("8b", "ascend-910", (1, "bfloat16")),
    ],
)  # fmt: skip
def test_the_smallest_legal_split_that_fits_is_planned(model: str, profile: str, expected: tuple[int, str]) -> None:
    answer = accepted(model, cluster_of(profile))
    assert _shape(answer) == expected
    assert legal_tensor_parallel(MODELS[model], answer.engine.tp) is None
    assert answer.memory.fits and not answer.placement.waiting
    assert answer.placement.count == answer.engine.tp


@pytest.mark.parametrize(
    ("model", "profile", "reason", "clause"),
    [
        ("70b", "a10", Reason.NEEDS_SEVERAL_NODES, "these are all of a node, and it would take 3 such nodes"),
        ("32b", "a10", Reason.NEEDS_SEVERAL_NODES, "would need"),
        ("70b", "mig-single", Reason.MODEL_TOO_LARGE, "would need"),
        ("72b-awq", "a10", Reason.MODEL_TOO_LARGE, "would need"),
        ("8b", "cpu", Reason.NO_MATCHING_GPU, "no node of the cluster has one"),
        ("half-b", "t4-shared", Reason.NO_MATCHING_GPU, "time-slicing"),
    ],
)
def test_where_no_known_shape_fits_the_answer_says_why(model: str, profile: str, reason: Reason, clause: str) -> None:
    answer = rejected(model, cluster_of(profile))
    assert answer.reason is reason and clause in answer.message and answer.cure


def test_groups_that_cannot_be_split_are_an_option_turned_down_with_the_arithmetic() -> None:
    rows = [row for row in rejected("72b-awq", cluster_of("a10")).rejected if "14784, not a multiple of the" in row.message]
    assert [(row.option, row.reason) for row in rows] == [("2 x NVIDIA-A10, awq4", Reason.ILLEGAL_TENSOR_PARALLEL)]


@pytest.mark.parametrize(("model", "tp"), [("odd", 2), ("half-b", 4), ("72b-awq", 2), ("72b-awq", 8)])
def test_a_split_that_the_model_forbids_is_refused_when_asked_for(model: str, tp: int) -> None:
    answer = rejected(model, cluster_of("h100"), engine={"tensorParallel": tp})
    assert answer.reason is Reason.ILLEGAL_TENSOR_PARALLEL


def test_a_model_that_needs_more_than_the_whole_largest_node_says_so_unless_a_smaller_split_was_asked_for() -> None:
    for profile in ("h100", "mi300x", "ascend-910"):
        answer = rejected(replace(MODELS["70b"], num_layers=1200, weight_bytes=2_000_000_000_000), cluster_of(profile, "l4"))
        assert answer.reason is Reason.NEEDS_SEVERAL_NODES and "such nodes" in answer.message, profile
    few = rejected("70b", cluster_of("h100"), engine={"tensorParallel": 1})
    assert few.reason is Reason.MODEL_TOO_LARGE


def test_a_split_that_is_asked_for_is_taken_although_less_would_do() -> None:
    assert accepted("8b", cluster_of("h100"), engine={"tensorParallel": 4}).engine.tp == 4


def test_more_gpus_than_any_node_has_are_refused() -> None:
    answer = rejected("8b", cluster_of("a10"), engine={"tensorParallel": 8})
    assert answer.reason is Reason.NO_MATCHING_GPU and "more than" in answer.message


# -- quantization --------------------------------------------------------------------------------------------------------------------


def test_if_needed_quantizes_only_what_does_not_fit_as_it_is() -> None:
    fits = accepted("8b", cluster_of("h100"), quantization=AWQ_IF_NEEDED)
    assert (fits.quantize, fits.precision) == (False, "bfloat16")
    needs = accepted("70b", cluster_of("a10"), quantization=AWQ_IF_NEEDED)
    assert (needs.quantize, needs.precision, needs.engine.tp) == (True, "awq4", 4)
    whole = [row.reason for row in needs.rejected if "bfloat16" in row.option]
    expected = [Reason.MODEL_TOO_LARGE] * 2 + [Reason.NEEDS_SEVERAL_NODES, Reason.NO_MATCHING_GPU]
    assert whole == expected, "one, two and four are too few, and no node has eight"


def test_if_needed_asks_whether_it_fits_and_not_whether_it_is_free() -> None:
    full = cluster_of("h100", used={"h100-0": 8})
    answer = accepted("70b", full, quantization=AWQ_IF_NEEDED)
    assert (answer.quantize, answer.placement.waiting) == (False, True)


def test_always_quantizes() -> None:
    answer = accepted("8b", cluster_of("h100"), quantization=AWQ_ALWAYS)
    assert (answer.quantize, answer.precision) == (True, "awq4")
    assert answer.memory.weights < 0.4 * accepted("8b", cluster_of("h100")).memory.weights


def test_a_checkpoint_that_is_quantized_already_is_served_as_it_is() -> None:
    answer = accepted("70b-awq", cluster_of("h100"), quantization=AWQ_ALWAYS)
    assert (answer.quantize, answer.precision) == (False, "awq4")


def test_groups_that_do_not_divide_the_model_are_refused_or_left_out() -> None:
    odd = replace(MODELS["8b"], hidden_size=4128, fingerprint="odd hidden")
    assert rejected(odd, cluster_of("h100"), quantization=AWQ_ALWAYS).reason is Reason.INVALID_QUANTIZATION
    answer = accepted(odd, cluster_of("h100"), quantization=AWQ_IF_NEEDED)
    assert not answer.quantize and Reason.INVALID_QUANTIZATION in {row.reason for row in answer.rejected}


# -- backends and devices --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("profile", "backend", "device", "image", "resource"),
    [
        ("h100", "cuda", "cuda", "cuda", "nvidia.com/gpu"), ("a10", "cuda", "cuda", "cuda", "nvidia.com/gpu"),
        ("mi300x", "triton", "cuda", "rocm", "amd.com/gpu"), ("ascend-910", "torch", "auto", "ascend", "huawei.com/Ascend910"),
    ],
)  # fmt: skip
def test_the_backend_follows_from_the_device(profile: str, backend: str, device: str, image: str, resource: str) -> None:
    answer = accepted("8b", cluster_of(profile))
    assert (answer.engine.backend, answer.engine.device) == (backend, device)
    assert (answer.placement.image, answer.placement.resource) == (image, resource)


def test_turing_runs_the_torch_backend_in_float16_and_shared_gpus_only_when_allowed() -> None:
    small = replace(MODELS["tiny"], dtype="bfloat16")
    answer = accepted(small, cluster_of("t4-shared"), accelerator={"allowShared": True})
    assert (answer.engine.backend, answer.engine.dtype, answer.engine.tp) == ("torch", "float16", 1)
    assert answer.memory.usable < 3.75 * GIB, "a share of four has a quarter of the memory"
    assert answer.engine.num_cache_blocks, "on a shared GPU the cache has a fixed size: what looks free belongs to others, too"


def test_tensor_parallelism_never_spans_shared_or_sliced_gpus() -> None:
    for profile, accelerator in (("t4-shared", {"allowShared": True}), ("mig-single", {})):
        answer = rejected("8b", cluster_of(profile), engine={"tensorParallel": 2}, accelerator=accelerator)
        assert answer.reason is Reason.ILLEGAL_TENSOR_PARALLEL, profile


def test_bfloat16_on_turing_is_refused() -> None:
    answer = rejected("tiny", cluster_of("t4-shared"), accelerator={"allowShared": True}, engine={"dtype": "bfloat16"})
    assert answer.reason is Reason.UNSUPPORTED_GPU and "bfloat16" in answer.message


def _relabelled(profile: str, **labels: str | None) -> ClusterFacts:
    """A profile's nodes with labels changed; `_` stands for `.`, and None takes one away."""
    objects = node_objects(profile)
    for node in objects:
        for key, value in labels.items():
            name = "nvidia.com/" + key.replace("__", "-").replace("_", ".")
            node["metadata"]["labels"].pop(name, None)
            if value is not None:
                node["metadata"]["labels"][name] = value
    return cluster_facts([read_node(node) for node in objects], [])


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"gpu_compute_major": "7", "gpu_compute_minor": "0"}, Reason.UNSUPPORTED_GPU),
        ({"cuda_driver__version_full": "570.133.20"}, Reason.DRIVER_TOO_OLD),
        ({"gpu_memory": None}, Reason.GPU_LABELS_MISSING),
        ({"gpu_product": None}, Reason.GPU_LABELS_MISSING),
        ({"gpu_compute_major": None}, Reason.GPU_LABELS_MISSING),
        ({"gpu_memory": "many"}, Reason.GPU_LABELS_MISSING),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_with_its_own_reason(labels: dict[str, str | None], reason: Reason) -> None:
    answer = rejected("8b", _relabelled("h100", **labels))
    assert answer.reason is reason and answer.cure


def test_capabilities_and_drivers_are_compared_as_numbers() -> None:
    blackwell = _relabelled("h100", gpu_compute_major="10", gpu_compute_minor="0", cuda_driver__version_full="1000.1")
    assert accepted("8b", blackwell).engine.backend == "cuda"


def test_the_oldest_driver_is_that_of_the_cuda_that_is_pinned() -> None:
    pins = (Path(__file__).parents[2] / "requirements/runtime.txt").read_text()
    cuda = re.search(r"^nvidia-cuda-runtime==(\d+)\.", pins, re.M)
    assert cuda is not None and {12: (525,), 13: (580,)}[int(cuda.group(1))] == MIN_DRIVER


@pytest.mark.parametrize(("profile", "image"), [("h100", "cuda"), ("mi300x", "rocm"), ("ascend-910", "ascend")])
def test_a_device_without_an_image_for_it_is_refused(profile: str, image: str) -> None:
    images = {**IMAGES, image: ""}
    answer = rejected("8b", cluster_of(profile), images)
    assert answer.reason is Reason.NO_RUNTIME_IMAGE and image in answer.message


@pytest.mark.parametrize(
    ("profile", "backend"),
    [("mi300x", "cuda"), ("ascend-910", "triton"), ("ascend-910", "cuda"), ("t4-shared", "cuda"), ("t4-shared", "triton")],
)
def test_a_backend_that_the_device_cannot_run_is_refused(profile: str, backend: str) -> None:
    answer = rejected("tiny", cluster_of(profile), engine={"backend": backend}, accelerator={"allowShared": True})
    assert answer.reason is Reason.UNSUPPORTED_GPU


# -- accelerator's wishes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accelerator", "product"),
    [
        ({}, "NVIDIA-H100-80GB-HBM3"),
        ({"minMemory": "100Gi"}, "NVIDIA-H200"),
        ({"products": ["NVIDIA-A10"]}, "NVIDIA-A10"),
        ({"resource": "amd.com/gpu"}, "AMD_Instinct_MI300X_OAM"),
        ({"nodeSelector": {"kubernetes.io/hostname": "h200-0"}}, "NVIDIA-H200"),
    ],
)
def test_the_wishes_for_an_accelerator_narrow_the_choice(accelerator: dict[str, Any], product: str) -> None:
    answer = accepted("8b", cluster_of("a10", "h100", "h200", "mi300x"), accelerator=accelerator)
    assert answer.product == product
    assert answer.rejected, "the others are listed"


@pytest.mark.parametrize(
    "accelerator",
    [{"minMemory": "300Gi"}, {"products": ["NVIDIA-B200"]}, {"resource": "amd.com/gpu"}, {"nodeSelector": {"zone": "moon"}}],
)
def test_a_wish_that_no_node_meets_is_refused(accelerator: dict[str, Any]) -> None:
    answer = rejected("8b", cluster_of("a10", "h100"), accelerator=accelerator)
    assert answer.reason is Reason.NO_MATCHING_GPU and len(answer.rejected) == 2


def test_a_tainted_node_is_used_only_if_the_taint_is_tolerated() -> None:
    objects = node_objects("h100")
    objects[0]["spec"]["taints"] = [{"key": "team", "value": "research", "effect": "NoSchedule"}]
    cluster = cluster_facts([read_node(node) for node in objects], [])
    assert "team=research:NoSchedule" in rejected("8b", cluster).message
    tolerations = [{"key": "team", "operator": "Equal", "value": "research"}]
    assert accepted("8b", cluster, pod={"tolerations": tolerations}).engine.tp == 1


def test_a_taint_named_like_the_resource_is_tolerated_anyway() -> None:
    objects = node_objects("h100")
    objects[0]["spec"]["taints"] = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]
    answer = accepted("8b", cluster_facts([read_node(node) for node in objects], []))
    assert answer.placement.tolerated == ("nvidia.com/gpu",)


# -- capacity --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("used", "replicas", "waiting"),
    [
        ({}, 1, False), ({"h100-0": 7}, 1, False), ({"h100-0": 8}, 1, True),
        ({"h100-0": 6}, 2, False), ({"h100-0": 7}, 2, True), ({}, 9, True),
    ],
)  # fmt: skip
def test_a_shape_that_fits_but_has_too_little_free_is_planned_and_waits(used: dict[str, int], replicas: int, waiting: bool) -> None:
    answer = accepted("8b", cluster_of("h100", used=used), replicas=replicas)
    assert answer.placement.waiting is waiting


def test_free_gpus_of_different_nodes_are_not_added_up() -> None:
    cluster = cluster_of("h100*2", used={"h100-0": 5, "h100-1": 5})
    assert accepted("70b", cluster).placement.waiting, "four are needed on one node, and each has three"


def test_a_shape_with_room_goes_before_one_that_needs_fewer_gpus_but_is_full() -> None:
    cluster = cluster_of("h100", "a10", used={"h100-0": 8})
    answer = accepted("8b", cluster)
    assert answer.product == "NVIDIA-A10" and answer.engine.tp == 2
    assert Reason.INSUFFICIENT_FREE_GPU in {row.reason for row in answer.rejected}


@pytest.mark.parametrize(
    ("spec", "status"),
    [({"unschedulable": True}, None), ({}, {"type": "Ready", "status": "False"}), ({}, {"type": "Ready", "status": "Unknown"})],
)
def test_a_node_that_is_cordoned_or_not_ready_is_a_known_shape_without_room(spec: dict[str, Any], status: dict[str, str] | None) -> None:
    objects = node_objects("h100")
    objects[0]["spec"].update(spec)
    if status is not None:
        objects[0]["status"]["conditions"] = [status]
    assert accepted("8b", cluster_facts([read_node(node) for node in objects], [])).placement.waiting


def test_without_the_right_to_see_pods_the_scheduler_decides() -> None:
    assert not accepted("8b", cluster_facts(nodes_of("h100"), None), replicas=100).placement.waiting


def test_without_the_right_to_see_nodes_the_inventory_is_all_that_is_known() -> None:
    assert rejected("8b", cluster_facts(None, None)).reason is Reason.GPU_LABELS_MISSING
    inventory = parse_inventory({"pools": POOL})
    answer = accepted("8b", cluster_facts(None, None, inventory=inventory))
    assert answer.product == "H100" and answer.placement.waiting


POOL = """
- name: h100
  nodeSelector: {cloud.example/pool: h100}
  resource: nvidia.com/gpu
  count: 8
  product: H100
  memory: 79Gi
  computeCapability: "9.0"
  taints: [{key: nvidia.com/gpu, effect: NoSchedule}]
"""


def test_a_pool_at_zero_is_planned_for_by_its_own_labels_so_that_an_autoscaler_can_act() -> None:
    answer = accepted("70b", cluster_of("a10", inventory=parse_inventory({"pools": POOL})))
    assert (answer.product, answer.engine.tp, answer.placement.waiting) == ("H100", 4, True)
    assert [(label.key, label.values) for label in answer.placement.node_labels] == [("cloud.example/pool", ("h100",))]


def test_two_services_planned_at_once_never_count_on_the_same_gpu() -> None:
    used = {"h100-0": 7}
    first = accepted("8b", cluster_of("h100", used=used))
    taken = reservation("default/first", spec_of(), first, 1)
    second = accepted("8b", cluster_of("h100", used=used, reservations=[taken]))
    assert (first.placement.waiting, second.placement.waiting) == (False, True)


def test_a_reservation_takes_the_fullest_node_that_can_hold_it() -> None:
    one = reservation("default/one", spec_of(), accepted("8b", cluster_of("h100")), 1)
    cluster = cluster_of("h100*2", used={"h100-0": 4}, reservations=[one])
    assert accepted("70b", cluster).placement.waiting is False, "the empty node stays whole"
    assert [offer.free for node in cluster.nodes for offer in node.offers] == [3, 8]


def test_own_pods_that_the_plan_replaces_are_free_again() -> None:
    pods = {"h100-0": 8}
    assert accepted("8b", cluster_of("h100", used=pods)).placement.waiting
    assert not accepted("8b", cluster_of("h100", used=pods, credit=["uid-h100-0"])).placement.waiting


def test_a_pod_larger_than_the_nodes_host_memory_is_refused() -> None:
    objects = node_objects("a10")
    for node in objects:
        node["status"]["allocatable"]["memory"] = "4Gi"
    answer = rejected("half-b", cluster_facts([read_node(node) for node in objects], []))
    assert answer.reason is Reason.MODEL_TOO_LARGE and "host memory" in answer.message


# -- where pods are sent ---------------------------------------------------------------------------------------------------------------


def _sent_to(answer: Plan, cluster: ClusterFacts) -> set[str]:
    labels = [(label.key, label.values) for label in answer.placement.node_labels]
    return {node.name for node in cluster.nodes if node.matches(labels)}


def test_pods_are_sent_to_the_product_that_was_planned() -> None:
    cluster = cluster_of("h100*2", "h200", "a10")
    assert _sent_to(accepted("8b", cluster, accelerator={"products": ["NVIDIA-H200"]}), cluster) == {"h200-0"}


def test_nodes_of_one_product_with_an_old_driver_or_less_memory_are_told_apart() -> None:
    objects = node_objects("h100*3")
    old, small = objects[1]["metadata"]["labels"], objects[2]["metadata"]["labels"]
    old.update({"nvidia.com/cuda.driver-version.full": "550.54.15", "nvidia.com/cuda.driver-version.major": "550"})
    small["nvidia.com/gpu.memory"] = "8000"
    cluster = cluster_facts([read_node(node) for node in objects], [])
    answer = accepted("8b", cluster)
    assert _sent_to(answer, cluster) == {"h100-0"}
    assert Reason.DRIVER_TOO_OLD in {row.reason for row in answer.rejected}


def test_a_newer_driver_is_no_other_shape() -> None:
    objects = node_objects("h100*2")
    objects[1]["metadata"]["labels"]["nvidia.com/cuda.driver-version.full"] = "590.1"
    cluster = cluster_facts([read_node(node) for node in objects], [])
    assert _sent_to(accepted("8b", cluster, replicas=16), cluster) == {"h100-0", "h100-1"}


# -- numbers of the plan ---------------------------------------------------------------------------------------------------------------


def test_sessions_are_as_long_as_the_model_allows_or_the_memory_holds() -> None:
    assert accepted("half-b", cluster_of("h100")).engine.session_len == 32768
    held = accepted("8b", cluster_of("a10"))
    assert held.engine.session_len is not None and 8192 <= held.engine.session_len < 0.91 * held.memory.capacity_tokens
    assert accepted("8b", cluster_of("a10"), engine={"sessionLen": 4096}).engine.session_len == 4096


def test_a_longer_session_takes_more_gpus_and_one_beyond_the_model_is_refused() -> None:
    assert accepted("70b-awq", cluster_of("h100")).engine.tp == 1
    assert accepted("70b-awq", cluster_of("h100"), engine={"sessionLen": 131072}).engine.tp == 2
    assert rejected("half-b", cluster_of("h100"), engine={"sessionLen": 65536}).reason is Reason.INVALID_CONFIGURATION


def test_fewer_sessions_at_once_need_less_memory() -> None:
    assert accepted("8b", cluster_of("a10"), engine={"sessionLen": 2048, "maxBatchSize": 2}).engine.tp == 1


def test_a_smaller_share_for_the_cache_can_take_more_gpus() -> None:
    assert accepted("8b", cluster_of("a10"), engine={"cacheMaxEntryCount": "0.3"}).engine.tp == 4


def test_the_engine_is_started_with_what_the_spec_says() -> None:
    engine = {"maxBatchSize": 17, "cacheMaxEntryCount": "0.7", "enablePrefixCaching": False, "dtype": "float16", "backend": "torch"}
    got = accepted("8b", cluster_of("h100"), engine=engine).engine
    assert (got.max_batch_size, got.cache_max_entry_count, got.enable_prefix_caching) == (17, 0.7, False)
    assert (got.dtype, got.backend) == ("float16", "torch")


def test_an_unsupported_architecture_is_refused_before_all_else() -> None:
    answer = rejected(replace(MODELS["8b"], supported=False, architecture="FooForCausalLM"), cluster_of("h100"))
    assert answer.reason is Reason.UNSUPPORTED_ARCHITECTURE and "FooForCausalLM" in answer.message


def test_a_model_without_our_implementation_takes_one_gpu_and_the_plan_says_why() -> None:
    facts = replace(MODELS["8b"], family="transformers", architecture="OlmoForCausalLM")
    answer = accepted(facts, cluster_of("h100"))
    assert answer.engine.tp == 1
    assert any(row.reason is Reason.UNSUPPORTED_ARCHITECTURE and "OlmoForCausalLM" in row.message for row in answer.rejected)
    answer = accepted(replace(facts, fallback_reason="Gantline's has the activation silu, not 'gelu'"), cluster_of("h100"))
    assert any("the activation silu, not 'gelu': transformers' own runs it" in row.message for row in answer.rejected)
    refused = rejected(facts, cluster_of("h100"), engine={"tensorParallel": 2})
    assert refused.reason is Reason.ILLEGAL_TENSOR_PARALLEL and "on one device" in refused.message


# -- CPU -------------------------------------------------------------------------------------------------------------------------------


def test_auto_never_falls_back_to_a_cpu() -> None:
    assert rejected("tiny", cluster_of("cpu")).reason is Reason.NO_MATCHING_GPU


def test_a_cpu_is_used_when_it_is_asked_for() -> None:
    answer = accepted("tiny", cluster_of("cpu", "h100"), accelerator={"resource": "cpu"})
    assert (answer.engine.backend, answer.engine.device, answer.engine.dtype, answer.engine.tp) == ("torch", "cpu", "float32", 1)
    assert (answer.placement.image, answer.placement.resource, answer.placement.count, answer.placement.waiting) == ("cpu", "", 0, False)
    assert answer.engine.session_len == 2048
    assert answer.engine.num_cache_blocks is not None and answer.engine.num_cache_blocks * 64 >= 8 * 2048
    assert 1.2 * GIB < answer.placement.memory_bytes < 1.75 * GIB


def test_the_memory_that_the_user_gives_a_cpu_pod_is_what_the_plan_uses() -> None:
    few = accepted("half-b", cluster_of("cpu"), accelerator={"resource": "cpu"})
    limits = {"limits": {"memory": "16Gi", "cpu": "6"}}
    more = accepted("half-b", cluster_of("cpu"), accelerator={"resource": "cpu"}, pod={"resources": limits})
    assert (more.placement.memory_bytes, more.placement.cpu_millis) == (16 * GIB, 6000)
    assert (more.engine.num_cache_blocks or 0) > (few.engine.num_cache_blocks or 0)
    small = rejected("half-b", cluster_of("cpu"), accelerator={"resource": "cpu"}, pod={"resources": {"limits": {"memory": "2Gi"}}})
    assert small.reason is Reason.MODEL_TOO_LARGE


def test_a_model_too_large_for_the_largest_node_is_refused() -> None:
    assert rejected("70b", cluster_of("cpu"), accelerator={"resource": "cpu"}).reason is Reason.MODEL_TOO_LARGE


def test_several_processes_on_a_cpu_share_the_model() -> None:
    answer = accepted("tiny", cluster_of("cpu"), accelerator={"resource": "cpu"}, engine={"tensorParallel": 2})
    assert answer.engine.tp == 2 and answer.placement.memory_bytes > 2 * GIB


def test_without_nodes_or_image_a_cpu_service_is_refused() -> None:
    assert rejected("tiny", cluster_of(), accelerator={"resource": "cpu"}).reason is Reason.NO_MATCHING_NODE
    assert rejected("tiny", cluster_of("cpu"), {"cpu": ""}, accelerator={"resource": "cpu"}).reason is Reason.NO_RUNTIME_IMAGE
    answer = rejected("tiny", cluster_of("cpu"), accelerator={"resource": "cpu", "nodeSelector": {"disk": "ssd"}})
    assert answer.reason is Reason.NO_MATCHING_NODE


def test_quantized_weights_on_a_cpu_take_less_memory() -> None:
    plain = accepted("half-b", cluster_of("cpu"), accelerator={"resource": "cpu"})
    packed = accepted("half-b", cluster_of("cpu"), accelerator={"resource": "cpu"}, quantization=AWQ_ALWAYS)
    assert packed.precision == "awq4" and packed.memory.weights < plain.memory.weights


# -- properties ------------------------------------------------------------------------------------------------------------------------

ALL = ["a10", "a100-80", "ascend-910", "cpu", "h100", "h200", "l4", "mi300x", "mig-mixed", "mig-single", "t4-shared"]


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("profile", ALL)
def test_every_plan_is_legal_and_fits_and_every_refusal_explains_itself(model: str, profile: str) -> None:
    for sections in ({}, {"quantization": AWQ_IF_NEEDED}, {"accelerator": {"allowShared": True}}, {"accelerator": {"resource": "cpu"}}):
        answer = planned(model, cluster_of(profile), **sections)
        for row in answer.rejected:
            assert row.option and row.message and row.reason in Reason
        if not isinstance(answer, Plan):
            assert answer.message and answer.cure
            continue
        assert answer.engine.tp in TENSOR_PARALLEL and answer.memory.fits and answer.engine.session_len
        assert answer.engine.session_len <= MODELS[model].max_position_embeddings
        assert answer.engine.session_len <= answer.memory.capacity_tokens
        assert answer.load_seconds > 0
        assert answer == planned(model, cluster_of(profile), **sections), "equal facts give equal plans"


def test_the_same_nodes_in_another_order_give_the_same_plan() -> None:
    nodes = nodes_of("a10", "h100", "h200", "mi300x", "mig-mixed")
    one, other = cluster_facts(nodes, []), cluster_facts(reversed(nodes), [])
    assert one == other and hash(one) == hash(other)
    assert plan(spec_of(), MODELS["8b"], one, IMAGES) == plan(spec_of(), MODELS["8b"], other, IMAGES)


def test_the_planner_publishes_what_others_import() -> None:
    assert sorted(planner.__all__) == sorted(set(planner.__all__)) and all(hasattr(planner, name) for name in planner.__all__)
