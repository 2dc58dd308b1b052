"""What the cluster is made of: each Go module, its binaries, how they are built, and where they lie once built.

A module's key is a hash of everything that decides its binaries: `go.mod`, `go.sum`, our own sources in its folder, and the flags below.
Its binaries lie in `<cache>/modules/<module>-<key>/`; `<cache>/<key of all modules>/bin/` collects them by links, which makes one folder
for PATH.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gantline_devcluster.cache import cache_root
from gantline_devcluster.errors import DevclusterError

GO_SOURCES = Path(__file__).resolve().parents[1] / "go"
_CNI = "github.com/containernetworking/plugins/plugins"
_CONTAINERD = "github.com/containerd/containerd/v2/cmd"
_KEDA = "github.com/kedacore/keda/v2"
# One fixed date: `kubectl version` needs some date, and a build must not depend on the day.
_BUILD_DATE = "2026-01-01T00:00:00Z"


@dataclass(frozen=True)
class Module:
    """A Go module under devcluster/go: `binaries` maps a binary's name to its package, or a file's name to its path in the module that is
    `versioned`, where files are `copied` from there and nothing is compiled."""

    name: str
    binaries: dict[str, str]
    tags: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()  # variables set at link time; {version} is the version that go.mod requires of `versioned`
    versioned: str = ""
    copied: bool = False

    @property
    def source(self) -> Path:
        return GO_SOURCES / self.name

    @cached_property
    def version(self) -> str:
        """The pinned version ("v1.36.3") of the module's principal requirement; "v0.0.0" where it has none."""
        if not self.versioned:
            return "v0.0.0"
        found = re.search(rf"^(?:require )?\s*{re.escape(self.versioned)} (v\S+)", self._read("go.mod"), re.MULTILINE)
        if not found:
            raise DevclusterError(f"{self.source / 'go.mod'} requires no {self.versioned}", "Restore it from version control")
        return found[1]

    @property
    def linker_flags(self) -> str:
        major, minor = self.version.removeprefix("v").split(".")[:2]
        values = {"version": self.version, "major": major, "minor": minor, "date": _BUILD_DATE}
        return " ".join(["-s", "-w", *(f"-X {stamp.format(**values)}" for stamp in self.stamps)])

    @cached_property
    def key(self) -> str:
        digest = hashlib.sha256(repr((self.binaries, self.tags, self.linker_flags, platform.machine())).encode())
        for path in sorted(p for p in self.source.rglob("*") if p.suffix == ".go" or p.name in ("go.mod", "go.sum")):
            digest.update(f"\0{path.relative_to(self.source)}\0".encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    @property
    def folder(self) -> Path:
        return cache_root() / "modules" / f"{self.name}-{self.key}"

    def missing(self, wanted: frozenset[str]) -> list[str]:
        """Those of `wanted` that belong to this module and are not built yet, in build order."""
        return [name for name in self.binaries if name in wanted and not (self.folder / name).exists()]

    def _read(self, name: str) -> str:
        try:
            return (self.source / name).read_text()
        except OSError as error:
            cure = "Run from a checkout of the repository, with gantline installed in editable mode"
            raise DevclusterError(f"the Go modules are not at {GO_SOURCES}", cure) from error


_VERSION = "k8s.io/component-base/version"
_STAMPS = (
    f"{_VERSION}.gitVersion={{version}}", f"{_VERSION}.gitMajor={{major}}", f"{_VERSION}.gitMinor={{minor}}",
    f"{_VERSION}.gitTreeState=clean", f"{_VERSION}.buildDate={{date}}",
)  # fmt: skip
KUBERNETES = Module(
    "kubernetes",
    # kube-apiserver first: the others share most of its packages, and it is what the most tests wait for.
    {
        name: f"k8s.io/kubernetes/cmd/{name}"
        for name in ("kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
    },
    stamps=_STAMPS,
    versioned="k8s.io/kubernetes",
)
OLDEST = "-oldest"
"""Suffix of the binaries of the oldest release that upstream supports."""
KUBERNETES_OLDEST = Module(
    "kubernetes-oldest",
    {f"{name}{OLDEST}": f"k8s.io/kubernetes/cmd/{name}" for name in ("kube-apiserver", "kube-controller-manager", "kube-scheduler")},
    stamps=_STAMPS,
    versioned="k8s.io/kubernetes",
)
KEDA = Module(
    "keda-operator",
    # By the names that they have in KEDA's images: clients are known by them, also as owners of fields.
    {"keda": f"{_KEDA}/cmd/operator", "keda-adapter": f"{_KEDA}/cmd/adapter"},
    stamps=(f"{_KEDA}/version.Version={{version}}",),
    versioned=_KEDA,
)
KEDA_MANIFESTS = Module(
    "keda",
    {
        "scaledobjects.yaml": "config/crd/bases/keda.sh_scaledobjects.yaml",
        **{
            f"keda-{name}.yaml": f"config/crd/bases/{name}.yaml"
            for name in (
                "keda.sh_scaledjobs",
                "keda.sh_triggerauthentications",
                "keda.sh_clustertriggerauthentications",
                "eventing.keda.sh_cloudeventsources",
                "eventing.keda.sh_clustercloudeventsources",
            )
        },
        **{
            f"keda-{folder}-{name}.yaml": f"config/{folder}/{name}.yaml"
            for folder in ("rbac", "metrics-server")
            for name in ("role", "role_binding")
        },
    },
    versioned=_KEDA,
    copied=True,
)
MODULES = (
    Module("tools", {"keys": "./cmd/keys", "pause": "./cmd/pause"}),
    Module("etcd", {"etcd": "go.etcd.io/etcd/server/v3"}, versioned="go.etcd.io/etcd/server/v3"),
    KUBERNETES,
    Module(
        "containerd",
        {name: f"{_CONTAINERD}/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
        tags=("no_btrfs", "no_devmapper", "no_zfs"),
        stamps=("github.com/containerd/containerd/v2/version.Version={version}",),
        versioned="github.com/containerd/containerd/v2",
    ),
    Module(
        "cni",
        {path.split("/")[1]: f"{_CNI}/{path}" for path in ("main/ptp", "main/loopback", "ipam/host-local", "meta/portmap")},
        stamps=("github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion={version}",),
        versioned="github.com/containernetworking/plugins",
    ),
    Module("coredns", {"coredns": "."}, versioned="github.com/coredns/coredns"),
    Module(
        "helm",
        {"helm": "helm.sh/helm/v4/cmd/helm"},
        stamps=("helm.sh/helm/v4/internal/version.version={version}",),
        versioned="helm.sh/helm/v4",
    ),
    Module("kwok", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}, versioned="sigs.k8s.io/kwok"),
    Module(
        "registry",
        {"registry": "."},
        stamps=("github.com/distribution/distribution/v3/version.version={version}",),
        versioned="github.com/distribution/distribution/v3",
    ),
    Module("devices", {"devices": "."}, versioned="k8s.io/kubelet"),
    Module(
        "gateway-api",
        {"httproutes.yaml": "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml"},
        versioned="sigs.k8s.io/gateway-api",
        copied=True,
    ),
    Module(
        "inference-pools",
        {"inferencepools.yaml": "config/crd/bases/inference.networking.k8s.io_inferencepools.yaml"},
        versioned="sigs.k8s.io/gateway-api-inference-extension",
        copied=True,
    ),
    KUBERNETES_OLDEST,
    KEDA_MANIFESTS,
    KEDA,
)  # fmt: skip

_API = frozenset({"keys", "etcd", "kube-apiserver", "kubectl", "kube-controller-manager", "kube-scheduler"})
_EVERYTHING = frozenset(name for module in MODULES for name in module.binaries)
_REHEARSAL = frozenset({"registry", "devices"})
_KEDA_ONLY = frozenset({*KEDA.binaries, *KEDA_MANIFESTS.binaries} - {"scaledobjects.yaml"})
_DEFINITIONS = frozenset(name for module in MODULES for name in module.binaries if module.copied) - _KEDA_ONLY
_OLDEST = frozenset(KUBERNETES_OLDEST.binaries)
_NODE = _EVERYTHING - _REHEARSAL - _DEFINITIONS - _OLDEST - _KEDA_ONLY - {"kwok"}
SETS: dict[str, frozenset[str]] = {
    "client": frozenset({"kubectl", "helm"}),
    "api": _API,
    "test": _API | {"kwok"} | _DEFINITIONS,
    "node": _NODE,
    "suite": _NODE | {"kwok"} | _DEFINITIONS,
    "rehearsal": _NODE | _REHEARSAL,
    "oldest": (_API | {"kwok"} | _OLDEST) - {"kube-apiserver", "kube-controller-manager", "kube-scheduler"},
    "keda": _API | {"kwok"} | _DEFINITIONS | _KEDA_ONLY,
    "all": _EVERYTHING,
}


def missing(wanted: frozenset[str]) -> list[str]:
    return [name for module in MODULES for name in module.missing(wanted)]


def find(name: str) -> Path:
    """The built binary `name`. Raises DevclusterError naming the build command where there is none."""
    module = next(m for m in MODULES if name in m.binaries)
    path = module.folder / name
    if not path.exists():
        smallest = next(title for title in ("api", "test", "node", "rehearsal", "oldest", "keda") if name in SETS[title])
        raise DevclusterError(f"{name} {module.version} is not built yet", f"Run: python -m gantline_devcluster build --set {smallest}")
    return path


def collected() -> Path:
    """The folder with links to every binary built so far (bring it up to date with each call): what goes into PATH."""
    key = hashlib.sha256("".join(module.key for module in MODULES).encode()).hexdigest()[:16]
    folder = cache_root() / key / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for module in (module for module in MODULES if not module.copied):
        for name in module.binaries:
            target = module.folder / name
            if target.exists() and not (folder / name).exists():
                temporary = folder / f".{name}.{os.getpid()}"
                with contextlib.suppress(FileExistsError):
                    temporary.symlink_to(os.path.relpath(target, folder))
                temporary.replace(folder / name)
    return folder
