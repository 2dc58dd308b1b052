"""One operator at a time: a Lease that one of them holds, and an end to writing before another may begin.

    waiting --- the Lease is free, was given back, or was not renewed for as long as it says ---> leading
    leading --- not renewed in time, or another holds it ---> LeadershipLost: the process ends, and the kubelet starts another

Clocks of different machines are never compared: who waits counts from when it saw the Lease change, who leads from before it sent the
last renewal that succeeded. So by its own clock a leader stops writing a third of the duration before anybody else's wait is over, and one
that was stopped for longer, and goes on, finds at its next write that it may not. What it was sending at that very moment may still
arrive: Jobs have names that say what they do, so none is doubled, and everything else the new leader sees change and puts right.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import random
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from gantline_operator.client import ApiError, Client, Conflict, NotFound, Object, Resource

__all__ = ["LEASES", "Leadership", "LeadershipLost"]

LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")

_log = logging.getLogger(__name__)

_ADDRESS = "gantline.io/address"


class LeadershipLost(Exception):
    """Another operator leads, or may. This one has to end: what it knows may be old."""


class Leadership:
    """The right to write, by the Lease `lease` (`namespace/name`). It is renewed five times within the time that a leader may miss.

    `identity` names this process; empty: a name of which there is no second. One that finds its own name in the Lease takes it at once, so
    only a name whose earlier process is surely dead may come again: a pod's, of which the kubelet runs one container at a time.
    `address` is where other operators reach it.
    """

    def __init__(
        self,
        client: Client,
        lease: str,
        identity: str,
        duration_s: float,
        *,
        address: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._namespace, _, self._name = lease.partition("/")
        self._identity = identity or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"[:128]
        self._address = address
        self._duration_s = duration_s
        self._deadline_s = duration_s * 2 / 3
        self._retry_s = self._deadline_s / 5
        # Connections of its own: workers that use all of theirs must not hold a renewal up.
        self._client = client.sibling(request_timeout_s=self._deadline_s / 2)
        self._clock = clock
        self._until = -float("inf")
        self._version = ""
        self._seen: tuple[object, ...] = ()
        self.leader = ""
        """Address of the operator that leads, while this one does not; empty: not known."""
        self._seen_at = 0.0

    def leads(self) -> bool:
        return self.left_s() > 0

    def left_s(self) -> float:
        """Seconds for which this process may still write; negative where it may not."""
        return self._until - self._clock()

    async def acquire(self, stop: asyncio.Event) -> bool:
        """Waits until this process leads; False where `stop` was set before."""
        told = False
        while not stop.is_set():
            try:
                if await self._take():
                    _log.info("Leading: %s holds Lease %s/%s", self._identity, self._namespace, self._name)
                    return True
                told = told or self._tell_holder()
            except Conflict:
                pass  # somebody was faster
            except ApiError as error:
                _log.warning("Lease %s/%s: %s", self._namespace, self._name, error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._retry_s * random.uniform(0.8, 1.2)):
                    await stop.wait()
        return False

    async def keep(self) -> None:
        """Renews until cancelled. Raises LeadershipLost."""
        while True:
            await asyncio.sleep(self._retry_s)
            if not self.leads():
                raise LeadershipLost(f"Lease {self._namespace}/{self._name} could not be renewed for {self._deadline_s:.0f} s")
            try:
                async with asyncio.timeout(self.left_s()):
                    await self._renew()
            except (ApiError, TimeoutError) as error:
                _log.warning("Lease %s/%s is not renewed yet: %s", self._namespace, self._name, error)

    async def release(self) -> None:
        """Gives the Lease back, so that the next one need not wait. To be called once nothing is written any more."""
        if self.leads():
            self._until = -float("inf")
            with contextlib.suppress(ApiError):
                await self._give_back()
        await self._client.close()

    async def _give_back(self) -> None:
        """Once more where something else was written meanwhile: a renewal that was under way when it was given up may still arrive."""
        for _ in range(3):
            with contextlib.suppress(Conflict):
                await self._write({"holderIdentity": None})
                return
            live = await self._client.get(LEASES, self._namespace, self._name)
            if live["spec"].get("holderIdentity") != self._identity:
                return
            self._version = live["metadata"]["resourceVersion"]

    async def _take(self) -> bool:
        """One attempt; False while another holds it."""
        sent = self._clock()
        try:
            live = await self._client.get(LEASES, self._namespace, self._name)
        except NotFound:
            metadata = {"name": self._name, "annotations": {_ADDRESS: self._address}}
            body = {"metadata": metadata, "spec": {**self._spec({}), "leaseTransitions": 0}}
            self._hold(await self._client.create(LEASES, self._namespace, body), sent)
            return True
        if not self._is_free(live):
            self.leader = _address(live)
            return False
        self._version = live["metadata"]["resourceVersion"]
        self._hold(await self._write(self._spec(live.get("spec") or {}), address=self._address), sent)
        return True

    async def _renew(self) -> None:
        sent = self._clock()
        try:
            self._hold(await self._write({"renewTime": _now()}), sent)
        except (Conflict, NotFound):  # somebody wrote something else into it, or deleted it
            if not await self._take():
                self._until = -float("inf")
                raise LeadershipLost(f"Lease {self._namespace}/{self._name} is held by {self._seen[0]}") from None

    async def _write(self, spec: Mapping[str, object], *, address: str | None = None) -> Object:
        marks = {} if address is None else {"annotations": {_ADDRESS: address}}
        body = {"metadata": {"resourceVersion": self._version, **marks}, "spec": spec}
        return await self._client.patch(LEASES, self._namespace, self._name, body)

    def _hold(self, live: Object, sent: float) -> None:
        self._version = live["metadata"]["resourceVersion"]
        self._until = sent + self._deadline_s

    def _is_free(self, live: Object) -> bool:
        spec: Mapping[str, Any] = live.get("spec") or {}
        holder = spec.get("holderIdentity")
        if not holder or holder == self._identity:
            return True
        seen = (holder, spec.get("renewTime"), spec.get("leaseTransitions"))
        if seen != self._seen:
            self._seen, self._seen_at = seen, self._clock()
        return self._clock() - self._seen_at > (spec.get("leaseDurationSeconds") or self._duration_s)

    def _spec(self, before: Mapping[str, Any]) -> Object:
        transitions = before.get("leaseTransitions") or 0
        now = _now()
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": round(self._duration_s),
            "acquireTime": now,
            "renewTime": now,
            "leaseTransitions": transitions + (before.get("holderIdentity") != self._identity),
        }

    def _tell_holder(self) -> bool:
        _log.info("Waiting: %s holds Lease %s/%s", self._seen[0], self._namespace, self._name)
        return True


def _address(lease: Object) -> str:
    """Of the holder; empty where it says none. No name: whoever may write the Lease should not send us anywhere that DNS knows."""
    text = str((lease["metadata"].get("annotations") or {}).get(_ADDRESS, ""))
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        return ""


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
