"""Two real servers for all of the gateway's tests, since each costs a second: one echoes, one streams slowly and without end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.gateway_process import GatewayProcess, gateway, write_services
from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with running(write_model(tmp_path_factory.mktemp("echo") / "echo")) as server:
        yield server


@pytest.fixture(scope="session")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("slow") / "slow", endless=True, step_seconds=0.02)
    with running(model, "--drain-timeout=0") as server:
        yield server


@pytest.fixture(scope="session")
def services(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that `shared` offers; tests name services of their own in it."""
    return tmp_path_factory.mktemp("services") / "services.json"


@pytest.fixture(scope="session")
def shared(services: Path, echo: ServerProcess, slow: ServerProcess) -> Iterator[GatewayProcess]:
    """A gateway before both servers, under several names."""
    offered = [
        {"name": "echo", "replicas": [echo.url]},
        {"name": "slow", "replicas": [slow.url]},
        {"name": "twice", "namespace": "a", "servedName": "echo-twice", "replicas": [echo.url]},
        {"name": "twice", "namespace": "b", "servedName": "echo-twice", "replicas": []},
        {"name": "at-zero", "replicas": [], "wanted": 0, "startupSeconds": 42},
        {"name": "asleep", "replicas": [], "suspended": True},
    ]
    with gateway(write_services(services, *offered)) as process:
        yield process
