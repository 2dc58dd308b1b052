"""Development images: empty folders, an entry point and the pause program, written as an OCI archive without any image builder.

What makes them work is `environment_mounts`: every container of the node gets the machine's `/usr`, the Python installation, the virtual
environment and the source tree, read-only, at the places where the real images have them (`/opt/gantline`). A change of the source is in
the next container; nothing is built.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gantline_devcluster.errors import DevclusterError

OPERATOR_IMAGE = "localhost/gantline-operator:dev"
RUNTIME_IMAGE = "localhost/gantline-runtime-cpu:dev"
PAUSE_IMAGE = "localhost/gantline-pause:dev"
HOME = "/opt/gantline"
SOURCE_ROOTS = ("operator", "runtime", "kernels", "quant", "devcluster")
USER = "1000:1000"
ENTRY_POINTS = {
    "gantline": "gantline_runtime.cli",
    "gantline-operator": "gantline_operator.main",
    "gantline-gateway": "gantline_gateway.main",
}
# Folders that pods mount over: what lies below them would be hidden.
MOUNTED_OVER = ("/tmp", "/mnt", "/dev", "/proc", "/sys", "/run", "/var/run")


@dataclass(frozen=True)
class Entry:
    """One path of an image's only layer: a folder (no data), a file, or a symbolic link."""

    path: str
    data: bytes | None = None
    link: str = ""
    mode: int = 0o755


@dataclass(frozen=True)
class Image:
    name: str
    entrypoint: tuple[str, ...]
    entries: tuple[Entry, ...]
    user: str = USER
    environment: Mapping[str, str] = field(default_factory=dict)


def source_tree() -> Path:
    return Path(__file__).resolve().parents[3]


def pause_image(pause: bytes) -> Image:
    """What every node needs. `pause` is the static program that holds a pod's namespaces."""
    return Image(PAUSE_IMAGE, ("/pause",), (*root_filesystem(), Entry("pause", pause)), user="65535:65535")


def development_images() -> list[Image]:
    """The operator's and the runtime's: nothing without `environment_mounts`."""
    root = (*root_filesystem(), *(Entry(f"opt/gantline/bin/{name}", script(module)) for name, module in ENTRY_POINTS.items()))
    root += (Entry("opt/gantline/tiny-model", link="source/examples/tiny-model"),)
    environment = {
        "PATH": f"{HOME}/bin:{HOME}/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": ":".join(f"{HOME}/source/{part}" for part in SOURCE_ROOTS),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return [
        Image(OPERATOR_IMAGE, ("gantline-operator",), root, environment=environment),
        Image(RUNTIME_IMAGE, ("gantline",), root, environment=environment),
    ]


def root_filesystem() -> tuple[Entry, ...]:
    """The folders that mounts go to, a minimal /etc, and `/bin -> usr/bin` wherever this machine has it so."""
    folders = [
        "dev",
        "etc",
        "etc/ssl",
        "etc/alternatives",
        "home",
        "mnt",
        "opt/gantline/venv",
        "opt/gantline/source",
        "proc",
        "root",
        "run",
    ]
    entries = [Entry(folder) for folder in [*folders, "sys", "tmp", "usr", "var", "var/tmp"]]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        path = Path("/", name)
        if path.is_symlink():
            entries.append(Entry(name, link=os.readlink(path)))
    users = (("root", 0, "/root"), ("gantline", 1000, "/tmp"), ("nobody", 65534, "/tmp"))
    passwd = "".join(f"{name}:x:{number}:{number}::{home}:/usr/sbin/nologin\n" for name, number, home in users)
    files = {
        "etc/passwd": passwd,
        "etc/group": "root:x:0:\ngantline:x:1000:\nnogroup:x:65534:\n",
        "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
        "etc/ld.so.cache": "",  # the machine's own is mounted here
    }
    return (*entries, *(Entry(path, text.encode(), mode=0o644) for path, text in files.items()))


def script(module: str) -> bytes:
    return f"#!{HOME}/venv/bin/python\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n".encode()


def environment_mounts(prefix: str = sys.prefix, base_prefix: str = sys.base_prefix) -> list[dict[str, Any]]:
    """The OCI mounts of every container: read-only, in an order in which none hides another.

    Raises DevclusterError where the Python installation lies in a folder that pods mount over (it cannot be shown elsewhere: its path is
    compiled in).
    """
    if prefix == base_prefix:
        raise DevclusterError("gantline_devcluster runs outside a virtual environment", "Run `make venv` and use its .venv/bin/python")
    if any(Path(folder) in Path(base_prefix).resolve().parents for folder in MOUNTED_OVER):
        cure = "Make the virtual environment with a Python that is installed elsewhere"
        raise DevclusterError(f"Python is installed at {base_prefix}, in a folder that pods mount over", cure)
    wanted = {"/usr": "/usr"}
    wanted |= {f"/{name}": f"/{name}" for name in ("bin", "sbin", "lib", "lib32", "lib64") if not Path("/", name).is_symlink()}
    wanted |= {path: path for path in ("/etc/ssl", "/etc/alternatives", "/etc/ld.so.cache")}
    if Path("/usr") not in Path(base_prefix).resolve().parents:
        wanted[base_prefix] = str(Path(base_prefix).resolve())
    wanted |= {f"{HOME}/venv": str(Path(prefix).resolve()), f"{HOME}/source": str(source_tree())}
    return [
        {"destination": destination, "type": "bind", "source": source, "options": ["rbind", "ro", "nosuid", "nodev"]}
        for destination, source in wanted.items()
        if Path(source).exists()
    ]


def write_archive(path: Path, images: list[Image]) -> None:
    """An OCI image layout in a tar file, the same bytes for the same images."""
    blobs: dict[str, bytes] = {}

    def add(data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data), **more}

    manifests = []
    for image in images:
        layer = layer_tar(image.entries)
        kind = "application/vnd.oci.image"
        manifest = {
            "schemaVersion": 2,
            "mediaType": f"{kind}.manifest.v1+json",
            "config": add(encode(image_config(image, hashlib.sha256(layer).hexdigest())), f"{kind}.config.v1+json"),
            "layers": [add(layer, f"{kind}.layer.v1.tar")],
        }
        names = {"io.containerd.image.name": image.name, "org.opencontainers.image.ref.name": image.name.rpartition(":")[2]}
        manifests.append(add(encode(manifest), f"{kind}.manifest.v1+json", annotations=names))
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    files = {"oci-layout": encode({"imageLayoutVersion": "1.0.0"}), "index.json": encode(index)}
    files |= {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(layer_tar(tuple(Entry(name, data, mode=0o644) for name, data in files.items())))
    partial.replace(path)


def image_config(image: Image, layer_digest: str) -> dict[str, Any]:
    config = {
        "User": image.user,
        "Env": [f"{key}={value}" for key, value in image.environment.items()],
        "Entrypoint": list(image.entrypoint),
        "WorkingDir": HOME if image.environment else "/",
    }
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]}
    return {"architecture": machine, "os": "linux", "config": config, "rootfs": rootfs, "history": [{"created_by": "gantline_devcluster"}]}


def layer_tar(entries: tuple[Entry, ...]) -> bytes:
    """A tar of these entries with their parents, owned by root, without times."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        made: set[str] = set()
        for entry in entries:
            for parent in reversed(Path(entry.path).parents):
                if str(parent) != "." and str(parent) not in made:
                    made.add(str(parent))
                    tar.addfile(_folder(str(parent), 0o755))
            if entry.link:
                info = tarfile.TarInfo(entry.path)
                info.type, info.linkname = tarfile.SYMTYPE, entry.link
                tar.addfile(info)
            elif entry.data is not None:
                info = tarfile.TarInfo(entry.path)
                info.size, info.mode = len(entry.data), entry.mode
                tar.addfile(info, io.BytesIO(entry.data))
            elif entry.path not in made:
                made.add(entry.path)
                tar.addfile(_folder(entry.path, 0o1777 if entry.path.endswith("tmp") else entry.mode))
    return buffer.getvalue()


def _folder(path: str, mode: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode = tarfile.DIRTYPE, mode
    return info


def encode(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
