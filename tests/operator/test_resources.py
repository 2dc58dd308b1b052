"""What is rendered for a service: golden files for the whole, and the rules that every object keeps."""

from __future__ import annotations

import argparse
import importlib
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from gantline_operator import resources
from gantline_operator.claim_sharing import Sharing
from gantline_operator.resources import MissingImage, ModelLocation, Mount, Parent
from gantline_operator.resources.naming import content_hash, job_name
from gantline_operator.resources.quantities import bytes_quantity, cpu_quantity, overlay
from gantline_operator.rollout_strategy import StrategyName
from gantline_operator.spec import parse_spec
from gantline_runtime.cli import COMMANDS
from gantline_runtime.config import EngineConfig, ServerConfig, from_arguments

from tests.operator.render_cases import (
    CASES,
    CPU_PLAN,
    CPU_STAGE,
    FINGERPRINT,
    FULL_SPEC,
    GPU_PLAN,
    GPU_STAGE,
    LONGEST,
    SETTINGS,
    Case,
    parent_of,
    service,
)

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
Object = dict[str, Any]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def pod_template(item: Object) -> Object:
    template: Object = item["spec"]["template"]
    return template


def with_pods(case: Case) -> list[Object]:
    return [item for item in case.objects() if item["kind"] in ("Job", "Deployment")]


def deployment(case: Case) -> Object:
    return next(item for item in case.objects() if item["kind"] == "Deployment")


def changed(case: Case, **parts: Any) -> Case:
    """`case` with parts of its spec given anew, as JSON."""
    base = {"model": {"uri": case.parent.spec.model.uri}, "accelerator": {"resource": "cpu"}, "quantization": {"method": "awq"}}
    spec = {name: {**base.get(name, {}), **value} if isinstance(value, dict) else value for name, value in {**base, **parts}.items()}
    return replace(case, parent=replace(case.parent, spec=parse_spec(spec)))


@pytest.mark.parametrize("name", CASES)
def test_objects_are_those_of_the_golden_file(name: str) -> None:
    text = yaml.dump_all(CASES[name].objects(), Dumper=_Plain, sort_keys=False, width=140, explicit_start=True)
    path = GOLDEN / f"{name}.yaml"
    if os.environ.get("GANTLINE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "if that is meant: GANTLINE_UPDATE_GOLDEN=1 pytest tests/operator/test_resources.py, and read the diff"


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_same_question_gets_the_same_answer(name: str) -> None:
    assert CASES[name].objects() == CASES[name].objects()


@pytest.mark.parametrize("name", CASES)
def test_every_object_is_labelled_owned_and_legally_named(name: str) -> None:
    case = CASES[name]
    for item in case.objects():
        marks, owners = item["metadata"]["labels"], item["metadata"]["ownerReferences"]
        assert marks["app.kubernetes.io/managed-by"] == "gantline-operator" and marks["gantline.io/service"] == case.parent.name
        assert marks["app.kubernetes.io/version"] == "0.1.0" and marks["gantline.io/role"] == marks["app.kubernetes.io/component"]
        assert all(len(value) <= 63 and re.fullmatch(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?", value) for value in marks.values())
        assert [(o["uid"], o["controller"], o["blockOwnerDeletion"]) for o in owners] == [(case.parent.uid, True, True)]
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", item["metadata"]["name"]) and len(item["metadata"]["name"]) <= 63
        assert item["metadata"]["namespace"] == "team"
        assert (item["apiVersion"], item["kind"]) in {(kind.api_version, kind.kind) for kind in resources.MANAGED_KINDS}


@pytest.mark.parametrize("name", CASES)
def test_pods_keep_the_restricted_standard_and_hold_no_token(name: str) -> None:
    for item in with_pods(CASES[name]):
        pod = pod_template(item)["spec"]
        assert pod["automountServiceAccountToken"] is False and pod["serviceAccountName"] == f"{CASES[name].parent.name}-runtime"
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["fsGroup"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["readOnlyRootFilesystem"] is True and security["allowPrivilegeEscalation"] is False
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"]["memory"] and container["resources"]["limits"]["memory"]
            assert {"/tmp", "/var/cache/gantline"} <= {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("name", CASES)
def test_every_mount_has_its_volume_and_no_name_stands_twice(name: str) -> None:
    for item in with_pods(CASES[name]):
        pod = pod_template(item)["spec"]
        container = pod["containers"][0]
        volumes = [volume["name"] for volume in pod["volumes"]]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes) and len(set(volumes)) == len(volumes)
        for listed in (container["env"], pod.get("imagePullSecrets", [])):
            names = [entry["name"] for entry in listed]
            assert len(set(names)) == len(names), "server-side apply refuses a key that stands twice"


@pytest.mark.parametrize("name", CASES)
def test_no_pod_carries_the_operators_version(name: str) -> None:
    for item in with_pods(CASES[name]):
        assert "app.kubernetes.io/version" not in pod_template(item)["metadata"]["labels"], "an upgraded operator would restart it"


@pytest.mark.parametrize("name", CASES)
def test_the_deployment_selects_its_own_pods_by_labels_that_never_change(name: str) -> None:
    item = deployment(CASES[name])
    selector = item["spec"]["selector"]["matchLabels"]
    assert selector == {"gantline.io/service": CASES[name].parent.name, "gantline.io/role": "server"}
    assert selector.items() <= pod_template(item)["metadata"]["labels"].items()
    for job in (entry for entry in CASES[name].objects() if entry["kind"] == "Job"):
        assert not selector.items() <= pod_template(job)["metadata"]["labels"].items()


def test_the_service_answers_at_port_80_by_the_runtimes_named_port() -> None:
    objects = CASES["quickstart"].objects()
    service = next(item for item in objects if item["kind"] == "Service")
    assert service["spec"]["ports"] == [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}]
    container = pod_template(deployment(CASES["quickstart"]))["spec"]["containers"][0]
    assert container["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert {probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe", "livenessProbe")} == {
        "startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health",
    }  # fmt: skip


def test_a_slow_load_has_time_and_an_endless_one_has_an_end() -> None:
    quick, slow = deployment(CASES["quickstart"]), deployment(CASES["gpu-from-claim"])
    budgets = []
    for item in (quick, slow):
        probe = pod_template(item)["spec"]["containers"][0]["startupProbe"]
        budgets.append(probe["periodSeconds"] * probe["failureThreshold"])
        assert item["spec"]["progressDeadlineSeconds"] > budgets[-1], "a rollout that still may succeed is not given up"
    assert budgets[0] >= 3 * 20 and budgets[1] >= 3 * 141.5 and budgets[1] < 3600


def test_the_kubelet_waits_for_streams_to_drain() -> None:
    case = changed(CASES["cpu-from-image"], rollout={"drainTimeout": "10m"})
    pod = pod_template(deployment(case))["spec"]
    assert pod["terminationGracePeriodSeconds"] > 600 + 3
    assert "--drain-timeout=600.0" in pod["containers"][0]["args"]


def test_ranks_of_one_pod_get_shared_memory_and_a_single_one_does_not() -> None:
    alone, shared = (pod_template(deployment(CASES[name]))["spec"] for name in ("quickstart", "gpu-from-claim"))
    assert not [volume for volume in alone["volumes"] if volume["name"] == "shm"]
    volume = next(volume for volume in shared["volumes"] if volume["name"] == "shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in shared["containers"][0]["volumeMounts"]


@pytest.mark.parametrize(
    ("strategy", "replicas", "sharing", "expected"),
    [
        ("Surge", 1, Sharing.ANY, (1, 0)),
        ("Surge", 3, Sharing.ONE_NODE, (1, 0)),
        ("Surge", 1, Sharing.ONE_POD, "Recreate"),
        ("Surge", 3, Sharing.ONE_POD, "Recreate"),
        ("Drain", 0, Sharing.ANY, "Recreate"),
        ("Drain", 1, Sharing.ANY, "Recreate"),
        ("Drain", 3, Sharing.ONE_NODE, "Recreate"),
        ("Drain", 2, Sharing.ANY, (0, 1)),
    ],
)
def test_a_revision_takes_over_by_its_strategy(strategy: StrategyName, replicas: int, sharing: Sharing, expected: Any) -> None:
    case = changed(CASES["cpu-from-image"], replicas=replicas)
    location = ModelLocation("/m", (), sharing)
    objects = resources.serving(case.parent, GPU_PLAN, location, SETTINGS, strategy=strategy)
    made = next(item for item in objects if item["kind"] == "Deployment")["spec"]["strategy"]
    if expected == "Recreate":
        assert made == {"type": "Recreate"}
    else:
        surge, unavailable = expected
        assert made == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}}


@pytest.mark.parametrize(("replicas", "suspend", "budgets"), [(1, False, 0), (2, False, 1), (2, True, 0), (0, False, 0)])
def test_a_disruption_budget_is_for_services_that_can_spare_a_pod(replicas: int, suspend: bool, budgets: int) -> None:
    objects = changed(CASES["cpu-from-image"], replicas=replicas, suspend=suspend).objects()
    found = [item for item in objects if item["kind"] == "PodDisruptionBudget"]
    assert len(found) == budgets and all(item["spec"]["maxUnavailable"] == 1 for item in found)


def test_scaling_and_suspending_leave_the_pods_as_they_are() -> None:
    cases = [changed(CASES["quickstart"], replicas=count, suspend=suspend) for count, suspend in ((1, False), (5, False), (5, True))]
    templates = [pod_template(deployment(case)) for case in cases]
    assert templates[0] == templates[1] == templates[2]
    assert [deployment(case)["spec"]["replicas"] for case in cases] == [1, 5, 0]


def test_whoever_mounts_a_cache_for_one_node_is_put_beside_the_others() -> None:
    terms = set()
    for item in with_pods(CASES["quickstart"]):
        pod, marks = pod_template(item)["spec"], pod_template(item)["metadata"]["labels"]
        affinity = pod.get("affinity", {}).get("podAffinity")
        if item["metadata"]["labels"]["gantline.io/role"] == "inspect":
            assert affinity is None, "it mounts no cache"
            continue
        term = affinity["requiredDuringSchedulingIgnoredDuringExecution"][0]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= marks.items(), "the first pod has to match its own term"
        terms.add(tuple(term["labelSelector"]["matchLabels"].items()))
    assert len(terms) == 1
    for item in with_pods(CASES["hub-to-gpu"]):
        assert "podAffinity" not in pod_template(item)["spec"].get("affinity", {}), "ReadWriteMany: any node will do"


def only_term(item: Object) -> Object:
    (term,) = pod_template(item)["spec"]["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    return dict(term["labelSelector"])


def test_whoever_mounts_a_source_for_one_node_is_put_beside_the_others() -> None:
    parent = replace(CASES["gpu-from-claim"].parent, source_sharing=Sharing.ONE_NODE)
    location = resources.source_location(parent.spec.model.uri, Sharing.ONE_NODE)
    assert location is not None
    inspect = resources.inspect_job(parent, CPU_STAGE, SETTINGS)
    made = {item["kind"]: item for item in resources.serving(parent, GPU_PLAN, location, SETTINGS, strategy="Drain")}
    ((mark,),) = {tuple(only_term(item)["matchLabels"].items()) for item in (inspect, made["Deployment"])}
    for item in (inspect, made["Deployment"]):
        assert mark in pod_template(item)["metadata"]["labels"].items(), "the first pod has to match its own term"
    for cache, either in ((Sharing.ONE_NODE, True), (Sharing.ANY, False)):
        both = replace(parent, cache_sharing=cache)
        quantize = resources.quantize_job(both, GPU_STAGE, SETTINGS, source=location, fingerprint=FINGERPRINT)
        own = pod_template(quantize)["metadata"]["labels"]["gantline.io/cache-volume"]
        expected = [{"key": mark[0], "operator": "In", "values": [mark[1], own]}]
        assert only_term(quantize) == ({"matchExpressions": expected} if either else {"matchLabels": dict([mark])})
        assert own != mark[1], "it is the cache's: what an eviction must not touch is found by it"


def test_jobs_run_where_the_server_will_run() -> None:
    for item in with_pods(CASES["hub-to-gpu"])[1:]:  # all but inspect, which needs no accelerator
        pod = pod_template(item)["spec"]
        requirements = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]
        assert requirements["matchExpressions"] == [{"key": "nvidia.com/gpu.product", "operator": "In", "values": ["NVIDIA-A10"]}]
        assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    timed = {"key": "dedicated", "operator": "Equal", "value": "llm", "effect": "NoExecute", "tolerationSeconds": 60}
    for item in with_pods(CASES["every-field"]):
        pod = pod_template(item)["spec"]
        assert pod["nodeSelector"] == {"pool": "inference"} and timed in pod["tolerations"]
        assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("high", "nvidia")
        assert pod["imagePullSecrets"] == [{"name": "installation"}, {"name": "team"}]


@pytest.mark.parametrize("name", CASES)
def test_a_job_runs_once_and_an_eviction_is_no_failure(name: str) -> None:
    for item in (entry for entry in CASES[name].objects() if entry["kind"] == "Job"):
        spec = item["spec"]
        assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never" and spec["activeDeadlineSeconds"] >= 3600
        assert spec["podFailurePolicy"]["rules"][0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert "ttlSecondsAfterFinished" not in spec, "its answer is read before it may go"
        assert pod_template(item)["spec"]["containers"][0]["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_sources_are_mounted_read_only_and_only_stages_write_to_the_cache() -> None:
    for name in CASES:
        for item in with_pods(CASES[name]):
            for mount in pod_template(item)["spec"]["containers"][0]["volumeMounts"]:
                role = item["metadata"]["labels"]["gantline.io/role"]
                if mount["mountPath"] == "/mnt/source" or (mount["mountPath"] == "/mnt/cache" and role == "server"):
                    assert mount["readOnly"] is True
                if mount["mountPath"] == "/mnt/cache" and role != "server":
                    assert "readOnly" not in mount


def test_a_source_and_a_cache_on_one_claim_are_one_volume() -> None:
    case = changed(CASES["quickstart"], model={"uri": "pvc://both/models/tiny"}, cache={"claimName": "both"})
    job = resources.quantize_job(case.parent, CPU_STAGE, SETTINGS, source=case.source(), fingerprint=FINGERPRINT)
    pod = pod_template(job)["spec"]
    assert [volume["persistentVolumeClaim"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume] == [{"claimName": "both"}]
    mounts = {mount["mountPath"]: (mount["name"], mount.get("readOnly", False)) for mount in pod["containers"][0]["volumeMounts"]}
    assert (mounts["/mnt/source"], mounts["/mnt/cache"]) == (("claim-0", True), ("claim-0", False))


def test_the_hubs_token_reaches_only_what_reads_the_hub() -> None:
    for item in with_pods(CASES["every-field"]):
        env = {entry["name"]: entry for entry in pod_template(item)["spec"]["containers"][0]["env"]}
        reads = item["metadata"]["labels"]["gantline.io/role"] in ("inspect", "fetch")
        assert ("HF_TOKEN" in env) is reads
        if reads:
            assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "HF_TOKEN"}}
            assert env["HF_ENDPOINT"]["value"] == "https://mirror.example", "the service's own goes before the installation's"
        else:
            assert env["HF_HUB_OFFLINE"]["value"] == "1"


@pytest.mark.parametrize(
    ("uri", "needed", "optional", "address"),
    [
        (
            "s3://models/tiny",
            {"AWS_ACCESS_KEY_ID": "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY": "AWS_SECRET_ACCESS_KEY"},
            {"AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_S3_ADDRESSING_STYLE", "GANTLINE_CA_CERTIFICATES"},
            ("AWS_ENDPOINT_URL", "http://minio:9000"),
        ),
        (
            "oci://registry.example/team/tiny:v1",
            {"DOCKER_AUTH_CONFIG": ".dockerconfigjson"},
            {"GANTLINE_CA_CERTIFICATES"},
            ("GANTLINE_INSECURE_REGISTRIES", "a:5000,b"),
        ),
    ],
)
def test_what_opens_a_source_reaches_only_what_reads_it(
    uri: str, needed: dict[str, str], optional: set[str], address: tuple[str, str]
) -> None:
    case = changed(CASES["quickstart"], model={"uri": uri, "secretRef": {"name": "keys"}})
    settings = replace(SETTINGS, s3_endpoint="http://minio:9000", insecure_registries=("a:5000", "b"))
    fetch = resources.fetch_job(case.parent, CPU_STAGE, settings, revision="c0ffee")
    quantize = resources.quantize_job(case.parent, CPU_STAGE, settings, source=case.model(), fingerprint=FINGERPRINT)
    inspect = resources.inspect_job(case.parent, CPU_STAGE, settings)
    for job in (inspect, fetch):
        env = {entry["name"]: entry for entry in pod_template(job)["spec"]["containers"][0]["env"]}
        references = {name: entry["valueFrom"]["secretKeyRef"] for name, entry in env.items() if "valueFrom" in entry}
        assert {name for name, reference in references.items() if reference.get("optional")} == optional
        assert {name: reference["key"] for name, reference in references.items() if not reference.get("optional")} == needed
        assert {reference["name"] for reference in references.values()} == {"keys"}
        assert env[address[0]]["value"] == address[1]
        assert "HF_ENDPOINT" not in env
    assert not any("valueFrom" in entry for entry in pod_template(quantize)["spec"]["containers"][0]["env"])
    public = changed(CASES["quickstart"], model={"uri": uri})
    inspect = resources.inspect_job(public.parent, CPU_STAGE, settings)
    assert not any("valueFrom" in entry for entry in pod_template(inspect)["spec"]["containers"][0]["env"])


def test_a_bucket_is_looked_at_again_when_its_pods_are_replaced_and_an_image_is_not() -> None:
    def inspected(uri: str, again: str) -> str:
        return resources.inspect_hash(replace(changed(CASES["quickstart"], model={"uri": uri}).parent, restarted_at=again))

    assert inspected("s3://models/tiny", "now") != inspected("s3://models/tiny", "")
    assert inspected("oci://registry.example/tiny:v1", "now") == inspected("oci://registry.example/tiny:v1", "")


def test_stages_are_told_what_to_do_with_what() -> None:
    inspect, fetch, quantize = (pod_template(job)["spec"]["containers"][0]["args"] for job in CASES["every-field"].jobs())
    assert inspect == ["inspect", "hf://org/name", "--revision=v1.0"]
    assert fetch[:2] == ["fetch", "hf://org/name"] and fetch[3] == "--revision=c0ffee", "the commit that was inspected"
    assert re.fullmatch(r"/mnt/cache/fetch-[0-9a-f]{10}", fetch[2])
    assert quantize[:3] == ["quantize", "awq", fetch[2]] and re.fullmatch(r"/mnt/cache/awq-[0-9a-f]{10}", quantize[3])
    assert quantize[4:] == ["--bits=4", "--group-size=64", "--max-perplexity-increase=0.05"]
    server = pod_template(deployment(CASES["every-field"]))["spec"]["containers"][0]["args"]
    assert server[:2] == ["serve", quantize[3]] and "--tp=2" in server and "--served-model-name=org/name:v1" in server


@pytest.mark.parametrize("name", CASES)
def test_the_runtimes_own_command_line_understands_every_container(name: str) -> None:
    for item in with_pods(CASES[name]):
        command, *rest = pod_template(item)["spec"]["containers"][0]["args"]
        parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
        importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
        parsed = parser.parse_args(rest)
        if command == "serve":
            engine, server = from_arguments(EngineConfig, parsed), from_arguments(ServerConfig, parsed)
            assert engine == CASES[name].plan.engine and (server.host, server.port) == ("0.0.0.0", 8000)
            assert server.drain_timeout == CASES[name].parent.spec.rollout.drain_timeout


def test_algorithm_versions_are_those_that_the_runtime_writes_into_manifests() -> None:
    for kind, module in (("fetch", "runtime/gantline_runtime/commands/fetch.py"), ("awq", "quant/gantline_quant/pipeline.py")):
        found = re.findall(r"^ALGORITHM_VERSION = (\d+)", (ROOT / module).read_text(), re.M)  # importing it would import torch
        assert found == [str(resources.ALGORITHM_VERSIONS[kind])], kind


def test_a_claims_folder_is_inspected_where_it_is_mounted() -> None:
    job = CASES["gpu-from-claim"].jobs()[0]
    assert pod_template(job)["spec"]["containers"][0]["args"] == ["inspect", "file:///mnt/source/llama-3.1-8b-instruct"]


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("file:///opt/model/", ModelLocation("/opt/model")),
        ("pvc://claim", ModelLocation("/mnt/source", (Mount("claim", "/mnt/source"),))),
        ("pvc://claim/", ModelLocation("/mnt/source", (Mount("claim", "/mnt/source"),))),
        ("pvc://claim.x/a/b/", ModelLocation("/mnt/source/a/b", (Mount("claim.x", "/mnt/source"),))),
        ("hf://org/name", None),
    ],
)
def test_a_local_source_has_a_place_in_the_pod(uri: str, expected: ModelLocation | None) -> None:
    assert resources.source_location(uri) == expected


CHANGES: list[tuple[str, Object]] = [
    ("model.uri", {"model": {"uri": "hf://org/other"}}),
    ("model.revision", {"model": {"revision": "v2"}}),
    ("model.servedName", {"model": {"servedName": "x"}}),
    ("model.secretRef", {"model": {"secretRef": {"name": "other"}}}),
    ("quantization.groupSize", {"quantization": {"groupSize": 32}}),
    ("quantization.maxPerplexityIncrease", {"quantization": {"maxPerplexityIncrease": "0.5"}}),
    ("accelerator.nodeSelector", {"accelerator": {"nodeSelector": {"pool": "other"}}}),
    ("replicas", {"replicas": 7}),
    ("cache.claimName", {"cache": {"claimName": "other"}}),
    ("cache.accessMode", {"cache": {"accessMode": "ReadWriteOnce"}}),
    ("rollout.drainTimeout", {"rollout": {"drainTimeout": "1s"}}),
    ("suspend", {"suspend": True}),
    *((f"pod.{name}", {"pod": {name: value}}) for name, value in {
        "tolerations": [], "priorityClassName": "low", "runtimeClassName": "runc", "imagePullSecrets": [], "env": [], "resources": {},
    }.items()),
]  # fmt: skip


@pytest.mark.parametrize(("field", "change"), CHANGES, ids=[name for name, _ in CHANGES])
def test_every_field_of_the_spec_that_is_not_the_planners_shows_in_an_object(field: str, change: Object) -> None:
    merged = {name: {**FULL_SPEC.get(name, {}), **value} if isinstance(value, dict) else value for name, value in change.items()}
    spec, before = {**FULL_SPEC, **merged}, CASES["every-field"]
    after = replace(before, parent=replace(before.parent, spec=parse_spec(spec)))
    assert before.objects() != after.objects(), field


def test_the_claim_follows_the_spec() -> None:
    def spec_of(**cache: Any) -> Object:
        claim: Object = resources.cache_claim(changed(CASES["quickstart"], cache=cache).parent, SETTINGS, 3 << 29)["spec"]
        return claim

    assert spec_of() == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1536Mi"}}}
    assert spec_of(storageClassName="fast", size="2Gi", accessMode="ReadWriteMany") == {
        "accessModes": ["ReadWriteMany"], "storageClassName": "fast", "resources": {"requests": {"storage": "2Gi"}},
    }  # fmt: skip


def test_a_revision_is_a_hash_of_inputs_that_no_release_changes() -> None:
    case = CASES["every-field"]
    # Change these lines only together with a decision to restart every running pod at the next upgrade.
    assert resources.revision(case.parent, case.plan, case.model()) == "5edf818f65"
    assert resources.revision(CASES["quickstart"].parent, CPU_PLAN, CASES["quickstart"].model()) == "350cef97bf"


@pytest.mark.parametrize(
    "other",
    [
        replace(CASES["every-field"], plan=replace(GPU_PLAN, placement=replace(GPU_PLAN.placement, count=4))),
        replace(CASES["every-field"], plan=replace(GPU_PLAN, engine=replace(GPU_PLAN.engine, max_batch_size=8))),
        replace(CASES["every-field"], quantized=False),
        replace(CASES["every-field"], parent=replace(CASES["every-field"].parent, restarted_at="later")),
    ],
    ids=["devices", "engine", "model", "restartedAt"],
)
def test_another_plan_model_or_restart_is_another_revision(other: Case) -> None:
    case = CASES["every-field"]
    assert resources.revision(other.parent, other.plan, other.model()) != resources.revision(case.parent, case.plan, case.model())


def test_the_image_and_what_the_cluster_has_free_are_no_part_of_the_revision() -> None:
    case = CASES["every-field"]
    waiting = replace(case.plan, placement=replace(case.plan.placement, waiting=True), load_seconds=5.0, rejected=())
    assert resources.revision(case.parent, waiting, case.model()) == resources.revision(case.parent, case.plan, case.model())


def test_a_template_that_was_kept_is_used_as_it_is() -> None:
    case, kept = CASES["quickstart"], {"metadata": {"labels": {"kept": "yes"}}, "spec": {}}
    objects = resources.serving(case.parent, case.plan, case.model(), SETTINGS, strategy="Drain", template=kept)
    assert pod_template(next(item for item in objects if item["kind"] == "Deployment")) == kept


def test_hashes_are_of_inputs_alone_and_differ_where_the_result_would() -> None:
    spec = CASES["every-field"].parent.spec
    remote = parent_of(service(FULL_SPEC))
    later = replace(remote, spec=replace(spec, model=replace(spec.model, revision="v2")))
    assert resources.inspect_hash(remote) != resources.inspect_hash(later)
    assert resources.fetch_hash(spec, "c0ffee") == resources.fetch_hash(replace(spec, replicas=9), "c0ffee")
    assert resources.fetch_hash(spec, "c0ffee") != resources.fetch_hash(spec, "decaf")
    stricter = replace(spec, quantization=replace(spec.quantization, max_perplexity_increase=0.01))
    assert resources.quantize_hash(spec, FINGERPRINT) == resources.quantize_hash(stricter, FINGERPRINT), "the same copy"
    assert resources.quantize_job_hash(spec, FINGERPRINT) != resources.quantize_job_hash(stricter, FINGERPRINT), "judged anew"
    finer = replace(spec, quantization=replace(spec.quantization, group_size=32))
    assert resources.quantize_hash(spec, FINGERPRINT) != resources.quantize_hash(finer, FINGERPRINT)


def test_a_restart_looks_again_at_files_that_are_read_in_place_and_keeps_what_was_fetched() -> None:
    for uri, again in (("pvc://models/llama", True), ("file:///models/llama", True), ("hf://org/llama", False)):
        parent = parent_of(service({"model": {"uri": uri}}))
        assert (resources.inspect_hash(parent) != resources.inspect_hash(replace(parent, restarted_at="monday"))) is again


def test_the_longest_names_fit() -> None:
    assert len(job_name(LONGEST, "quantize", "0" * 10, 99)) == 63
    assert content_hash({"b": 1, "a": 2}) == content_hash({"a": 2, "b": 1}) and len(content_hash({})) == 10


def test_a_retry_is_a_job_of_its_own() -> None:
    parent = CASES["quickstart"].parent
    first, second = (resources.inspect_job(parent, CPU_STAGE, SETTINGS, attempt=n) for n in (0, 1))
    assert second["metadata"]["name"] == f"{first['metadata']['name']}-1"
    assert [job["metadata"]["annotations"] for job in (first, second)] == [{"gantline.io/attempt": "0"}, {"gantline.io/attempt": "1"}]


def test_an_image_that_is_not_set_is_named() -> None:
    without = replace(SETTINGS, images={"cpu": "x"})
    with pytest.raises(MissingImage, match=r"runtime\.images\.cuda"):
        resources.serving(CASES["gpu-from-claim"].parent, GPU_PLAN, CASES["gpu-from-claim"].model(), without, strategy="Drain")
    with pytest.raises(MissingImage, match=r"runtime\.images\.cuda"):
        resources.fetch_job(CASES["hub-to-gpu"].parent, GPU_STAGE, without)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (({}, {}), ({"cpu": "2", "memory": "4Gi"}, {"memory": "4Gi"})),
        (({"memory": "8Gi"}, {}), ({"cpu": "2", "memory": "8Gi"}, {"memory": "8Gi"})),
        (({"memory": "1Gi"}, {}), ({"cpu": "2", "memory": "1Gi"}, {"memory": "4Gi"})),
        (({}, {"memory": "2Gi"}), ({"cpu": "2", "memory": "2Gi"}, {"memory": "2Gi"})),
        (({}, {"cpu": "500m"}), ({"cpu": "500m", "memory": "4Gi"}, {"memory": "4Gi", "cpu": "500m"})),
        (({"memory": "9Gi"}, {"memory": "8Gi"}), ({"cpu": "2", "memory": "9Gi"}, {"memory": "8Gi"})),
        (({"ephemeral-storage": "1Gi"}, {}), ({"cpu": "2", "memory": "4Gi", "ephemeral-storage": "1Gi"}, {"memory": "4Gi"})),
    ],
)
def test_a_users_amounts_go_first_and_ours_never_contradict_them(theirs: Any, expected: Any) -> None:
    assert overlay({"cpu": "2", "memory": "4Gi"}, {"memory": "4Gi"}, *theirs) == expected


def test_threads_on_a_cpu_follow_the_pods_share_of_it() -> None:
    def threads(case: Case, tp: int = 1) -> str | None:
        plan = replace(case.plan, engine=replace(case.plan.engine, tp=tp))
        template = resources.build_template(case.parent, plan, case.model(), SETTINGS)
        env = {entry["name"]: entry.get("value") for entry in template["spec"]["containers"][0]["env"]}
        return env.get("OMP_NUM_THREADS")

    case = changed(CASES["cpu-from-image"], pod={"resources": {"requests": {"cpu": "6"}}})
    assert (threads(CASES["quickstart"]), threads(case), threads(case, 2), threads(CASES["gpu-from-claim"])) == ("1", "6", "3", None)


def test_amounts_are_written_as_people_would() -> None:
    assert [bytes_quantity(n) for n in (1 << 30, 3 << 29, (1 << 20) + 1)] == ["1Gi", "1536Mi", "2Mi"]
    assert [cpu_quantity(n) for n in (2000, 500, 1500)] == ["2", "500m", "1500m"]


def test_our_variables_stand_unless_the_user_may_change_them() -> None:
    case = changed(CASES["cpu-from-image"], pod={"env": [{"name": "OMP_NUM_THREADS", "value": "9"}, {"name": "NEW", "value": "1"}]})
    env = {entry["name"]: entry["value"] for entry in pod_template(deployment(case))["spec"]["containers"][0]["env"]}
    assert (env["OMP_NUM_THREADS"], env["NEW"], env["GANTLINE_PLANNED_BYTES"]) == ("9", "1", str(CPU_PLAN.memory.total))


def test_a_parent_needs_no_more_than_its_spec() -> None:
    parent = Parent("chat", "team", "uid", parse_spec({"model": {"uri": "hf://a/b"}}))
    assert (parent.served_name, parent.cache_claim, parent.sharing_of_cache) == ("chat", "chat-cache", Sharing.ONE_NODE)
