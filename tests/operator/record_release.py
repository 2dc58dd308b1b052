"""Records what a release stores, for the test that a later one takes it over (test_upgrade.py).

    python -m tests.operator.record_release

writes tests/operator/releases/VERSION.json: the services, with their status, and their children, as this release leaves them in a cluster.
Run it once for each release, from its own commit, and keep the file for ever: it is what users have.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from gantline_devcluster.api_only import ApiCluster
from gantline_operator import resources
from gantline_operator.main import version

from tests.operator.harness import (
    FACTS,
    ROOT,
    TINY,
    answer,
    apply,
    copied,
    fates,
    gpu_nodes,
    inspected,
    install_crd,
    items,
    patch,
    service,
    serving,
    volume,
    wait_reason,
)
from tests.operator.oracle import assert_at_rest

__all__ = ["FOLDER", "PLACE", "dump"]

Object = dict[str, Any]
FOLDER = ROOT / "tests" / "operator" / "releases"
PLACE = "release"
"""Label of the nodes that the recorded services ask for."""
_OF_THE_SERVER = ("uid", "resourceVersion", "creationTimestamp", "managedFields", "generation", "selfLink", "namespace")


def main() -> int:
    with ApiCluster(kwok=True) as cluster:
        install_crd(cluster)
        cluster.client.post("/api/v1/namespaces", {"metadata": {"name": PLACE}})
        fates(
            cluster,
            [
                *inspected(tiny=TINY, idle=TINY, gpu=FACTS, remote={**FACTS, "revision": "abc123"}),
                ("fetch", "remote", "complete", answer(artefact={"kind": "fetch", "bytes": FACTS["weightBytes"]}), {}),
                ("quantize", "remote", "complete", copied(), {}),
            ],
        )
        cluster.simulate("cpu", 1)
        place = gpu_nodes(cluster, PLACE, "l4", 2)
        volume(cluster, PLACE, "remote-cache")
        with serving(cluster, PLACE):
            ingress = {"host": "chat.example.com", "className": "nginx"}
            apply(
                cluster,
                service("tiny", PLACE, replicas=2, ingress=ingress, pod={"env": [{"name": "A", "value": "b"}]}),
                service("idle", PLACE, replicas=0),
                service("gpu", PLACE, engine={"sessionLen": 4096}, rollout={"drainTimeout": "60s"}, **place),
                service("remote", PLACE, model={"uri": "hf://org/name"}, quantization={"method": "awq"}, **place),
            )
            for name in ("tiny", "gpu", "remote"):
                wait_reason(cluster, name, PLACE, "Ready")
            patch(cluster, "tiny", PLACE, {"engine": {"maxBatchSize": 7}})  # so that there is a revision before
            wait_reason(cluster, "idle", PLACE, "ScaledToZero")
            wait_reason(cluster, "tiny", PLACE, "Ready")
            assert_at_rest(cluster, PLACE)
            recorded = dump(cluster, PLACE)
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{version()}.json"
    path.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    print(path.relative_to(ROOT))
    return 0


def dump(cluster: ApiCluster, namespace: str) -> dict[str, list[Object]]:
    """The services and their children, without what a server says of its own storage."""
    found = {"inferenceservices": [_stored(item) for item in items(cluster, "inferenceservices", namespace)]}
    for kind in (kind for kind in resources.MANAGED_KINDS if not kind.optional):
        owned = [item for item in items(cluster, kind.plural, namespace) if item["metadata"].get("ownerReferences")]
        found[kind.plural] = [{"apiVersion": kind.api_version, "kind": kind.kind, **_stored(item)} for item in owned]
    return found


def _stored(item: Object) -> Object:
    metadata = {key: value for key, value in item["metadata"].items() if key not in _OF_THE_SERVER}
    metadata.get("annotations", {}).pop("kubectl.kubernetes.io/last-applied-configuration", None)
    return {**item, "metadata": metadata}


if __name__ == "__main__":
    sys.exit(main())
