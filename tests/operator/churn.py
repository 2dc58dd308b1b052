"""Services that are created, changed, scaled, suspended and deleted while pods, children, nodes and operators come and go.

    python -m tests.operator.churn [--minutes 30] [--services 24] [--seed 0]

prints what it did, and ends with the oracle; the suite runs seconds of it (test_scale.py). Nothing is random but by the seed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_operator.resources import MANAGED_KINDS

from tests.operator.definition import every_kind
from tests.operator.harness import FACTS, SETTINGS, TINY, Operator, fates, gpu_nodes, inspected, install_crd, items, path_of, service
from tests.operator.oracle import assert_at_rest

__all__ = ["Churn"]

_CONTROLLERS = ("HPA", "Gantline", "KEDA")
_RESYNC_S = 20
"""Between two looks at everything: what another did to a kind that is not watched is mended then."""


@dataclass
class Churn:
    """In one namespace, whose GPU nodes are its own."""

    cluster: ApiCluster
    namespace: str
    services: int
    seed: int = 0
    done: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._names = [f"churn{index}" for index in range(self.services)]
        self._generation = 0
        self._operator: Operator | None = None
        self._settings = replace(SETTINGS, watch_namespaces=(self.namespace,), resync_seconds=_RESYNC_S, network_policies=True)

    def __enter__(self) -> Churn:
        models = {name: FACTS if self._on_gpu(name) else TINY for name in self._names}
        fates(self.cluster, inspected(**models))
        for _ in range(2):
            self._add_nodes()
        self._start_operator()
        return self

    def __exit__(self, *_: object) -> None:
        if self._operator is not None:
            self._operator.stop()

    def step(self) -> None:
        """One thing happens to something. What somebody else made impossible meanwhile does not."""
        what = self._chance.choices(*zip(*self._events, strict=True))[0]
        with contextlib.suppress(ApiError):
            what()
            self.done[what.__name__.lstrip("_")] += 1

    def settle(self) -> None:
        """Peace: room for everything again, nothing suspended (what never was inspected has no plan), and then the oracle."""
        self._add_nodes()
        for item in items(self.cluster, "inferenceservices", self.namespace):
            self._patch_one(item["metadata"]["name"], {"suspend": False})
        assert_at_rest(self.cluster, self.namespace, settings=self._settings, timeout_s=300)

    @property
    def _events(self) -> list[tuple[Callable[[], None], int]]:
        return [
            (self._create, 6),
            (self._update, 5),
            (self._scale, 5),
            (self._suspend, 2),
            (self._delete, 3),
            (self._delete_pod, 3),
            (self._delete_child, 3),
            (self._lose_node, 2),
            (self._add_nodes, 2),
            (self._replace_operator, 1),
        ]

    def _create(self) -> None:
        name = self._chance.choice(self._names)
        place = {"accelerator": {"resource": "auto", "nodeSelector": {"for": self.namespace}}} if self._on_gpu(name) else {}
        body = service(name, self.namespace, **place, **self._wishes(name))
        self.cluster.client.post(path_of("inferenceservices", self.namespace), body)

    def _wishes(self, name: str) -> dict[str, Any]:
        """Each kind that is made for some services alone is made for some of these; autoscalers find no load, and hold."""
        kind = int(name.removeprefix("churn")) % 4
        wishes: dict[str, Any] = {"ingress": {"host": f"{name}.example.com"}} if self._chance.random() < 0.5 else {}
        if kind < len(_CONTROLLERS):
            return {**wishes, "scaling": {"controller": _CONTROLLERS[kind], "max": 4}}
        return {**wishes, "replicas": self._chance.randrange(3)}

    def _update(self) -> None:
        self._patch({"engine": {"maxBatchSize": self._chance.randrange(2, 64)}})

    def _scale(self) -> None:
        self._patch({"replicas": self._chance.randrange(4)})

    def _suspend(self) -> None:
        self._patch({"suspend": self._chance.random() < 0.5})

    def _delete(self) -> None:
        self._remove("inferenceservices", self._some())

    def _delete_pod(self) -> None:
        self._delete_one("pods")

    def _delete_child(self) -> None:
        """Of those that the operator makes here; a kind that it does not watch is made again with the next resync."""
        self._delete_one(self._chance.choice([kind.plural for kind in MANAGED_KINDS]))

    def _lose_node(self) -> None:
        nodes = self.cluster.client.get(f"/api/v1/nodes?labelSelector=for%3D{self.namespace}")["items"]
        if nodes:
            self.cluster.remove_nodes(self._chance.choice(nodes)["metadata"]["name"])

    def _add_nodes(self) -> None:
        """Under new names: as a node pool would."""
        self._generation += 1
        gpu_nodes(self.cluster, self.namespace, "h100" if self._generation % 3 == 0 else "l4", name=f"-{self._generation}")

    def _replace_operator(self) -> None:
        assert self._operator is not None and not self._operator.dead.is_set(), "the operator died"
        self._operator.stop()
        self._start_operator()

    def _start_operator(self) -> None:
        self._operator = Operator(self.cluster, self._settings).__enter__()

    def _on_gpu(self, name: str) -> bool:
        return int(name.removeprefix("churn")) % 2 == 1

    def _some(self) -> str:
        there = [item["metadata"]["name"] for item in items(self.cluster, "inferenceservices", self.namespace)]
        return self._chance.choice(there or self._names)

    def _patch(self, spec: dict[str, Any]) -> None:
        self._patch_one(self._some(), spec)

    def _patch_one(self, name: str, spec: dict[str, Any]) -> None:
        path = f"{path_of('inferenceservices', self.namespace)}/{name}"
        self.cluster.client.call("PATCH", path, {"spec": spec}, content_type="application/merge-patch+json")

    def _delete_one(self, plural: str) -> None:
        found = [item["metadata"]["name"] for item in items(self.cluster, plural, self.namespace) if item["metadata"]["name"] != "default"]
        if found:
            self._remove(plural, self._chance.choice(found))

    def _remove(self, plural: str, name: str) -> None:
        """In the background, as kubectl does: a Job's default would leave its pods."""
        path = f"{path_of(plural, self.namespace)}/{name}"
        self.cluster.client.call("DELETE", path, {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background"})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="how long (default: 30)")
    parser.add_argument("--services", type=int, default=24, help="names that services take (default: 24)")
    parser.add_argument("--pause", type=float, default=0.5, help="seconds between two events (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of what happens (default: 0)")
    options = parser.parse_args()
    with ApiCluster(kwok=True) as cluster:
        install_crd(cluster)
        cluster.simulate("cpu", 2)
        cluster.client.post("/api/v1/namespaces", {"metadata": {"name": "churn"}})
        with every_kind(cluster), Churn(cluster, "churn", options.services, options.seed) as churn:
            end = time.monotonic() + options.minutes * 60
            while time.monotonic() < end:
                churn.step()
                time.sleep(options.pause)
            began = time.monotonic()
            churn.settle()
            left = len(items(cluster, "inferenceservices", "churn"))
            print(json.dumps({**churn.done, "services_left": left, "settled_s": round(time.monotonic() - began, 1)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
