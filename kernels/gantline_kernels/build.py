"""Compile the CUDA C++ kernels: `python -m gantline_kernels.build [--nvcc PATH] [--output FILE] [--fetch]`.

One shared library with plain C entry points, which needs nothing at run time but the driver. Sources named `*_hopper.cu` become machine
code for Hopper's own instructions (sm_90a). Others become machine code for compute capability 8.0, which 8.6 and 8.9 run too, and 9.0,
and intermediate code of 8.0, which the driver compiles for what is newer.

nvcc is looked for in --nvcc, in the cache, and on the PATH; --fetch installs it from PyPI into the cache (271 MB). The library goes into
the cache, named by a hash of the sources, where `library.py` finds it; images copy it beside this file. The hash is in the library, too,
so that one of other sources is known wherever it lies.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

__all__ = ["build", "cache_folder", "fetch_toolkit", "find_nvcc", "library_path", "main", "sources_hash", "stamp_of"]

_SOURCES = Path(__file__).parent / "cuda_kernels"
_TOOLKIT = "cuda-toolkit[nvcc,cccl,cudart]==13.0.*"
_HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
_GENERAL = ["-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90,code=sm_90"]
_FLAGS = ["-std=c++17", "-O3", "--compiler-options=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-lmem-usage"]
_STAMP = "gantline_kernels_sources"
_HASH_CHARS = 16


def cache_folder() -> Path:
    """$GANTLINE_CACHE, or ~/.cache/gantline."""
    return Path(os.environ.get("GANTLINE_CACHE") or Path.home() / ".cache" / "gantline")


@cache
def sources_hash() -> str:
    """Of these very sources and how they are compiled."""
    digest = hashlib.sha256()
    for source in sorted(_SOURCES.glob("*.cu*")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(" ".join([*_FLAGS, *_HOPPER, *_GENERAL]).encode())
    return digest.hexdigest()[:_HASH_CHARS]


def library_path() -> Path:
    """Where the library of these very sources lies in the cache, built or not."""
    return cache_folder() / f"kernels-{sources_hash()}" / "libgantline_kernels.so"


def stamp_of(library: ctypes.CDLL) -> str:
    """`sources_hash` of what it was built from; empty if it does not say."""
    try:
        return (ctypes.c_char * (_HASH_CHARS + 1)).in_dll(library, _STAMP).value.decode(errors="replace")
    except ValueError:
        return ""


def find_nvcc(given: str = "") -> Path | None:
    """The compiler: the given one, the cache's, or the PATH's."""
    candidates = [given, *map(str, (cache_folder() / "cuda-toolkit").glob("lib/python*/site-packages/nvidia/cu13/bin/nvcc")), "nvcc"]
    for candidate in candidates:
        found = shutil.which(candidate) if candidate else None
        if found:
            return Path(found)
    return None


def fetch_toolkit() -> Path:
    """Install the compiler into the cache -> nvcc. Raises subprocess.CalledProcessError, or FileNotFoundError if it does not hold one."""
    folder = cache_folder() / "cuda-toolkit"
    found = find_nvcc()
    if found is None or folder not in found.parents:
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", _TOOLKIT], check=True)
        found = find_nvcc()
    if found is None:
        raise FileNotFoundError(f"no nvcc in {folder}")
    return found


def build(nvcc: Path, output: Path, *, jobs: int = 0) -> None:
    """Compile every source and link them to `output`, which appears whole or not at all. Raises CalledProcessError."""
    toolkit = nvcc.resolve().parent.parent
    with tempfile.TemporaryDirectory(prefix="gantline-kernels-") as folder:
        work = Path(folder)
        stamp = work / "stamp.cpp"
        stamp.write_text(f'extern "C" __attribute__((visibility("default"))) const char {_STAMP}[] = "{sources_hash()}";\n')
        with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
            objects = list(pool.map(lambda source: _compile(nvcc, source, work), [*sorted(_SOURCES.glob("*.cu")), stamp]))
        libraries = [f"-L{path}" for path in (toolkit / "lib", toolkit / "lib64") if path.is_dir()]
        linked = work / output.name
        subprocess.run([nvcc, *_HOPPER, "-shared", "-cudart", "static", *libraries, "-o", linked, *objects], check=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = output.with_suffix(f".{os.getpid()}.partial")
        shutil.copyfile(linked, partial)
        partial.rename(output)


def _compile(nvcc: Path, source: Path, folder: Path) -> Path:
    target = folder / f"{source.stem}.o"
    architectures = _HOPPER if source.stem.endswith("_hopper") else _GENERAL
    subprocess.run([nvcc, *_FLAGS, *architectures, "-c", source, "-o", target], check=True)
    return target


def _is_current(output: Path) -> bool:
    try:
        return stamp_of(ctypes.CDLL(str(output))) == sources_hash()
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA C++ kernels.")
    parser.add_argument("--nvcc", default="", help="the compiler; default: the cache's, or the PATH's")
    parser.add_argument("--output", type=Path, default=None, help="the library; default: in the cache")
    parser.add_argument("--fetch", action="store_true", help="install the compiler into the cache first, from PyPI")
    args = parser.parse_args(arguments)
    output = args.output or library_path()
    if _is_current(output):
        print(f"{output} is up to date")
        return 0
    nvcc = fetch_toolkit() if args.fetch else find_nvcc(args.nvcc)
    if nvcc is None:
        print("gantline: no nvcc found. Give --nvcc PATH, or --fetch to install it into the cache.", file=sys.stderr)
        return 1
    build(nvcc, output)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
