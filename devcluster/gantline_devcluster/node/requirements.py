"""Whether this machine can run a node, and the Debian packages that it needs for that."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable

from gantline_devcluster.errors import DevclusterError, NotPossibleHere
from gantline_devcluster.node import cgroups, linux

PACKAGES = {"runc": "runc", "nft": "nftables", "ip": "iproute2", "mount": "mount"}
WAYS_OUT = "Use `sudo`, or KUBECONFIG= of any cluster; the tests that need no node run without it"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def why_no_node() -> str:
    """One clause on why no node can run here, "" where one can (missing packages aside)."""
    if os.geteuid() != 0:
        return "a node needs root, and this user is not root"
    if why := linux.why_no_namespaces():
        return f"a node needs namespaces of its own, and this machine or container does not allow them: {why}"
    trees = cgroups.hierarchies()
    if not trees or not all(os.access(tree.point, os.W_OK) for tree in trees):
        return "a node needs control groups of its own, and /sys/fs/cgroup cannot be written here"
    return ""


def require_node() -> None:
    """Raises NotPossibleHere with one sentence and the ways out."""
    if why := why_no_node():
        cure = WAYS_OUT if os.geteuid() != 0 else "Use a privileged container or the machine itself, or KUBECONFIG= of any cluster"
        raise NotPossibleHere(why, cure)


def missing_packages() -> list[str]:
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=path)})


def require_packages(tell: Callable[[str], None]) -> None:
    """Install what is missing with apt-get where there is one. Raises DevclusterError naming the packages otherwise."""
    missing = missing_packages()
    if not missing:
        return
    names = " ".join(missing)
    apt = shutil.which("apt-get")
    if apt is None:
        raise DevclusterError(f"a node needs the packages {names}", "Install them with this system's package manager and try again")
    tell(f"installing the packages {names}")
    for command in ([apt, "install"], [apt, "update"], [apt, "install"]):  # the lists may be missing or old: update only if they are
        command += ["--yes", "--quiet", "--no-install-recommends", *missing] if command[1] == "install" else ["--quiet"]
        answer = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
        if not missing_packages():
            return
    reason = (answer.stderr.strip().splitlines() or ["no message"])[-1]
    raise DevclusterError(f"apt-get could not install {names}: {reason}", f"Run: apt-get update && apt-get install {names}")
