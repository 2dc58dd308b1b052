"""From a body's bytes to a model of `protocol*.py`, and to what its prompts begin with.

JSON is read and judged with Python's lock held: 8 MB take 2 ms where they are one text, and seconds where they are millions of values.
Short bodies are read at once. Long ones go to a process of their own (`body_process.py`), one after another, so that neither streams nor
probes wait for what a client sends; what comes back is bounded by the models.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import Request

from gantline_runtime import garbage
from gantline_runtime.prompt_prefixes import PromptPrefixes, read_prefixes
from gantline_runtime.server.api_error import ApiError
from gantline_runtime.server.body import BODY_TIMEOUT_S, BodyLimits, check_content_type, read_body
from gantline_runtime.server.helper_process import Helper, HelperCrashed, HelperTooSlow

__all__ = ["BodyReader", "is_long"]

_SHORT_BYTES = 32 * 1024
"""Whatever is in so few, it takes no more than some 10 ms."""
_LONG_BYTES = 1 << 20
"""Of one text, too: to decode what is escaped in it takes 6 ms a MB."""
_MOST_VALUES = 50_000
"""Of a body between these two: where a number counts 1, and a text, of which objects have several, 8."""
_TIMEOUT_S = 60.0
_MOST_WAITING = 32
"""Long bodies, each of which is held in memory meanwhile."""

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")


def is_long(data: bytes) -> bool:
    """Whether `data` may take more than some 10 ms to read. Guessed by its commas, those inside of texts included, and by its quotes:
    inside of texts these are escaped, so that a megabyte of somebody's source code is no reason."""
    if len(data) <= _SHORT_BYTES:
        return False
    if len(data) > _LONG_BYTES:
        return True
    return data.count(b",") + 4 * (data.count(b'"') - data.count(b'\\"')) > _MOST_VALUES


class BodyReader:
    """Reads bodies of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._limits = BodyLimits(max_bytes, BODY_TIMEOUT_S, BODY_TIMEOUT_S)
        self._helper = Helper("gantline_runtime.server.body_process")
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def parse(self, request: Request, model: type[M]) -> M:
        """Raises ApiError 400, 408, 413, 415 or 503, ClientLeft, or pydantic.ValidationError."""
        data = await self._read(request)
        if not is_long(data):
            return model.model_validate_json(data)
        fields: M = await self._exchange_long((model, data))
        return fields

    async def parse_prompt(
        self, request: Request, model: type[M], take: Callable[[M], tuple[M, T]]
    ) -> tuple[M, list[PromptPrefixes], T | None]:
        """As `parse`, and what each of the body's prompts begins with, as a gateway reads it from the same bytes. `take`, which may be a
        function of a module that `body_process.py` imports, works out what is large and takes it from the fields, if the body is long;
        otherwise that is None and still to do."""
        data = await self._read(request)
        if not is_long(data):
            return model.model_validate_json(data), list(read_prefixes(data)), None
        fields, taken, prefixes = await self._exchange_long((model, data, take))
        return fields, prefixes, taken

    async def close(self) -> None:
        await self._helper.close()

    async def _read(self, request: Request) -> bytes:
        check_content_type(request.headers)
        return await read_body(request, self._limits)

    async def _exchange_long(self, message: tuple[Any, ...]) -> Any:
        if self._waiting >= _MOST_WAITING:
            cause = f"{_MOST_WAITING} long bodies of requests are waiting to be read. Try again soon."
            raise ApiError(503, cause, code="overloaded", headers={"Retry-After": "1"})
        exchange = asyncio.create_task(self._exchange(pickle.dumps(message, protocol=5)))
        # A client that leaves in the middle must not cost the others the process: the exchange ends as it would have.
        exchange.add_done_callback(lambda task: task.cancelled() or task.exception())
        answer = await asyncio.shield(exchange)
        with garbage.held_back():
            status, *told = pickle.loads(answer)  # of our own process, not of a client
        if status == "parsed":
            return told[0]
        cause, code, param = told
        raise ApiError(400, cause, code=code, param=param)

    async def _exchange(self, message: bytes) -> bytes:
        self._waiting += 1
        try:
            async with self._lock:
                if not self._helper.running:
                    await self._helper.start()
                return await self._helper.exchange(message, _TIMEOUT_S)
        except HelperTooSlow:
            raise ApiError(503, f"The body could not be read within {_TIMEOUT_S:g} s.", code="overloaded") from None
        except HelperCrashed:
            raise ApiError(500, "The process that reads long bodies ended, perhaps out of memory.", code="internal_error") from None
        finally:
            self._waiting -= 1
