"""What builders are given beside the plan: the service, the installation's settings, and where the model lies."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gantline_operator.claim_sharing import Sharing
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
    "source_location",
    "tied_claims",
]


_SHARED = "ReadWriteMany"


class MissingImage(LookupError):
    """The installation names no image for what a pod shall run on; the message names the setting."""


@dataclass(frozen=True)
class Parent:
    """The service that owns what is built. `restarted_at` is its annotation gantline.io/restartedAt; `cache_sharing`, how the cache's
    claim may be mounted, as the claim itself says (None: there is none yet, and the spec says how one is made); `source_sharing`, the same
    of the claim that a pvc:// source names."""

    name: str
    namespace: str
    uid: str
    spec: InferenceServiceSpec
    restarted_at: str = ""
    cache_sharing: Sharing | None = None
    source_sharing: Sharing = Sharing.ANY

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
    def sharing_of_cache(self) -> Sharing:
        asked = Sharing.ANY if self.spec.cache.access_mode == _SHARED else Sharing.ONE_NODE
        return self.cache_sharing or asked


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

    `sharing` is that of the volume.
    """

    path: str
    mounts: tuple[Mount, ...] = field(default=())
    sharing: Sharing = Sharing.ANY
    images: tuple[ImageMount, ...] = field(default=())
    """Images that are mounted as volumes."""
    pull_bytes: int = 0
    """What a node has to pull of them, weights alone."""

    @property
    def one_node(self) -> bool:
        """Whether all that mount it have to run on one node."""
        return self.sharing is not Sharing.ANY


_CLAIM_URI = re.compile(r"pvc://([^/]+)(/.*)?")


def source_location(uri: str, sharing: Sharing = Sharing.ANY) -> ModelLocation | None:
    """Where a local source lies: file:///path in the image, pvc://claim/path on its claim, mounted read-only. None for remote sources.
    `sharing` is the claim's."""
    if uri.startswith("file://"):
        return ModelLocation(uri.removeprefix("file://").rstrip("/"))
    match = _CLAIM_URI.fullmatch(uri)
    if match is None:
        return None
    claim, path = match.group(1), (match.group(2) or "").rstrip("/")
    return ModelLocation(f"{SOURCE_MOUNT}{path}", (Mount(claim, SOURCE_MOUNT, read_only=True),), sharing)


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


def tied_claims(parent: Parent, mounts: Sequence[Mount]) -> list[str]:
    """Of the claims that a pod mounts, those that only pods of one node can."""
    sharing = {mount.claim: parent.source_sharing for mount in mounts} | {parent.cache_claim: parent.sharing_of_cache}
    return [claim for claim in dict.fromkeys(mount.claim for mount in mounts) if sharing[claim] is not Sharing.ANY]


def cache_mount(parent: Parent, *, read_only: bool) -> Mount:
    return Mount(parent.cache_claim, CACHE_MOUNT, read_only=read_only)


def cache_location(parent: Parent, kind: str, digest: str) -> ModelLocation:
    """Folder of the artefact `kind` (fetch, awq) that was made from inputs with the hash `digest`, as the server mounts it."""
    return ModelLocation(f"{CACHE_MOUNT}/{kind}-{digest}", (cache_mount(parent, read_only=True),), parent.sharing_of_cache)
