"""`gantline_devcluster build`: compile what is missing, one binary after the other, each usable as soon as it is done.

Several builds at once are safe: one holds the lock, the others wait until what they want is there. A binary appears by rename, so none is
ever seen half-written. The log of each lies in `<cache>/logs/`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gantline_devcluster import binaries
from gantline_devcluster.binaries import MODULES, Module
from gantline_devcluster.cache import cache_root, locked
from gantline_devcluster.errors import DevclusterError
from gantline_devcluster.golang import find_go

PLAIN_INTERVAL_S = 15.0
TAIL_LINES = 12


def build(wanted: frozenset[str], tell: Callable[[str], None] = print) -> Path:
    """Build those of `wanted` that are missing; returns the folder that collects all binaries. Raises DevclusterError."""
    started = time.monotonic()

    def satisfied() -> bool:
        return not binaries.missing(wanted)

    if not satisfied():
        waiting = lambda holder: tell(f"waiting for the build of process {holder}")
        with locked(cache_root() / "build.lock", satisfied, waiting) as needed:
            if needed:
                count = _build_missing(wanted, tell)
                tell(f"built {count} binaries in {time.monotonic() - started:.0f} s")
    return binaries.collected()


def _build_missing(wanted: frozenset[str], tell: Callable[[str], None]) -> int:
    go = find_go(tell)
    work = [(module, name) for module in MODULES for name in module.missing(wanted)]
    for number, (module, name) in enumerate(work, 1):
        label = f"{number}/{len(work)} {name} {module.version}" if module.versioned else f"{number}/{len(work)} {name}"
        make = copy_one if module.copied else build_one
        make(go, module, name, Progress(label, tell))
    return len(work)


def build_one(go: Path, module: Module, name: str, progress: Progress) -> Path:
    """Compile one binary into the module's folder. Raises DevclusterError with the end of the compiler's output."""
    module.folder.mkdir(parents=True, exist_ok=True)
    partial = module.folder / f".{name}.{os.getpid()}.partial"
    log = cache_root() / "logs" / f"{module.name}-{name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [str(go), "build", "-v", "-trimpath", "-mod=readonly", "-tags", ",".join(module.tags), "-ldflags", module.linker_flags]
    command += ["-o", str(partial), module.binaries[name]]
    try:
        code = _follow(command, module.source, build_environment(go), log, progress)
        if code:
            raise DevclusterError(
                f"building {name} failed: {_tail(log)}", f"Look into {log}; run the build again, it continues where it stopped"
            )
        partial.replace(module.folder / name)
    finally:
        partial.unlink(missing_ok=True)
    progress.done()
    return module.folder / name


def copy_one(go: Path, module: Module, name: str, progress: Progress) -> Path:
    """Take one file out of the module that is pinned, whose sum go.sum has. Raises DevclusterError."""
    command = [str(go), "mod", "download", "-json", f"{module.versioned}@{module.version}"]
    answer = subprocess.run(command, cwd=module.source, env=build_environment(go), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    found = json.loads(answer.stdout) if answer.stdout.startswith("{") else {}
    if answer.returncode or "Dir" not in found:
        cause = found.get("Error") or answer.stderr.strip() or "no message"
        raise DevclusterError(f"{module.versioned} {module.version} cannot be downloaded: {cause}", "Check the network, and run it again")
    module.folder.mkdir(parents=True, exist_ok=True)
    partial = module.folder / f".{name}.{os.getpid()}.partial"
    partial.write_bytes((Path(found["Dir"]) / module.binaries[name]).read_bytes())
    partial.replace(module.folder / name)
    progress.done()
    return module.folder / name


def build_environment(go: Path) -> dict[str, str]:
    """Go's environment without what a user's own settings could break: no CGO, no workspace, no version-control stamp, the toolchain
    as it is.
    """
    flags = " ".join(f for f in os.environ.get("GOFLAGS", "").split() if not f.startswith(("-mod", "-buildvcs", "-tags", "-ldflags")))
    fixed = {"CGO_ENABLED": "0", "GOWORK": "off", "GOTOOLCHAIN": "local", "GOFLAGS": f"{flags} -buildvcs=false".strip(), "GOOS": "linux"}
    path = f"{go.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    home = {} if os.environ.get("HOME") else {"GOPATH": str(cache_root() / "gopath"), "GOCACHE": str(cache_root() / "go-build")}
    return {**os.environ, **fixed, **home, "PATH": path}


def _follow(command: list[str], folder: Path, environment: dict[str, str], log: Path, progress: Progress) -> int:
    with (
        log.open("w") as file,
        subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                progress.saw(line.strip())
        except BaseException:
            process.terminate()  # Ctrl-C leaves no compiler behind
            raise
    return process.returncode


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text().splitlines() if not re.fullmatch(r"[\w./@~+-]+", line.strip())]
    return " | ".join(lines[-TAIL_LINES:]) or "no message"


@dataclass
class Progress:
    """What a person sees of one binary: a bar over its packages on a terminal, otherwise a line now and then."""

    label: str
    tell: Callable[[str], None]
    started: float = field(default_factory=time.monotonic)
    packages: int = 0
    downloads: int = 0
    _told: float = 0.0
    _bar: tqdm[Any] | None = None

    def __post_init__(self) -> None:
        self._told = self.started
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self.label, unit=" packages", leave=False, mininterval=0.2)
        else:
            self.tell(f"{self.label}: building")

    def saw(self, line: str) -> None:
        """One line of the compiler's: a package compiled or a module downloaded."""
        if line.startswith("go: downloading"):
            self.downloads += 1
        elif line and " " not in line:
            self.packages += 1
            if self._bar is not None:
                self._bar.update()
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(line.removeprefix("go: ")[-50:], refresh=False)
        elif now - self._told > PLAIN_INTERVAL_S:
            self._told = now
            self.tell(f"{self.label}: {self._so_far(now)}")

    def done(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self.tell(f"{self.label}: done, {self._so_far(time.monotonic())}")

    def _so_far(self, now: float) -> str:
        fetched = f", {self.downloads} modules downloaded" if self.downloads else ""
        return f"{self.packages} packages compiled{fetched}, {now - self.started:.0f} s"
