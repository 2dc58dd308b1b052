"""The few system calls that Python has no function for (before 3.12), and what this machine allows of them."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE, MS_SHARED = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18, 1 << 20,
)  # fmt: skip
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def enter_network_of(pid: int) -> None:
    """Move the calling *thread* into that process's network namespace; sockets that it makes from then on belong there."""
    with open(f"/proc/{pid}/ns/net") as namespace:
        _checked(_libc.setns(namespace.fileno(), CLONE_NEWNET), f"setns to process {pid}")


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = source.encode(), str(target).encode(), kind.encode() or None, ctypes.c_ulong(flags), options.encode() or None
    _checked(_libc.mount(*arguments), f"mount {kind or source} on {target}")


def bind(source: str | Path, target: str | Path, *, recursive: bool = True) -> None:
    mount(str(source), target, flags=MS_BIND | (MS_REC if recursive else 0))


def unmount(target: str | Path) -> None:
    _checked(_libc.umount2(str(target).encode(), MNT_DETACH), f"unmount {target}")


def die_with_parent() -> None:
    """The kernel sends SIGKILL to this process when the thread that made it ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def mounts_below(folder: Path) -> list[Path]:
    """Mount points of this namespace at or below `folder`, innermost first."""
    points = (line.split()[4].encode().decode("unicode_escape") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return sorted((Path(p) for p in points if Path(p) == folder or folder in Path(p).parents), key=lambda p: -len(p.parts))


def why_no_namespaces() -> str:
    """Why this process cannot make the namespaces and mounts of a node: "" where it can. Tried in a child, so nothing here changes."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        message = ""
        try:
            unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC)
            mount("none", "/", flags=MS_REC | MS_PRIVATE)
            mount("tmpfs", "/run", "tmpfs")
        except OSError as error:
            message = error.strerror or str(error)
            if error.errno in (errno.EPERM, errno.EACCES):
                message += " (the capabilities CAP_SYS_ADMIN and CAP_NET_ADMIN are missing)"
        os.write(writing, message.encode()[:1000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        message = answer.read()
    os.waitpid(child, 0)
    return message
