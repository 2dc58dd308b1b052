"""A source behind a private certificate authority: refused with what to do, and read once the authority is given."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import huggingface_hub.utils
import pytest
from gantline_runtime import cli
from gantline_runtime.sources import patience
from gantline_runtime.sources.certificates import VARIABLE
from gantline_runtime.termination import Reason

from tests.runtime.certificate_files import make_certificate
from tests.runtime.checkpoint_files import model_files
from tests.runtime.fetching import last_word
from tests.runtime.hub_server import Hub, serve_hub
from tests.runtime.registry_server import REPOSITORY, Images, push_artifact, serve_images
from tests.runtime.s3_server import Store, serve_store


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of this machine's own, with its key."""
    folder = tmp_path_factory.mktemp("authority")
    make_certificate(folder, "tests", cert="ca.crt", hosts="IP:127.0.0.1,DNS:localhost")
    return folder


@pytest.mark.parametrize("kind", ["hf", "s3", "oci"])
def test_a_private_authority_is_trusted_once_it_is_given(
    kind: str, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "HF_", "SSL_CERT"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SSL_CERT_FILE", "")  # so that what is set meanwhile is taken back
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(tmp_path / "last-word"))
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: pytest.fail("no other try can help"))
    huggingface_hub.utils.get_session()  # one that trusts what was trusted before, as an earlier download leaves it
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "ca.crt", authority / "key.pem")
    files = model_files()
    images = Images()
    push_artifact(images, files)
    servers = {
        "hf": serve_hub(Hub(files=files), context=context),
        "s3": serve_store(Store(objects={f"tiny/{name}": data for name, data in files.items()}), context=context),
        "oci": serve_images(images, context=context),
    }
    with servers[kind] as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        monkeypatch.setattr("gantline_runtime.sources.registry._is_insecure", lambda registry: False)
        registry = server.url.removeprefix("https://")
        uri = {"hf": "hf://org/name", "s3": "s3://models/tiny", "oci": f"oci://{registry}/{REPOSITORY}:v1"}[kind]
        assert cli.main(["inspect", uri]) == 75
        assert last_word(tmp_path).reason == Reason.DOWNLOAD_STALLED
        assert "not trusted" in last_word(tmp_path).message and "ca.crt" in last_word(tmp_path).cure
        monkeypatch.setenv(VARIABLE, "no certificate")
        assert cli.main(["inspect", uri]) == 64
        monkeypatch.setenv(VARIABLE, (authority / "ca.crt").read_text())
        assert cli.main(["fetch", uri, str(tmp_path / "model")]) == 0
