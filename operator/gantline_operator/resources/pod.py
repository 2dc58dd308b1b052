"""What every pod of ours has in common: Pod Security `restricted`, folders to write to, no token, and where it may run.

/mnt/source            the claim that a `pvc://` source names, read-only
/mnt/image             the image that an `oci://` source names, where it is mounted instead of fetched, read-only
/mnt/cache             the service's cache claim: read-only to the server, writable to the stages that fill it
/tmp                   temporary files, and HOME
/var/cache/gantline    what compilers keep (Triton, torch, CUDA), empty at each start
/dev/shm               memory for ranks that share a pod, where there is more than one
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gantline_operator.resources.naming import Object
from gantline_operator.resources.quantities import bytes_quantity

__all__ = [
    "CACHE_MOUNT", "CONTAINER_SECURITY", "IMAGE_MOUNT", "POD_USER", "SOURCE_MOUNT", "ImageMount", "Mount", "PodBase", "build_container",
    "build_pod", "image_pods", "merge_env", "shared_memory_bytes",
]  # fmt: skip

SOURCE_MOUNT = "/mnt/source"
CACHE_MOUNT = "/mnt/cache"
IMAGE_MOUNT = "/mnt/image"
_TEMPORARY = "/tmp"
_COMPILED = "/var/cache/gantline"
_SHARED_MEMORY = "/dev/shm"

POD_USER = 1000
"""The images' own, and of the files that pods leave in a cache volume (fsGroup)."""

_GIB = 1 << 30
_SCRATCH_BYTES = 8 * _GIB
"""Most that a pod may leave in one of its temporary folders: past it the kubelet evicts this pod instead of the node filling up."""

CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}

_FOLDERS = {
    "HOME": _TEMPORARY,
    "TMPDIR": _TEMPORARY,
    "XDG_CACHE_HOME": _COMPILED,
    "TRITON_CACHE_DIR": f"{_COMPILED}/triton",
    "TORCHINDUCTOR_CACHE_DIR": f"{_COMPILED}/inductor",
    "CUDA_CACHE_PATH": f"{_COMPILED}/cuda",
    "HF_HOME": f"{_COMPILED}/huggingface",
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Mount:
    """A claim, where it is mounted, and whether the pod may write to it."""

    claim: str
    path: str
    read_only: bool = True


@dataclass(frozen=True)
class ImageMount:
    """An image that a container runtime pulls and mounts, read-only, and where. `reference` has a digest, so that it never changes."""

    reference: str
    path: str
    pull_secret: str = ""
    """Secret of type kubernetes.io/dockerconfigjson; empty: none is needed."""


@dataclass(frozen=True)
class PodBase:
    """The image of a pod, where the pod may run, and what it takes there. Quantities are Kubernetes' strings."""

    image: str
    image_pull_policy: str
    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    node_selector: Mapping[str, str] = field(default_factory=dict)
    node_requirements: Sequence[Object] = ()
    """matchExpressions that all have to hold."""
    tolerations: Sequence[Object] = ()
    priority_class: str = ""
    runtime_class: str = ""
    image_pull_secrets: Sequence[str] = ()
    user: int | None = POD_USER
    """That the pod runs as; None: whom the cluster gives."""
    env: Sequence[Object] = ()
    """The user's, which win over ours of the same name."""


def build_container(
    name: str,
    base: PodBase,
    arguments: Sequence[str],
    *,
    env: Sequence[Object] = (),
    mounts: Sequence[Mount] = (),
    images: Sequence[ImageMount] = (),
    tp: int = 1,
) -> Object:
    """A container whose entry point is the image's; its last words come from its termination message, else from the end of its log."""
    ours = [{"name": key, "value": value} for key, value in _FOLDERS.items()] + list(env)
    return {
        "name": name,
        "image": base.image,
        "imagePullPolicy": base.image_pull_policy,
        "args": list(arguments),
        "env": merge_env(ours, base.env),
        "resources": {"requests": dict(base.requests), "limits": dict(base.limits)},
        "securityContext": copy.deepcopy(CONTAINER_SECURITY),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "tmp", "mountPath": _TEMPORARY},
            {"name": "compiled", "mountPath": _COMPILED},
            *([{"name": "shm", "mountPath": _SHARED_MEMORY}] if tp > 1 else []),
            *_volume_mounts(mounts),
            *_image_mounts(images),
        ],
    }


def build_pod(
    base: PodBase,
    container: Object,
    *,
    service_account: str,
    mounts: Sequence[Mount] = (),
    images: Sequence[ImageMount] = (),
    tp: int = 1,
    affinity: Mapping[str, Any] | None = None,
    **extra: Any,
) -> Object:
    """A pod's spec around `container`. `extra` are further fields of the spec; empty ones are left out, so that an apply owns no void."""
    spec: Object = {
        "serviceAccountName": service_account,
        "automountServiceAccountToken": False,
        # A namespace of a thousand Services would put ten thousand variables into each container.
        "enableServiceLinks": False,
        "securityContext": _pod_security(base.user),
        "containers": [container],
        "volumes": [
            _scratch("tmp"),
            _scratch("compiled"),
            *([_memory("shm", shared_memory_bytes(tp))] if tp > 1 else []),
            *_claim_volumes(mounts),
            *_image_volumes(images),
        ],
        "nodeSelector": dict(base.node_selector),
        "affinity": {**_node_affinity(base.node_requirements), **(affinity or {})},
        "tolerations": [dict(item) for item in base.tolerations],
        "priorityClassName": base.priority_class,
        "runtimeClassName": base.runtime_class,
        "imagePullSecrets": [{"name": name} for name in _pull_secrets(base, images)],
        **extra,
    }
    return {key: value for key, value in spec.items() if value not in ({}, [], "", None)}


def _pod_security(user: int | None) -> Object:
    """Without a user nothing is said of users and groups: where the cluster gives them out (OpenShift), a pod that asks for one of its own
    is refused, and elsewhere the image's user is taken."""
    identity = {} if user is None else {"runAsUser": user, "runAsGroup": user, "fsGroup": user}
    return {
        "runAsNonRoot": True,
        **identity,
        # Walking through a volume of a million files at each start would take longer than loading the model.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def image_pods(namespace: str, image: ImageMount, user: int | None) -> Object:
    """A Deployment without replicas whose pods mount `image`, for a dry run: what is asked is whether such pods are taken."""
    marks = {"app.kubernetes.io/managed-by": "gantline-operator", "app.kubernetes.io/component": "image-volume-check"}
    container = build_container("check", PodBase(image.reference, "IfNotPresent"), (), images=(image,))
    pod = build_pod(PodBase("", "", user=user), container, service_account="default", images=(image,))
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "gantline-image-volume-check", "namespace": namespace, "labels": marks},
        "spec": {"replicas": 0, "selector": {"matchLabels": marks}, "template": {"metadata": {"labels": marks}, "spec": pod}},
    }


def merge_env(ours: Iterable[Object], theirs: Iterable[Object]) -> list[Object]:
    """Ours, then theirs; of one name the last one stands, since an apply refuses a list that names a variable twice."""
    merged: dict[str, Object] = {}
    for item in (*ours, *theirs):
        merged[item["name"]] = dict(item)
    return list(merged.values())


def shared_memory_bytes(tp: int) -> int:
    """Room in /dev/shm, in bytes: NCCL and gloo take some 100 MiB a rank. It counts towards the container's memory limit once used."""
    return tp * _GIB // 2


def _node_affinity(requirements: Sequence[Object]) -> Object:
    if not requirements:
        return {}
    term = {"matchExpressions": [dict(item) for item in requirements]}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}}


def _volume_names(mounts: Sequence[Mount]) -> dict[str, str]:
    """Names of volumes by claim. A claim mounted at two places is one volume: kubelets have hung on two volumes of one claim."""
    claims = list(dict.fromkeys(mount.claim for mount in mounts))
    return {claim: f"claim-{index}" for index, claim in enumerate(claims)}


def _volume_mounts(mounts: Sequence[Mount]) -> list[Object]:
    names = _volume_names(mounts)
    return [
        {"name": names[mount.claim], "mountPath": mount.path, **({"readOnly": True} if mount.read_only else {})} for mount in mounts
    ]  # fmt: skip


def _claim_volumes(mounts: Sequence[Mount]) -> list[Object]:
    # readOnly stands at the mount, not here: here it would ask the driver for a read-only attachment, which some refuse for RWO claims.
    return [{"name": name, "persistentVolumeClaim": {"claimName": claim}} for claim, name in _volume_names(mounts).items()]


def _image_mounts(images: Sequence[ImageMount]) -> list[Object]:
    return [{"name": f"image-{index}", "mountPath": image.path, "readOnly": True} for index, image in enumerate(images)]


def _image_volumes(images: Sequence[ImageMount]) -> list[Object]:
    # A digest never means another image, so that what a node has need not be asked for again.
    return [
        {"name": f"image-{index}", "image": {"reference": image.reference, "pullPolicy": "IfNotPresent"}}
        for index, image in enumerate(images)
    ]


def _pull_secrets(base: PodBase, images: Sequence[ImageMount]) -> Iterable[str]:
    return dict.fromkeys([*base.image_pull_secrets, *(image.pull_secret for image in images if image.pull_secret)])


def _scratch(name: str) -> Object:
    return {"name": name, "emptyDir": {"sizeLimit": bytes_quantity(_SCRATCH_BYTES)}}


def _memory(name: str, num_bytes: int) -> Object:
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": bytes_quantity(num_bytes)}}
