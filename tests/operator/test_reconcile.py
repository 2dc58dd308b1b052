"""The operator on a real API server, through kubectl: from a manifest to children, conditions and events."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import preparation

from tests.operator.harness import (
    FACTS,
    SETTINGS,
    TINY,
    Operator,
    answer,
    apply,
    assert_converged,
    children,
    copied,
    event_reasons,
    fate,
    fates,
    get,
    gpu_nodes,
    inspected,
    install_crd,
    items,
    patch,
    remove_gpu_nodes,
    server_pods,
    service,
    status,
    volume,
    wait,
    wait_events,
    wait_reason,
)

BAD = ("NotAModel", "ModelNotFound", "UnsafeWeights", "InvalidCheckpoint", "UnsupportedArchitecture")
FOREIGN = {
    **TINY,
    "architecture": "OlmoForCausalLM",
    "family": "transformers",
    "fallbackReason": "Gantline has no implementation of OlmoForCausalLM",
}
TROUBLES = {
    "pull": ("image-pull", "", "ImagePullFailed"),
    "oom": ("oom", "", "OutOfMemory"),
    "crash": ("crash-loop", "", "EngineCrashLoop"),
    "cuda": ("crash-loop", answer("CudaOutOfMemory", message="No room.", cure="Lower it."), "CudaOutOfMemory"),
    "flag": ("crash-loop", answer("InvalidConfiguration", message="No such flag."), "InvalidConfiguration"),
}


@pytest.fixture(scope="module")
def world(api_cluster: ApiCluster) -> Iterator[ApiCluster]:
    """One operator for the whole cluster, and what it will find, by the services' names."""
    install_crd(api_cluster)
    fates(
        api_cluster,
        [
            *inspected(tiny=TINY, **dict.fromkeys(("big", "one", "two", "gated", "shared"), FACTS), **dict.fromkeys(TROUBLES, TINY)),
            *inspected(remote={**FACTS, "revision": "abc123"}, foreign=FOREIGN),
            ("fetch", "remote", "complete", answer(artefact={"kind": "fetch", "bytes": FACTS["weightBytes"]}), {}),
            ("quantize", "remote", "complete", copied(), {}),
            ("quantize", "shared", "complete", copied(), {}),
            ("quantize", "gated", "failed", answer("QualityGateFailed", message="Worse.", cure="Raise the limit."), {"exit_code": 65}),
            ("inspect", "slow", "never-ready", "", {}),
            *(
                ("inspect", f"bad-{name.lower()}", "failed", answer(name, message="The cause.", cure="The cure."), {"exit_code": 65})
                for name in BAD
            ),
            *(("server", name, how, message, {}) for name, (how, message, _) in TROUBLES.items()),
        ],
    )
    with Operator(api_cluster):
        yield api_cluster


@pytest.fixture
def cluster(world: ApiCluster, namespace: str) -> Iterator[ApiCluster]:
    """With one node that has no GPU, for good; nodes that the test adds for itself go at its end."""
    if not world.client.get("/api/v1/nodes").get("items"):
        world.simulate("cpu", 1)
    yield world
    remove_gpu_nodes(world, namespace)


def test_a_manifest_becomes_a_served_model_and_then_nothing_moves(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace))
    cluster.kubectl("wait", "--for=condition=Ready", "gisvc/tiny", "-n", namespace, "--timeout=60s")
    cluster.kubectl("wait", "--for=jsonpath={.status.startup.revision}", "gisvc/tiny", "-n", namespace, "--timeout=30s")
    found = status(cluster, "tiny", namespace)
    revision, source = found["revision"], found["model"]["inputs"]
    expected = [
        "serviceaccounts/tiny-runtime",
        "services/tiny",
        f"jobs/tiny-inspect-{source}",
        "deployments/tiny",
        f"controllerrevisions/tiny-{revision}",
    ]
    assert_converged(cluster, "tiny", namespace, expected)
    line = cluster.kubectl("get", "gisvc", "tiny", "-n", namespace, "--no-headers").stdout.split()
    assert line[:6] == ["tiny", "True", "Ready", "file:///models/tiny", "torch", "1"]
    assert found["url"] == f"http://tiny.{namespace}.svc"
    assert found["startup"]["revision"] == revision
    job = get(cluster, "jobs", f"tiny-inspect-{source}", namespace)
    assert job["spec"]["ttlSecondsAfterFinished"] == SETTINGS.job_retention_seconds
    wait_events(cluster, "tiny", namespace, "ModelInspected", "Planned", "RolloutStarted", "RolloutCompleted")
    assert len(event_reasons(cluster, "tiny", namespace)) == 4, "and nothing else"
    metadata = get(cluster, "inferenceservices", "tiny", namespace)["metadata"]
    assert "finalizers" not in metadata
    assert set(metadata.get("annotations", {})) <= {"kubectl.kubernetes.io/last-applied-configuration"}, "kopf keeps no notes on the object"


def test_describe_says_why_a_model_runs_by_transformers_implementation(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("foreign", namespace))
    sentence = f"transformers' own implementation runs it: {FOREIGN['fallbackReason']}."
    assert sentence in wait_reason(cluster, "foreign", namespace, "Inspected", "ModelReady")["message"]
    wait_reason(cluster, "foreign", namespace, "Ready")
    wait_events(cluster, "foreign", namespace, "ModelInspected")
    described = cluster.kubectl("describe", "gisvc/foreign", "-n", namespace).stdout
    status, _, told = described.partition("Events:")
    assert sentence in status and sentence in told
    assert "Fallback Reason:" in status


def test_a_remote_model_is_fetched_quantized_and_served_from_the_cache(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "l4")
    volume(cluster, namespace, "remote-cache")
    quantization = {"method": "awq", "maxPerplexityIncrease": "0.05"}
    apply(cluster, service("remote", namespace, model={"uri": "hf://org/name"}, quantization=quantization, **place))
    wait_reason(cluster, "remote", namespace, "Ready")
    found = status(cluster, "remote", namespace)
    conditions = {item["type"]: item for item in found["conditions"]}
    assert conditions["QuantizationReady"]["reason"] == "Quantized"
    assert conditions["ModelReady"]["reason"] == "Fetched"
    artefacts = {item["kind"]: item for item in found["artefacts"]}
    assert artefacts["awq"]["perplexity"] == {"before": "10", "after": "10.2"}
    assert artefacts["awq"]["facts"]["quantization"]["method"] == "awq"
    template = get(cluster, "deployments", "remote", namespace)["spec"]["template"]["spec"]
    assert template["containers"][0]["args"][:2] == ["serve", f"/mnt/cache/awq-{artefacts['awq']['hash']}"]
    jobs = {item["metadata"]["labels"]["gantline.io/role"]: item["spec"]["template"]["spec"] for item in items(cluster, "jobs", namespace)}
    assert jobs["fetch"]["containers"][0]["args"][-1] == "--revision=abc123", "the commit that was inspected, not a branch that moves"
    assert jobs["quantize"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert jobs["fetch"]["affinity"]["nodeAffinity"] == template["affinity"]["nodeAffinity"]
    wanted = [
        "Planned",
        "FetchStarted",
        "FetchSucceeded",
        "QuantizationStarted",
        "QuantizationSucceeded",
        "RolloutStarted",
        "RolloutCompleted",
    ]
    wait_events(cluster, "remote", namespace, *wanted)


def test_a_copy_worse_than_its_limit_never_serves_and_the_original_goes_on(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "l4")
    volume(cluster, namespace, "gated-cache")
    apply(cluster, service("gated", namespace, **place))
    wait_reason(cluster, "gated", namespace, "Ready")
    before = get(cluster, "deployments", "gated", namespace)["spec"]
    patch(cluster, "gated", namespace, {"quantization": {"method": "awq", "maxPerplexityIncrease": "0.05"}})
    refused = wait_reason(cluster, "gated", namespace, "QualityGateFailed")
    assert "still serves" in refused["message"]
    assert wait_reason(cluster, "gated", namespace, "QualityGateFailed", "Degraded")["status"] == "True"
    assert wait_reason(cluster, "gated", namespace, "Available", "Servable")["status"] == "True"
    assert get(cluster, "deployments", "gated", namespace)["spec"] == before
    # The operator judges too: a copy whose numbers are over the limit is refused whatever its Job thought of it.
    fate(cluster, "quantize", "gated", "complete", copied(10.0, 10.9))
    patch(cluster, "gated", namespace, {"quantization": {"maxPerplexityIncrease": "0.06"}})
    wait(lambda: status(cluster, "gated", namespace).get("artefacts"))
    wait_reason(cluster, "gated", namespace, "QualityGateFailed", "QuantizationReady")
    assert get(cluster, "deployments", "gated", namespace)["spec"] == before
    patch(cluster, "gated", namespace, {"quantization": {"maxPerplexityIncrease": "0.1"}})
    wait_reason(cluster, "gated", namespace, "Ready")
    assert len(items(cluster, "jobs", namespace)) == 3, "the copy was there already: no third quantize Job"
    wait(lambda: "QualityGateFailed" in event_reasons(cluster, "gated", namespace))


def test_a_bad_model_is_told_with_cause_and_cure(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, *(service(f"bad-{given.lower()}", namespace) for given in BAD))
    for given in BAD:
        name = f"bad-{given.lower()}"
        found = wait_reason(cluster, name, namespace, given)
        assert "The cause. The cure." in found["message"]
        assert wait_reason(cluster, name, namespace, given, "ModelReady")["status"] == "False"
        assert wait_reason(cluster, name, namespace, "WaitingForModel", "PlanResolved")["status"] == "Unknown"
    assert len(items(cluster, "jobs", namespace)) == len(BAD)
    assert not items(cluster, "deployments", namespace)


def test_a_stage_that_failed_for_good_starts_again_with_restarted_at(cluster: ApiCluster, namespace: str) -> None:
    name = "bad-invalidcheckpoint"
    apply(cluster, service(name, namespace, model={"uri": "hf://org/name"}))
    wait_reason(cluster, name, namespace, "InvalidCheckpoint")
    cluster.kubectl("annotate", f"gisvc/{name}", "-n", namespace, "gantline.io/restartedAt=now")
    wait(lambda: [item["metadata"]["name"][-2:] == "-1" for item in items(cluster, "jobs", namespace)] == [False, True])
    wait_reason(cluster, name, namespace, "InvalidCheckpoint")


def test_a_source_that_changed_in_place_is_looked_at_again_by_a_restart(cluster: ApiCluster, namespace: str) -> None:
    fates(cluster, inspected(edited=TINY))
    apply(cluster, service("edited", namespace))
    wait_reason(cluster, "edited", namespace, "Ready")
    fates(cluster, inspected(edited={**TINY, "fingerprint": "sha256:0c"}))
    cluster.kubectl("annotate", "gisvc/edited", "-n", namespace, "gantline.io/restartedAt=now")
    wait(lambda: status(cluster, "edited", namespace)["model"]["fingerprint"] == "sha256:0c")
    wait_reason(cluster, "edited", namespace, "Ready")
    assert len(items(cluster, "jobs", namespace)) == 2


def test_a_service_that_fits_nowhere_is_planned_again_when_nodes_come(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("big", namespace, accelerator={"resource": "auto"}))
    assert wait_reason(cluster, "big", namespace, "NoMatchingGPU", "PlanResolved")["status"] == "False"
    gpu_nodes(cluster, namespace, "l4")
    wait_reason(cluster, "big", namespace, "Ready")
    assert status(cluster, "big", namespace)["plan"]["product"] == "NVIDIA-L4"


def test_where_all_gpus_are_taken_the_pod_waits_and_runs_when_one_is_free(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "h100")
    apply(cluster, service("one", namespace, replicas=8, **place))
    wait_reason(cluster, "one", namespace, "Ready")
    apply(cluster, service("two", namespace, **place))
    found = wait_reason(cluster, "two", namespace, "WaitingForCapacity", "Scheduled")
    assert "Insufficient nvidia.com/gpu" in found["message"]
    assert wait_reason(cluster, "two", namespace, "Planned", "PlanResolved")["status"] == "True"
    assert wait_reason(cluster, "two", namespace, "WaitingForCapacity")["status"] == "False"
    cluster.kubectl("scale", "gisvc/one", "--replicas=7", "-n", namespace)
    wait_reason(cluster, "two", namespace, "Ready")


def test_two_services_planned_at_once_never_count_on_the_same_gpus(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "h100")
    gpu_nodes(cluster, namespace, "a100-80")
    apply(cluster, *(service(name, namespace, replicas=8, **place) for name in ("one", "two")))
    for name in ("one", "two"):
        wait_reason(cluster, name, namespace, "Ready")
    assert len({status(cluster, name, namespace)["plan"]["product"] for name in ("one", "two")}) == 2


def test_why_a_pod_does_not_serve_becomes_the_reason(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, *(service(name, namespace) for name in TROUBLES))
    for name, (_, _, reason) in TROUBLES.items():
        wait_reason(cluster, name, namespace, reason)
        assert wait_reason(cluster, name, namespace, reason, "Degraded")["status"] == "True"
        assert wait_reason(cluster, name, namespace, "NotAvailable", "Servable")["status"] == "False"


def test_suspend_runs_nothing_and_keeps_everything(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("slow", namespace))
    wait(lambda: items(cluster, "jobs", namespace))
    patch(cluster, "slow", namespace, {"suspend": True})
    wait_reason(cluster, "slow", namespace, "Suspended")
    wait(lambda: not children(cluster, namespace, "jobs"))
    fates(cluster, inspected(slow=TINY))
    patch(cluster, "slow", namespace, {"suspend": False})
    wait_reason(cluster, "slow", namespace, "Ready")
    patch(cluster, "slow", namespace, {"suspend": True})
    wait_reason(cluster, "slow", namespace, "Suspended", "Servable")
    wait(lambda: not server_pods(cluster, "slow", namespace))
    assert get(cluster, "deployments", "slow", namespace)["spec"]["replicas"] == 0
    patch(cluster, "slow", namespace, {"suspend": False})
    wait_reason(cluster, "slow", namespace, "Ready")
    assert len(items(cluster, "jobs", namespace)) == 1, "what was inspected is known"


def test_a_paused_service_is_left_alone_and_its_status_still_told(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace))
    wait_reason(cluster, "tiny", namespace, "Ready")
    cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "gantline.io/paused=true")
    assert wait_reason(cluster, "tiny", namespace, "Paused", "Progressing")["status"] == "False"
    assert wait_reason(cluster, "tiny", namespace, "Ready")["status"] == "True", "pausing changes nothing of what serves"
    cluster.kubectl("scale", "deployment/tiny", "--replicas=2", "-n", namespace)
    cluster.kubectl("delete", "service", "tiny", "-n", namespace)
    patch(cluster, "tiny", namespace, {"replicas": 3, "quantization": {"method": "awq"}})
    wait(lambda: status(cluster, "tiny", namespace)["observedGeneration"] == 2)
    wait(lambda: status(cluster, "tiny", namespace)["readyReplicas"] == 2)
    found = wait_reason(cluster, "tiny", namespace, "Paused")
    assert "gantline.io/paused" in found["message"]
    assert not [item for item in items(cluster, "services", namespace) if item["metadata"]["name"] == "tiny"]
    assert len(items(cluster, "jobs", namespace)) == 1 and not items(cluster, "persistentvolumeclaims", namespace)
    patch(cluster, "tiny", namespace, {"quantization": None})
    cluster.kubectl("annotate", "gisvc/tiny", "-n", namespace, "gantline.io/paused-")
    wait(lambda: status(cluster, "tiny", namespace)["readyReplicas"] == 3)
    wait_reason(cluster, "tiny", namespace, "Ready")
    assert get(cluster, "services", "tiny", namespace)
    wait_events(cluster, "tiny", namespace, "Paused", "Resumed")


def test_a_service_that_is_paused_from_the_start_gets_no_child(cluster: ApiCluster, namespace: str) -> None:
    manifest = service("tiny", namespace)
    manifest["metadata"]["annotations"] = {"gantline.io/paused": "true"}
    apply(cluster, manifest)
    wait_reason(cluster, "tiny", namespace, "Paused")
    assert wait_reason(cluster, "tiny", namespace, "Paused", "ModelReady")["status"] == "False"
    assert not children(cluster, namespace)
    cluster.kubectl("annotate", "--overwrite", "gisvc/tiny", "-n", namespace, "gantline.io/paused=false")
    wait_reason(cluster, "tiny", namespace, "Ready")


def test_kubectl_scale_reaches_the_deployment_and_what_is_not_needed_goes(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace))
    wait_reason(cluster, "tiny", namespace, "Ready")
    for count in (3, 1, 0):
        cluster.kubectl("scale", "gisvc/tiny", f"--replicas={count}", "-n", namespace)
        wait(lambda count=count: status(cluster, "tiny", namespace)["readyReplicas"] == count)
        wait_reason(cluster, "tiny", namespace, "Ready" if count else "ScaledToZero")
        wait(lambda count=count: len(items(cluster, "poddisruptionbudgets", namespace)) == (count > 1))
    scale = cluster.client.get(f"/apis/gantline.io/v1alpha1/namespaces/{namespace}/inferenceservices/tiny/scale")
    assert scale["status"]["selector"] == "gantline.io/service=tiny,gantline.io/role=server"


def test_a_source_claim_that_is_missing_is_named_and_waited_for(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "_MISSING_POLL_S", 0.5)
    apply(cluster, service("tiny", namespace, model={"uri": "pvc://models/tiny"}))
    found = wait_reason(cluster, "tiny", namespace, "ModelNotFound")
    assert "PersistentVolumeClaim models does not exist" in found["message"]
    assert not items(cluster, "jobs", namespace)
    volume(cluster, namespace, "models")
    claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "volumeName": f"{namespace}-models"}
    cluster.client.post(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims", {"metadata": {"name": "models"}, "spec": claim})
    wait_reason(cluster, "tiny", namespace, "Ready")


def test_replicas_that_a_one_node_volume_keeps_apart_are_told_so(cluster: ApiCluster, namespace: str) -> None:
    place = gpu_nodes(cluster, namespace, "l4")
    volume(cluster, namespace, "shared-cache")
    gpus = int(cluster.client.get(f"/api/v1/nodes/l4-0{namespace.removeprefix('test')}")["status"]["allocatable"]["nvidia.com/gpu"])
    apply(cluster, service("shared", namespace, replicas=gpus + 1, quantization={"method": "awq"}, **place))
    found = wait_reason(cluster, "shared", namespace, "CacheNotShareable")
    assert "ReadWriteMany" in found["message"]
    assert wait_reason(cluster, "shared", namespace, "Available", "Servable")["status"] == "True"


def test_a_deleted_service_leaves_nothing(cluster: ApiCluster, namespace: str) -> None:
    apply(cluster, service("tiny", namespace, replicas=2))
    wait_reason(cluster, "tiny", namespace, "Ready")
    cluster.kubectl("delete", "gisvc/tiny", "-n", namespace)
    wait(lambda: not children(cluster, namespace) and not items(cluster, "pods", namespace), what=lambda: children(cluster, namespace))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": -1}, "spec.replicas"),
        ({"engine": {"tensorParallel": 3}}, "spec.engine.tensorParallel"),
        ({"model": {"uri": "ftp://x/y"}}, "spec.model.uri"),
        ({"nonsense": 1}, "spec.nonsense"),
        ({"accelerator": {"resource": "cpu", "minMemory": "24Gi"}}, "minMemory"),
    ],
)
def test_a_wrong_manifest_is_refused_with_the_fields_path(world: ApiCluster, change: dict[str, object], words: str) -> None:
    manifest = service("tiny", "default")
    manifest["spec"] |= change
    refused = world.kubectl("apply", "--validate=strict", "--dry-run=server", "-f", "-", input=json.dumps(manifest), check=False)
    assert refused.returncode != 0
    assert words in refused.stderr


def test_a_spec_that_this_operator_does_not_understand_is_a_condition_and_no_retry(cluster: ApiCluster, namespace: str) -> None:
    """As after a downgrade: the cluster's definition knows a field that this operator lacks."""
    apply(cluster, service("tiny", namespace))
    wait_reason(cluster, "tiny", namespace, "Ready")
    path = "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/future"
    add = [{"op": "add", "path": path, "value": {"type": "string"}}]
    try:
        cluster.kubectl("patch", "crd", "inferenceservices.gantline.io", "--type=json", "-p", json.dumps(add))

        def is_kept() -> bool:
            patch(cluster, "tiny", namespace, {"future": "x"})
            return "future" in get(cluster, "inferenceservices", "tiny", namespace)["spec"]

        wait(is_kept)
        found = wait_reason(cluster, "tiny", namespace, "InvalidSpec")
        assert "spec.future" in found["message"]
        assert wait_reason(cluster, "tiny", namespace, "Available", "Servable")["status"] == "True"
        patch(cluster, "tiny", namespace, {"future": None})
        wait_reason(cluster, "tiny", namespace, "Ready")
    finally:
        install_crd(cluster)
