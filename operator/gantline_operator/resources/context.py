"""What builders are given beside the plan: the service, the installation's settings, and where the model lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gantline_operator.resource import InferenceServiceSpec
from gantline_operator.resources.naming import Object, cache_claim_name, owner_reference
from gantline_operator.resources.pod import CACHE_MOUNT, IMAGE_MOUNT, POD_USER, SOURCE_MOUNT, ImageMount, Mount
from gantline_operator.settings import OperatorSettings

__all__ = [
    "MissingImage",
    "ModelLocation",
    "Parent",
    "Settings",
    "cache_location",
    "cache_mount",
    "image_location",
    "is_shared",
    "source_location",
    "source_mounts",
]


_SHARED = "ReadWriteMany"


class MissingImage(LookupError):
    """The installation names no image for what a pod shall run on; the message names the setting."""


@dataclass(frozen=True)
class Parent:
    """The service that owns what is built. `restarted_at` is its annotation gantline.io/restartedAt; `cache_shared`, whether several nodes
    may mount the cache's claim, as the claim itself says (None: there is none yet, and the spec says how one is made)."""

    name: str
    namespace: str
    uid: str
    spec: InferenceServiceSpec
    restarted_at: str = ""
    cache_shared: bool | None = None

    @property
    def owner(self) -> Object:
        return owner_reference(self.name, self.uid)

    @property
    def served_name(self) -> str:
        return self.spec.model.served_name or self.name

    @property
    def cache_claim(self) -> str:
        """The claim for artefacts: the user's, or the one that is made."""
        return self.spec.cache.claim_name or cache_claim_name(self.name)

    @property
    def cache_on_one_node(self) -> bool:
        """Whether everything that mounts the cache has to run on one node."""
        asked = self.spec.cache.access_mode == _SHARED
        return not (asked if self.cache_shared is None else self.cache_shared)


@dataclass(frozen=True)
class Settings:
    """What the installation fixes for every pod. `images` by accelerator: cuda, cpu, rocm, ascend."""

    version: str
    images: Mapping[str, str]
    image_pull_policy: str = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    hf_endpoint: str = ""
    s3_endpoint: str = ""
    insecure_registries: tuple[str, ...] = ()
    network_policies: bool = False
    load_url: str = ""
    """Address at which KEDA reaches the operator."""
    server_clients: tuple[str, ...] = ()
    pod_user: int | None = POD_USER
    """None: whom the cluster gives."""

    @staticmethod
    def of(operator: OperatorSettings, version: str) -> Settings:
        return Settings(
            version=version,
            images=operator.images,
            image_pull_policy=operator.image_pull_policy,
            image_pull_secrets=operator.image_pull_secrets,
            hf_endpoint=operator.hf_endpoint,
            s3_endpoint=operator.s3_endpoint,
            insecure_registries=operator.insecure_registries,
            network_policies=operator.network_policies,
            load_url=operator.load_url,
            server_clients=operator.server_clients,
            pod_user=operator.pod_user,
        )

    def image(self, accelerator: str) -> str:
        """Raises MissingImage."""
        if not self.images.get(accelerator):
            raise MissingImage(f"no runtime image for {accelerator} is set: set the chart's value runtime.images.{accelerator}")
        return self.images[accelerator]


@dataclass(frozen=True)
class ModelLocation:
    """Where a model's files lie inside a pod: at `path`, on `mounts`, or in the image where there are none.

    `one_node` says that the volume can be mounted on one node only.
    """

    path: str
    mounts: tuple[Mount, ...] = field(default=())
    one_node: bool = False
    images: tuple[ImageMount, ...] = field(default=())
    """Images that are mounted as volumes."""
    pull_bytes: int = 0
    """What a node has to pull of them, weights alone."""


_CLAIM_URI = re.compile(r"pvc://([^/]+)(/.*)?")


def source_location(uri: str) -> ModelLocation | None:
    """Where a local source lies: file:///path in the image, pvc://claim/path on its claim, mounted read-only. None for remote sources."""
    if uri.startswith("file://"):
        return ModelLocation(uri.removeprefix("file://").rstrip("/"))
    match = _CLAIM_URI.fullmatch(uri)
    if match is None:
        return None
    claim, path = match.group(1), (match.group(2) or "").rstrip("/")
    return ModelLocation(f"{SOURCE_MOUNT}{path}", (Mount(claim, SOURCE_MOUNT, read_only=True),))


def image_location(spec: InferenceServiceSpec, revision: str, folder: str, weight_bytes: int) -> ModelLocation:
    """Where an oci:// source lies as an image volume: pinned to the digest `revision`, with the model in `folder` of it.

    The whole image is mounted and the folder named in the path, since a subPath needs another release of Kubernetes than the volume does.
    """
    name = spec.model.uri.removeprefix("oci://").partition("@")[0]
    repository, colon, tag = name.rpartition(":")
    image = repository if colon and "/" not in tag else name  # a colon before a slash is the registry's port
    secret = spec.model.secret_ref.name if spec.model.secret_ref else ""
    mount = ImageMount(f"{image}@{revision}", IMAGE_MOUNT, pull_secret=secret)
    return ModelLocation(f"{IMAGE_MOUNT}/{folder}".rstrip("/"), images=(mount,), pull_bytes=weight_bytes)


def source_mounts(uri: str) -> tuple[Mount, ...]:
    location = source_location(uri)
    return location.mounts if location else ()


def is_shared(claim: Object) -> bool:
    """Whether several nodes may mount the claim at once. Its spec counts, which never changes, and not what its volume could do beside
    that: a claim that is bound late would replace the pods that bound it."""
    return _SHARED in ((claim.get("spec") or {}).get("accessModes") or ())


def cache_mount(parent: Parent, *, read_only: bool) -> Mount:
    return Mount(parent.cache_claim, CACHE_MOUNT, read_only=read_only)


def cache_location(parent: Parent, kind: str, digest: str) -> ModelLocation:
    """Folder of the artefact `kind` (fetch, awq) that was made from inputs with the hash `digest`, as the server mounts it."""
    return ModelLocation(f"{CACHE_MOUNT}/{kind}-{digest}", (cache_mount(parent, read_only=True),), parent.cache_on_one_node)
