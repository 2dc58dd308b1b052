"""The node's first process: makes the namespaces, then keeps the components in them (see keeper.py) as their process 1.

    python -m gantline_devcluster.node.init NAME

Two processes: the outer one waits, the inner one is process 1 of the new process namespace. The kernel ends the outer one with the
supervisor, the inner one with the outer, and everything in the namespace with the inner one: mounts, network devices, containers. What
the host keeps is one control group and the run's folder.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from gantline_devcluster import keeper
from gantline_devcluster.cache import cache_root
from gantline_devcluster.control_plane import NODE
from gantline_devcluster.node import cgroups, linux
from gantline_devcluster.node.images import source_tree
from gantline_devcluster.node.layout import NODE_ADDRESS, NODE_NETWORK, Run
from gantline_devcluster.node.outside import NO_WAY_OUT
from gantline_devcluster.node.requirements import SYSTEM_PATH

# Folders in which components write at fixed paths: covered, so that nothing of the host's is read or changed.
COVERED = (Path("/run"), Path("/var/lib"), Path("/var/log"))
# Kernel settings that a kubelet insists on. They are the whole machine's, so it is shown files with these values instead, and changes
# nothing.
KERNEL_SETTINGS = {
    "vm/overcommit_memory": "1", "vm/panic_on_oom": "0", "kernel/panic": "10", "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000", "kernel/keys/root_maxbytes": "25000000",
}  # fmt: skip


def main() -> int:
    run = Run(sys.argv[1])
    linux.die_with_parent()
    cgroups.enter(run.cgroup)
    linux.unshare(linux.CLONE_NEWCGROUP)
    cgroups.enter_leaf(run.cgroup)
    linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWPID | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC)
    inner = os.fork()
    if inner:
        return os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    linux.die_with_parent()
    arrange_mounts(run)
    arrange_network()
    keeper.Keeper().run()
    return 0


def arrange_mounts(run: Run) -> None:
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("proc", "/proc", "proc", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    cgroups.mount_as_root()
    kept = [run.folder, source_tree(), Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve(), cache_root()]
    for folder in COVERED:
        cover(folder, kept)
    show_settings(Path("/run/kernel-settings"))
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_SHARED)  # pods with mount propagation need a shared root


def cover(folder: Path, kept: list[Path]) -> None:
    """Lay an empty file system in memory over `folder`; those of `kept` that lie in it stay where they are."""
    held = []
    for path in (path for path in kept if folder in path.parents):
        aside = tempfile.mkdtemp(prefix="gantline-", dir="/tmp")
        linux.bind(path, aside)
        held.append((path, aside))
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    for path, aside in held:
        path.mkdir(parents=True, exist_ok=True)
        linux.bind(aside, path)
        linux.unmount(aside)
        os.rmdir(aside)


def show_settings(folder: Path) -> None:
    folder.mkdir()
    for name, value in KERNEL_SETTINGS.items():
        shown, real = folder / name.replace("/", "."), Path("/proc/sys", name)
        if real.exists():
            shown.write_text(f"{value}\n")
            linux.bind(shown, real)


def arrange_network() -> None:
    """An address on a bridge (kernels may lack `dummy` devices) and a default route to it, which components insist on.

    There is no way out, and pods are told at once: what would leave by that bridge is rejected, not dropped.
    """
    ip, nft = (shutil.which(program, path=SYSTEM_PATH) or program for program in ("ip", "nft"))
    commands = [
        "link set lo up",
        "link add node0 type bridge",
        f"address add {NODE_ADDRESS}/{NODE_NETWORK.split('/')[1]} dev node0",
        "link set node0 up",
        "route add default dev node0",
    ]
    for command in commands:
        subprocess.run([ip, *command.split()], check=True)
    subprocess.run([nft, "-f", "-"], check=True, input=NO_WAY_OUT, text=True)
    for setting, value in (("ip_forward", "1"), ("icmp_ratelimit", "0")):  # a rejection that is not sent is a connection that waits
        Path("/proc/sys/net/ipv4", setting).write_text(value)
    socket.sethostname(NODE)


if __name__ == "__main__":
    sys.exit(main())
