"""`kubectl gantline`: the real kubectl finds the plugin and asks a real API server, with a person's own rights."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.binaries import find
from gantline_operator.conditions import Reason
from gantline_operator.kubectl.command import main
from gantline_operator.kubectl.explain import explain
from gantline_operator.kubectl.timeline import about
from gantline_operator.kubectl.top import Sample, read_metrics
from gantline_operator.pod_state import read_pod
from gantline_operator.reasons import look_up

from tests.operator.harness import (
    FACTS,
    TINY,
    apply,
    fates,
    gpu_nodes,
    inspected,
    install_crd,
    remove_gpu_nodes,
    service,
    serving,
    wait_events,
    wait_reason,
)

Object = dict[str, Any]
HUGE: Object = {**FACTS, "numLayers": 2000, "weightBytes": 900_000_000_000, "fingerprint": "sha256:0c"}


@dataclass(frozen=True)
class Site:
    cluster: ApiCluster
    namespace: str
    folder: Path
    """With the plugin in it, as an installation of the package puts it on the PATH."""

    def kubectl(self, *arguments: str, input: str | None = None) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig), "PATH": f"{self.folder}:{os.environ['PATH']}"}
        command = [str(find("kubectl")), *arguments]
        return subprocess.run(command, env=environment, input=input, capture_output=True, text=True, timeout=60)

    def run(self, *arguments: str, kubeconfig: Path | None = None) -> tuple[int, str, str]:
        """The plugin's exit code, output and complaints: in this process, since another one costs a second."""
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main([*arguments, "--kubeconfig", str(kubeconfig or self.cluster.kubeconfig)])
        return code, out.getvalue(), err.getvalue()

    def ask(self, *arguments: str, kubeconfig: Path | None = None) -> str:
        code, out, err = self.run(*arguments, "-n", self.namespace, kubeconfig=kubeconfig)
        assert code == 0, err
        return out


@pytest.fixture(scope="module")
def site(api_cluster: ApiCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A service that is ready, one whose name begins alike, and one whose model fits nowhere; the operator has gone."""
    folder = tmp_path_factory.mktemp("path")
    plugin = folder / "kubectl-gantline"
    plugin.write_text(f'#!/bin/sh\nexec {sys.executable} -m gantline_operator.kubectl.command "$@"\n')
    plugin.chmod(0o755)
    namespace = "asked"
    install_crd(api_cluster)
    api_cluster.client.post("/api/v1/namespaces", {"metadata": {"name": namespace}})
    fates(api_cluster, inspected(asked=TINY, enormous=HUGE, **{"asked-too": TINY}))
    if not api_cluster.client.get("/api/v1/nodes").get("items"):
        api_cluster.simulate("cpu", 1)
    place = gpu_nodes(api_cluster, namespace, "h100")
    with serving(api_cluster, namespace):
        apply(api_cluster, service("asked", namespace), service("asked-too", namespace), service("enormous", namespace, **place))
        for name in ("asked", "asked-too"):
            wait_reason(api_cluster, name, namespace, "Ready")
            wait_reason(api_cluster, name, namespace, "Available", "Servable")  # of pods, which are listed before the Deployment is asked
            wait_events(api_cluster, name, namespace, "RolloutCompleted")
        wait_reason(api_cluster, "enormous", namespace, "NeedsSeveralNodes")
    yield Site(api_cluster, namespace, folder)
    remove_gpu_nodes(api_cluster, namespace)
    api_cluster.client.call("DELETE", f"/api/v1/namespaces/{namespace}")


def test_explain_says_why_in_sentences_and_what_to_do_next(site: Site) -> None:
    lines = site.kubectl("gantline", "explain", "enormous", "-n", site.namespace).stdout.splitlines()
    assert lines[0].startswith("asked/enormous is not ready (NeedsSeveralNodes): the model does not fit on all GPUs of the largest node")
    assert any(line.startswith("Ready: ") and "would need" in line for line in lines)
    assert any(re.match(r"  8 x NVIDIA-H100-80GB-HBM3, bfloat16 +NeedsSeveralNodes +each of 8", line) for line in lines), lines
    assert lines[-1].startswith("Next: nodes with more GPU memory, a quantized copy")
    assert len(lines) == len(set(lines)), "nothing is said twice"

    good = site.ask("explain", "asked")
    assert good.startswith("asked/asked is ready: 1 of 1 replicas answer at http://asked.asked.svc.\nPlan: float32 on a CPU")
    assert "Next:" not in good


def test_explain_of_what_nobody_looks_at_or_what_is_not_there_says_so(site: Site) -> None:
    site.cluster.kubectl("create", "-f", "-", input=json.dumps(service("unseen", site.namespace)))
    assert "no operator has looked at it yet" in site.ask("explain", "unseen")
    code, _, error = site.run("explain", "nothing", "-n", site.namespace)
    assert code != 0 and "there is no InferenceService nothing in namespace asked. `kubectl get gisvc -A`" in error
    code, _, error = site.run("explain", "x", "--context", "nowhere")
    assert code == 64 and "no cluster" in error


def test_events_tell_the_story_of_one_service_with_its_jobs_and_pods(site: Site) -> None:
    lines = site.ask("events", "asked").splitlines()
    assert lines[0].split() == ["AGE", "OBJECT", "TYPE", "REASON", "NOTE"]
    reasons = [line.split()[3] for line in lines[1:] if "InferenceService/asked " in line]
    order = ["ModelInspected", "Planned", "RolloutStarted", "RolloutCompleted"]
    assert [reason for reason in reasons if reason in order] == order
    objects = {line.split()[1] for line in lines[1:]}
    assert any(name.startswith("Job/asked-inspect-") for name in objects) and any(name.startswith("Pod/asked-") for name in objects)
    assert not any("asked-too" in name for name in objects), "another service's, though its name begins alike"


def test_top_without_the_right_to_reach_pods_says_so_and_shows_the_rest(site: Site) -> None:
    for verb, resource in (("get,list", "inferenceservices.gantline.io"), ("list", "pods")):
        name = resource.partition(".")[0]
        site.cluster.kubectl("create", "role", name, f"--verb={verb}", f"--resource={resource}", "-n", site.namespace)
        account = f"--serviceaccount={site.namespace}:default"
        site.cluster.kubectl("create", "rolebinding", name, f"--role={name}", account, "-n", site.namespace)
    person = site.cluster.service_account_kubeconfig(site.namespace, "default")
    table = site.ask("top", kubeconfig=person)
    rows = {line.split()[0]: line.split() for line in table.splitlines()}
    assert rows["SERVICE"] == ["SERVICE", "REPLICAS", "RUNNING", "WAITING", "TOKENS/S", "KV", "CACHE", "REASON"]
    assert rows["asked"] == ["asked", "1/1", "-", "-", "-", "-", "Ready"] and rows["enormous"][-1] == "NeedsSeveralNodes"
    assert "You may not reach pods through the API server (`get` of `pods/proxy`)" in table
    assert "You may not list events here" in site.ask("events", "asked", kubeconfig=person)
    code, _, error = site.run("top", "-A", kubeconfig=person)
    assert code != 0 and "you may not read InferenceServices" in error


def test_top_names_pods_that_do_not_answer(site: Site) -> None:
    """Simulated pods never do; the real ones are asked in the tests of the one-node cluster."""
    table = site.ask("top", "asked", "--interval=0.2")
    assert re.search(r"^Pod asked-\S+ does not answer: ", table, re.M) and len(re.findall(r"^asked", table, re.M)) == 1


def test_plan_is_the_planner_of_gantline_plan_on_the_cluster_at_hand(site: Site) -> None:
    wanted = {"resource": "nvidia.com/gpu", "nodeSelector": {"for": site.namespace}}
    manifest = json.dumps(service("asked", site.namespace, accelerator=wanted))
    planned = site.kubectl("gantline", "plan", "-f", "-", input=manifest)
    assert "1 x NVIDIA-H100-80GB-HBM3 (nvidia.com/gpu)" in planned.stdout, planned.stderr


def test_every_reason_has_its_meaning_and_its_cure() -> None:
    for reason in Reason:
        found = look_up(reason)
        assert found is not None and found.means and found.cure and "](" not in found.means + found.cure, reason
    assert look_up("Unheard") is None


NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def told(conditions: list[tuple[str, str, str, str]], pods: list[Object] | None = None, generation: int = 1, **status: Any) -> list[str]:
    """What is said of a service with these conditions (type, status, reason, message) and pods."""
    listed = [dict(zip(("type", "status", "reason", "message"), item, strict=True)) for item in conditions]
    metadata = {"name": "chat", "namespace": "team", "generation": generation}
    found = {"metadata": metadata, "spec": {"replicas": 2}, "status": {"observedGeneration": 1, "conditions": listed, **status}}
    return explain(found, [read_pod(pod) for pod in pods or []], NOW)


def test_a_rollout_that_fails_while_others_serve_is_told_with_the_pods_words() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    containers = [{"name": "server", "ready": False, "restartCount": 0, "state": {"waiting": waiting}}]
    marks = {"gantline.io/role": "server", "gantline.io/service": "chat"}
    metadata = {"name": "chat-x", "uid": "u", "creationTimestamp": "2026-01-01T11:50:00Z", "labels": marks}
    pod = {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": {"phase": "Pending", "containerStatuses": containers}}
    lines = told(
        [("Ready", "False", "ImagePullFailed", "no such image"), ("Servable", "True", "Available", ""), ("Progressing", "False", "x", "y"),
         ("Degraded", "True", "ImagePullFailed", "no such image")],
        [pod], generation=2, readyReplicas=1, url="http://chat.team.svc",
    )  # fmt: skip
    assert lines[:4] == [
        "team/chat is not ready (ImagePullFailed): the image is not there, or not for us.",
        "The operator has not looked at the newest spec yet; what follows is about the one before.",
        "Meanwhile 1 of 2 replicas answer at http://chat.team.svc.",
        "Ready: no such image",
    ]
    assert lines[4].startswith("Pod chat-x on n1 (10m old): ImagePullFailed: ") and lines[5].startswith("Next: check `runtime.images`")
    assert len(lines) == 6, "nothing twice, and nothing of what is as it should be"


def test_a_job_at_work_is_named_with_its_progress_and_what_is_degraded_has_a_next_step_though_ready() -> None:
    stage = {"name": "fetch", "state": "Running", "job": "chat-fetch-1", "progress": "41 %"}
    lines = told([("Ready", "False", "Fetching", "The model is being downloaded.")], stages=[stage])
    assert "At work: fetch, Job chat-fetch-1: 41 %. Its log: kubectl logs job/chat-fetch-1" in lines and lines[-1].startswith("Next: wait")
    calm = told([("Ready", "True", "Ready", ""), ("Degraded", "True", "Forbidden", "a quota")], readyReplicas=2, url="u")
    assert calm[0] == "team/chat is ready: 2 of 2 replicas answer at u." and calm[-1] == "Next: grant it, or raise the quota."
    assert told([("Ready", "False", "OfTomorrow", "?")])[0].endswith("(OfTomorrow): a reason that this release does not know.")


def event(kind: str, name: str, at: str, **more: Any) -> Object:
    regarding = {"kind": kind, "name": name, "uid": more.pop("uid", "u")}
    return {"metadata": {"name": f"{name}.{at}"}, "regarding": regarding, "eventTime": f"2026-01-01T00:00:{at}.000000Z", **more}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([event("Pod", "chat-1", "02"), event("InferenceService", "chat", "01")], ["chat", "chat-1"]),
        ([event("Pod", "chat-two-1", "01"), event("Pod", "chatter-1", "02"), event("Job", "chat-two", "03")], []),
        ([event("InferenceService", "chat", "01", uid="of a service before")], []),
        ([{"metadata": {"name": "x"}, "regarding": {"kind": "Pod", "name": "chat-1"}}, {}], []),
        ([event("Pod", "chat-1", "01", series={"count": 3, "lastObservedTime": "2026-01-01T00:00:09Z"}), event("Job", "chat-j", "05")],
         ["chat-j", "chat-1"]),
    ],
)  # fmt: skip
def test_events_of_a_service_are_told_from_those_of_others(events: Sequence[Object], expected: list[str]) -> None:
    found = about(events, "chat", "u", {"chat-two", "other"})
    assert [item["regarding"]["name"] for _, item in found] == expected


METRICS = (
    "gantline_num_requests_running 2.0\ngantline_num_requests_waiting 1.0\ngantline_kv_cache_usage_perc 0.25\n"
    "# TYPE gantline_generation_tokens_total counter\ngantline_generation_tokens_total 90.0\n"
)


@pytest.mark.parametrize(
    ("text", "sample"), [(METRICS, Sample(1.0, 2.0, 1.0, 0.25, 90.0)), ("", None), ("<html>", None), ("up 1\n", None), ("a{b=\n", None)]
)
def test_metrics_of_our_engine_are_read_and_others_are_none(text: str, sample: Sample | None) -> None:
    assert read_metrics(text, 1.0) == sample
