"""The one oracle of the fault tests: live == desired(spec), nothing extra, every generation observed, and nothing moves any more.

What is desired is built anew, by the operator's own pure builders, from spec and status alone; whether it is what is there, the API server
says: a server-side apply of it, as a dry run, must come to what is stored. Nothing else that is ours may be there, but for what is kept on
purpose: finished Jobs with a time to live, the two revisions before, and the last good one with its cache.

It looks at every kind that the operator can make (`resources.MANAGED_KINDS`: what is not there cannot be applied); that each of them is
asked for too where a spec wants it, test_oracle.py sees to.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gantline_devcluster.api_only import ApiCluster
from gantline_devcluster.client import ApiError
from gantline_operator import resources
from gantline_operator.apply import controller_uid
from gantline_operator.claim_sharing import sharing_of
from gantline_operator.eviction import claims_of_template, template_of
from gantline_operator.main import version
from gantline_operator.plan_status import from_status
from gantline_operator.reconcile_pass import SERVICES, policy_of
from gantline_operator.resources.naming import MANAGED_BY
from gantline_operator.settings import OperatorSettings
from gantline_operator.spec import parse_service
from gantline_operator.stages import read_job

from tests.operator import applying
from tests.operator.definition import is_known
from tests.operator.harness import KINDS, SETTINGS, items, versions, wait

__all__ = ["assert_at_rest", "assert_gone", "desired_of", "faults_of"]

Object = dict[str, Any]
Name = tuple[str, str]

_KEPT_REVISIONS = 3


def assert_at_rest(
    cluster: ApiCluster, *namespaces: str, settings: OperatorSettings = SETTINGS, quiet_s: float = 1.0, timeout_s: float = 60.0
) -> None:
    """Waits until all services of the namespaces are as they should be; fails with what is not."""
    found: list[str] = ["nothing was looked at yet"]

    def good() -> bool:
        found[:] = [fault for namespace in namespaces for fault in faults_of(cluster, namespace, settings)]
        return not found

    def still() -> bool:
        before = [versions(cluster, namespace) for namespace in namespaces]
        time.sleep(quiet_s)
        return [versions(cluster, namespace) for namespace in namespaces] == before and good()

    wait(good, what=lambda: "\n".join(found), timeout_s=timeout_s, every_s=0.8)  # each look is some twenty requests
    wait(still, what=lambda: "\n".join(found) or "resourceVersions keep moving", timeout_s=timeout_s)


def assert_gone(cluster: ApiCluster, *namespaces: str) -> None:
    """Neither services nor anything that was made for one."""

    def rest() -> list[str]:
        kinds = ("inferenceservices", *KINDS)
        return [f"{ns}/{kind}/{_name(item)}" for ns in namespaces for kind in kinds for item in items(cluster, kind, ns) if _is_left(item)]

    wait(lambda: not rest(), what=rest)


def desired_of(cluster: ApiCluster, namespace: str, settings: OperatorSettings = SETTINGS) -> list[Object]:
    """What has to be in the namespace, of all kinds but Jobs."""
    seen = _Seen.of(cluster, namespace)
    return [item for parent in items(cluster, "inferenceservices", namespace) for item in _desired(parent, seen, settings)]


def faults_of(cluster: ApiCluster, namespace: str, settings: OperatorSettings = SETTINGS) -> list[str]:
    """What is not as it should be in the namespace, a sentence each."""
    seen = _Seen.of(cluster, namespace)
    live, faults, allowed = seen.live, list[str](), set[Name]()
    for parent in items(cluster, "inferenceservices", namespace):
        faults += _unobserved(parent)
        try:
            desired = list(_desired(parent, seen, settings))
        except _NotYet as error:
            faults.append(f"{_name(parent)}: {error}")
            continue
        for item in desired:
            faults += _difference(cluster, item, live.get((item["kind"], _name(item))))
        allowed |= {(item["kind"], _name(item)) for item in desired} | set(_kept(parent, live))
    return faults + [f"{kind} {name} is there and should not be" for kind, name in sorted(live.keys() - allowed)]


class _NotYet(Exception):
    pass


def _unobserved(parent: Object) -> Iterator[str]:
    generation, status = parent["metadata"]["generation"], parent.get("status") or {}
    seen = {status.get("observedGeneration"), *(item["observedGeneration"] for item in status.get("conditions") or [])}
    if seen != {generation}:
        yield f"{_name(parent)}: generation {generation}, observed {seen}"


@dataclass(frozen=True)
class _Seen:
    """Of one namespace."""

    live: dict[Name, Object]
    """What is ours, by kind and name."""
    claims: dict[str, Object]
    """By name."""
    known: set[str]
    """Kinds that the cluster has."""

    @staticmethod
    def of(cluster: ApiCluster, namespace: str) -> _Seen:
        return _Seen(
            {(item["kind"], _name(item)): item for item in _owned(cluster, namespace)},
            {_name(claim): claim for claim in items(cluster, "persistentvolumeclaims", namespace)},
            {kind.kind for kind in resources.MANAGED_KINDS if not kind.optional or is_known(cluster, kind)},
        )


def _desired(parent: Object, seen: _Seen, settings: OperatorSettings) -> Iterator[Object]:
    """What the operator applies again and again; claims and revisions only have to be there (`_difference`)."""
    status, metadata = parent.get("status") or {}, parent["metadata"]
    _, spec = parse_service({"apiVersion": SERVICES.api_version, "kind": SERVICES.kind, **parent})
    restarted_at = (metadata.get("annotations") or {}).get(resources.RESTARTED_AT, "")
    owner = resources.Parent(_name(parent), metadata["namespace"], metadata["uid"], spec, restarted_at)
    rendering = resources.Settings.of(settings, version())
    planned = from_status(status.get("plan") or {}, spec)
    if planned is None or not status.get("model"):
        raise _NotYet("there is no plan")
    if (claim := seen.claims.get(owner.cache_claim)) is not None:
        owner = replace(owner, cache_sharing=sharing_of(claim, read_only=False))
    for mount in (resources.source_location(spec.model.uri) or resources.ModelLocation("")).mounts:
        owner = replace(owner, source_sharing=sharing_of(seen.claims[mount.claim], read_only=True))
    location = _location(owner, planned.quantize, status["model"])
    wanted, rollout = resources.revision(owner, planned, location), status.get("rollout") or {}
    mark = rollout["good"] if rollout.get("failed") == wanted and spec.rollout.auto_rollback else wanted
    stored = seen.live.get(("ControllerRevision", f"{_name(parent)}-{mark}"))
    if stored is None or status.get("revision") != mark:
        raise _NotYet(f"revision {mark} is not the one that serves")
    yield {**stored, "metadata": {**stored["metadata"], "labels": resources.labels(_name(parent), "server", revision=mark)}}
    if mark == wanted:
        strategy = stored["data"]["strategy"]["name"]
        yield from resources.serving(owner, planned, location, rendering, strategy=strategy, template=stored["data"]["template"])
    else:
        kept = (item for item in stored["data"]["objects"] if item["kind"] != "PodDisruptionBudget")
        yield from (_scaled(item, resources.replicas(owner)) for item in kept)
        yield from resources.disruption_budgets(owner, rendering)
    yield from resources.network_policies(owner, rendering)
    yield from resources.ingress(owner, rendering)
    if settings.inference_pools == "true" or (settings.inference_pools == "auto" and "InferencePool" in seen.known):
        yield resources.inference_pool(owner, rendering)
    autoscalers = resources.autoscalers(owner, rendering, policy_of(spec, status, settings))
    yield from (item for item in autoscalers if item["kind"] in seen.known)
    if spec.cache.claim_name is None and (planned.quantize or resources.source_location(spec.model.uri) is None):
        yield resources.cache_claim(owner, rendering, 1)


def _location(owner: resources.Parent, quantize: bool, model: Object) -> resources.ModelLocation:
    spec = owner.spec
    if quantize:
        return resources.cache_location(owner, spec.quantization.method, resources.quantize_hash(spec, model["fingerprint"]))
    source = resources.source_location(spec.model.uri, owner.source_sharing)
    return source or resources.cache_location(owner, "fetch", resources.fetch_hash(spec, model.get("revision") or None))


def _scaled(item: Object, replicas: int) -> Object:
    return {**item, "spec": {**item["spec"], "replicas": replicas}} if item["kind"] == "Deployment" else item


def _kept(parent: Object, live: dict[Name, Object]) -> Iterator[Name]:
    """What may be there beside the desired: it is looked at by people, or goes by itself."""
    uid = parent["metadata"]["uid"]
    own = [(name, item) for name, item in live.items() if controller_uid(item) == uid]
    yield from (name for name, item in own if name[0] == "Job" and (read_job(item).state != "Active"))
    revisions = sorted((item["revision"], name) for name, item in own if name[0] == "ControllerRevision")
    yield from (name for _, name in revisions[-_KEPT_REVISIONS:])
    good = ("ControllerRevision", f"{_name(parent)}-{((parent.get('status') or {}).get('rollout') or {}).get('good')}")
    yield good
    yield from (("PersistentVolumeClaim", claim) for claim in claims_of_template(template_of(live.get(good))))


def _difference(cluster: ApiCluster, desired: Object, live: Object | None) -> Iterator[str]:
    name = f"{desired['kind']} {_name(desired)}"
    if live is None:
        yield f"{name} is missing"
    elif desired["kind"] in ("ControllerRevision", "PersistentVolumeClaim"):
        if not desired["metadata"]["labels"].items() <= (live["metadata"].get("labels") or {}).items():
            yield f"{name} lacks labels"
    else:
        try:
            applied = applying.apply(cluster.client, desired, dry_run=True)
        except ApiError as error:
            yield f"{name} cannot be applied: {error}"
            return
        if _content(applied) != _content(live):
            yield f"{name} is not as desired: {_content(live)} instead of {_content(applied)}"


def _content(item: Object) -> Object:
    """All that the operator decides; not who wrote it when, and what others report."""
    meta = item["metadata"]
    return {
        **{key: value for key, value in item.items() if key not in ("metadata", "status", "kind", "apiVersion")},
        "labels": meta.get("labels"),
        "owners": meta.get("ownerReferences"),
    }


def _owned(cluster: ApiCluster, namespace: str) -> Iterable[Object]:
    """What belongs to a service or bears the operator's label, with its kind; pods are the cluster's own."""
    for kind in resources.MANAGED_KINDS:
        for item in items(cluster, kind.plural, namespace):
            owners, labels = item["metadata"].get("ownerReferences") or [], item["metadata"].get("labels") or {}
            ours = labels.get("app.kubernetes.io/managed-by") == MANAGED_BY
            if ours or any(owner["kind"] == SERVICES.kind for owner in owners):
                yield {"apiVersion": kind.api_version, "kind": kind.kind, **item}


def _is_left(item: Object) -> bool:
    labels = item["metadata"].get("labels") or {}
    return "gantline.io/service" in labels or "model" in (item.get("spec") or {})


def _name(item: Object) -> str:
    return str(item["metadata"]["name"])
