"""`gantline inspect` and `gantline fetch` of oci:// sources: what tools push, and how registries let in."""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from gantline_devcluster.binaries import find
from gantline_devcluster.build import build
from gantline_runtime import cli
from gantline_runtime.artefact import MANIFEST
from gantline_runtime.checkpoint import open_checkpoint, read_checkpoint
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.sources import layers, open_remote, parse_uri, patience
from gantline_runtime.sources.registry import INSECURE_REGISTRIES, Registry
from gantline_runtime.sources.registry_login import find_login
from gantline_runtime.sources.uri import ImageReference
from gantline_runtime.termination import Reason

from tests.runtime.checkpoint_files import model_files, write_files
from tests.runtime.fetching import kill_mid_download, last_word, names
from tests.runtime.registry_server import INDEX, REPOSITORY, TAR, TITLE, USER, Images, push_artifact, push_image, serve_images, tar_of

FILES = {**model_files({"vocab_size": 4000}), "tokenizer.json": b"{}"}
EXTRA = {"pytorch_model.bin": b"\x80", "modeling.py": b"import os"}
KEPT = {*FILES, MANIFEST}
PASSWORD = "open-sesame"


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DOCKER_AUTH_CONFIG", raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(tmp_path / "last-word"))
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "5")
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@contextmanager
def registry(**settings: Any) -> Iterator[Images]:
    with serve_images(Images(**settings)) as images:
        yield images


def uri(images: Images, ending: str = ":v1") -> str:
    return f"oci://{images.url.removeprefix('http://')}/{REPOSITORY}{ending}"


def log_in(monkeypatch: pytest.MonkeyPatch, images: Images, password: str = PASSWORD, key: str = "") -> None:
    entry = {"auth": base64.b64encode(f"{USER}:{password}".encode()).decode()}
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {key or images.url.removeprefix("http://"): entry}}))


def _oras(images: Images) -> str:
    return push_artifact(images, {**FILES, **EXTRA})


def _oras_folder(images: Images) -> str:
    data = tar_of({f"tiny/{name}": data for name, data in FILES.items()}, compress=True)
    return images.tag([images.add(data, f"{TAR}+gzip", **{TITLE: "tiny", "io.deis.oras.content.unpack": "true"})])


def _kitops(images: Images) -> str:
    kind = "application/vnd.kitops.modelkit"
    model = images.add(tar_of({f"./model/{name}": data for name, data in FILES.items()}), f"{kind}.model.v1.tar")
    return images.tag([model, images.add(tar_of({"docs/README.md": b"# tiny"}), f"{kind}.docs.v1.tar")])


def _modelpack(images: Images) -> str:
    kind, notes = "application/vnd.cncf.model", "org.cncf.model.filepath"
    weights = images.add(FILES["model.safetensors"], f"{kind}.weight.v1.raw", **{notes: "model.safetensors"})
    rest = {name: data for name, data in FILES.items() if name != "model.safetensors"}
    return images.tag([weights, images.add(tar_of(rest), f"{kind}.weight.config.v1.tar", **{notes: "config"})])


def _modelcar(images: Images) -> str:
    base = tar_of({"etc/config.json": b"{}", "models/old.safetensors": b"old", "usr/lib/x.json": b"{}"}, compress=True)
    config = tar_of({"models/config.json": FILES["config.json"], "models/.wh.old.safetensors": b""}, compress=True)
    rest = tar_of({f"models/{name}": data for name, data in FILES.items() if name != "config.json"}, compress=True)
    kind = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    digest = images.tag([images.add(data, kind) for data in (base, config, rest)], name="amd64")
    other = {"digest": f"sha256:{'0' * 64}", "platform": {"architecture": "unknown"}}
    return images.put({"mediaType": INDEX, "manifests": [other, {"digest": digest, "platform": {"architecture": "riscv64"}}]}, "v1")


def _image(images: Images) -> str:
    return push_image(images, {**FILES, **EXTRA})


@pytest.mark.parametrize("push", [_oras, _oras_folder, _kitops, _modelpack, _modelcar, _image])
def test_a_model_is_inspected_and_fetched_whatever_pushed_it(
    push: Callable[[Images], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with registry(password=PASSWORD) as images:
        log_in(monkeypatch, images)
        digest = push(images)
        assert cli.main(["inspect", uri(images)]) == 0
        facts = json.loads(capfd.readouterr().out)
        images.manifests.pop("v1")  # what was inspected is fetched, whatever becomes of its tag
        assert cli.main(["fetch", uri(images), str(tmp_path / "model"), f"--revision={digest}"]) == 0
    assert (facts["name"], facts["revision"]) == (REPOSITORY, digest)
    assert names(tmp_path / "model") - {"README.md"} == KEPT
    assert facts["fingerprint"] == open_checkpoint(write_files(tmp_path / "original", FILES)).facts.fingerprint
    assert {name: (tmp_path / "model" / name).read_bytes() for name in FILES} == FILES
    captured = capfd.readouterr()
    assert not any(secret in captured.out + captured.err for secret in (PASSWORD, "token-", "X-Amz"))
    assert not any(item[3] for item in images.seen("/storage/")), "the token is none of the storage's business"


def _without_a_layer(images: Images) -> str:
    """As tools do that add files beside an image's configuration."""
    digest = push_image(images, FILES)
    manifest = json.loads(images.manifests[digest])
    return images.put({**manifest, "layers": [*manifest["layers"], images.add(tar_of({"more": b""}), TAR)]}, "v1")


def _lost_configuration(images: Images) -> str:
    digest = push_image(images, FILES)
    images.blobs[json.loads(images.manifests[digest])["config"]["digest"]] = b"{}"
    return digest


@pytest.mark.parametrize(
    ("push", "folder"),
    [
        (_image, "models"), (lambda images: push_image(images, FILES, "."), ""), (_oras, None), (_oras_folder, None), (_kitops, None),
        (_modelpack, None), (_modelcar, None), (_without_a_layer, None), (_lost_configuration, None),
    ],
)  # fmt: skip
def test_the_inspection_tells_where_in_an_image_the_model_lies_if_nodes_can_mount_it(
    push: Callable[[Images], str], folder: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    with registry() as images:
        push(images)
        assert cli.main(["inspect", uri(images)]) == 0
    assert json.loads(capfd.readouterr().out).get("imageFolder") == folder


@pytest.mark.parametrize("push", [_oras, _kitops])
def test_an_image_is_judged_by_headers_alone(push: Callable[[Images], str], monkeypatch: pytest.MonkeyPatch) -> None:
    big = model_files({"vocab_size": 100_000})
    monkeypatch.setattr(f"{__name__}.FILES", big)
    with registry() as images:
        push(images)
        read_checkpoint(open_remote(parse_uri(uri(images))))
    ranges = [item[2].removeprefix("bytes=").split("-") for item in images.seen("/storage/")]
    assert sum(int(last) - int(first) + 1 for first, last in ranges) < 1_500_000 < len(big["model.safetensors"]) // 4


@pytest.mark.parametrize(
    ("settings", "given", "ending", "reason", "words"),
    [
        ({"password": "another"}, PASSWORD, ":v1", Reason.DOWNLOAD_UNAUTHORIZED, ("401", "may not pull it")),
        ({"password": PASSWORD}, "", ":v1", Reason.DOWNLOAD_UNAUTHORIZED, ("401", "no credentials were given")),
        ({"password": PASSWORD, "scheme": "Basic"}, "", ":v1", Reason.DOWNLOAD_UNAUTHORIZED, ("no credentials were given",)),
        ({}, "", ":v2", Reason.MODEL_NOT_FOUND, ("404",)),
        ({}, "", f"@sha256:{'1' * 64}", Reason.MODEL_NOT_FOUND, ("404",)),
        ({"rate_limited": 99}, "", ":v1", Reason.DOWNLOAD_RATE_LIMITED, ("429",)),
        ({"failures": 99}, "", ":v1", Reason.DOWNLOAD_STALLED, ("503",)),
        ({"stall_after": 0}, "", ":v1", Reason.DOWNLOAD_STALLED, ("stalled",)),
        ({"corrupt": True}, "", ":v1", Reason.INVALID_CHECKPOINT, ("another hash",)),
    ],
)
def test_each_failure_has_its_reason_and_publishes_nothing(
    settings: dict[str, Any],
    given: str,
    ending: str,
    reason: Reason,
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "0.1" if "stall_after" in settings else "5")
    with registry(**settings) as images:
        if given:
            log_in(monkeypatch, images, given)
        _oras(images)
        assert cli.main(["fetch", uri(images, ending), str(tmp_path / "model")]) != 0
    word = last_word(tmp_path)
    assert word.reason == reason and word.cure and all(part in word.message for part in words), word
    assert not (tmp_path / "model").exists()


def _endless_name() -> bytes:
    """A tar whose first entry says that its name has 100 GiB."""
    item = tarfile.TarInfo("././@LongLink")
    item.type, item.size = tarfile.GNUTYPE_LONGNAME, 100 << 30
    return item.tobuf(tarfile.GNU_FORMAT) + bytes(4096)


@pytest.mark.parametrize(
    ("push", "word"),
    [
        (lambda images: images.tag([]), "config.json"),
        (lambda images: images.put({"mediaType": INDEX, "manifests": []}, "v1"), "no image"),
        (lambda images: images.put({"mediaType": "x", "layers": [{"digest": "md5:x"}]}, "v1"), "sha256"),
        (lambda images: images.tag([images.add(b"\x1f\x8b nonsense", f"{TAR}+gzip")]), "gzip"),
        (lambda images: images.tag([images.add(b"\x28\xb5\x2f\xfd", f"{TAR}+zstd")]), "zstd"),
        (lambda images: images.tag([images.add(b"no tar at all" * 99, TAR)]), "tar"),
        (lambda images: images.tag([images.add(_endless_name(), TAR)]), "names and attributes"),
        (lambda images: images.tag([images.add(tar_of({"a/config.json": b"", "b/config.json": b""}), TAR)]), "several"),
        (lambda images: images.tag([images.add(b"{}", TAR, **{TITLE: "../config.json"})]), "tar"),
    ],
)  # fmt: skip
def test_what_is_no_models_image_is_refused(push: Callable[[Images], str], word: str, tmp_path: Path) -> None:
    with registry() as images:
        push(images)
        assert cli.main(["inspect", uri(images)]) == 65
    assert word in last_word(tmp_path).message, last_word(tmp_path)


@pytest.mark.parametrize(
    "settings", [{"scheme": "Basic"}, {"token_lasts": 2}, {"rate_limited": 2, "failures": 1, "cuts": 2, "cut_after": 9999}]
)
def test_passwords_expiring_tokens_and_bad_moments_are_lived_with(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry(password=PASSWORD, **settings) as images:
        log_in(monkeypatch, images)
        _oras(images)
        assert cli.main(["fetch", uri(images), str(tmp_path / "model")]) == 0
    assert names(tmp_path / "model") == KEPT


def test_an_identity_token_in_the_place_of_a_password_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    with registry(password=PASSWORD) as images:
        _oras(images)
        entry = {"auth": base64.b64encode(b"00000000:").decode(), "identitytoken": PASSWORD}
        monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {images.url.removeprefix("http://"): entry}}))
        assert cli.main(["inspect", uri(images)]) == 0


@pytest.mark.parametrize("push", [_oras, _kitops])
def test_a_killed_download_goes_on_where_it_stopped(push: Callable[[Images], str], tmp_path: Path) -> None:
    with registry(stall_after=150_000) as images:
        push(images)
        kill_mid_download(uri(images), tmp_path / "model", images, received=150_000)
        assert cli.main(["fetch", uri(images), str(tmp_path / "model")]) == 0
    assert images.starts("/storage/") == [150_000]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_compressed_layer_is_read_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_SNAPSHOT_EVERY_BYTES", 1000)
    monkeypatch.setattr(layers, "_STEP_BYTES", 5000)
    dice = random.Random(1)
    data = bytes(dice.choice(b"abcd") for _ in range(200_000)) + bytes(50_000) + dice.randbytes(50_000)
    blob = gzip.compress(data[:120_000]) + gzip.compress(data[120_000:], 0) + bytes(512)
    opened: list[int] = []

    @contextmanager
    def open_range(start: int, end: int) -> Iterator[Iterator[bytes]]:
        opened.append(start)
        yield (blob[i : min(i + 700, end)] for i in range(start, end, 700))

    service = patience.Service("oci://x/y", "the registry", "", "", "")
    contents = layers.open_layer(service, open_range, len(blob), "a layer")
    assert contents.read(len(data) + 1) == data
    for start in [dice.randrange(len(data)) for _ in range(40)]:
        contents.seek(start)
        assert contents.read(3000) == data[start : start + 3000]
    assert len(set(opened)) > 20, "reads begin near what they read"


@pytest.mark.parametrize(
    ("key", "repository", "found"),
    [
        ("registry.example", "team/tiny", True),
        ("https://registry.example/v2/", "team/tiny", True),
        ("registry.example/team", "team/tiny", True),
        ("registry.example/tea", "team/tiny", False),
        ("registry.example.evil", "team/tiny", False),
    ],
)
def test_a_login_is_for_its_registry_and_path_alone(key: str, repository: str, found: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", json.dumps({"auths": {key: {"username": "a", "password": "b"}}}))
    assert bool(find_login(ImageReference("registry.example", repository))) is found


@pytest.mark.parametrize("text", ["{not json", '{"auths": {"registry.example": {"auth": "§"}}}'])
def test_a_docker_configuration_that_cannot_be_read_is_not_quoted(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", text)
    with pytest.raises(ConfigurationError) as caught:
        find_login(ImageReference("registry.example", "x"))
    assert text not in str(caught.value) and "docker-registry" in caught.value.cure


def test_plain_http_is_for_this_machine_and_for_registries_that_were_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def base(registry: str) -> str:
        return Registry(ImageReference(registry, "x"), "x")._base

    monkeypatch.setenv(INSECURE_REGISTRIES, "plain.example:5000, other.example")
    assert base("registry.example").startswith("https://") and base("plain.example").startswith("https://")
    assert all(base(name).startswith("http://") for name in ("plain.example:5000", "other.example:80", "localhost:5000", "127.0.0.1:1"))
    assert base("docker.io") == "https://registry-1.docker.io/v2/x"


@contextmanager
def real_registry(folder: Path) -> Iterator[str]:
    """`host:port` of the distribution project's registry, which keeps its images in `folder`."""
    storage = {"filesystem": {"rootdirectory": str(folder / "images")}}
    config = {"version": 0.1, "storage": storage, "http": {"addr": "127.0.0.1:0", "secret": "x"}, "log": {"level": "info"}}
    (folder / "config.yml").write_text(json.dumps(config))
    process = subprocess.Popen([find("registry"), "serve", folder / "config.yml"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "listening on" in line)
        yield re.findall(r"listening on (127\.0\.0\.1:\d+)", line)[0]
    finally:
        process.terminate()
        process.wait()


def push(registry: str, images: Images) -> None:
    with httpx.Client(base_url=f"http://{registry}/v2/{REPOSITORY}/", timeout=60) as client:
        for digest, data in images.blobs.items():
            upload = client.post("blobs/uploads/").raise_for_status().headers["Location"]
            client.put(httpx.URL(upload).copy_add_param("digest", digest), content=data).raise_for_status()
        for name, body in images.manifests.items():
            client.put(f"manifests/{name}", content=body, headers={"Content-Type": json.loads(body)["mediaType"]}).raise_for_status()


@pytest.mark.skipif(os.environ.get("GANTLINE_FULL_MATRIX") != "1", reason="needs a registry's build: GANTLINE_FULL_MATRIX=1")
@pytest.mark.parametrize("fill", [_oras, _oras_folder, _kitops, _modelpack])
def test_a_real_registry_is_read(fill: Callable[[Images], str], tmp_path: Path) -> None:
    build(frozenset({"registry"}), print)
    images = Images()
    digest = fill(images)
    with real_registry(tmp_path) as registry:
        push(registry, images)
        assert cli.main(["fetch", f"oci://{registry}/{REPOSITORY}:v1", str(tmp_path / "model")]) == 0
        assert cli.main(["inspect", f"oci://{registry}/{REPOSITORY}@{digest}"]) == 0
        assert cli.main(["inspect", f"oci://{registry}/{REPOSITORY}:v2"]) == 66
    assert {name: (tmp_path / "model" / name).read_bytes() for name in FILES} == FILES
