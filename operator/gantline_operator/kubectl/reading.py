"""Reading with a person's own rights: what they may not see is told in a sentence, and the rest is answered all the same."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from gantline_runtime.errors import SourceError

from gantline_operator.client import ApiError, Client, Forbidden, KindMissing, NotFound, Object, Resource
from gantline_operator.events import EVENTS
from gantline_operator.observe import PODS
from gantline_operator.reconcile_pass import SERVICES
from gantline_operator.resources import child_selector

__all__ = ["JOBS", "Reader", "age", "columns"]

JOBS = Resource("batch/v1", "Job", "jobs")


class Reader:
    """One namespace, or all of them (None). `missing` collects a sentence about each sort of object that could not be read."""

    def __init__(self, client: Client, namespace: str | None) -> None:
        self.client = client
        self.namespace = namespace
        self.missing: list[str] = []

    async def service(self, name: str) -> Object:
        """Raises SourceError."""
        try:
            return await self.client.get(SERVICES, self.namespace, name)
        except NotFound:
            raise SourceError(
                f"there is no InferenceService {name} in namespace {self.namespace}", cure="`kubectl get gisvc -A` lists those that are."
            ) from None
        except ApiError as error:
            raise _unreadable(error) from None

    async def services(self) -> list[Object]:
        """Raises SourceError."""
        try:
            return await self.client.list(SERVICES, self.namespace)
        except ApiError as error:
            raise _unreadable(error) from None

    async def pods(self, service: str = "") -> list[Object]:
        """Of one service, or of all."""
        return await self._list(PODS, child_selector(service) if service else "gantline.io/service")

    async def jobs(self, service: str) -> list[Object]:
        return await self._list(JOBS, child_selector(service))

    async def events(self) -> list[Object]:
        return await self._list(EVENTS, "")

    async def _list(self, resource: Resource, selector: str) -> list[Object]:
        try:
            return await self.client.list(resource, self.namespace, **({"labelSelector": selector} if selector else {}))
        except Forbidden:
            self.missing.append(f"You may not list {resource.plural} here, so nothing is said of them.")
        except ApiError as error:
            self.missing.append(f"{resource.plural} could not be read, so nothing is said of them: {error}")
        return []


def _unreadable(error: ApiError) -> SourceError:
    if isinstance(error, KindMissing):
        return SourceError("this cluster does not know InferenceServices", cure="Install Gantline's chart, or choose another context.")
    if isinstance(error, Forbidden):
        return SourceError(f"you may not read InferenceServices: {error}", cure="Ask for the role `view` in this namespace.")
    return SourceError(f"the cluster gives no answer: {error}", cure="Check --context, and whether kubectl itself gets one.")


def age(since: datetime, now: datetime) -> str:
    """As kubectl shows it: `47s`, `12m`, `5h`, `3d`."""
    seconds = max(0, int((now - since).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table as kubectl prints one; the last column is as wide as it is."""
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head) - 1)]
    lines = ["   ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines)
