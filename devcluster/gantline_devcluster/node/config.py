"""The configuration files of the node's components, as data: what goes in comes from `Run`, nothing here touches the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gantline_devcluster.control_plane import NODE
from gantline_devcluster.node.images import PAUSE_IMAGE
from gantline_devcluster.node.layout import DNS_DOMAIN, DNS_SERVICE, NODE_ADDRESS, POD_CIDR, REGISTRY_PORT, Run
from gantline_devcluster.node.outside import DNS_LOG

PROVISIONER = "gantline.io/directory"


def containerd(run: Run, cni_binaries: Path, runc: str, snapshotter: str, *, base_spec: Path | None) -> str:
    """containerd's TOML. Strings are quoted as JSON, which TOML's basic strings contain.

    Every container starts from the OCI specification in `base_spec`; None is containerd's own, with nothing of this machine in it.
    """
    base = f"\n    base_runtime_spec = {json.dumps(str(base_spec))}" if base_spec else ""

    def quoted(value: Path | str) -> str:
        return json.dumps(str(value))

    return f"""version = 3
root = {quoted(run.folder / "containerd")}
state = "/run/containerd"
disabled_plugins = ["io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing", "io.containerd.nri.v1.nri"]
[grpc]
  address = {quoted(run.containerd_socket)}
[plugins.'io.containerd.cri.v1.images']
  snapshotter = {quoted(snapshotter)}
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = {quoted(run.folder / "registries")}
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = {quoted(PAUSE_IMAGE)}
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = [{quoted(cni_binaries)}]
    conf_dir = {quoted(run.folder / "cni")}
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"{base}
    [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
      BinaryName = {quoted(runc)}
"""


def runtime_spec(default: dict[str, Any], mounts: list[dict[str, Any]]) -> dict[str, Any]:
    """containerd's own default OCI spec with the environment's mounts first, so that a pod's mounts come after and win."""
    return {**default, "mounts": [*default["mounts"], *mounts]}


def registry(run: Run) -> dict[str, Any]:
    """The image registry's configuration: plain HTTP on the node's own address, which only the node and its relays reach."""
    return {
        "version": 0.1,
        "log": {"level": "warn", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(run.images)}},
        "http": {"addr": f"{NODE_ADDRESS}:{REGISTRY_PORT}", "secret": "one registry, one process"},
    }


def registry_host() -> str:
    """containerd's hosts.toml for the name under which the host pushes: the same images are pulled from the node's own address."""
    address = json.dumps(f"http://{NODE_ADDRESS}:{REGISTRY_PORT}")
    return f'server = {address}\n[host.{address}]\n  capabilities = ["pull", "resolve"]\n'


def cni(run: Run) -> dict[str, Any]:
    """`ptp`, not a bridge: every packet between pods passes the node's own routing, so Services work without bridge netfilter."""
    addresses = {
        "type": "host-local",
        "dataDir": str(run.folder / "cni-addresses"),
        "ranges": [[{"subnet": POD_CIDR}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    plugins = [
        {"type": "ptp", "ipMasq": False, "ipam": addresses},
        {"type": "portmap", "capabilities": {"portMappings": True}, "backend": "nftables"},
    ]
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}


def kubelet(run: Run, *, measures_disk: bool = True) -> dict[str, Any]:
    """The kubelet's configuration; without `measures_disk` there is no ephemeral-storage (file systems that its statistics cannot read)."""
    keys = run.folder / "keys"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {"anonymous": {"enabled": False}, "webhook": {"enabled": True}, "x509": {"clientCAFile": str(keys / "ca.crt")}},
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(keys / "kubelet.crt"),
        "tlsPrivateKeyFile": str(keys / "kubelet.key"),
        "containerRuntimeEndpoint": f"unix://{run.containerd_socket}",
        "cgroupDriver": "cgroupfs",
        "failCgroupV1": False,
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "localStorageCapacityIsolation": measures_disk,
        # The disk is the machine's too: how full it is says nothing about this node, and development images exist nowhere else.
        "evictionHard": {"memory.available": "100Mi"},
        "imageGCHighThresholdPercent": 100,
        "clusterDNS": [DNS_SERVICE],
        "clusterDomain": DNS_DOMAIN,
        "resolvConf": str(run.folder / "resolv.conf"),
        "podLogsDir": str(run.folder / "pod-logs"),
        "volumePluginDir": str(run.folder / "volume-plugins"),
        "nodeStatusUpdateFrequency": "10s",
        "syncFrequency": "10s",
        "crashLoopBackOff": {"maxContainerRestartPeriod": "60s"},
    }


def corefile(run: Run) -> str:
    """The cluster's own names and those of the run's `hosts` file; no question ever leaves the node, and any other name does not exist."""
    return f""".:53 {{
    errors
    {DNS_LOG}
    ready 127.0.0.1:8181
    hosts {run.folder / "hosts"} {{
        fallthrough
    }}
    kubernetes {DNS_DOMAIN} in-addr.arpa {{
        kubeconfig {run.folder / "coredns.kubeconfig"}
        pods insecure
    }}
    template ANY ANY {{
        rcode NXDOMAIN
    }}
    cache 5
    loadbalance
}}
"""


def bootstrap_objects() -> list[tuple[str, dict[str, Any]]]:
    """What a cluster has from its first moment, each with its API path: DNS, StorageClasses, the rights of the node's own components."""
    storage, rbac = "/apis/storage.k8s.io/v1/storageclasses", "/apis/rbac.authorization.k8s.io/v1"
    system = "/api/v1/namespaces/kube-system/services"
    slices = "/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"
    dns_ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"clusterIP": DNS_SERVICE, "ports": dns_ports},
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "kube-dns-node", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [NODE_ADDRESS], "conditions": {"ready": True}, "nodeName": NODE}],
        "ports": dns_ports,
    }
    read = [
        {"apiGroups": [""], "resources": ["services", "pods", "namespaces"], "verbs": ["list", "watch"]},
        {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"]},
    ]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "gantline:coredns"}, "rules": read}
    return [
        (f"{system}/kube-dns", service),
        (f"{slices}/kube-dns-node", endpoints),
        (f"{rbac}/clusterroles/gantline:coredns", role),
        (f"{rbac}/clusterrolebindings/gantline:coredns", binding("gantline:coredns", "gantline:coredns", "system:coredns")),
        (
            f"{rbac}/clusterrolebindings/gantline:apiserver",
            binding("gantline:apiserver", "system:kubelet-api-admin", "apiserver-kubelet-client"),
        ),
        (f"{storage}/standard", storage_class("standard", "WaitForFirstConsumer", default=True)),
        (f"{storage}/standard-immediate", storage_class("standard-immediate", "Immediate")),
    ]


def binding(name: str, role: str, user: str) -> dict[str, Any]:
    group = "rbac.authorization.k8s.io"
    return {
        "apiVersion": f"{group}/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name},
        "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
        "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
    }


def storage_class(name: str, mode: str, *, default: bool = False) -> dict[str, Any]:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": name, "annotations": {"storageclass.kubernetes.io/is-default-class": str(default).lower()}},
        "provisioner": PROVISIONER,
        "volumeBindingMode": mode,
        "reclaimPolicy": "Delete",
    }
