"""Work that goes on beside other work, and whose failure ends it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

__all__ = ["beside"]


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], stop: asyncio.Event) -> AsyncIterator[asyncio.Task[None]]:
    """Runs `work` for as long as the block. Where it fails `stop` is set, and what it failed of is raised at the block's end."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            stop.set()

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
