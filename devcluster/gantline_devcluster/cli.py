"""`python -m gantline_devcluster`: build the parts, run a real one-node cluster, simulate nodes beside it."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.binaries import SETS, collected
from gantline_devcluster.build import build
from gantline_devcluster.client import ApiError
from gantline_devcluster.control_plane import NODE
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node.cluster import NodeCluster
from gantline_devcluster.node.layout import BUILT_IMAGES, DEFAULT_NAME

EXIT_NOT_RUNNING = 3


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except DevclusterError as error:
        print(f"gantline: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("gantline: interrupted", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m gantline_devcluster", description=__doc__)
    top.add_argument("--name", default=DEFAULT_NAME, help="which cluster, where there are several (default: %(default)s)")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    made = add("build", run_build, "compile Kubernetes and its parts into the cache (once for each version)")
    sets = (
        "client: kubectl and helm; api: no node; test: api and kwok; node: what `up` needs; suite: node and test; "
        "rehearsal: node and a registry; oldest: the oldest Kubernetes; keda: test and KEDA; all (default)"
    )
    made.add_argument("--set", choices=sorted(SETS), default="all", help=sets)
    add("binaries", lambda _: print(collected()), "print the folder of the built binaries: kubectl, helm, ...")
    up = add("up", run_up, "start the node, or find it running; returns when it is Ready and its DNS answers (root)")
    up.add_argument(BUILT_IMAGES, action="store_true", help="no development images: a registry of the node takes what you build and push")
    add("down", run_down, "end the cluster and remove all that belongs to it")
    add("status", run_status, "what runs, what was restarted, what is exposed").add_argument("--json", action="store_true")
    logs = add("logs", run_logs, "print a component's log, or list the logs")
    logs.add_argument("component", nargs="?")
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("--tail", type=int, default=200, metavar="N", help="the last N lines (default: %(default)s)")
    add("kubeconfig", run_kubeconfig, "print the path of the administrator's kubeconfig")
    add("registry", run_registry, "print the registry of a node that runs built images")
    simulate = add("simulate", run_simulate, "add simulated nodes")
    simulate.add_argument("profile", help=f"one of {', '.join(profiles.names())}, or a profile file")
    simulate.add_argument("--count", type=int, help="how many of each of the profile's groups")
    simulate.add_argument("--no-taint", action="store_true", help="let any pod go there, also those that should really run")
    expose = add("expose", run_expose, "relay a loopback port to a Service, until `down`; prints its address")
    expose.add_argument("service", metavar="NAMESPACE/SERVICE:PORT")
    expose.add_argument("--local", type=int, default=0, metavar="PORT", help="this loopback port (default: a free one)")
    devices = add("devices", run_devices, "have the kubelet offer devices that do not exist, such as nvidia.com/gpu")
    devices.add_argument("resource")
    devices.add_argument("count", type=int)
    outside = add("outside", run_outside, "addresses and names outside that the cluster asked for; exit code 1 if it did")
    outside.add_argument("--json", action="store_true")
    add("unexpose", run_unexpose, "end such a relay").add_argument("local", type=int, metavar="PORT")
    return top


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run_build(options: argparse.Namespace) -> None:
    print(build(SETS[options.set], tell))


def run_up(options: argparse.Namespace) -> None:
    started = time.monotonic()
    cluster = NodeCluster(options.name)
    cluster.up(lambda line: tell(f"{line}, {time.monotonic() - started:.0f} s"), built_images=options.built_images)
    tell(f"the node is ready, {time.monotonic() - started:.0f} s")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


def run_down(options: argparse.Namespace) -> int:
    left = NodeCluster(options.name).down()
    for path in left:
        tell(f"gantline: {path} could not be removed")
    return 1 if left else 0


def run_status(options: argparse.Namespace) -> int:
    cluster = NodeCluster(options.name)
    if not cluster.supervisor():
        error = cluster.state().get("error")
        print(
            json.dumps({"phase": "not running"})
            if options.json
            else f"{options.name}: not running{f'; it failed: {error}' if error else ''}"
        )
        return EXIT_NOT_RUNNING
    state = cluster.order(do="status") if cluster.run.control_socket.exists() else cluster.state()
    state = {"components": {}, "exposed": {}, **state}
    healthy = state["phase"] == "ready" and all(c["running"] for c in state["components"].values())
    if options.json:
        print(json.dumps(state))
        return 0 if healthy else 1
    age_s = time.time() - state["started"]
    print(f"{options.name}: {state['phase']}, up for {age_s:.0f} s, supervisor {state['pid']}, {NODE} {_node(cluster)}")
    for name, component in state["components"].items():
        shown = (
            "running" if component["running"] else f"ended with code {component['code']}{', starting again' if component['again'] else ''}"
        )
        print(f"  {name:24} {shown:32} {component['restarts']} restarts")
    for port, service in state["exposed"].items():
        print(f"  http://127.0.0.1:{port} -> {service}")
    return 0 if healthy else 1


def _node(cluster: NodeCluster) -> str:
    try:
        conditions = cluster.client.get(f"/api/v1/nodes/{NODE}")["status"]["conditions"]
    except (ApiError, OSError, KeyError):
        return "unknown"
    return next((f"Ready={c['status']}" for c in conditions if c["type"] == "Ready"), "unknown")


def run_logs(options: argparse.Namespace) -> int:
    folder = NodeCluster(options.name).run.logs
    found = sorted(path.stem for path in folder.glob("*.log"))
    if options.component not in found:
        if options.component is None and found:
            print("\n".join(found))
            return 0
        raise DevclusterError(f"there is no log {options.component or ''} in {folder}", f"There are: {', '.join(found) or 'none'}")
    command = ["tail", f"--lines={options.tail}", *(["--follow"] if options.follow else []), str(folder / f"{options.component}.log")]
    return subprocess.run(command).returncode


def run_kubeconfig(options: argparse.Namespace) -> None:
    cluster = NodeCluster(options.name)
    if not cluster.supervisor():
        raise DevclusterError(f"the cluster {options.name!r} is not running", "Start it: python -m gantline_devcluster up")
    print(cluster.kubeconfig)


def run_outside(options: argparse.Namespace) -> int:
    found = NodeCluster(options.name).outside()
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join([*found["addresses"], *found["names"]]) or "nothing")
    return 1 if found["addresses"] or found["names"] else 0


def run_registry(options: argparse.Namespace) -> None:
    registry = NodeCluster(options.name).registry
    if not registry:
        raise DevclusterError(f"the cluster {options.name!r} runs development images", f"Start another: --name NAME up {BUILT_IMAGES}")
    print(registry)


def run_simulate(options: argparse.Namespace) -> None:
    path = Path(options.profile)
    names = NodeCluster(options.name).simulate(
        path if path.is_file() else options.profile, options.count, tainted=not options.no_taint, tell=tell
    )
    print("\n".join(names))


def run_expose(options: argparse.Namespace) -> None:
    print(f"http://127.0.0.1:{NodeCluster(options.name).expose(options.service, options.local)}")


def run_devices(options: argparse.Namespace) -> None:
    NodeCluster(options.name).offer_devices(options.resource, options.count, tell)


def run_unexpose(options: argparse.Namespace) -> None:
    NodeCluster(options.name).unexpose(options.local)
