"""Who may ask for custom metrics follows the API server's ConfigMap, through TLS as the aggregator has it, without a restart."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from gantline_devcluster.api_only import ApiCluster, free_port
from gantline_operator.admitting_port import AdmittingPort
from gantline_operator.certificates.pairs import make_pair
from gantline_operator.custom_metrics import API_VERSION
from gantline_operator.front_proxy import read_front_proxy

from tests.operator.harness import Operator, install_crd, serving, wait
from tests.operator.test_other_autoscalers import custom_metrics

CONFIG_MAP = "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication"
AUTHORITY, NAMES = "requestheader-client-ca-file", "requestheader-allowed-names"
LIST = f"/apis/{API_VERSION}"
_CONNECTIONS = 300


class Authority:
    """One that signs certificates of clients."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(name, self._key, is_authority=True)

    def client(self, name: str) -> ssl.SSLContext:
        """Shows a certificate of that common name."""
        key = ec.generate_private_key(ec.SECP256R1())
        secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        file = self._folder / f"{self._name}-{name}.pem"
        file.write_text(self._sign(name, key, is_authority=False) + secret.decode())
        return showing(file)

    def _sign(self, name: str, key: ec.EllipticCurvePrivateKey, *, is_authority: bool) -> str:
        named = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(self._name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM).decode()


def showing(certificate: Path, key: Path | None = None) -> ssl.SSLContext:
    context = ssl._create_unverified_context()
    context.load_cert_chain(certificate, key)
    return context


def answer(port: int, client: ssl.SSLContext, session: ssl.SSLSession | None = None) -> tuple[int, ssl.SSLSession | None]:
    """The status of an answer over a connection of its own (0: refused), and the session to resume. It resumes `session`, if it can."""
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as plain, client.wrap_socket(plain, session=session) as stream:
            stream.sendall(f"GET {LIST} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            line = stream.recv(64)
            assert session is None or not line or stream.session_reused
            return (int(line.split()[1]), stream.session) if line else (0, None)
    except (ssl.SSLError, ConnectionError):
        return 0, None


@contextmanager
def told(cluster: ApiCluster) -> Iterator[dict[str, str]]:
    """The ConfigMap's data, put back at the end."""
    before: dict[str, str] = cluster.client.get(CONFIG_MAP)["data"]
    try:
        yield before
    finally:
        tell(cluster, **before)


def tell(cluster: ApiCluster, **data: str) -> None:
    cluster.client.call("PATCH", CONFIG_MAP, {"data": data}, content_type="application/merge-patch+json")


@pytest.fixture
def port(api_cluster: ApiCluster, namespace: str) -> Iterator[int]:
    """Of an operator that serves custom metrics."""
    install_crd(api_cluster)
    with custom_metrics(api_cluster, namespace, given=True) as settings, serving(api_cluster, namespace, **settings) as operator:
        yield served(api_cluster, settings, operator)


def served(cluster: ApiCluster, settings: dict[str, Any], operator: Operator) -> int:
    port: int = settings["custom_metrics_port"]
    wait(lambda: not operator.dead.is_set() and answer(port, aggregator(cluster))[0] == 200)
    return port


def aggregator(cluster: ApiCluster) -> ssl.SSLContext:
    keys = cluster.folder / "keys"
    return showing(keys / "front-proxy.crt", keys / "front-proxy.key")


def test_a_new_authority_is_admitted_and_a_removed_one_refused_while_the_operator_serves(
    api_cluster: ApiCluster, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority(tmp_path, "next")
    new, stranger, old = authority.client("front-proxy"), authority.client("another"), aggregator(api_cluster)
    with told(api_cluster) as before:
        assert answer(port, new)[0] == 0, "nobody has named its authority yet"
        open_before = http.client.HTTPSConnection("127.0.0.1", port, context=old, timeout=10)
        assert get(open_before) == (200, None)
        # The rotation begins: both authorities are told, and whoever is connected is not cut off.
        tell(api_cluster, **{AUTHORITY: before[AUTHORITY] + authority.certificate})
        wait(lambda: answer(port, new)[0] == 200)
        status, session = answer(port, new)
        assert (status, answer(port, old)[0], answer(port, stranger)[0]) == (200, 200, 403) and session is not None
        socket_before = open_before.sock
        assert get(open_before) == (200, "close"), "over the old connection: the next one shows its certificate to the new authorities"
        assert get(open_before) == (200, None) and open_before.sock is not socket_before
        # Names change as well, for connections that are open too.
        open_before = http.client.HTTPSConnection("127.0.0.1", port, context=stranger, timeout=10)
        assert get(open_before) == (403, None)
        tell(api_cluster, **{NAMES: json.dumps([*json.loads(before[NAMES]), "another"])})
        wait(lambda: get(open_before) == (200, None))
        # What cannot be used changes nothing.
        tell(api_cluster, **{AUTHORITY: "no certificate"})
        wait(lambda: "stays as it was" in caplog.text)
        assert answer(port, new, session)[0] == 200
        # It ends: the authority that is no longer told is refused, also to whoever would go on with a session, or is connected.
        open_before = http.client.HTTPSConnection("127.0.0.1", port, context=new, timeout=60)
        assert get(open_before) == (200, None)
        tell(api_cluster, **before)
        assert open_before.sock is not None and open_before.sock.recv(1) == b"", "cut off without a further request"
        wait(lambda: answer(port, new)[0] == 0)
        assert answer(port, new, session)[0] == 0
        assert answer(port, old)[0] == 200


async def test_no_connection_is_lost_while_authorities_change(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path, "one"), Authority(tmp_path, "other")
    number, client = free_port(), authority.client("front-proxy")
    port = AdmittingPort(web.Application(), "127.0.0.1", number)
    port.use(make_pair(["127.0.0.1"], datetime.now(UTC)))
    port.admit(authority.certificate)

    async def change() -> None:
        while True:
            port.admit(authority.certificate + other.certificate)
            await asyncio.sleep(0)
            port.admit(other.certificate + authority.certificate)
            await asyncio.sleep(0)

    running = [asyncio.create_task(port.run()), asyncio.create_task(change())]
    await asyncio.sleep(0.1)
    found = await asyncio.gather(*(asyncio.to_thread(answer, number, client) for _ in range(_CONNECTIONS)))
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert [status for status, _ in found] == [404] * _CONNECTIONS


async def test_whoever_a_removed_authority_admitted_is_cut_off_after_what_it_is_waiting_for(tmp_path: Path) -> None:
    removed, kept = Authority(tmp_path, "removed"), Authority(tmp_path, "kept")
    number, asked, go_on = free_port(), asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        asked.set()
        await go_on.wait()
        return web.Response(text="whole")

    application = web.Application()
    application.router.add_get("/slow", slow)
    application.router.add_get("/quick", lambda request: asyncio.sleep(0, web.Response(text="whole")))
    port = AdmittingPort(application, "127.0.0.1", number)
    port.use(make_pair(["127.0.0.1"], datetime.now(UTC)))
    port.admit(removed.certificate + kept.certificate)
    running = asyncio.create_task(port.run())
    await asyncio.sleep(0.1)
    connect = lambda authority: asyncio.open_connection("127.0.0.1", number, ssl=authority.client("front-proxy"))
    ask = lambda path: f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    connections = [await connect(authority) for authority in (removed, removed, kept)]
    (idle, _), (waiting, to_waiting), (stays, to_stays) = connections
    for reader, writer in connections:
        writer.write(ask("/quick"))
        assert b"whole" in await asyncio.wait_for(reader.readuntil(b"whole"), 10)
    to_waiting.write(ask("/slow"))
    await asyncio.wait_for(asked.wait(), 10)
    port.admit(kept.certificate)
    assert await asyncio.wait_for(idle.read(), 10) == b"", "no further answer"
    go_on.set()
    assert b"whole" in await asyncio.wait_for(waiting.read(), 10), "what was asked for before is answered, and the connection ends"
    to_stays.write(ask("/quick"))
    assert b"Connection: close" in await asyncio.wait_for(stays.read(), 10)
    for _, writer in connections:
        writer.close()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_connection_that_was_being_made_when_its_authority_was_removed_gets_no_metrics(tmp_path: Path) -> None:
    removed, kept = Authority(tmp_path, "removed"), Authority(tmp_path, "kept")
    number, served = free_port(), list[str]()

    async def metrics(request: web.Request) -> web.Response:
        served.append(request.path)
        return web.Response()

    application = web.Application()
    application.router.add_get(LIST, metrics)
    port = AdmittingPort(application, "127.0.0.1", number)
    port.use(make_pair(["127.0.0.1"], datetime.now(UTC)))
    port.admit(removed.certificate)
    running = asyncio.create_task(port.run())
    await asyncio.sleep(0.1)
    with socket.create_connection(("127.0.0.1", number), 10) as plain:
        await asyncio.sleep(0.1)  # accepted, and waiting for its handshake
        port.admit(kept.certificate)
        stream = await asyncio.to_thread(removed.client("front-proxy").wrap_socket, plain)
        stream.sendall(f"GET {LIST} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert b" 403 " in await asyncio.to_thread(stream.recv, 64)
    assert not served
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def get(connection: http.client.HTTPSConnection) -> tuple[int, str | None]:
    """Status and `Connection` of an answer over this connection, which connects anew where it was closed."""
    connection.request("GET", LIST)
    response = connection.getresponse()
    response.read()
    return response.status, response.headers.get("Connection")


def test_the_chart_role_may_list_and_watch_that_config_map_alone(api_cluster: ApiCluster, namespace: str) -> None:
    account = f"system:serviceaccount:{namespace}:default"
    binding = {
        "metadata": {"name": namespace},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "extension-apiserver-authentication-reader"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
    }
    path = "/apis/rbac.authorization.k8s.io/v1/namespaces/kube-system/rolebindings"
    api_cluster.client.post(path, binding)
    name = CONFIG_MAP.rsplit("/", 1)[1]
    try:
        for verb in ("list", "watch"):
            asked = ("auth", "can-i", verb, f"configmaps/{name}", "-n", "kube-system", "--as", account)
            wait(lambda asked=asked: api_cluster.kubectl(*asked).stdout.strip() == "yes")
        listed = api_cluster.kubectl(
            "get", "configmaps", "-n", "kube-system", f"--field-selector=metadata.name={name}", "-o", "name", "--as", account
        )
        assert listed.stdout.split() == [f"configmap/{name}"]
    finally:
        api_cluster.client.call("DELETE", f"{path}/{namespace}")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({}, "names no authority"),
        ({AUTHORITY: " \n"}, "names no authority"),
        ({AUTHORITY: "x", NAMES: '"front-proxy"'}, "is not a list"),
        ({AUTHORITY: "x", NAMES: "[front"}, "Expecting value"),
    ],
)
def test_what_names_no_authority_or_no_names_is_an_error(data: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_front_proxy(data)
