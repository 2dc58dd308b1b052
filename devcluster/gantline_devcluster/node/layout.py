"""Where a node's run lives, and the fixed facts of its network. One folder holds everything; removing the run removes the folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from gantline_devcluster.errors import DevclusterError

NODE_ADDRESS, NODE_NETWORK = "10.77.0.2", "10.77.0.0/24"
API_PORT = 6443
REGISTRY_PORT = 5000
POD_CIDR = "10.88.0.0/16"
DNS_SERVICE, DNS_DOMAIN = "10.96.0.10", "cluster.local"
DEFAULT_NAME = "dev"
BUILT_IMAGES = "--built-images"
_LONGEST_FOLDER = 60  # a unix socket's path has at most 107 bytes, and containerd's lies 30 below the run's folder


@dataclass(frozen=True)
class Run:
    """The folder of the run `name`, below `${GANTLINE_STATE:-/var/lib/gantline}`."""

    name: str = DEFAULT_NAME

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,28}[a-z0-9])?", self.name):
            raise DevclusterError(f"{self.name!r} is no name for a cluster", "Use at most 30 small letters, digits and dashes")
        if len(str(self.folder)) > _LONGEST_FOLDER:
            raise DevclusterError(f"the path {self.folder} is too long for unix sockets", "Set GANTLINE_STATE to a shorter folder")

    @property
    def folder(self) -> Path:
        return Path(os.environ.get("GANTLINE_STATE") or "/var/lib/gantline").absolute() / self.name

    @property
    def cgroup(self) -> str:
        return f"gantline-{self.name}"

    @property
    def lock(self) -> Path:
        """Held by the supervisor for as long as it lives; holds its process id."""
        return self.folder / "supervisor.lock"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, for the user's own shell: by the relayed loopback port."""
        return self.folder / "kubeconfig"

    @property
    def state_file(self) -> Path:
        return self.folder / "state.json"

    @property
    def control_socket(self) -> Path:
        return self.folder / "control.sock"

    @property
    def containerd_socket(self) -> Path:
        return self.folder / "containerd.sock"

    @property
    def images(self) -> Path:
        """What was pushed to the node's registry."""
        return self.folder / "registry"

    @property
    def volumes(self) -> Path:
        return self.folder / "volumes"
