"""Figures of the control plane on a real API server: from a spec to its first child, changes at rest, memory.

    python -m benchmarks.operator_scale [--services 200] [--nodes 100] [--latency-services 50] [--rest 60]

The operator is a process of its own, as in its image. Nodes are simulated (kwok), pods become ready at once, so only the operator, the
API server and the controllers are measured. Prints one line of JSON, for docs/perf-log.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.api_only import ApiCluster, add_nodes
from gantline_devcluster.client import ApiError

ROOT = Path(__file__).parents[1]
GROUP = "/apis/gantline.io/v1alpha1"
KINDS = {
    "/api/v1": ("serviceaccounts", "services", "persistentvolumeclaims"),
    "/apis/batch/v1": ("jobs",),
    "/apis/apps/v1": ("deployments", "controllerrevisions"),
    "/apis/policy/v1": ("poddisruptionbudgets",),
    "/apis/networking.k8s.io/v1": ("ingresses", "networkpolicies"),
    "/apis/events.k8s.io/v1": ("events",),
    GROUP: ("inferenceservices",),
}
FACTS = {
    "architecture": "LlamaForCausalLM",
    "family": "llama",
    "supported": True,
    "numLayers": 32,
    "hiddenSize": 4096,
    "intermediateSize": 14336,
    "numHeads": 32,
    "numKvHeads": 8,
    "headDim": 128,
    "vocabSize": 128256,
    "maxPositionEmbeddings": 8192,
    "tieWordEmbeddings": False,
    "dtype": "bfloat16",
    "weightBytes": 16_060_522_496,
    "name": "llama-8b",
    "revision": "main",
    "fingerprint": "sha256:0a",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=200, help="services in all (default: 200)")
    parser.add_argument("--nodes", type=int, default=100, help="simulated nodes, of mixed GPUs (default: 100)")
    parser.add_argument("--latency-services", type=int, default=50, help="services timed, each way (default: 50)")
    parser.add_argument("--pace", type=float, default=1.0, help="seconds between two; the other way is all at once (default: 1)")
    parser.add_argument("--rest", type=float, default=60, help="seconds at rest (default: 60)")
    options = parser.parse_args()
    with ApiCluster(kwok=True) as cluster:
        print(json.dumps(measure(cluster, options)))
    return 0


def measure(cluster: ApiCluster, options: argparse.Namespace) -> dict[str, Any]:
    cluster.kubectl("apply", "--server-side", "-f", str(ROOT / "crds/gantline.io_inferenceservices.yaml"))
    wait(lambda: answers(cluster), 30, lambda: "the definition is not served")
    cluster.set_fate({"gantline.io/role": "inspect"}, "complete", message=json.dumps({"reason": "Completed", "facts": FACTS}))
    add_nodes(cluster.client, mixed_nodes(options.nodes))
    say(f"{options.nodes} nodes")
    with operator(cluster) as process:
        paced = time_first_children(cluster, "p", options.latency_services, options.pace)
        say(f"first children, one service each {options.pace} s: {summary(paced)}")
        burst = time_first_children(cluster, "b", options.latency_services, 0)
        say(f"first children, all services at once: {summary(burst)}")
        for index in range(2 * options.latency_services, options.services):
            create(cluster, f"s{index}")
        began = time.monotonic()
        wait(lambda: ready(cluster) == options.services, 600, lambda: f"{ready(cluster)} of {options.services} ready")
        say(f"{options.services} services ready {time.monotonic() - began:.0f} s after the last was applied")
        wait(lambda: quiet(cluster, 5.0), 180, lambda: "things keep moving")
        before = versions(cluster)
        time.sleep(options.rest)
        after = versions(cluster)
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return {
            "services": options.services,
            "nodes": options.nodes,
            "cores": os.cpu_count(),
            "load_1m": round(os.getloadavg()[0], 1),
            "first_child_paced_s": summary(paced),
            "first_child_burst_s": summary(burst),
            "rest_s": options.rest,
            "changed_at_rest": changed,
            "operator_rss_mib": round(memory_mib(process.pid, "VmRSS"), 1),
            "operator_peak_mib": round(memory_mib(process.pid, "VmHWM"), 1),
            "operator_cpu_s": round(cpu_seconds(process.pid), 1),
        }


def mixed_nodes(count: int) -> list[dict[str, Any]]:
    names = ("a10", "l4", "a100-80", "h100", "h200")
    each = -(-count // len(names))
    return [node for name in names for node in profiles.load(name, each)][:count]


@contextmanager
def operator(cluster: ApiCluster) -> Iterator[subprocess.Popen[bytes]]:
    environment = {
        **os.environ,
        "KUBECONFIG": str(cluster.kubeconfig),
        "GANTLINE_IMAGE_CUDA": "registry.example/gantline-runtime:1",
        "GANTLINE_METRICS_PORT": "0",
        "GANTLINE_HEALTH_PORT": "0",
    }
    process = subprocess.Popen([sys.executable, "-m", "gantline_operator.main"], env=environment)
    try:
        time.sleep(5)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def create(cluster: ApiCluster, name: str) -> None:
    spec = {"model": {"uri": "file:///models/llama"}, "engine": {"sessionLen": 4096}}
    body = {"apiVersion": "gantline.io/v1alpha1", "kind": "InferenceService", "metadata": {"name": name}, "spec": spec}
    cluster.client.post(f"{GROUP}/namespaces/default/inferenceservices", body)


def summary(latencies: list[float]) -> dict[str, float]:
    return {"p50": round(percentile(latencies, 50), 3), "p99": round(percentile(latencies, 99), 3), "max": round(max(latencies), 3)}


def time_first_children(cluster: ApiCluster, prefix: str, count: int, pace_s: float) -> list[float]:
    """Seconds from the answer to a service's POST to the sight of its first child, by another process that watches the children."""
    applied: dict[str, float] = {}
    path = "/api/v1/namespaces/default/serviceaccounts?labelSelector=app.kubernetes.io%2Fmanaged-by%3Dgantline-operator"
    start = cluster.client.get(path)["metadata"]["resourceVersion"]
    watcher = subprocess.Popen(
        [sys.executable, "-c", _WATCH, str(cluster.kubeconfig), path, start, str(count)], stdout=subprocess.PIPE, text=True
    )
    time.sleep(2)
    for index in range(count):
        create(cluster, f"{prefix}{index}")
        applied[f"{prefix}{index}"] = time.time()
        time.sleep(pace_s)
    output, _ = watcher.communicate(timeout=300)
    seen = {line.split()[0]: float(line.split()[1]) for line in output.splitlines()}
    return [max(0.0, seen[name] - moment) for name, moment in applied.items()]


_WATCH = """
import sys, time
from pathlib import Path
from gantline_devcluster.client import Client
kubeconfig, path, version, count = sys.argv[1:]
seen = set()
for event in Client(Path(kubeconfig)).watch(path, version):
    name = event["object"]["metadata"].get("labels", {}).get("gantline.io/service")
    if event["type"] == "ADDED" and name not in seen:
        seen.add(name)
        print(name, time.time(), flush=True)
        if len(seen) == int(count):
            break
"""


def answers(cluster: ApiCluster) -> bool:
    try:
        return "items" in cluster.client.get(f"{GROUP}/inferenceservices")
    except ApiError:
        return False


def ready(cluster: ApiCluster) -> int:
    services = cluster.client.get(f"{GROUP}/inferenceservices")["items"]
    states = [{c["type"]: c for c in item.get("status", {}).get("conditions", [])} for item in services]
    settled = ("Ready", "WaitingForCapacity")
    return sum(state.get("Ready", {}).get("reason") in settled for state in states)


def versions(cluster: ApiCluster) -> dict[str, str]:
    found = {}
    for group, plurals in KINDS.items():
        for plural in plurals:
            for item in cluster.client.get(f"{group}/namespaces/default/{plural}")["items"]:
                found[f"{plural}/{item['metadata']['name']}"] = item["metadata"]["resourceVersion"]
    return found


def quiet(cluster: ApiCluster, seconds: float) -> bool:
    before = versions(cluster)
    time.sleep(seconds)
    return versions(cluster) == before


def memory_mib(pid: int, field: str) -> float:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def wait(check: Callable[[], bool], timeout_s: float, what: Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise SystemExit(f"gave up after {timeout_s:.0f} s: {what()}")
        time.sleep(0.5)


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
