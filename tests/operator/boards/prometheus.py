"""A real Prometheus on loopback."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml

from tests.runtime.server_process import wait_until

__all__ = ["SCRAPE_S", "TARGETS", "prometheus"]

SCRAPE_S = 2
TARGETS = "targets.json"
"""File in Prometheus' folder that lists what is scraped, in its own form (file_sd); it may change at any time."""


@contextmanager
def prometheus(folder: Path) -> Iterator[str]:
    """Its URL. Labels of the targets win over none that a page has itself, as with the chart's PodMonitors."""
    job = {"job_name": "gantline", "honor_labels": True, "file_sd_configs": [{"files": [TARGETS], "refresh_interval": "1s"}]}
    config = {"global": {"scrape_interval": f"{SCRAPE_S}s", "scrape_timeout": f"{SCRAPE_S}s"}, "scrape_configs": [job]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen(["prometheus", *flags], cwd=folder, stdout=log, stderr=log)
    try:
        wait_until(lambda: _answers(f"http://{address}/-/ready"), timeout_s=60, what="Prometheus is ready")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False
