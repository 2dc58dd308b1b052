"""What one look of the autoscaling loop costs: many services, whose replicas answer with a whole /metrics page over loopback.

    python -m benchmarks.autoscaling_loop [--services 200] [--replicas 2] [--looks 5]

Replicas are one server in a process of its own, so its work is not counted. Prints one line of JSON, for docs/perf-log.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from unittest.mock import patch

from gantline_operator.autoscaling import loop as autoscaling_loop
from gantline_operator.autoscaling.loop import Autoscaler
from gantline_operator.autoscaling.policy import Policy
from gantline_operator.autoscaling.targets import Target, Targets
from gantline_operator.pod_state import PodState
from gantline_operator.settings import OperatorSettings


def serve(ready: Connection) -> None:
    """A /metrics page as the server renders it, on a port of the kernel's choice."""
    from aiohttp import web
    from gantline_runtime.engine_messages import EngineReport
    from gantline_runtime.server.lifecycle import State
    from gantline_runtime.server.metrics import Metrics

    metrics = Metrics("1")
    metrics.engine(EngineReport(num_running=7, num_waiting=1, cache_usage=0.4))
    page = metrics.render(State.READY)

    async def main() -> None:
        application = web.Application()

        async def show(request: web.Request) -> web.Response:
            return web.Response(body=page)

        application.router.add_get("/metrics", show)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        ready.send((runner.addresses[0][1], len(page)))
        await asyncio.Event().wait()

    asyncio.run(main())


def build_targets(services: int, replicas: int) -> Targets:
    targets = Targets()
    for index in range(services):
        pods = tuple(_pod(f"s{index}-{number}") for number in range(replicas))
        target = Target("default", f"s{index}", f"u{index}", "r", Policy(max=replicas, min=replicas), replicas, pods)
        targets.note(target.key, target)
    return targets


def _pod(name: str) -> PodState:
    now = datetime.now(UTC)
    return PodState(
        name=name, uid=name, role="server", job="", revision="r", node="n", phase="Running", deleting=False, ready=True, restarts=0,
        created=now, scheduled=now, started=now, ready_at=now, trouble=None, answer=None, address="127.0.0.1",
    )  # fmt: skip


async def measure(services: int, replicas: int, looks: int) -> dict[str, float]:
    targets = build_targets(services, replicas)
    unused = None  # no gateway is asked, and nothing is scaled: the client is not used
    autoscaler = Autoscaler(unused, OperatorSettings(), targets, enqueue=lambda *_: None, scaled=lambda _: None)  # type: ignore[arg-type]
    wall, cpu = [], []
    async with autoscaler._scraper:
        await autoscaler.look()  # connections are made once
        for _ in range(looks):
            began = time.monotonic(), time.process_time()
            await autoscaler.look()
            wall.append(time.monotonic() - began[0])
            cpu.append(time.process_time() - began[1])
    known = sum(1 for target in targets.all.values() if autoscaler.load(target.key) is not None)
    assert known == services, f"{services - known} services are unknown"
    return {"look_s": round(statistics.median(wall), 3), "look_cpu_s": round(statistics.median(cpu), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--looks", type=int, default=5)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        port, size = ours.recv()
        with patch.object(autoscaling_loop, "SERVER_PORT", port):
            found = asyncio.run(measure(options.services, options.replicas, options.looks))
    finally:
        server.terminate()
        server.join()
    print(json.dumps({"services": options.services, "replicas": options.replicas, "page_bytes": size, **found}))


if __name__ == "__main__":
    main()
