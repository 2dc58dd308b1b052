"""Reading a model contacts its own source and nobody else: tried in a network namespace that records what would leave it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PREPARE = """
set -e
mount --make-rprivate /
mount --bind "$1" /etc/resolv.conf
ip link set lo up
ip link add node0 type bridge
ip address add 10.77.0.2/24 dev node0
ip link set node0 up
ip route add default dev node0
exec "$2" -c "$3" "$4"
"""
PROGRAM = """
import os, socket, subprocess, sys
from pathlib import Path
from gantline_devcluster.node import outside
from gantline_runtime import cli
from tests.runtime import hub_server, registry_server, s3_server
from tests.runtime.checkpoint_files import model_files

subprocess.run(["nft", "-f", "-"], check=True, input=outside.NO_WAY_OUT, text=True)
files, folder = model_files(), Path(sys.argv[1])
hub, store = hub_server.Hub(files=files), s3_server.Store(objects={f"tiny/{name}": data for name, data in files.items()})
images = registry_server.Images()
registry_server.push_artifact(images, files)
with hub_server.serve_hub(hub), s3_server.serve_store(store), registry_server.serve_images(images):
    os.environ |= {"HF_ENDPOINT": hub.url, "AWS_ENDPOINT_URL": store.url}
    registry = images.url.removeprefix("http://")
    for number, uri in enumerate(("hf://org/name", "s3://models/tiny", f"oci://{registry}/{registry_server.REPOSITORY}:v1")):
        assert cli.main(["inspect", uri]) == 0
        assert cli.main(["fetch", uri, str(folder / str(number))]) == 0
print("contacted", outside.read_addresses())
try:
    socket.getaddrinfo("outside.example", 443)
except OSError:
    pass
print("control", outside.read_addresses())
"""


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("nft"), reason="a network namespace of its own needs root, nft and ip")
def test_inspect_and_fetch_contact_nobody_but_their_source(tmp_path: Path) -> None:
    resolver = tmp_path / "resolv.conf"
    resolver.write_text("nameserver 192.0.2.53\noptions timeout:1 attempts:1\n")
    command = ["unshare", "--net", "--mount", "bash", "-c", PREPARE, "bash", str(resolver), sys.executable, PROGRAM, str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith(("HF_", "AWS_"))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "contacted []" in done.stdout.splitlines(), done.stdout
    assert "control ['192.0.2.53:53']" in done.stdout.splitlines(), "silence is not deafness"
