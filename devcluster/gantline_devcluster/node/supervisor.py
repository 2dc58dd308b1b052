"""The background process behind `up`: starts the node, keeps it, relays loopback ports into it, and takes everything with it when it ends.

It lives outside the namespaces and holds the run's lock for as long as it lives. What it knows is in `state.json`; it takes orders on
`control.sock`, one JSON object a line: `{"do": "expose", "service": "ns/name:port", "local": 0}`, `{"do": "unexpose", "local": 8000}`,
`{"do": "devices", "resource": "nvidia.com/gpu", "count": 1}`, `{"do": "kwok"}`, `{"do": "status"}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from gantline_devcluster.api_only import free_port
from gantline_devcluster.binaries import collected, find
from gantline_devcluster.client import ApiError, Client
from gantline_devcluster.control_plane import KUBERNETES_SERVICE, NODE, ControlPlane, write_private
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.node import config, dns, outside
from gantline_devcluster.node.images import development_images, environment_mounts, pause_image, write_archive
from gantline_devcluster.node.layout import API_PORT, BUILT_IMAGES, DNS_DOMAIN, DNS_SERVICE, NODE_ADDRESS, POD_CIDR, REGISTRY_PORT, Run
from gantline_devcluster.node.relay import Relays
from gantline_devcluster.node.requirements import SYSTEM_PATH
from gantline_devcluster.processes import Component, Keeper, tail

START_TIMEOUT_S = 180.0
POLL_S = 0.2
WATCH_S = 1.0
SIMULATED_LEASE_S = 40
DEVICE_PLUGINS = "/var/lib/kubelet/device-plugins"  # compiled into the kubelet, whatever its root folder is
# overlayfs cannot lie on overlayfs, which is what the root of a container is; and of these file systems no kubelet knows the size.
UNMEASURED = ("btrfs", "zfs")
# Imported once where no bytecode exists yet: otherwise every container would compile torch and its like anew, since there the environment
# is read-only.
WARMED = "torch transformers starlette uvicorn huggingface_hub kopf kubernetes.client kubernetes.aio prometheus_client"
WARM_UP = f"""
import importlib
for name in {WARMED!r}.split():
    try:
        importlib.import_module(name)
    except Exception as error:
        print(name, error)
"""
log = logging.getLogger("supervisor")


class Supervisor:
    def __init__(self, run: Run, *, built_images: bool = False) -> None:
        """With `built_images` containers get nothing of this machine, and a registry takes the images that they run."""
        self.run = run
        self.built_images = built_images
        self.registry_port = free_port() if built_images else 0
        self.plane = ControlPlane(run.folder, NODE_ADDRESS, API_PORT)
        self.api_port = free_port()
        self.exposed: dict[int, str] = {}
        self.phase, self.error, self.started = "starting", "", time.time()
        self._service_cache: dict[str, tuple[float, tuple[str, int]]] = {}
        self.stopping = False
        self._warm_up: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Everything that can be written before a process runs."""
        folder = self.run.folder
        self.plane.prepare((f"kubelet={NODE},{NODE_ADDRESS}", "apiserver-kubelet-client="))
        for part in ("cni", "volumes", "pod-logs", "volume-plugins", "containerd"):
            (folder / part).mkdir(exist_ok=True)
        self._write("resolv.conf", f"nameserver {DNS_SERVICE}\n")
        self._write("hosts", "# Names for pods, in the format of /etc/hosts; read anew when it changes.\n")
        self._write("Corefile", config.corefile(self.run))
        kind = subprocess.run(["stat", "--file-system", "--format=%T", str(folder)], capture_output=True, text=True).stdout.strip()
        self._write("kubelet.json", json.dumps(config.kubelet(self.run, measures_disk=kind not in UNMEASURED), indent=1))
        self._write("cni/10-pods.conflist", json.dumps(config.cni(self.run), indent=1))
        runc = shutil.which("runc", path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}") or "runc"
        spec = None if self.built_images else self._write_development_spec()
        snapshotter = "native" if kind == "overlayfs" else "overlayfs"
        self._write("containerd.toml", config.containerd(self.run, find("ptp").parent, runc, snapshotter, base_spec=spec))
        images = [] if self.built_images else development_images()
        write_archive(folder / "images.tar", [pause_image(find("pause").read_bytes()), *images])
        if self.built_images:
            self._write("registry.json", json.dumps(config.registry(self.run)))
            (folder / "registries" / self.registry).mkdir(parents=True)
            self._write(f"registries/{self.registry}/hosts.toml", config.registry_host())
        url = f"https://127.0.0.1:{self.api_port}"
        self.plane.write_kubeconfig(self.run.kubeconfig, self.plane.tokens["admin"], "admin", url=url)
        self._give_to_user(self.run.kubeconfig)

    @property
    def registry(self) -> str:
        """The registry's name, for the host and the node alike; "" where there is none."""
        return f"localhost:{self.registry_port}" if self.registry_port else ""

    def _write_development_spec(self) -> Path:
        default = json.loads(subprocess.run([str(find("ctr")), "oci", "spec"], capture_output=True, check=True).stdout)
        self._write("spec.json", json.dumps(config.runtime_spec(default, environment_mounts())))
        return self.run.folder / "spec.json"

    def start_keeper(self) -> None:
        """Must run in the main thread: the node ends with the thread that starts it."""
        command = [sys.executable, "-m", "gantline_devcluster.node.init", self.run.name]
        self.keeper = Keeper(command, log=self.run.logs / "init.log")

    async def serve(self) -> None:
        """Bring the node up, then keep it until a signal ends it or it breaks."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        bring_up = asyncio.create_task(self._bring_up_or_fail())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait([bring_up, stopped], return_when=asyncio.FIRST_COMPLETED)
        while not stop.is_set() and self.phase == "ready":
            self.write_state()
            if not self.keeper.alive():
                self._fail(f"the node's first process ended: {tail(self.run.logs / 'init.log')}")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), WATCH_S)
        self.stopping = True
        bring_up.cancel()

    async def _bring_up_or_fail(self) -> None:
        try:
            await asyncio.wait_for(self._bring_up(), START_TIMEOUT_S)
        except TimeoutError:
            self._fail(f"the node was not ready within {START_TIMEOUT_S:.0f} s; it was last {self.phase}")
        except (DevclusterError, OSError, subprocess.SubprocessError) as error:
            self._fail(str(error))

    async def _bring_up(self) -> None:
        self._enter("starting containerd, etcd and the API server")
        environment = {"PATH": f"{collected()}:{SYSTEM_PATH}"}
        self._start("containerd", [find("containerd"), "--config", self.run.folder / "containerd.toml"], environment)
        self._run(self.plane.etcd())
        keys = self.run.folder / "keys"
        self._run(
            self.plane.apiserver(
                "--allow-privileged", "--kubelet-preferred-address-types=InternalIP", f"--kubelet-certificate-authority={keys / 'ca.crt'}",
                f"--kubelet-client-certificate={keys / 'apiserver-kubelet-client.crt'}",
                f"--kubelet-client-key={keys / 'apiserver-kubelet-client.key'}", "--endpoint-reconciler-type=master-count",
            )
        )  # fmt: skip
        await asyncio.to_thread(self.keeper.wait_running, "kube-apiserver")
        self.relays = Relays(self.keeper.pid)
        await self.relays.open(self.api_port, _fixed(NODE_ADDRESS, API_PORT))
        control = await asyncio.start_unix_server(self._take_orders, self.run.control_socket)
        self._give_to_user(self.run.control_socket)
        self.write_state()
        client = Client(self.run.kubeconfig)
        await asyncio.gather(asyncio.to_thread(self._import_images), asyncio.to_thread(client.wait_ready, START_TIMEOUT_S, self._check))
        self._enter("starting the controllers and the node")
        for path, document in config.bootstrap_objects():
            await asyncio.to_thread(client.apply, path, document)
        self._start_node(environment)
        if self.built_images:
            await self._start_registry(environment)
        else:
            self._warm_bytecode()
        self._enter("waiting for the node")
        await self._until(lambda: self._node_ready(client))
        self._enter("waiting for DNS")
        while not await self._dns_answers():
            self._check()
            await asyncio.sleep(POLL_S)
        self._enter("ready")
        self.control = control

    def _start_node(self, environment: dict[str, str]) -> None:
        folder = self.run.folder
        self._run(self.plane.controller_manager("--allocate-node-cidrs=false", "--node-monitor-period=2s"))
        self._run(self.plane.scheduler())
        kubelet = [
            find("kubelet"), f"--config={folder / 'kubelet.json'}", f"--kubeconfig={folder / 'kubelet.kubeconfig'}",
            f"--root-dir={folder / 'kubelet'}", f"--cert-dir={folder / 'keys'}", f"--hostname-override={NODE}", f"--node-ip={NODE_ADDRESS}",
        ]  # fmt: skip
        self._start("kubelet", kubelet, environment)
        proxy = [
            find("kube-proxy"), f"--kubeconfig={folder / 'kube-proxy.kubeconfig'}", "--proxy-mode=nftables", f"--hostname-override={NODE}",
            f"--cluster-cidr={POD_CIDR}", "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0",
            "--conntrack-tcp-timeout-close-wait=0", "--nodeport-addresses=primary", "--healthz-bind-address=127.0.0.1:10256",
        ]  # fmt: skip
        self._start("kube-proxy", proxy, environment)
        self._start("coredns", [find("coredns"), "-conf", folder / "Corefile"], environment)
        provisioner = [sys.executable, "-m", "gantline_devcluster.node.provisioner", folder / "provisioner.kubeconfig", self.run.volumes]
        self._start("provisioner", provisioner, environment)

    async def _start_registry(self, environment: dict[str, str]) -> None:
        quiet = {"OTEL_TRACES_EXPORTER": "none"}
        self._start("registry", [find("registry"), "serve", self.run.folder / "registry.json"], environment | quiet)
        await self.relays.open(self.registry_port, _fixed(NODE_ADDRESS, REGISTRY_PORT))

    def _import_images(self) -> None:
        """Into containerd's namespace of Kubernetes; retried until containerd listens."""
        command = [str(find("ctr")), "--address", str(self.run.containerd_socket), "--namespace", "k8s.io", "images", "import"]
        deadline = time.monotonic() + 60
        while True:
            answer = subprocess.run([*command, str(self.run.folder / "images.tar")], capture_output=True, text=True)
            if answer.returncode == 0:
                return
            self._check()
            if time.monotonic() > deadline:
                raise DevclusterError(
                    f"the development images could not be imported: {answer.stderr.strip()}", "Look into containerd's log"
                )
            time.sleep(POLL_S)

    def _warm_bytecode(self) -> None:
        marker = importlib.util.find_spec("torch")
        if marker is None or marker.cached is None or Path(marker.cached).exists():
            return
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX")} | {
            "OMP_NUM_THREADS": "1"
        }
        with (self.run.logs / "bytecode.log").open("ab") as output:
            self._warm_up = subprocess.Popen(
                ["nice", sys.executable, "-c", WARM_UP], env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    async def _until(self, done: Any) -> None:
        while not await asyncio.to_thread(done):
            self._check()
            await asyncio.sleep(POLL_S)

    def _node_ready(self, client: Client) -> bool:
        try:
            conditions = client.get(f"/api/v1/nodes/{NODE}")["status"].get("conditions", [])
        except (ApiError, OSError):
            return False
        return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    async def _dns_answers(self) -> bool:
        try:
            answer = await self.relays.ask_udp((DNS_SERVICE, 53), dns.question(f"kubernetes.default.svc.{DNS_DOMAIN}"))
        except (OSError, TimeoutError):
            return False
        return KUBERNETES_SERVICE in dns.addresses(answer)

    def _check(self) -> None:
        """Raise early where waiting longer is pointless."""
        if self.stopping:
            raise DevclusterError("the start was interrupted", "Start it again")
        if not self.keeper.alive():
            raise DevclusterError(
                f"the node's namespaces could not be made: {tail(self.run.logs / 'init.log')}", "The message is the kernel's"
            )
        for name, state in self.keeper.states.items():
            if state.failed or state.starts > 4:
                raise DevclusterError(
                    f"{name} ended with code {state.code}: {tail(self.run.logs / f'{name}.log')}", "The message is its own"
                )

    async def _take_orders(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, ValueError):
            while line := await reader.readline():
                try:
                    answer = await self._obey(json.loads(line))
                except (DevclusterError, OSError, KeyError, TypeError) as error:
                    answer = {"error": str(error)}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    async def _obey(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["do"] == "status":
            return self.state()
        if order["do"] == "outside":
            return {"addresses": await self.relays.inside(outside.read_addresses), "names": outside.read_names(self.run.logs)}
        if order["do"] == "kwok":
            if "kwok" not in self.keeper.states:
                self._run(self.plane.kwok(SIMULATED_LEASE_S))
            return {}
        if order["do"] == "devices":
            self._offer_devices(str(order["resource"]), int(order["count"]))
            return {}
        if order["do"] == "unexpose":
            self.relays.close_port(int(order["local"]))
            del self.exposed[int(order["local"])]
            self.write_state()
            return {}
        if order["do"] == "expose":
            return {"port": await self._expose(str(order["service"]), int(order.get("local") or 0))}
        raise DevclusterError(f"there is no order {order['do']!r}", "Use the same version of gantline_devcluster for `up` and for this")

    def _offer_devices(self, resource: str, count: int) -> None:
        """Run a device plugin for `resource`; the kubelet keeps what it once knew, so another count needs another run."""
        name = f"devices-{resource.replace('/', '-')}"
        if name in self.keeper.states:
            raise DevclusterError(f"{resource} is offered already", "Use another resource, or `down` and `up`")
        self._start(name, [find("devices"), DEVICE_PLUGINS, resource, count], {})

    async def _expose(self, service: str, local: int) -> int:
        """Open a loopback port for a Service, or return the one that it has. The Service is looked up anew as connections come."""
        same = next((port for port, name in self.exposed.items() if name == service), 0)
        if same and local in (0, same):
            return same
        await asyncio.to_thread(self._resolve, service)
        port = local or free_port()
        await self.relays.open(port, lambda: asyncio.to_thread(self._resolve, service))
        self.exposed[port] = service
        self.write_state()
        return port

    def _resolve(self, service: str) -> tuple[str, int]:
        """(cluster address, port) of `namespace/name:port`, where port is a number or a name. Raises DevclusterError."""
        at, known = self._service_cache.get(service, (0.0, ("", 0)))
        if time.monotonic() - at < 2.0 and known[1]:
            return known
        name, _, port = service.rpartition(":")
        namespace, _, name = name.rpartition("/")
        client = Client(self.run.kubeconfig)
        try:
            spec = client.get(f"/api/v1/namespaces/{namespace}/services/{name}")["spec"]
        except ApiError as error:
            raise DevclusterError(f"there is no Service {namespace}/{name} ({error.status})", "Write NAMESPACE/SERVICE:PORT") from error
        finally:
            client.close()
        numbers = [p["port"] for p in spec.get("ports", []) if port in (str(p["port"]), p.get("name"))]
        if not numbers or spec.get("clusterIP") in (None, "", "None"):
            have = ", ".join(str(p["port"]) for p in spec.get("ports", []))
            raise DevclusterError(f"the Service {namespace}/{name} has no cluster address with port {port}", f"Its ports are: {have}")
        found = (str(spec["clusterIP"]), int(numbers[0]))
        self._service_cache[service] = (time.monotonic(), found)
        return found

    def state(self) -> dict[str, Any]:
        components = {
            name: {"running": s.running, "restarts": max(0, s.starts - 1), "code": s.code, "again": s.again}
            for name, s in self.keeper.states.items()
        }
        return {
            "phase": self.phase, "error": self.error, "pid": os.getpid(), "started": self.started, "api_port": self.api_port,
            "registry": self.registry, "exposed": {str(port): service for port, service in self.exposed.items()}, "components": components,
        }  # fmt: skip

    def write_state(self) -> None:
        text = json.dumps(self.state())
        if text != getattr(self, "_written", None):
            self._written = text
            partial = self.run.state_file.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(self.run.state_file)

    def close(self) -> None:
        if self._warm_up:
            self._warm_up.kill()
            self._warm_up.wait()
        with contextlib.suppress(AttributeError):
            self.relays.close()
        self.keeper.close()

    def _enter(self, phase: str) -> None:
        log.info("%s, %.1f s", phase, time.time() - self.started)
        self.phase = phase
        self.write_state()

    def _fail(self, error: str) -> None:
        log.error(error)
        self.error = error
        self._enter("failed")

    def _start(self, name: str, argv: list[Any], environment: dict[str, str]) -> None:
        self._run(
            Component(name, [str(a) for a in argv], self.run.logs / f"{name}.log", environment=environment, end_signal=signal.SIGKILL)
        )

    def _run(self, component: Component) -> None:
        self.keeper.start(replace(component, restart=True))

    def _write(self, name: str, text: str) -> None:
        write_private(self.run.folder / name, text)

    def _give_to_user(self, path: Path) -> None:
        """Under sudo the files that a person uses belong to that person."""
        if os.environ.get("SUDO_UID", "").isdigit():
            os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", "-1")))


def _fixed(address: str, port: int) -> Any:
    async def target() -> tuple[str, int]:
        return address, port

    return target


def main() -> int:
    run, built_images = Run(sys.argv[1]), BUILT_IMAGES in sys.argv[2:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    lock = run.lock.open("a+")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    supervisor = Supervisor(run, built_images=built_images)
    try:
        supervisor.prepare()
        supervisor.start_keeper()
    except (DevclusterError, OSError, subprocess.SubprocessError) as error:
        run.state_file.write_text(json.dumps({"phase": "failed", "error": str(error), "pid": os.getpid()}))
        log.error("%s", error)
        return 1
    try:
        asyncio.run(supervisor.serve())
    finally:
        supervisor.close()
    return 1 if supervisor.error else 0


if __name__ == "__main__":
    sys.exit(main())
