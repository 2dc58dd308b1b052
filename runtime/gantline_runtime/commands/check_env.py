"""Versions, devices, what works here and what is missing.

Each backend's kernels are really run on a small input and compared with the plain reference. Exit code 0 if a model can be served on
what this machine has, else 1: a package is missing, the backend that would be chosen does not work, or a GPU cannot be used.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

__all__ = ["Finding", "add_arguments", "inspect_environment", "run"]

_PACKAGES = (
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "msgspec", "pyzmq"),
    *("starlette", "uvicorn", "uvloop", "pydantic", "jinja2", "prometheus-client", "huggingface-hub"),
)
_OPTIONAL = frozenset({"triton", "huggingface-hub"})
_MIN_SHM_BYTES = 1 << 30
_TOLERANCE = 2e-2

Status = Literal["ok", "note", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `note` is worth knowing, `missing` keeps something from working."""

    section: str
    name: str
    value: str
    status: Status = "ok"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")


def run(args: argparse.Namespace) -> int:
    findings = list(inspect_environment())
    broken = [finding for finding in findings if finding.status == "missing"]
    if args.json:
        print(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        _print_table(findings)
        print(f"\n{len(broken)} problems; the first: {broken[0].name}: {broken[0].value}" if broken else "\nA model can be served here.")
    return 1 if broken else 0


def inspect_environment() -> Iterator[Finding]:
    yield from _host()
    yield from _packages()
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", "torch", f"cannot be imported: {error}", "missing")
        return
    yield from _devices(torch)
    yield from _backends(torch)


def _host() -> Iterator[Finding]:
    yield Finding("host", "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("host", "gantline", _version("gantline") or "not installed (run from a source tree)")
    try:
        from gantline_runtime.memory import available_cpus, available_host_bytes
    except ImportError:  # it needs torch, whose absence is reported below
        pass
    else:
        yield Finding("host", "processors", f"{available_cpus()} usable of {os.cpu_count()}")
        yield Finding("host", "memory", f"{available_host_bytes() / 2**30:.1f} GiB usable")
    yield _shared_memory()


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("host", "/dev/shm", "not there; tensor parallelism needs it", "note")
    small = size < _MIN_SHM_BYTES
    text = f"{size / 2**30:.1f} GiB" + ("; tensor parallelism over GPUs needs 1 GiB or more" if small else "")
    return Finding("host", "/dev/shm", text, "note" if small else "ok")


def _packages() -> Iterator[Finding]:
    for name in _PACKAGES:
        found = _version(name)
        if found is not None:
            yield Finding("packages", name, found)
        elif name in _OPTIONAL:
            yield Finding("packages", name, "not installed", "note")
        else:
            yield Finding("packages", name, "not installed; pip install 'gantline[runtime]'", "missing")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices(torch: Any) -> Iterator[Finding]:
    driver = _nvidia_smi()
    if not torch.cuda.is_available():
        if driver:
            cause = "torch cannot use it: a driver too old for this CUDA, or a torch without CUDA"
            yield Finding("devices", "gpu", f"{driver}; {cause} ({torch.version.cuda or 'no CUDA'})", "missing")
        else:
            yield Finding("devices", "gpu", "none; models run on the CPU", "note")
        return
    yield Finding("devices", "cuda", f"{torch.version.cuda or torch.version.hip}, driver {driver or 'unknown'}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            yield Finding("devices", f"gpu {index}", f"{properties.name}: {str(error).splitlines()[0]}", "missing")
            continue
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        yield Finding("devices", f"gpu {index}", f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory}")


def _nvidia_smi() -> str:
    """The driver's version, or empty where there is no NVIDIA driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout.strip() else ""


def _backends(torch: Any) -> Iterator[Finding]:
    from gantline_kernels import api, library

    has_gpu = torch.cuda.is_available()
    device = "cuda" if has_gpu else "cpu"
    chosen = api.select("auto", device)
    for backend in api.BACKENDS:
        if not has_gpu and backend != "torch":
            yield Finding("backends", backend, "needs a GPU", "note")
            continue
        problem = _try_backend(torch, backend, device)
        label = f"works on {device}" + ("; the one that is chosen" if backend == chosen else "")
        yield Finding("backends", backend, problem or label, "missing" if problem and backend == chosen else "note" if problem else "ok")
    if has_gpu:
        path, named = library.find(), os.environ.get(library.VARIABLE)
        absent = f"not at {named}, where {library.VARIABLE} says" if named else "not built"
        missing = f"{absent}, so Triton's kernels serve alone: run python -m gantline_kernels.build --fetch"
        yield Finding("backends", "cuda library", missing if path is None else str(path), "note" if path is None else "ok")


def _try_backend(torch: Any, backend: str, device: str) -> str:
    """Run two operations and compare; what is wrong, or empty."""
    from gantline_kernels import api, reference

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 256, generator=generator).to(device)
    weight = torch.rand(256, generator=generator).to(device)
    try:
        got = (api.rms_norm(x, weight, 1e-6, backend=backend), api.silu_and_mul(x, backend=backend))
        expected = (reference.rms_norm(x, weight, 1e-6), reference.silu_and_mul(x))
        error = max(float((a.float() - b.float()).abs().max()) for a, b in zip(got, expected, strict=True))
    except Exception as problem:  # compilers, drivers, libraries: the point is to say what happened
        lines = str(problem).strip().splitlines()
        return f"fails: {type(problem).__name__}: {lines[0][:200] if lines else ''}"
    return "" if error <= _TOLERANCE else f"computes wrongly: off by {error:.3g}"


def _print_table(findings: list[Finding]) -> None:
    section = ""
    marks = {"ok": " ", "note": "-", "missing": "!"}
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(("" if finding is findings[0] else "\n") + section)
        print(f" {marks[finding.status]} {finding.name:<18} {finding.value}")
    sys.stdout.flush()
