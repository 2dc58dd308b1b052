"""The process of one rank other than 0: imports while rank 0 does, then serves as `distributed.py` says.

python -m gantline_runtime.rank_process RANK PIPE PARENT DEVICE      (PIPE: an open file's number; DEVICE as `EngineConfig.device`)
"""

from __future__ import annotations

import multiprocessing.connection
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence

from gantline_runtime import garbage
from gantline_runtime.gpu_opening import begin_opening
from gantline_runtime.torch_import import without_tracing

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    rank, pipe, parent = (int(text) for text in arguments[:3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; rank 0 decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # draining is rank 0's business, too
    _end_with_parent(parent)
    begin_opening(arguments[3], rank)
    with garbage.importing(), without_tracing():
        from gantline_runtime.distributed import serve_rank
    serve_rank(rank, multiprocessing.connection.Connection(pipe))


def _end_with_parent(pid: int) -> None:
    """End this process when its parent is gone, whatever it is waiting for then."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    if os.getppid() != pid:  # it ended before the line above, and the number is somebody else's
        os._exit(1)

    def wait() -> None:
        select.select([handle], [], [])
        os._exit(0)

    threading.Thread(target=wait, name="gantline-parent-watch", daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
