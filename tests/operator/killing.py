"""Operators that die as by a SIGKILL after so many writes, and the scenarios in which they do.

The sample that the suite runs is chosen by a checksum of the operator's own sources: the same code always dies at the same places, changed
code at others. GANTLINE_FULL_MATRIX=1 runs every place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gantline_operator.client import Conflict, NotFound, connect
from gantline_operator.controller import Controller
from gantline_operator.reconcile_pass import SERVICES

from tests.operator.harness import ROOT, SETTINGS

__all__ = ["FULL", "SCENARIOS", "Run", "Scenario", "in_the_full_matrix", "reconcile_until_killed", "runs"]

Object = dict[str, Any]
FULL = os.environ.get("GANTLINE_FULL_MATRIX") == "1"
in_the_full_matrix = pytest.mark.skipif(not FULL, reason="GANTLINE_FULL_MATRIX=1 runs it; docs/perf-log.md has the last run")


@dataclass(frozen=True)
class Scenario:
    """From a service at rest with the spec `before` (None: none is there) to one with `after` (None: it is deleted)."""

    name: str
    service: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None
    most_writes: int
    """More than an operator needs for it."""


SCENARIOS = (
    Scenario("create", "tiny", None, {}, 24),
    Scenario("update", "tiny", {}, {"replicas": 2}, 16),
    Scenario("quantize", "packed", None, {"quantization": {"method": "awq"}}, 36),
    Scenario("rollout", "tiny", {}, {"engine": {"maxBatchSize": 3}}, 24),
    Scenario("handover", "tiny", {"scaling": {"controller": "HPA", "max": 2}}, {"scaling": {"controller": "KEDA", "max": 2}}, 16),
    Scenario("delete", "tiny", None, None, 24),
)


@dataclass(frozen=True)
class Run:
    scenario: Scenario
    writes: int
    namespace: str


def runs(prefix: str) -> Iterator[Run]:
    """Each in a namespace of its own."""
    seed = zlib.crc32(b"".join(path.read_bytes() for path in sorted((ROOT / "operator/gantline_operator").rglob("*.py"))))
    for number, scenario in enumerate(SCENARIOS):
        # In a third of `most_writes` most of the work is done.
        sample = 1 + (seed >> (5 * number)) % (scenario.most_writes // 3)
        for writes in range(1, scenario.most_writes + 1) if FULL else [sample]:
            yield Run(scenario, writes, f"{prefix}-{scenario.name}-{writes}")


class Killed(BaseException):
    """As a SIGKILL between two writes: nothing of that operator runs afterwards."""


async def reconcile_until_killed(kubeconfig: Path, run: Run) -> int:
    """Reconciles the run's service again and again until the process would have died after so many writes, or the service is as it should
    be; how many writes there were."""
    client = await connect(str(kubeconfig))
    send, done = client._send, 0

    async def mortal(method: str, path: str, **arguments: Any) -> bytes:
        nonlocal done
        result = await send(method, path, **arguments)
        done += method != "GET"
        if method != "GET" and done == run.writes:
            raise Killed
        return result

    client._send = mortal  # type: ignore[method-assign]
    controller = Controller(client, replace(SETTINGS, observe_nodes="never"), "1")
    await controller._learn_kinds()
    try:
        while not _is_ready(await client.get(SERVICES, run.namespace, run.scenario.service)):
            with contextlib.suppress(Conflict):  # the volume controller writes to claims too: the queue would try again
                await controller.reconcile((run.namespace, run.scenario.service))
            await asyncio.sleep(0.1)
    except Killed:
        pass
    except NotFound:
        pass  # deleted meanwhile
    finally:
        await client.close()
    return done


def _is_ready(parent: Object) -> bool:
    status = parent.get("status") or {}
    ready = {item["type"]: item["reason"] for item in status.get("conditions") or []}.get("Ready")
    return ready == "Ready" and status.get("observedGeneration") == parent["metadata"]["generation"]
