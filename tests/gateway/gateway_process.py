"""Starts `gantline-gateway` as a user does, over a file that lists services, which a test may rewrite."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.runtime.server_process import LoggedProcess, wait_until

__all__ = ["GatewayProcess", "gateway", "write_services"]


class GatewayProcess(LoggedProcess):
    """`flags` are those of `gantline-gateway`."""

    def __init__(self, *flags: str, **environment: str) -> None:
        command = ["-m", "gantline_gateway.main", "--host=127.0.0.1", "--port=0", "--internal-port=0", "--log-format=json"]
        super().__init__([*command, *flags], ("gantline_gateway.main",), environment)
        self.internal_url = ""

    def wait_listening(self) -> GatewayProcess:
        line = self.wait_log("listening")
        self.url, self.internal_url = line["url"], line["internal_url"]
        return self

    def internal(self, path: str) -> Any:
        return self._client.get(self.internal_url + path)

    def demand(self, service: str) -> dict[str, Any]:
        return self.internal("/demand").json()["services"][service]  # type: ignore[no-any-return]

    def wait_demand(self, service: str, **values: float) -> None:
        wait_until(lambda: all(self.demand(service)[name] == value for name, value in values.items()), what=f"demand {values}")


def write_services(path: Path, *services: dict[str, Any]) -> Path:
    """Replaced as a whole, as an editor or a mounted ConfigMap does it."""
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"services": list(services)}))
    draft.replace(path)
    return path


@contextlib.contextmanager
def gateway(services: Path, *flags: str) -> Iterator[GatewayProcess]:
    process = GatewayProcess(f"--services={services}", "--drain-delay=0", *flags)
    try:
        yield process.wait_listening()
    finally:
        process.stop()
