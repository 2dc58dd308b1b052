"""oci:// models that nodes mount as image volumes: asked for, or where everything is known to allow it, on a real API server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster, add_nodes
from gantline_operator.container_runtimes import mounts_images
from gantline_operator.pod_state import read_pod
from gantline_operator.resources import image_location
from gantline_operator.spec import parse_service

from tests.operator.harness import (
    TINY,
    Operator,
    answer,
    apply,
    assert_converged,
    children,
    copied,
    fates,
    get,
    inspected,
    install_crd,
    items,
    patch,
    remove_gpu_nodes,
    service,
    serving,
    status,
    volume,
    wait,
    wait_reason,
)  # fmt: skip

Object = dict[str, Any]
DIGEST = "sha256:" + "5e" * 32
URI = "oci://registry.example:5000/team/tiny:v1"
MOUNTED = {"name": "image-0", "image": {"reference": f"registry.example:5000/team/tiny@{DIGEST}", "pullPolicy": "IfNotPresent"}}
IMAGE = {**TINY, "revision": DIGEST, "imageFolder": "models"}
ARTIFACT = {**TINY, "revision": DIGEST}
NAMES = ("asked", "auto", "copied")


@pytest.fixture(scope="module")
def cluster(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    made = answer(artefact={"kind": "fetch", "bytes": TINY["weightBytes"]})
    found = inspected(**dict.fromkeys(NAMES, IMAGE), artifact=ARTIFACT)
    fetched = [("fetch", name, "complete", made, {}) for name in (*NAMES, "artifact")]
    fates(api_cluster, [*found, *fetched, ("quantize", "copied", "complete", copied(**TINY), {})])
    return api_cluster


@pytest.fixture
def operator(cluster: ApiCluster, namespace: str) -> Iterator[Operator]:
    with serving(cluster, namespace) as operator:
        yield operator
    remove_gpu_nodes(cluster, namespace)


def nodes(cluster: ApiCluster, namespace: str, name: str, runtime: str = "containerd://2.1.4", kubelet: str = "v1.36.3") -> Object:
    """A node of this test's own with these versions; the spec that goes to such nodes."""
    (node,) = profiles.load("cpu", 1)
    node["metadata"]["name"] += f"{namespace.removeprefix('test')}-{name}"
    node["metadata"]["labels"] |= {"for": namespace, "kubernetes.io/hostname": node["metadata"]["name"]}
    node["status"]["nodeInfo"] |= {"containerRuntimeVersion": runtime, "kubeletVersion": kubelet}
    add_nodes(cluster.client, [node])
    return {"accelerator": {"resource": "cpu", "nodeSelector": {"for": namespace}}}


def model(delivery: str, **more: Any) -> Object:
    return {"uri": URI, "delivery": delivery, **more}


def pod_of(cluster: ApiCluster, name: str, namespace: str) -> Object:
    spec: Object = get(cluster, "deployments", name, namespace)["spec"]["template"]["spec"]
    return spec


def test_an_image_is_mounted_with_its_pull_secret_and_nothing_is_fetched(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    where = nodes(cluster, namespace, "a", runtime="simulated://1")
    apply(cluster, service("asked", namespace, model=model("image", secretRef={"name": "login"}), **where))
    wait_reason(cluster, "asked", namespace, "Ready")
    pod = pod_of(cluster, "asked", namespace)
    assert [volume for volume in pod["volumes"] if volume["name"] == "image-0"] == [MOUNTED]
    (container,) = pod["containers"]
    assert {"name": "image-0", "mountPath": "/mnt/image", "readOnly": True} in container["volumeMounts"]
    assert container["args"][:2] == ["serve", "/mnt/image/models"] and pod["imagePullSecrets"] == [{"name": "login"}]
    assert [(item["kind"], item["path"]) for item in status(cluster, "asked", namespace)["artefacts"]] == [("image", "/mnt/image/models")]
    inspection = next(job["metadata"]["name"] for job in items(cluster, "jobs", namespace))
    assert not children(cluster, namespace, "persistentvolumeclaims") and children(cluster, namespace, "jobs") == [f"jobs/{inspection}"]
    assert_converged(cluster, "asked", namespace, children(cluster, namespace))


def test_auto_mounts_it_where_all_nodes_can_and_stays_with_that(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    where = nodes(cluster, namespace, "able")
    apply(cluster, service("auto", namespace, model=model("auto"), **where))
    wait_reason(cluster, "auto", namespace, "Ready")
    assert MOUNTED in pod_of(cluster, "auto", namespace)["volumes"]
    before = get(cluster, "deployments", "auto", namespace)["metadata"]["generation"]
    nodes(cluster, namespace, "older", runtime="containerd://1.7.27")
    cluster.kubectl("annotate", "gisvc/auto", "-n", namespace, "example.com/touched=1")
    time.sleep(2)
    assert get(cluster, "deployments", "auto", namespace)["metadata"]["generation"] == before
    volume(cluster, namespace, "auto-cache")
    patch(cluster, "auto", namespace, {"model": {"delivery": "files"}})
    wait(lambda: MOUNTED not in pod_of(cluster, "auto", namespace)["volumes"])
    wait_reason(cluster, "auto", namespace, "Ready")
    assert [item["kind"] for item in status(cluster, "auto", namespace)["artefacts"]] == ["fetch"]


@pytest.mark.parametrize(
    ("runtime", "kubelet"), [("containerd://1.7.27", "v1.36.3"), ("containerd://2.2.0", "v1.34.1"), ("other://9", "v1.36.3")]
)
def test_auto_fetches_files_where_one_node_may_not_be_able_and_stays_with_that(
    cluster: ApiCluster, namespace: str, operator: Operator, runtime: str, kubelet: str
) -> None:
    nodes(cluster, namespace, "able")
    where = nodes(cluster, namespace, "unable", runtime=runtime, kubelet=kubelet)
    volume(cluster, namespace, "auto-cache")
    apply(cluster, service("auto", namespace, model=model("auto"), **where))
    wait_reason(cluster, "auto", namespace, "Ready")
    assert pod_of(cluster, "auto", namespace)["containers"][0]["args"][1].startswith("/mnt/cache/fetch-")
    before = get(cluster, "deployments", "auto", namespace)["metadata"]["generation"]
    nodes(cluster, namespace, "unable")  # it was upgraded
    cluster.kubectl("annotate", "gisvc/auto", "-n", namespace, "example.com/touched=1")
    time.sleep(2)
    assert get(cluster, "deployments", "auto", namespace)["metadata"]["generation"] == before


def test_an_artifact_is_fetched_by_auto_and_refused_as_an_image(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    apply(cluster, service("artifact", namespace, model=model("image"), **nodes(cluster, namespace, "able")))
    refused = wait_reason(cluster, "artifact", namespace, "ImageVolumeUnavailable", "ModelReady")
    assert "is an artifact" in refused["message"] and not items(cluster, "deployments", namespace)
    volume(cluster, namespace, "artifact-cache")
    patch(cluster, "artifact", namespace, {"model": {"delivery": "auto"}})
    wait_reason(cluster, "artifact", namespace, "Ready")
    assert pod_of(cluster, "artifact", namespace)["containers"][0]["args"][1].startswith("/mnt/cache/fetch-")


@pytest.fixture
def policy(cluster: ApiCluster, namespace: str) -> Iterator[str]:
    """By which the namespace takes no image volumes."""
    path, name = "/apis/admissionregistration.k8s.io/v1", f"no-images-{namespace}"
    kinds = {"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"], "resources": ["deployments"]}
    cel = "!has(object.spec.template.spec.volumes) || object.spec.template.spec.volumes.all(v, !has(v.image))"
    rule = {"expression": cel, "message": "no image volumes in this house"}
    body = {"failurePolicy": "Fail", "matchConstraints": {"resourceRules": [kinds]}, "validations": [rule]}
    cluster.client.post(f"{path}/validatingadmissionpolicies", {"metadata": {"name": name}, "spec": body})
    selector = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}
    binding = {"policyName": name, "validationActions": ["Deny"], "matchResources": selector}
    cluster.client.post(f"{path}/validatingadmissionpolicybindings", {"metadata": {"name": name}, "spec": binding})
    yield name
    cluster.client.call("DELETE", f"{path}/validatingadmissionpolicybindings/{name}")
    cluster.client.call("DELETE", f"{path}/validatingadmissionpolicies/{name}")


def test_a_cluster_that_takes_none_is_found_out_by_a_dry_run_that_leaves_nothing(
    cluster: ApiCluster, namespace: str, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    where = nodes(cluster, namespace, "able")

    def is_in_force() -> bool:
        template = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "x", "image": "x"}], "volumes": [MOUNTED]}}
        body = {"metadata": {"name": "x"}, "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": template}}
        path = f"/apis/apps/v1/namespaces/{namespace}/deployments?dryRun=All"
        try:
            cluster.client.post(path, body)
        except Exception as error:
            return "no image volumes in this house" in str(error)
        return False

    wait(is_in_force)
    volume(cluster, namespace, "auto-cache")
    with serving(cluster, namespace):
        asked, auto = service("asked", namespace, model=model("image"), **where), service("auto", namespace, model=model("auto"), **where)
        apply(cluster, asked, auto)
        refused = wait_reason(cluster, "asked", namespace, "ImageVolumeUnavailable", "ModelReady")
        assert "no image volumes in this house" in refused["message"]
        wait_reason(cluster, "auto", namespace, "Ready")
        assert [item["metadata"]["name"] for item in items(cluster, "deployments", namespace)] == ["auto"]
        assert pod_of(cluster, "auto", namespace)["containers"][0]["args"][1].startswith("/mnt/cache/fetch-")
    with serving(cluster, namespace):  # after a restart all services are looked at by a survey first
        time.sleep(5)
        refused = wait_reason(cluster, "asked", namespace, "ImageVolumeUnavailable", "ModelReady")
        assert "no image volumes in this house" in refused["message"]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    remove_gpu_nodes(cluster, namespace)


def test_a_quantized_copy_is_made_from_the_mounted_image(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    where = nodes(cluster, namespace, "able")
    volume(cluster, namespace, "copied-cache")
    apply(cluster, service("copied", namespace, model=model("image"), quantization={"method": "awq"}, **where))
    wait_reason(cluster, "copied", namespace, "Ready")
    jobs = items(cluster, "jobs", namespace)
    assert [job["metadata"]["labels"]["gantline.io/role"] for job in jobs] == ["inspect", "quantize"]
    pod = jobs[1]["spec"]["template"]["spec"]
    assert MOUNTED in pod["volumes"] and pod["containers"][0]["args"][2] == "/mnt/image/models"
    assert pod_of(cluster, "copied", namespace)["containers"][0]["args"][1].startswith("/mnt/cache/awq-")
    assert MOUNTED not in pod_of(cluster, "copied", namespace)["volumes"]


def test_a_delivery_other_than_files_is_for_images_alone(cluster: ApiCluster, namespace: str) -> None:
    wrong = service("wrong", namespace, model={"uri": "hf://org/name", "delivery": "image"})
    with pytest.raises(Exception, match="a delivery other than files belongs to oci:// sources only"):
        apply(cluster, wrong)


@pytest.mark.parametrize(
    ("uri", "folder", "reference", "path"),
    [
        ("oci://registry.example/a/b:v1", "models", "registry.example/a/b", "/mnt/image/models"),
        ("oci://registry.example:5000/a/b", "", "registry.example:5000/a/b", "/mnt/image"),
        (f"oci://registry.example:5000/a/b:v1@{DIGEST}", "x/y", "registry.example:5000/a/b", "/mnt/image/x/y"),
    ],
)
def test_the_image_is_named_by_the_digest_that_was_inspected(uri: str, folder: str, reference: str, path: str) -> None:
    _, spec = parse_service(service("chat", "default", model={"uri": uri, "delivery": "image"}))
    location = image_location(spec, DIGEST, folder, 1000)
    assert (location.path, location.images[0].reference, location.pull_bytes) == (path, f"{reference}@{DIGEST}", 1000)


@pytest.mark.parametrize(
    ("runtime", "kubelet", "can"),
    [
        ("containerd://2.1.0", "v1.35.0", True),
        ("containerd://2.4.2", "v1.36.3-gke.100", True),
        ("cri-o://1.31.0", "v1.35.0", True),
        ("containerd://10.0.0", "v1.100.0", True),
        ("containerd://2.0.5", "v1.36.0", False),
        ("cri-o://1.30.9", "v1.36.0", False),
        ("containerd://2.1.0", "v1.32.9", False),
        ("containerd://2.1.0", "v1.34.0", None),
        ("docker://28.0.0", "v1.36.0", None),
        ("containerd://", "v1.36.0", None),
        ("containerd://2.1.0", "", None),
        ("", "", None),
    ],
)
def test_nodes_are_able_unable_or_do_not_tell(runtime: str, kubelet: str, can: bool | None) -> None:
    assert mounts_images({"containerRuntimeVersion": runtime, "kubeletVersion": kubelet}) is can


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (f'Back-off pulling image "{MOUNTED["image"]["reference"]}"', MOUNTED["image"]["reference"]),
        ('Back-off pulling image "registry.example/runtime:1"', "registry.example/runtime:1"),
    ],
)
def test_what_cannot_be_pulled_is_named_be_it_the_runtime_or_the_model(message: str, named: str) -> None:
    waiting = {"image": "registry.example/runtime:1", "state": {"waiting": {"reason": "ImagePullBackOff", "message": message}}}
    metadata = {"name": "x", "uid": "x", "creationTimestamp": "2026-01-01T00:00:00Z"}
    pod = {
        "metadata": metadata,
        "spec": {"volumes": [{"name": "tmp", "emptyDir": {}}, MOUNTED]},
        "status": {"containerStatuses": [waiting]},
    }
    trouble = read_pod(pod).trouble
    assert trouble is not None and trouble.message.startswith(f"The image {named} cannot be pulled (ImagePullBackOff).")
