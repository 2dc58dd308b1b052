"""Figures of the control plane on a real API server: how soon, how much, how quiet, how soon again.

    python -m benchmarks.operator_scale [--services 200] [--nodes 100] [--latency-services 50] [--single 20] [--rest 60] [--outage 0]

First children of services that come one by one and all at once; then the rest at once, until every pod has its node; then single ones
at that size; nothing at all; a killed operator's successor, until it has verified everything; and, if asked for, an outage of the API
server. Prints one line of JSON, for docs/perf-log.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

from gantline_devcluster.api_only import ApiCluster, add_nodes

from benchmarks.control_plane import (
    ACCOUNTS,
    SERVERS,
    OperatorProcess,
    Sightings,
    changed,
    create,
    gpus,
    mixed_nodes,
    prepare,
    quiet,
    ready,
    say,
    summary,
    versions,
    wait,
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options that can come to an end: too few services or GPUs would only be noticed by waiting for what never comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=200, help="services in all (default: 200)")
    parser.add_argument("--nodes", type=int, default=100, help="simulated nodes, of mixed GPUs (default: 100)")
    parser.add_argument("--latency-services", type=int, default=50, help="services whose first child is timed, each way (default: 50)")
    parser.add_argument("--pace", type=float, default=1.0, help="seconds between two; the other way is all at once (default: 1)")
    parser.add_argument("--single", type=int, default=20, help="services applied one by one at full size, until bound (default: 20)")
    parser.add_argument("--rest", type=float, default=60, help="seconds at rest (default: 60)")
    parser.add_argument("--outage", type=float, default=0, help="seconds without an API server, at the end (default: none)")
    options = parser.parse_args(arguments)
    timed, free = 2 * options.latency_services + options.single, gpus(mixed_nodes(options.nodes))
    if min(options.latency_services, options.single) < 2:
        parser.error("a percentile needs two at least: raise --latency-services or --single to 2")
    if options.services < timed + 2:
        parser.error(
            f"--services {options.services} is too few: --latency-services {options.latency_services}, each way, and --single "
            f"{options.single} are {timed} already, and a burst has 2 at least. Give --services {timed + 2} or more, or lower the others"
        )
    if options.services + (options.single if options.outage else 0) > free:
        parser.error(
            f"--nodes {options.nodes} have {free} GPUs, and --services {options.services} take one each: some would never be bound. "
            "Give more nodes, or fewer services"
        )
    return options


def main() -> int:
    options = parse()
    with ApiCluster(kwok=True) as cluster:
        prepare(cluster)
        add_nodes(cluster.client, mixed_nodes(options.nodes))
        say(f"{options.nodes} nodes")
        with OperatorProcess(cluster) as operator:
            print(json.dumps(measure(cluster, operator, options)))
    return 0


def measure(cluster: ApiCluster, operator: OperatorProcess, options: argparse.Namespace) -> dict[str, Any]:
    count = options.latency_services
    figures: dict[str, Any] = {"services": options.services, "nodes": options.nodes, "cores": os.cpu_count()}
    figures["first_child_paced_s"] = _first_children(cluster, [f"p{i}" for i in range(count)], options.pace)
    figures["first_child_burst_s"] = _first_children(cluster, [f"b{i}" for i in range(count)], 0.0)
    rest = options.services - 2 * count - options.single
    figures["burst"] = rest
    figures["burst_bound_s"] = _bound(cluster, [f"s{i}" for i in range(rest)], 0.0)
    _settle(cluster, options.services - options.single)
    figures["single_bound_s"] = _bound(cluster, [f"o{i}" for i in range(options.single)], 2.0)
    _settle(cluster, options.services)
    reconciles, requests = operator.metric("gantline_reconciles_total"), operator.metric("gantline_api_requests_total")
    figures |= {
        "operator_cpu_s": round(operator.cpu_s(), 1),
        "requests_per_reconcile": round(requests / reconciles, 1),
        "requests_per_service": round(requests / options.services, 1),
        "reconciles_per_service": round(reconciles / options.services, 1),
    }
    before, spent = versions(cluster), operator.cpu_s()
    time.sleep(options.rest)
    figures |= {
        "rest_s": options.rest,
        "changed_at_rest": changed(before, versions(cluster)),
        "operator_cpu_at_rest_s": round(operator.cpu_s() - spent, 1),
        "operator_rss_mib": round(operator.memory_mib(), 1),
        "operator_peak_mib": round(operator.memory_mib("VmHWM"), 1),
    }
    say(f"at rest: {figures}")
    figures |= _restart(cluster, operator, options.services)
    if options.outage:
        say(f"restarted: {figures}")
        figures |= _outage(cluster, operator, options)
    return {**figures, "load_1m": round(os.getloadavg()[0], 1)}


def _first_children(cluster: ApiCluster, names: list[str], pace_s: float) -> dict[str, float]:
    """From the answer to a service's POST to the sight of its first child."""
    return _timed(cluster, Sightings(cluster, ACCOUNTS, names), names, pace_s, "first child")


def _bound(cluster: ApiCluster, names: list[str], pace_s: float) -> dict[str, float]:
    """From the answer to a service's POST to the sight of its pod with a node."""
    return _timed(cluster, Sightings(cluster, SERVERS, names, bound=True), names, pace_s, "pod bound")


def _timed(cluster: ApiCluster, sightings: Sightings, names: list[str], pace_s: float, what: str) -> dict[str, float]:
    applied = {}
    for name in names:
        applied[name] = create(cluster, name)
        time.sleep(pace_s)
    found = summary(sightings.seconds_since(applied))
    say(f"{what}, {len(names)} services, {f'one each {pace_s:g} s' if pace_s else 'all at once'}: {found}")
    return found


def _settle(cluster: ApiCluster, count: int) -> None:
    wait(lambda: ready(cluster) == count, 900, lambda: f"{ready(cluster)} of {count} ready", every_s=2.0)
    wait(lambda: quiet(cluster, 5.0), 300, lambda: "things keep moving")


def _restart(cluster: ApiCluster, operator: OperatorProcess, count: int) -> dict[str, Any]:
    """A SIGKILL, and the time until the next process has reconciled every service."""
    before, began = versions(cluster), time.monotonic()
    operator.restart()
    wait(lambda: operator.metric("gantline_reconciles_total") >= count, 300, lambda: "not all were verified", every_s=1.0)
    seconds, spent = time.monotonic() - began, operator.cpu_s()
    return {
        "restart_to_verified_s": round(seconds, 1),
        "restart_cpu_s": round(spent, 1),
        "restart_requests": int(operator.metric("gantline_api_requests_total")),
        "changed_by_restart": changed(before, versions(cluster)),
    }


def _outage(cluster: ApiCluster, operator: OperatorProcess, options: argparse.Namespace) -> dict[str, Any]:
    """The API server is killed; once it is back, services are applied one by one. No other object may have changed in the end."""
    before, spent = versions(cluster), operator.cpu_s()
    cluster.stop_apiserver()
    time.sleep(options.outage)
    cluster.start_apiserver()
    bound = _bound(cluster, [f"a{i}" for i in range(options.single)], 2.0)
    _settle(cluster, options.services + options.single)
    after = {key: version for key, version in versions(cluster).items() if key in before or key.startswith("events/")}
    return {
        "outage_s": options.outage,
        "operator_alive": operator.alive,
        "outage_cpu_s": round(operator.cpu_s() - spent, 1),
        "single_bound_after_outage_s": bound,
        "changed_by_outage": [key for key in changed(before, after) if key in before],
    }


if __name__ == "__main__":
    sys.exit(main())
