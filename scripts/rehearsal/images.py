"""The images: a builder that finds its way, what is built beside the quickstart's, how large they are, and builds again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from gantline_devcluster.cache import cache_root

from scripts.quickstart import BUILDERS, STATE
from scripts.quickstart import version as release
from scripts.rehearsal.cluster import ROOT, Rehearsal, RehearsalFailed

__all__ = [
    "KERNEL_MODEL", "KERNEL_TARGET", "build_again", "build_runtime", "builder_environment", "images_of", "install_packages", "provide_base",
    "record_sizes",
]  # fmt: skip

# What the machine says about certificates and package indexes is true inside a build as well; nothing of it gets into an image.
MACHINE_SETTINGS = ("/etc/ssl/certs", "/etc/pip.conf")
PACKAGES = {"buildah": "buildah", "mmdebstrap": "mmdebstrap"}
KERNEL_MODEL, KERNEL_TARGET = "qwen2.5-0.5b", "90"
KERNELS = ["--build-arg", f"KERNEL_MODELS={KERNEL_MODEL}", "--build-arg", f"KERNEL_TARGETS={KERNEL_TARGET}"]
"""One model's kernels for one architecture, as somebody builds who has one of each. The whole list takes 22 minutes of one processor."""


def install_packages() -> None:
    missing = sorted({package for program, package in PACKAGES.items() if not shutil.which(program)})
    if not missing:
        return
    if not shutil.which("apt-get"):
        raise RehearsalFailed(f"{' and '.join(missing)} are needed: install them with this system's package manager")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        subprocess.run(["apt-get", "--quiet", *command], env=environment, check=True, stdout=subprocess.DEVNULL)


def builder_environment(folder: Path, registry: str) -> dict[str, str]:
    """Settings of buildah in files of their own: where images lie, what of the machine a build sees, and that our registry speaks HTTP."""
    folder.mkdir(parents=True, exist_ok=True)
    store = str(cache_root() / "images")
    shown = [f"{path}:{path}:ro" for path in MACHINE_SETTINGS if Path(path).exists()]
    files = {
        "storage.conf": f'[storage]\ndriver = "overlay"\ngraphroot = {json.dumps(store)}\nrunroot = {json.dumps(store + "/run")}\n',
        "containers.conf": f"[containers]\nvolumes = {json.dumps(shown)}\n",
        "registries.conf": f'[[registry]]\nlocation = "{registry}"\ninsecure = true\n',
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    return {
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_REGISTRIES_CONF": str(folder / "registries.conf"),
        "BUILDAH_ISOLATION": "chroot",  # runs where the kernel's tools for more are missing; the network is the machine's
    }


def base_image() -> str:
    version: str = re.findall(r"^ARG PYTHON=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)[0]
    return f"python:{version}"


def provide_base(rehearsal: Rehearsal) -> None:
    """Pull the Dockerfile's base, or put a stand-in together where that cannot be."""
    base = base_image()
    if rehearsal.succeeds("buildah", "inspect", "--type", "image", base):
        return
    if not rehearsal.succeeds("buildah", "pull", "--quiet", base):
        print(f"  {base} cannot be pulled here: its stand-in is put together from Debian packages", flush=True)
        rehearsal.run("scripts/base_image.sh")


def build_runtime(rehearsal: Rehearsal) -> None:
    """The image for GPUs, built and pushed. From here on it is one of `images_of`."""
    image = f"{rehearsal.cluster.registry}/gantline/runtime:{release()}"
    with rehearsal.step(f"build runtime, with the kernels of {KERNEL_MODEL} for {KERNEL_TARGET}"):
        build(rehearsal, "runtime", image, ROOT)
    with rehearsal.step("push runtime"):
        rehearsal.run("buildah", "push", "--quiet", image)
    rehearsal.runtime_image = image


def build(rehearsal: Rehearsal, target: str, tag: str, folder: Path) -> None:
    kernels = KERNELS if target == "runtime" else []
    rehearsal.run("buildah", *BUILDERS["buildah"], *kernels, "--target", target, "--tag", tag, str(folder))


def images_of(rehearsal: Rehearsal) -> dict[str, str]:
    """Target -> the image that the cluster runs."""
    values = json.loads((STATE / "values.json").read_text())
    images = {"operator": f"{values['image']['repository']}:{values['image']['tag']}", "runtime-cpu": values["runtime"]["images"]["cpu"]}
    return images | ({"runtime": rehearsal.runtime_image} if rehearsal.runtime_image else {})


def record_sizes(rehearsal: Rehearsal) -> None:
    """Each image unpacked, as its layers are pulled, and how long the node took to pull and unpack it."""
    for target, image in images_of(rehearsal).items():
        layers = pushed_layers(rehearsal, image)
        packed = sum(layer["size"] for layer in layers)
        unpacked = rehearsal.run("buildah", "images", "--format", "{{.Size}}", image).splitlines()[0]  # a line for each tag
        rehearsal.figures.append((f"image {target}", f"{unpacked} unpacked, {packed / 1e6:.0f} MB to pull in {len(layers)} layers"))
    for event in rehearsal.get("events", "-A", "--field-selector=reason=Pulled")["items"]:
        if found := re.search(r'pulled image "(\S+)" in (\S+)', event["message"]):
            rehearsal.figures.append((f"pull {found[1].split('/')[-1].split(':')[0]}, unpacking included", found[2]))


def pushed_layers(rehearsal: Rehearsal, image: str) -> list[dict[str, Any]]:
    """The layers in the image's manifest as the registry has it, their sizes compressed."""
    name, tag = image.removeprefix(f"{rehearsal.cluster.registry}/").rsplit(":", 1)
    accept = {"Accept": "application/vnd.docker.distribution.manifest.v2+json"}
    request = urllib.request.Request(f"http://{rehearsal.cluster.registry}/v2/{name}/manifests/{tag}", headers=accept)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return list(json.load(answer)["layers"])


def build_again(rehearsal: Rehearsal) -> None:
    """The same builds after a change of one line of the runtime's code, in a copy of the tree."""
    with tempfile.TemporaryDirectory(prefix="gantline-") as folder:
        names = rehearsal.run("git", "ls-files", "-z").split("\0")
        for name in filter(None, names):
            (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder) / name)
        with (Path(folder) / "runtime/gantline_runtime/__init__.py").open("a") as file:
            file.write(f"# changed at {time.time()}\n")
        for target, image in images_of(rehearsal).items():
            with rehearsal.step(f"build {target} again after a change of one line"):
                build(rehearsal, target, f"changed/{target}", Path(folder))
            if image_id(rehearsal, f"changed/{target}") == image_id(rehearsal, image):
                raise RehearsalFailed(f"the change is not in the image {target}: the builder took a layer from its cache that it must not")
            rehearsal.run("buildah", "rmi", f"changed/{target}")


def image_id(rehearsal: Rehearsal, image: str) -> str:
    return rehearsal.run("buildah", "images", "--quiet", "--no-trunc", image).strip()
