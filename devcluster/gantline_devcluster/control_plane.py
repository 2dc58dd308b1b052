"""The commands and files of a control plane: pure builders, shared by the API-only cluster and by the node.

Everything of one run lies below one folder: `keys/` (its own authority), `tokens.csv`, `*.kubeconfig`, `etcd/`, `logs/`. Each component
has a token of its own with the name that Kubernetes' built-in RBAC knows, so only `admin` is omnipotent.
"""

from __future__ import annotations

import base64
import json
import secrets
import signal
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gantline_devcluster.binaries import OLDEST, find
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.processes import Component
from gantline_devcluster.stages import kwok_config

SERVICE_CIDR = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
NODE = "node-0"
_AGGREGATOR = "front-proxy"
# Fates are mutating admission policies, which that release has as a beta (see fates.py).
_POLICIES = ("--feature-gates=MutatingAdmissionPolicy=true", "--runtime-config=admissionregistration.k8s.io/v1beta1=true")
IDENTITIES = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
    "kube-proxy": ("system:kube-proxy", ""),
    "coredns": ("system:coredns", ""),
    "provisioner": ("gantline:provisioner", "system:masters"),
}


@dataclass(frozen=True)
class ControlPlane:
    """Where one control plane lives.

    `address:port` is the API server's; etcd listens on a unix socket in the folder (at most 107 bytes of path).
    """

    folder: Path
    address: str
    port: int
    tokens: dict[str, str] = field(default_factory=lambda: {name: secrets.token_urlsafe(24) for name in IDENTITIES})
    oldest: bool = False
    """Of the oldest release that upstream supports."""

    @property
    def url(self) -> str:
        return f"https://{self.address}:{self.port}"

    @property
    def authority(self) -> Path:
        return self.folder / "keys/ca.crt"

    @property
    def admin_kubeconfig(self) -> Path:
        return self.folder / "admin.kubeconfig"

    def prepare(self, extra_certificates: tuple[str, ...] = ()) -> None:
        """Write keys, tokens and kubeconfigs. Raises DevclusterError."""
        for part in ("logs", "etcd"):
            (self.folder / part).mkdir(parents=True, exist_ok=True, mode=0o700)
        names = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
        hosts = dict.fromkeys([*names, "127.0.0.1", KUBERNETES_SERVICE, self.address])
        certificates = [f"apiserver={','.join(hosts)}", f"{_AGGREGATOR}={_AGGREGATOR}", *extra_certificates]
        command = [str(find("keys")), str(self.folder / "keys"), *certificates]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            raise DevclusterError(f"no keys could be made: {answer.stderr.strip()}", f"See that {self.folder} is writable and not full")
        rows = (f'{token},{IDENTITIES[name][0]},{name},"{IDENTITIES[name][1]}"' for name, token in self.tokens.items())
        write_private(self.folder / "tokens.csv", "\n".join(rows) + "\n")
        for name in IDENTITIES:
            self.write_kubeconfig(self.folder / f"{name}.kubeconfig", self.tokens[name], name)

    def write_kubeconfig(self, path: Path, token: str, user: str, *, url: str | None = None, namespace: str | None = None) -> Path:
        write_private(path, json.dumps(kubeconfig(url or self.url, self.authority.read_bytes(), token, user, namespace), indent=1) + "\n")
        return path

    def etcd(self) -> Component:
        clients, peers = (f"unix://{self.folder / name}" for name in ("etcd.sock", "peer.sock"))
        argv = [
            find("etcd"), f"--data-dir={self.folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn", "--quota-backend-bytes=2147483648",
            f"--listen-client-urls={clients}", f"--advertise-client-urls={clients}", f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}", f"--initial-cluster=default={peers}",
            "--auto-compaction-mode=periodic", "--auto-compaction-retention=10m",
        ]  # fmt: skip
        return self._component("etcd", argv)

    def apiserver(self, *more: str) -> Component:
        keys = self.folder / "keys"
        argv = [
            self._kubernetes("kube-apiserver"), f"--etcd-servers=unix://{self.folder / 'etcd.sock'}", f"--bind-address={self.address}",
            f"--advertise-address={self.address}", f"--secure-port={self.port}",
            f"--tls-cert-file={keys / 'apiserver.crt'}", f"--tls-private-key-file={keys / 'apiserver.key'}",
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local", f"--service-account-key-file={keys / 'sa.pub'}",
            f"--service-account-signing-key-file={keys / 'sa.key'}", f"--token-auth-file={self.folder / 'tokens.csv'}",
            "--authorization-mode=Node,RBAC", f"--service-cluster-ip-range={SERVICE_CIDR}", "--profiling=false",
            "--enable-admission-plugins=NodeRestriction", *self._aggregation(), *(_POLICIES if self.oldest else ()), *more,
        ]  # fmt: skip
        return self._component("kube-apiserver", argv)

    def _aggregation(self) -> list[str]:
        """How other API servers, such as that of custom metrics, know that it is this one that asks, and for whom."""
        keys = self.folder / "keys"
        return [
            f"--requestheader-client-ca-file={keys / 'ca.crt'}", f"--requestheader-allowed-names={_AGGREGATOR}",
            "--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={keys / f'{_AGGREGATOR}.crt'}", f"--proxy-client-key-file={keys / f'{_AGGREGATOR}.key'}",
        ]  # fmt: skip

    def controller_manager(self, *more: str) -> Component:
        keys = self.folder / "keys"
        argv = [
            self._kubernetes("kube-controller-manager"), *self._authenticated("controller-manager"),
            f"--service-account-private-key-file={keys / 'sa.key'}", f"--root-ca-file={keys / 'ca.crt'}",
            "--use-service-account-credentials=true", "--controllers=*", "--secure-port=0",
            "--kube-api-qps=300", "--kube-api-burst=600", "--concurrent-gc-syncs=20", "--profiling=false", *more,
        ]  # fmt: skip
        return self._component("kube-controller-manager", argv)

    def scheduler(self) -> Component:
        argv = [
            self._kubernetes("kube-scheduler"), *self._authenticated("scheduler"), "--secure-port=0", "--kube-api-qps=300",
            "--kube-api-burst=600", "--profiling=false",
        ]  # fmt: skip
        return self._component("kube-scheduler", argv)

    def kwok(self, lease_s: int) -> Component:
        """Simulated nodes: only those that bear kwok's annotation, never a real one."""
        config = self.folder / "kwok.yaml"
        config.write_text("\n---\n".join(json.dumps(document) for document in kwok_config()))
        argv = [
            find("kwok"), f"--kubeconfig={self.admin_kubeconfig}", f"--config={config}", "--manage-all-nodes=false",
            "--manage-nodes-with-annotation-selector=kwok.x-k8s.io/node=fake", "--cidr=10.200.0.0/16", "--node-ip=127.0.0.1",
            f"--node-lease-duration-seconds={lease_s}",
        ]  # fmt: skip
        return self._component("kwok", argv, environment={"KWOK_WORKDIR": str(self.folder / "kwok")})

    def _kubernetes(self, name: str) -> Path:
        return find(f"{name}{OLDEST}" if self.oldest else name)

    def _authenticated(self, name: str) -> list[str]:
        file = self.folder / f"{name}.kubeconfig"
        return [f"--kubeconfig={file}", f"--authentication-kubeconfig={file}", f"--authorization-kubeconfig={file}", "--leader-elect=false"]

    def _component(self, name: str, argv: list[Any], environment: dict[str, str] | None = None) -> Component:
        log = self.folder / "logs" / f"{name}.log"
        return Component(name, [str(a) for a in argv], log, environment=environment or {}, end_signal=signal.SIGKILL)


def kubeconfig(url: str, authority: bytes, token: str, user: str, namespace: str | None = None) -> dict[str, Any]:
    """A kubeconfig with one cluster, one user by token, one context (JSON is YAML)."""
    cluster = {"server": url, "certificate-authority-data": base64.b64encode(authority).decode()}
    context = {"cluster": "gantline", "user": user, **({"namespace": namespace} if namespace else {})}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "gantline", "cluster": cluster}],
        "users": [{"name": user, "user": {"token": token}}],
        "contexts": [{"name": "gantline", "context": context}],
        "current-context": "gantline",
    }


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner reads, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.touch(mode=0o600)
    partial.write_text(text)
    partial.replace(path)
