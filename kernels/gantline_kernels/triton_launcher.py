# mypy: disable-error-code="no-untyped-def"
"""Triton without a C compiler: the two C modules that it would otherwise compile on the machine that serves, built beforehand.

Triton 3.6 compiles one module with what it asks of the driver, and one more for each signature of a kernel that is launched; which
signatures come up depends on the model and on the batch, so no list of them is ever complete. `triton_launcher.c` is one for all.

`python -m gantline_kernels.triton_launcher --output FOLDER` builds both (gcc and Python's headers, no GPU); with $GANTLINE_TRITON_LAUNCHER
naming that folder, `install` has Triton take them. Without it nothing changes, and Triton needs its compiler.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import triton
from triton.backends.nvidia import driver

__all__ = ["build", "install", "letters", "main"]

VARIABLE = "GANTLINE_TRITON_LAUNCHER"
_INTEGERS = {"i1", "i8", "i16", "i32", "i64", "u1", "u8", "u16", "u32", "u64"}
_FLOATS = {"fp16": "e", "bf16": "y", "fp32": "f", "f32": "f", "fp64": "d"}
_SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")


def install() -> bool:
    """Have Triton use the modules in the folder that the environment names; False where it names none.

    Raises OSError if they were built for another Triton or Python.
    """
    named = os.environ.get(VARIABLE)
    if not named:
        return False
    folder = Path(named)
    built = (folder / "versions").read_text()
    if built != _versions():
        raise OSError(f"the launcher in {folder} was built for {built}, and this is {_versions()}: build it again")

    def load(src: str, name: str, **_: Any):
        if name == "cuda_utils":
            return _load(folder, name)
        return SimpleNamespace(launch=functools.partial(_load(folder, "launcher").launch, src.encode()))

    driver.make_launcher = lambda constants, signature, tensordesc_meta: letters(signature.values(), tensordesc_meta)
    driver.compile_module_from_src = load
    driver.library_dirs = list  # nothing is linked, so nothing is looked for
    return True


def letters(types: Iterable[Any], tensordesc_meta: Sequence[Any] | None) -> str:
    """A letter for each argument of a launch, as `triton_launcher.c` explains them, from Triton's types ("*bf16", "i32", "constexpr", ...).

    A tensor descriptor is several arguments: its map, shape and strides; without hardware for it, its address, shape, strides, whether it
    is padded with NaN, and shape and strides again. Raises TypeError for a type that our kernels do not use.
    """
    metas = iter(tensordesc_meta or ())
    return "".join(_letters_of(kind, metas) for kind in types)


def _letters_of(kind: Any, metas: Iterable[Any]) -> str:
    if kind == "constexpr":
        return "x"
    if kind in _INTEGERS:
        return "i"
    if kind in _FLOATS:
        return _FLOATS[kind]
    if isinstance(kind, str) and kind.startswith("*"):
        return "p"
    described = re.match(r"tensordesc<[^\[>]*\[([^\]]*)\]", kind) if isinstance(kind, str) else None
    if described is None:
        raise TypeError(f"a Triton kernel has an argument of type {kind}, for which there is no launcher")
    shape_and_strides = "ii" * (described[1].count(",") + 1)
    return ("p" + shape_and_strides + "i" if next(iter(metas), None) is None else "t") + shape_and_strides


@functools.cache
def _load(folder: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}{_SUFFIX}")
    assert spec and spec.loader, f"{name} is no extension module"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _versions() -> str:
    return f"Triton {triton.__version__} and Python {sys.version_info.major}.{sys.version_info.minor}"


def build(output: Path, compiler: str = "gcc") -> None:
    """Compile both modules into the folder `output`. Raises CalledProcessError or FileNotFoundError (no compiler)."""
    nvidia = Path(driver.__file__).parent
    includes = [f"-I{nvidia / 'include'}", f"-I{sysconfig.get_paths(scheme='posix_prefix')['include']}"]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        # The driver's library is not here; an empty one of its name makes the modules ask for it where they are loaded.
        library = Path(folder, "libcuda.so.1")
        subprocess.run([compiler, "-shared", f"-Wl,-soname,{library.name}", "-x", "c", "/dev/null", "-o", library], check=True)
        for name, source in (("cuda_utils", nvidia / "driver.c"), ("launcher", Path(__file__).with_suffix(".c"))):
            command = [compiler, "-O3", "-shared", "-fPIC", "-Wno-psabi", *includes, source, "-Wl,--no-as-needed", library]
            subprocess.run([*map(str, command), "-o", output / f"{name}{_SUFFIX}"], check=True)
    (output / "versions").write_text(_versions())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build Triton's C modules beforehand.")
    parser.add_argument("--output", type=Path, required=True, help=f"the folder to name in {VARIABLE}")
    args = parser.parse_args(arguments)
    build(args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
