"""Files on a volume that processes of several users share: everybody reads them, the group changes and removes them.

As which user a pod runs is the cluster's matter where the pod does not say, and a service's files outlive its pods. What such users have in
common is a group: the pod's fsGroup, which a volume's folders hand down, or group 0, in which OpenShift runs users of any number.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["describe_owner", "open_up", "share_with_group"]

_FILE, _FOLDER = 0o664, 0o775
_GROUP = 0o070


def share_with_group() -> None:
    """From now on what this process makes is its group's to change, unless it says otherwise. Of a command that fills a volume."""
    os.umask(os.umask(0) & ~_GROUP)


def open_up(path: Path) -> None:
    """Everybody may read it and its group change it, whatever a library made it with. Another user's that can be read stays as it is.

    Raises PermissionError for another user's that cannot.
    """
    mode = path.stat().st_mode
    wanted = _FOLDER if stat.S_ISDIR(mode) else _FILE
    if stat.S_IMODE(mode) & ~stat.S_ISGID == wanted:
        return
    try:
        path.chmod(wanted | mode & stat.S_ISGID)
    except PermissionError:
        readable = wanted & 0o555
        if mode & readable != readable:
            raise


def describe_owner(path: Path) -> str:
    """Whose it is, for a message: `it is user 1000's and group 0's`."""
    try:
        found = path.lstat()
    except OSError:
        return "its owner is not known"
    return f"it is user {found.st_uid}'s and group {found.st_gid}'s"
