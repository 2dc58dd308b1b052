"""Services that share a cache volume, on a real API server: one copy, one Job, and room where nothing is in use."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_operator import stages
from gantline_operator.conditions import Reason
from gantline_operator.eviction import artefacts_of_pods
from gantline_operator.resources import fetch_hash, quantize_hash
from gantline_operator.spec import parse_service

from tests.operator.harness import (
    TINY,
    Operator,
    answer,
    apply,
    copied,
    event_reasons,
    fates,
    get,
    inspected,
    install_crd,
    items,
    patch,
    server_pods,
    service,
    serving,
    status,
    volume,
    wait,
    wait_events,
    wait_reason,
)  # fmt: skip

Object = dict[str, Any]
SIZE = TINY["weightBytes"]
FETCHED = answer(artefact={"kind": "fetch", "bytes": SIZE})


@pytest.fixture(scope="module")
def cluster(api_cluster: ApiCluster) -> ApiCluster:
    install_crd(api_cluster)
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    sharing = ("left", "right", "first", "second")
    copy = copied(**TINY)
    fates(
        api_cluster,
        [
            *inspected(**{name: {**TINY, "revision": "abc"} for name in sharing}),
            *(("fetch", name, "complete", FETCHED, {}) for name in sharing),
            *(("quantize", name, "complete", copy, {}) for name in sharing),
        ],
    )
    return api_cluster


@pytest.fixture
def operator(cluster: ApiCluster, namespace: str) -> Iterator[Operator]:
    with serving(cluster, namespace) as operator:
        yield operator


def claim(cluster: ApiCluster, namespace: str, limit: str = "") -> None:
    volume(cluster, namespace, "models")
    metadata: Object = {"name": "models", "namespace": namespace}
    if limit:
        metadata["annotations"] = {"gantline.io/cache-limit": limit}
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}, "storageClassName": ""}
    apply(cluster, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec})


def shared(name: str, namespace: str, uri: str = "hf://org/name", **spec: Any) -> Object:
    return service(name, namespace, model={"uri": uri}, cache={"claimName": "models", "accessMode": "ReadWriteMany"}, **spec)


def note(cluster: ApiCluster, namespace: str) -> Object:
    """The claim's note."""
    annotations = get(cluster, "persistentvolumeclaims", "models", namespace)["metadata"].get("annotations") or {}
    found: Object = json.loads(annotations.get("gantline.io/cache", "{}"))
    return found


def jobs(cluster: ApiCluster, namespace: str, role: str) -> list[str]:
    return [
        item["metadata"]["name"] for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == role
    ]


def served(cluster: ApiCluster, name: str, namespace: str) -> str:
    template = get(cluster, "deployments", name, namespace)["spec"]["template"]["spec"]
    return str(template["containers"][0]["args"][1]).removeprefix("/mnt/cache/")


def test_two_services_of_one_model_and_one_claim_fetch_and_quantize_once(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    claim(cluster, namespace)
    apply(cluster, *(shared(name, namespace, quantization={"method": "awq"}) for name in ("left", "right")))
    for name in ("left", "right"):
        wait_reason(cluster, name, namespace, "Ready")
        assert {item["kind"]: item["perplexity"] for item in status(cluster, name, namespace)["artefacts"] if item["kind"] == "awq"} == {
            "awq": {"before": "10", "after": "10.2"}
        }
    assert len(jobs(cluster, namespace, "fetch")) == len(jobs(cluster, namespace, "quantize")) == 1
    path = served(cluster, "left", namespace)
    assert served(cluster, "right", namespace) == path
    entries = note(cluster, namespace)["artefacts"]
    assert [user.partition(".")[0] for user in entries[path]["users"]] == ["left", "right"]
    source = next(name for name in entries if name.startswith("fetch-"))
    wait(lambda: not note(cluster, namespace)["artefacts"][source].get("users"), what=lambda: "what was quantized is needed no more")


def test_a_claim_that_was_made_anew_under_its_name_is_another_volume_and_filled_again(
    cluster: ApiCluster, namespace: str, operator: Operator
) -> None:
    claim(cluster, namespace)
    apply(cluster, shared("first", namespace))
    wait_reason(cluster, "first", namespace, "Ready")
    (before,) = status(cluster, "first", namespace)["artefacts"]
    uid = get(cluster, "persistentvolumeclaims", "models", namespace)["metadata"]["uid"]
    assert before["claimUid"] == uid
    (job,) = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "fetch"]

    patch(cluster, "first", namespace, {"suspend": True})
    wait(lambda: not server_pods(cluster, "first", namespace), what=lambda: "the claim is no more in use")
    cluster.kubectl("delete", "jobs", "--all", "-n", namespace, "--timeout=120s")  # pods that ended hold a claim too
    cluster.kubectl("delete", "pvc", "models", "-n", namespace, "--timeout=120s")  # waits until it is gone
    cluster.kubectl("delete", "pv", f"{namespace}-models", "--timeout=120s")
    claim(cluster, namespace)
    patch(cluster, "first", namespace, {"suspend": False})
    wait(
        lambda: (
            [item.get("claimUid") for item in status(cluster, "first", namespace).get("artefacts", [])]
            == [get(cluster, "persistentvolumeclaims", "models", namespace)["metadata"]["uid"]]
        ),
        what=lambda: status(cluster, "first", namespace),
    )
    (again,) = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "fetch"]
    assert again["metadata"]["uid"] != job["metadata"]["uid"], "the files were fetched again"
    wait_reason(cluster, "first", namespace, "Ready")
    wait_events(cluster, "first", namespace, "CacheReplaced")
    (told,) = [item for item in items(cluster, "events", namespace) if item["reason"] == "CacheReplaced"]
    assert told["type"] == "Warning" and "PersistentVolumeClaim models was made anew" in told["note"]


def test_a_note_that_was_restored_with_its_claim_fills_no_volume(cluster: ApiCluster, namespace: str, operator: Operator) -> None:
    claim(cluster, namespace)
    apply(cluster, shared("first", namespace))
    wait_reason(cluster, "first", namespace, "Ready")
    saved = get(cluster, "persistentvolumeclaims", "models", namespace)
    assert json.loads(saved["metadata"]["annotations"]["gantline.io/cache"])["claim"] == saved["metadata"]["uid"]

    cluster.kubectl("delete", "gisvc/first", "-n", namespace, "--timeout=60s")
    wait(lambda: not items(cluster, "pods", namespace))
    cluster.kubectl("delete", "pvc", "models", "-n", namespace, "--timeout=120s")
    cluster.kubectl("delete", "pv", f"{namespace}-models", "--timeout=120s")
    volume(cluster, namespace, "models")
    kept = {key: saved["metadata"][key] for key in ("name", "namespace")} | {"annotations": saved["metadata"]["annotations"]}
    kept["annotations"] = {"gantline.io/cache": kept["annotations"]["gantline.io/cache"]}
    spec = {key: value for key, value in saved["spec"].items() if key != "volumeName"}
    apply(cluster, {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": kept, "spec": spec})
    apply(cluster, shared("first", namespace))
    wait_reason(cluster, "first", namespace, "Ready")
    assert len(jobs(cluster, namespace, "fetch")) == 1, "what the note says is not there"
    written = note(cluster, namespace)
    assert (
        written["claim"]
        == get(cluster, "persistentvolumeclaims", "models", namespace)["metadata"]["uid"]
        != json.loads(kept["annotations"]["gantline.io/cache"])["claim"]
    )


def test_a_note_of_an_earlier_release_stays_in_force_and_gets_its_claims_uid(cluster: ApiCluster, namespace: str) -> None:
    claim(cluster, namespace)
    _, spec = parse_service(shared("first", namespace))
    folder = f"fetch-{fetch_hash(spec, 'abc')}"
    written = json.dumps({"artefacts": {folder: {"bytes": SIZE, "made": True, "used": "2026-01-01T00:00:00Z"}}})
    cluster.kubectl("annotate", "pvc", "models", "-n", namespace, f"gantline.io/cache={written}")
    with serving(cluster, namespace):
        apply(cluster, shared("first", namespace))
        wait_reason(cluster, "first", namespace, "Ready")
        assert served(cluster, "first", namespace) == folder and not jobs(cluster, namespace, "fetch")
        assert note(cluster, namespace)["claim"] == get(cluster, "persistentvolumeclaims", "models", namespace)["metadata"]["uid"]


def test_what_a_crash_left_on_a_full_volume_is_found_by_a_look_and_goes(
    cluster: ApiCluster, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody noted it: half a download of a Job whose service, and note, are no more."""
    monkeypatch.setitem(stages._PASSES, Reason.DISK_FULL, (10.0, 60.0))  # type: ignore[index]
    stray = "fetch-00000000ff"
    full = answer("DiskFull", message="the volume is full")
    holds = answer(artefact={"kind": "evict", "evicted": [], "found": {}, "halves": {stray: 30 * SIZE}})
    claim(cluster, namespace)
    found = [*inspected(crowded={**TINY, "revision": "abc"}), ("fetch", "crowded", "failed", full, {})]
    fates(cluster, [*found, ("evict", "crowded", "complete", holds, {})])
    with serving(cluster, namespace):
        apply(cluster, shared("crowded", namespace))
        wait(lambda: stray in note(cluster, namespace).get("artefacts", {}), what=lambda: note(cluster, namespace))
        assert ["evict", "/mnt/cache"] in evictions(cluster, namespace), "a look, which removes nothing"
        gone = answer(artefact={"kind": "evict", "evicted": [stray], "found": {}, "halves": {}})
        fates(cluster, [("evict", "crowded", "complete", gone, {}), ("fetch", "crowded", "complete", FETCHED, {})])
        wait(lambda: stray in note(cluster, namespace).get("evicted", {}), what=lambda: note(cluster, namespace), timeout_s=120)
        assert ["evict", "/mnt/cache", stray] in evictions(cluster, namespace)
        wait_reason(cluster, "crowded", namespace, "Ready", timeout_s=180)
        assert set(note(cluster, namespace)["artefacts"]) == {served(cluster, "crowded", namespace)}


def evictions(cluster: ApiCluster, namespace: str) -> list[list[str]]:
    """Arguments of the evict Jobs, in no order: two may be made in one second, and that is all that their age tells."""
    found = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "evict"]
    return [item["spec"]["template"]["spec"]["containers"][0]["args"] for item in found]


def test_artefacts_that_a_job_finds_beside_its_own_are_adopted_a_copy_with_its_quality(cluster: ApiCluster, namespace: str) -> None:
    claim(cluster, namespace)
    facts = {**TINY, "revision": "abc"}
    _, other = parse_service(shared("finder", namespace, uri="hf://org/other", quantization={"method": "awq"}))
    lost, copy = f"fetch-{fetch_hash(other, 'abc')}", f"awq-{quantize_hash(other, facts['fingerprint'])}"
    answered = answer(artefact={"kind": "fetch", "bytes": SIZE, "found": {lost: SIZE, copy: SIZE}, "halves": {}})
    found = [*inspected(finder=facts, adopter=facts, judge=facts), ("fetch", "finder", "complete", answered, {})]
    fates(cluster, [*found, ("quantize", "judge", "complete", copied(**TINY), {})])
    with serving(cluster, namespace):
        apply(cluster, shared("finder", namespace))
        wait_reason(cluster, "finder", namespace, "Ready")
        assert {lost, copy} < set(note(cluster, namespace)["artefacts"])
        apply(cluster, shared("adopter", namespace, uri="hf://org/other"))
        wait_reason(cluster, "adopter", namespace, "Ready")
        assert served(cluster, "adopter", namespace) == lost and len(jobs(cluster, namespace, "fetch")) == 1
        judged = {"method": "awq", "maxPerplexityIncrease": "0.05"}
        apply(cluster, shared("judge", namespace, uri="hf://org/other", quantization=judged))
        wait_reason(cluster, "judge", namespace, "Ready")
        assert served(cluster, "judge", namespace) == copy and len(jobs(cluster, namespace, "quantize")) == 1
        (quality,) = [item["perplexity"] for item in status(cluster, "judge", namespace)["artefacts"] if item["kind"] == "awq"]
        assert quality == {"before": "10", "after": "10.2"}


def test_what_nobody_uses_makes_room_what_is_served_stays_and_what_went_is_fetched_again(
    cluster: ApiCluster, namespace: str, operator: Operator
) -> None:
    claim(cluster, namespace, limit="148Mi")  # one model at a time: 128 MiB are kept beside what is fetched
    apply(cluster, shared("first", namespace))
    wait_reason(cluster, "first", namespace, "Ready")
    old = served(cluster, "first", namespace)
    apply(cluster, shared("second", namespace, uri="hf://org/other"))
    full = wait_reason(cluster, "second", namespace, "DiskFull", "ModelReady")
    assert "are in use" in full["message"] and "gantline.io/cache-limit" in full["message"]
    assert wait_reason(cluster, "second", namespace, "DiskFull", "Degraded")["status"] == "True"
    assert not jobs(cluster, namespace, "evict"), "what is served stays"
    wait_reason(cluster, "first", namespace, "Ready")

    fates(cluster, [("evict", "second", "complete", answer(artefact={"kind": "evict", "evicted": [old], "found": {}}), {})])
    patch(cluster, "first", namespace, {"suspend": True})
    wait_reason(cluster, "second", namespace, "Ready")
    new = served(cluster, "second", namespace)
    assert "EvictionStarted" in event_reasons(cluster, "second", namespace)
    (job,) = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "evict"]
    assert job["spec"]["template"]["spec"]["containers"][0]["args"] == ["evict", "/mnt/cache", old]
    after = note(cluster, namespace)
    assert old in after["evicted"] and set(after["artefacts"]) == {new}

    cluster.kubectl("delete", "gisvc/second", "-n", namespace)
    wait(lambda: not server_pods(cluster, "second", namespace))
    fates(cluster, [("evict", "first", "complete", answer(artefact={"kind": "evict", "evicted": [new], "found": {}}), {})])
    patch(cluster, "first", namespace, {"suspend": False})
    wait(lambda: old in note(cluster, namespace)["artefacts"])
    wait_reason(cluster, "first", namespace, "Ready")
    assert event_reasons(cluster, "first", namespace).count("FetchStarted") == 2
    assert served(cluster, "first", namespace) == old
    assert set(note(cluster, namespace)["artefacts"]) == {old}


@pytest.mark.skipif(not os.environ.get("GANTLINE_FULL_MATRIX"), reason="a minute and a half; GANTLINE_FULL_MATRIX=1")
def test_whatever_services_do_to_a_cache_nothing_that_a_pod_has_is_ever_evicted(cluster: ApiCluster, namespace: str) -> None:
    """Eight services over five models in a volume for two, suspended, woken, deleted and made again at random, for a minute."""
    chance = random.Random(7)
    claim(cluster, namespace, limit="150Mi")
    names, uris = [f"s{number}" for number in range(8)], [f"hf://org/m{number}" for number in range(5)]
    folders = [f"fetch-{fetch_hash(parse_service(shared('x', namespace, uri=uri))[1], 'abc')}" for uri in uris]
    gone = answer(artefact={"kind": "evict", "evicted": folders, "found": {}})
    facts = {**TINY, "revision": "abc"}
    roles = (("inspect", answer(facts=facts)), ("fetch", FETCHED), ("evict", gone))
    fates(cluster, [(role, name, "complete", message, {}) for name in names for role, message in roles])

    def make(name: str, uri: str) -> None:
        cluster.kubectl("delete", "gisvc", name, "-n", namespace, "--ignore-not-found")
        apply(cluster, shared(name, namespace, uri=uri))

    evicted: list[str] = []
    with serving(cluster, namespace):
        for name in names:
            make(name, chance.choice(uris))
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            name = chance.choice(names)
            if chance.random() < 0.3:
                make(name, chance.choice(uris))
            else:
                patch(cluster, name, namespace, {"suspend": chance.random() < 0.5})
            evicted += check_evictions(cluster, namespace, evicted)
        print(len(evicted), "evictions")
        assert evicted, "there was something to evict"
        for number, name in enumerate(names):
            make(name, uris[number % 2])
        for name in names:
            wait_reason(cluster, name, namespace, "Ready", timeout_s=240)
        check_evictions(cluster, namespace, evicted)
        entries = note(cluster, namespace)["artefacts"]
        assert {user.partition(".")[0] for entry in entries.values() for user in entry.get("users", [])} == set(names)


def check_evictions(cluster: ApiCluster, namespace: str, known: list[str]) -> list[str]:
    """New evict Jobs by name, none of which names what a pod that was there before it has."""
    found = [item for item in items(cluster, "jobs", namespace) if item["metadata"]["labels"]["gantline.io/role"] == "evict"]
    new = [job for job in found if job["metadata"]["name"] not in known]
    pods = [pod for pod in items(cluster, "pods", namespace) if pod["metadata"]["labels"]["gantline.io/role"] == "server"]
    for job in new:
        going = set(job["spec"]["template"]["spec"]["containers"][0]["args"][2:])
        held = artefacts_of_pods([pod for pod in pods if pod["metadata"]["creationTimestamp"] <= job["metadata"]["creationTimestamp"]])
        assert not going & held, (going & held, job["metadata"]["name"])
    return [job["metadata"]["name"] for job in new]
