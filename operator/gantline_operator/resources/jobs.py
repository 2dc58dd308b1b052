"""The stages' Jobs: inspect, fetch, quantize, and evict, which makes room for the others.

Created once under a name that says what they do, never applied again.

Of Kubernetes' retries only one is used: a pod that was evicted or preempted is replaced. A pod that failed is not; its reason stands in its
termination message, and the operator decides whether trying again can help (then as a Job of its own, so that this one keeps its log).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gantline_operator.plan_types import Placement
from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resources.context import ModelLocation, Parent, Settings, cache_location, cache_mount, source_location, tied_claims
from gantline_operator.resources.naming import GROUP, Object, Stage, content_hash, job_name, labels, metadata, service_account_name
from gantline_operator.resources.placement import (
    build_base,
    cpu_threads,
    same_node,
    volume_labels,
)
from gantline_operator.resources.pod import ImageMount, Mount, PodBase, build_container, build_pod
from gantline_operator.resources.source_env import source_env

__all__ = [
    "ALGORITHM_VERSIONS", "ATTEMPT", "evict_hash", "evict_job", "fetch_hash", "fetch_job", "inspect_hash", "inspect_job", "quantize_hash",
    "quantize_job", "quantize_job_hash",
]  # fmt: skip

ALGORITHM_VERSIONS: Mapping[str, int] = {"inspect": 1, "fetch": 1, "awq": 1}
"""Part of each stage's hash. Raised when a stage's result changes for the same input, so that old results are made anew; an image with the
same algorithm makes nothing anew."""

ATTEMPT = f"{GROUP}/attempt"
"""Annotation of a Job: 0 for the first of its kind, then 1 and so on."""

_DEADLINE_S: Mapping[Stage, int] = {"inspect": 3600, "fetch": 2 * 86400, "quantize": 3 * 86400, "evict": 3600}
"""Seconds until a Job is given up, pulling its image and waiting for a node included: a bound for what hangs, not a prediction."""


def inspect_hash(parent: Parent) -> str:
    """Of what is inspected: the source and its revision. Files that can change under the same name are looked at again when the pods are
    replaced: those that pods read in place, since the new pods read what is there by then, and a bucket's, which have no commits."""
    uri = parent.spec.model.uri
    may_change = source_location(uri) is not None or uri.startswith("s3://")
    again = {"restartedAt": parent.restarted_at} if may_change and parent.restarted_at else {}
    # Earlier releases did not ask whether it is an image.
    image = {"image": True} if parent.spec.model.delivery != "files" else {}
    return content_hash({"stage": "inspect", "version": ALGORITHM_VERSIONS["inspect"], **_source(parent.spec), **again, **image})


def fetch_hash(spec: InferenceServiceSpec, revision: str | None = None) -> str:
    """Of what is fetched. `revision` is the commit that the inspection found: a branch that moves on is fetched anew, a commit never is."""
    source = {**_source(spec), **({"revision": revision} if revision else {})}
    return content_hash({"stage": "fetch", "version": ALGORITHM_VERSIONS["fetch"], **source})


def quantize_hash(spec: InferenceServiceSpec, fingerprint: str) -> str:
    """Of the quantized copy, hence of its folder: the checkpoint and the method's parameters, not the limit that it is judged by."""
    wish = spec.quantization
    parameters = {"method": wish.method, "bits": wish.bits, "groupSize": wish.group_size, "model": fingerprint}
    return content_hash({"stage": "quantize", "version": ALGORITHM_VERSIONS["awq"], **parameters})


def quantize_job_hash(spec: InferenceServiceSpec, fingerprint: str) -> str:
    """Of the Job: the copy and the limit. Another limit is another Job, which finds the copy made already and only judges it."""
    return content_hash({"copy": quantize_hash(spec, fingerprint), "limit": spec.quantization.max_perplexity_increase})


def inspect_job(parent: Parent, placement: Placement, settings: Settings, *, attempt: int = 0) -> Object:
    """Reads the source's config and headers. Raises MissingImage."""
    source = source_location(parent.spec.model.uri)
    arguments = ["inspect", _inside(parent.spec.model.uri, source), *_revision(parent.spec.model.revision)]
    mounts = source.mounts if source else ()
    base = build_base(parent, placement, settings)
    return _job(parent, settings, "inspect", inspect_hash(parent), attempt, base, arguments, mounts, env=source_env(parent, settings))


def fetch_job(parent: Parent, placement: Placement, settings: Settings, *, revision: str | None = None, attempt: int = 0) -> Object:
    """Downloads a remote source into the cache. `revision` is the commit that was inspected. Raises MissingImage."""
    digest = fetch_hash(parent.spec, revision)
    target = cache_location(parent, "fetch", digest).path
    arguments = ["fetch", parent.spec.model.uri, target, *_revision(revision or parent.spec.model.revision)]
    mounts = (cache_mount(parent, read_only=False),)
    base = build_base(parent, placement, settings)
    return _job(parent, settings, "fetch", digest, attempt, base, arguments, mounts, env=source_env(parent, settings))


def quantize_job(
    parent: Parent, placement: Placement, settings: Settings, *, source: ModelLocation, fingerprint: str, attempt: int = 0
) -> Object:
    """Makes a quantized copy of `source` in the cache. Raises MissingImage."""
    wish = parent.spec.quantization
    target = cache_location(parent, wish.method, quantize_hash(parent.spec, fingerprint)).path
    arguments = ["quantize", wish.method, source.path, target, f"--bits={wish.bits}", f"--group-size={wish.group_size}"]
    if wish.max_perplexity_increase is not None:
        arguments.append(f"--max-perplexity-increase={wish.max_perplexity_increase}")
    cache = cache_mount(parent, read_only=False)
    # A source that lies in the cache itself is reached through the cache's own mount.
    mounts = [*(mount for mount in source.mounts if mount.path != cache.path), cache]
    base = build_base(parent, placement, settings)
    env = [{"name": "OMP_NUM_THREADS", "value": str(cpu_threads(base, 1))}, {"name": "HF_HUB_OFFLINE", "value": "1"}]
    digest = quantize_job_hash(parent.spec, fingerprint)
    return _job(parent, settings, "quantize", digest, attempt, base, arguments, mounts, env=env, images=source.images)


def evict_hash(claim: str, names: Sequence[str], since: str) -> str:
    """Of one eviction: the same names at another time are another one."""
    return content_hash({"stage": "evict", "claim": claim, "names": sorted(names), "since": since})


def evict_job(parent: Parent, placement: Placement, settings: Settings, *, names: Sequence[str], since: str, attempt: int = 0) -> Object:
    """Removes the artefacts `names`, and no other, from the cache. Raises MissingImage."""
    mount = cache_mount(parent, read_only=False)
    digest = evict_hash(mount.claim, names, since)
    arguments = ["evict", mount.path, *sorted(names)]
    base = build_base(parent, placement, settings)
    return _job(parent, settings, "evict", digest, attempt, base, arguments, (mount,), env=[])


def _job(
    parent: Parent,
    settings: Settings,
    stage: Stage,
    digest: str,
    attempt: int,
    base: PodBase,
    arguments: Sequence[str],
    mounts: Sequence[Mount],
    *,
    env: Sequence[Object],
    images: Sequence[ImageMount] = (),
) -> Object:
    marks = labels(parent.name, stage, version=settings.version, revision=digest)
    meta = metadata(job_name(parent.name, stage, digest, attempt), parent.namespace, marks, parent.owner)
    tied = tied_claims(parent, mounts)
    beside = volume_labels(mounts, parent.cache_claim, tied)
    pod = build_pod(
        base,
        build_container(stage, base, arguments, env=env, mounts=mounts, images=images),
        service_account=service_account_name(parent.name),
        mounts=mounts,
        images=images,
        affinity=same_node(tied),
        restartPolicy="Never",
        terminationGracePeriodSeconds=30,
    )
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {**meta, "annotations": {ATTEMPT: str(attempt)}},
        "spec": {
            "backoffLimit": 0,
            "activeDeadlineSeconds": _DEADLINE_S[stage],
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]},
            "template": {"metadata": {"labels": {**labels(parent.name, stage, revision=digest), **beside}}, "spec": pod},
        },
    }


def _source(spec: InferenceServiceSpec) -> dict[str, str | None]:
    return {"uri": spec.model.uri.rstrip("/"), "revision": spec.model.revision}


def _inside(uri: str, location: ModelLocation | None) -> str:
    """The source as the pod sees it."""
    return uri if location is None else f"file://{location.path}"


def _revision(revision: str | None) -> list[str]:
    return [f"--revision={revision}"] if revision else []
