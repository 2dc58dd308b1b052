"""Make torch's CUDA build importable without CUDA, for an image that computes on CPUs alone: 1.6 GB instead of 4.7.

PyPI's torch for Linux on x86-64 is built with CUDA, and the dynamic linker wants every library that it names and every function that it
refers to, though none is called where there is no GPU. So each library that torch is linked with becomes a stub: the same file, the same
functions, each of which ends the process with a sentence. What nothing is linked with goes. The CUDA runtime itself stays, since torch asks
it how many GPUs there are (none), and so does CUPTI, which torch's profiler starts.

usage: leave_out_cuda.py SITE_PACKAGES      (needs gcc and binutils)
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

KEPT = ("libcudart.so", "libcupti.so")
SOURCE = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((visibility("hidden"), noreturn)) void missing(const char *name) {{
  fprintf(stderr, "gantline: %s of CUDA was called, and this image is for CPUs: use the one made for GPUs\\n", name);
  abort();
}}
#define MISSING(name) void name(void) {{ missing(#name); }}
{functions}
"""


def undefined_functions(libraries: Iterable[Path]) -> set[str]:
    """The names that these refer to and do not have, without their versions."""
    return {line.split()[-1].split("@")[0] for library in libraries for line in dynamic_symbols(library, "--undefined-only")}


def defined_functions(library: Path) -> set[str]:
    """Its C functions; those of C++ that it shows are the standard library's templates, which their users have as well."""
    lines = [line.split() for line in dynamic_symbols(library, "--defined-only")]
    return {name.split("@")[0] for *_, kind, name in lines if kind in "TWi" and not name.startswith("_Z")}


def dynamic_symbols(library: Path, which: str) -> list[str]:
    return subprocess.run(["nm", "-D", which, library], capture_output=True, text=True, check=True).stdout.splitlines()


def needed_libraries(libraries: Iterable[Path]) -> set[str]:
    """File names that these are linked with."""
    text = "".join(subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout for path in libraries)
    return set(re.findall(r"\(NEEDED\).*\[(\S+)\]", text))


def write_stub(library: Path, functions: Iterable[str]) -> None:
    """Put a stub in the place of `library`; the file that was there is left alone, since it may be shared with others by a link."""
    lines = "\n".join(f"MISSING({name})" for name in sorted(functions))
    with tempfile.TemporaryDirectory() as folder:
        source, stub = Path(folder, "stub.c"), Path(folder, "stub.so")
        source.write_text(SOURCE.format(functions=lines))
        subprocess.run(["gcc", "-w", "-O1", "-s", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", stub, source], check=True)
        data = stub.read_bytes()
    library.unlink()
    library.write_bytes(data)


def main(site_packages: Path) -> None:
    torch = [path for path in (site_packages / "torch").rglob("*.so*") if path.is_file() and "linalg" not in path.name]
    cuda = [path for path in (site_packages / "nvidia").rglob("*") if path.is_file() and re.search(r"\.(so(\.|$)|a$)", path.name)]
    wanted, needed = undefined_functions(torch), needed_libraries(torch)
    for library in cuda:
        if library.name.startswith(KEPT):
            continue
        if library.name in needed:
            write_stub(library, wanted & defined_functions(library))
        else:
            library.unlink()
    for unused in (*(site_packages / "nvidia").rglob("include"), site_packages / "torch/include"):
        shutil.rmtree(unused)
    for unused in ("lib/libtorch_cuda_linalg.so", "bin/ptxas"):  # solvers for GPUs, loaded when first called; their assembler
        (site_packages / "torch" / unused).unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
