"""The node as seen from a shell or a test: bring it up, ask it, take it down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gantline_devcluster import profiles
from gantline_devcluster.api_only import add_nodes, run_kubectl
from gantline_devcluster.binaries import SETS
from gantline_devcluster.build import build
from gantline_devcluster.client import Client
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node import cgroups, linux
from gantline_devcluster.node.layout import BUILT_IMAGES, DEFAULT_NAME, Run
from gantline_devcluster.node.requirements import require_node, require_packages
from gantline_devcluster.processes import tail

UP_TIMEOUT_S = 200.0
DOWN_TIMEOUT_S = 30.0
POLL_S = 0.2
Tell = Callable[[str], None]


class NodeCluster:
    """One named run: `up` and `down` may be called at any time and from any process; the cluster itself lives in the background."""

    def __init__(self, name: str = DEFAULT_NAME) -> None:
        self.run = Run(name)

    @property
    def kubeconfig(self) -> Path:
        """The administrator's kubeconfig; its address is a loopback port of the host."""
        return self.run.kubeconfig

    @property
    def client(self) -> Client:
        """A new connection to the API server."""
        self._require_running()
        return Client(self.kubeconfig)

    def up(self, tell: Tell = print, *, built_images: bool = False) -> None:
        """Bring the node up, or find that it is; returns when it is Ready and its DNS answers. Raises DevclusterError, NotPossibleHere.

        With `built_images` there are no development images, and containers get nothing of this machine: the node has a registry of its
        own (`registry`), and runs what is pushed there.
        """
        require_node()
        require_packages(tell)
        build(SETS["rehearsal" if built_images else "node"], tell)
        with self._exclusively():
            if self.supervisor() and self.state().get("phase") != "failed":
                self._wait_until_ready(tell)
                self._require_images(built_images)
                return
            self._clean()
            self._start_supervisor(built_images)
            self._wait_until_ready(tell)

    def down(self) -> list[str]:
        """End everything of this run and remove it, whatever state it is in; returns what could not be removed (normally nothing)."""
        if os.geteuid() != 0 and not self.run.folder.exists():
            return []
        require_node()
        with self._exclusively():
            pid = self.supervisor()
            if pid:
                self._end(pid)
            left = self._clean()
        with contextlib.suppress(OSError):
            self.run.folder.parent.rmdir()  # only if no other run is there
        return left

    @property
    def registry(self) -> str:
        """`localhost:PORT` of the node's registry, over plain HTTP; "" where the node runs development images."""
        self._require_running()
        return str(self.state().get("registry", ""))

    def supervisor(self) -> int:
        """The process id of the living supervisor, 0 where there is none."""
        try:
            with self.run.lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(self.run.lock.read_text().strip() or 0)
        except OSError:
            return 0
        return 0

    def state(self) -> dict[str, Any]:
        """What the supervisor last wrote (see Supervisor.state); {} where no run was ever started."""
        try:
            return dict(json.loads(self.run.state_file.read_text()))
        except (OSError, ValueError):
            return {}

    def order(self, **order: Any) -> dict[str, Any]:
        """One order to the supervisor. Raises DevclusterError with its answer where it refuses."""
        self._require_running()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            try:
                connection.connect(str(self.run.control_socket))
                connection.sendall(json.dumps(order).encode() + b"\n")
                answer = connection.makefile().readline()
            except OSError as error:
                raise DevclusterError(f"the cluster's supervisor does not answer: {error}", "Run `down` and `up`") from error
        decoded = dict(json.loads(answer or '{"error": "the supervisor ended. Run `up`."}'))
        if "error" in decoded and decoded.get("phase") is None:
            cause, _, cure = str(decoded["error"]).partition(". ")
            raise DevclusterError(cause, cure or "Look into the supervisor's log")
        return decoded

    def expose(self, service: str, local: int = 0) -> int:
        """Relay a loopback port to `namespace/service:port`; returns the port. Kept until `down`, or `unexpose`."""
        return int(self.order(do="expose", service=service, local=local)["port"])

    def outside(self) -> dict[str, list[str]]:
        """Addresses and names outside the cluster that something in it has asked for since `up`; in vain, each of them."""
        return self.order(do="outside")

    def offer_devices(self, resource: str, count: int, tell: Tell = print) -> None:
        """Have the kubelet offer `count` devices that do not exist: pods that ask for them are scheduled and started as with real ones."""
        self._require_running()
        build(SETS["rehearsal"], tell)
        self.order(do="devices", resource=resource, count=count)

    def unexpose(self, local: int) -> None:
        self.order(do="unexpose", local=local)

    def simulate(self, profile: str | Path, count: int | None = None, *, tainted: bool = True, tell: Tell = print) -> list[str]:
        """Add simulated nodes beside the real one. `tainted` keeps pods that do not tolerate it off them, so that real work stays real."""
        self._require_running()
        nodes = profiles.load(profile, count, tainted=tainted)
        build(SETS["test"], tell)
        self.order(do="kwok")
        return add_nodes(self.client, nodes)

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True, timeout_s: float = 120.0
    ) -> subprocess.CompletedProcess[str]:
        return run_kubectl(self.kubeconfig, *arguments, input=input, check=check, timeout_s=timeout_s)

    def _require_running(self) -> None:
        if not self.run.folder.exists() or not self.supervisor():
            raise DevclusterError(f"the cluster {self.run.name!r} is not running", "Start it: python -m gantline_devcluster up")

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One `up` or `down` at a time; the lock is on the folder of all runs, so it leaves nothing."""
        parent = self.run.folder.parent
        parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(parent, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _require_images(self, built: bool) -> None:
        if bool(self.registry) != built:
            runs = "built" if self.registry else "development"
            raise DevclusterError(f"the cluster {self.run.name!r} runs {runs} images", "Use another --name, or `down` first")

    def _start_supervisor(self, built_images: bool) -> None:
        self.run.logs.mkdir(parents=True, exist_ok=True)
        self.run.folder.chmod(0o711)  # a sudo user's own kubectl reaches the kubeconfig, nothing else
        command = [sys.executable, "-m", "gantline_devcluster.node.supervisor", self.run.name]
        command += [BUILT_IMAGES] if built_images else []
        with (self.run.logs / "supervisor.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/")

    def _wait_until_ready(self, tell: Tell) -> None:
        deadline = time.monotonic() + UP_TIMEOUT_S
        told = ""
        while True:
            state = self.state()
            phase = str(state.get("phase", "starting"))
            if phase == "ready":
                return
            ended = getattr(self, "_process", None) is not None and self._process.poll() is not None
            if phase == "failed" or ended:
                why = state.get("error") or tail(self.run.logs / "supervisor.log")
                raise DevclusterError(f"the node did not start: {str(why).rstrip('.')}", f"Its logs are in {self.run.logs}")
            if phase != told:
                told = phase
                tell(phase)
            if time.monotonic() > deadline:
                raise DevclusterError(
                    f"the node was not ready within {UP_TIMEOUT_S:.0f} s, last: {phase}", f"Its logs are in {self.run.logs}"
                )
            time.sleep(POLL_S)

    def _end(self, pid: int) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            deadline = time.monotonic() + DOWN_TIMEOUT_S
            while self.supervisor() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _clean(self) -> list[str]:
        """What a run leaves on the host: a control group (with whatever still runs in it) and its folder."""
        left = cgroups.remove(self.run.cgroup)
        for point in linux.mounts_below(self.run.folder):
            linux.unmount(point)
        shutil.rmtree(self.run.folder, ignore_errors=True)
        return left + ([str(self.run.folder)] if self.run.folder.exists() else [])
