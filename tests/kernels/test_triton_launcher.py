"""Triton's modules built beforehand: what they pass to the driver, with a driver that only writes down what it is given."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from gantline_kernels import triton_launcher
from triton.backends.nvidia import driver

# The functions that the launcher calls. A launch is written to a file: grid, block and shared bytes, then 16 bytes of each parameter.
FAKE_DRIVER = """
#include <stdio.h>
#include <stdlib.h>
#include "cuda.h"
#undef cuLaunchKernelEx
CUresult cuGetErrorString(CUresult code, const char **text) { *text = code == 700 ? "an illegal address" : "something"; return 0; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return 0; }
CUresult cuDeviceGet(CUdevice *device, int number) { return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return 0; }
CUresult cuCtxSetCurrent(CUcontext context) { return 0; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return 0; }
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (pointer == 13) return CUDA_ERROR_INVALID_VALUE;
  *(CUdeviceptr *)value = pointer;
  return 0;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters, void **extra) {
  FILE *file = fopen(getenv("LAUNCHES"), "wb");
  fwrite(config, 1, 7 * sizeof(unsigned), file);
  fwrite(&config->numAttrs, 1, sizeof(unsigned), file);
  for (long i = 0; i < (long)function / 16; i++) fwrite(parameters[i], 1, 8, file);
  fclose(file);
  return (long)function % 16 ? 700 : 0;
}
"""
LAUNCH = """
import sys
from gantline_kernels import triton_launcher
from pathlib import Path

class Tensor:
    def __init__(self, address): self.address = address
    def data_ptr(self): return self.address

letters, function, arguments = eval(sys.argv[1])
module = triton_launcher._load(Path(sys.argv[2]), "launcher")
arguments = [Tensor(a["tensor"]) if isinstance(a, dict) else a for a in arguments]
module.launch(letters, 2, 3, 4, 5, function, False, True, None, None, (8, 1, 1024), None, None, None, *arguments)
"""

MAKE_LAUNCHER = driver.make_launcher
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="the launcher is built with gcc")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launcher")
    triton_launcher.build(folder)
    (folder / "driver.c").write_text(FAKE_DRIVER)
    include = Path(driver.__file__).parent / "include"
    command = ["gcc", "-w", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", folder / "driver.c"]
    subprocess.run([*command, "-o", folder / "libcuda.so.1"], check=True)
    return folder


def launch(built: Path, letters: str, arguments: list[Any], *, fails: bool = False) -> tuple[str, tuple[int, ...], list[bytes]]:
    """(standard error, what the driver was told of the grid, eight bytes of each parameter) of one launch in a process of its own."""
    log = built / "launches"
    log.unlink(missing_ok=True)
    function = 16 * (len(letters.replace("x", "")) + 2) + fails
    given = repr((letters.encode(), function, arguments))
    environment = os.environ | {"LD_LIBRARY_PATH": str(built), "LAUNCHES": str(log)}
    done = subprocess.run([sys.executable, "-c", LAUNCH, given, built], env=environment, capture_output=True, text=True, timeout=120)
    data = log.read_bytes() if log.exists() else b""
    return done.stderr, struct.unpack("8I", data[:32]) if data else (), [data[at : at + 8] for at in range(32, len(data), 8)]


def test_every_kind_of_parameter_reaches_the_driver_as_the_kernel_reads_it(built: Path) -> None:
    letters = "ppxpiiieyfd"
    arguments = [{"tensor": 2**40 + 5}, None, "a constant", 77, -3, 2**31 - 1, True, 1.5, -2.0, 0.1, 0.1]
    errors, config, parameters = launch(built, letters, arguments)
    assert errors == ""
    assert config == (2, 3, 4, 8 * 32, 1, 1, 1024, 1), "grid, block, shared memory, and the attribute for an overlapped launch"
    pointer, none, number, negative, large, flag, half, brain, single, double, *scratch = parameters
    assert struct.unpack("<QQQ", pointer + none + number) == (2**40 + 5, 0, 77)
    assert struct.unpack("<i", negative[:4]) == (-3,) and struct.unpack("<q", negative) == (-3,), "as 32 bits and as 64"
    assert struct.unpack("<i", large[:4]) == (2**31 - 1,) and flag[0] == 1
    assert struct.unpack("<e", half[:2]) == (1.5,) and struct.unpack("<f", b"\0\0" + brain[:2]) == (-2.0,)
    assert struct.unpack("<f", single[:4])[0] == pytest.approx(0.1) and struct.unpack("<d", double) == (0.1,)
    assert scratch == [bytes(8)] * 2


@pytest.mark.parametrize(
    ("letters", "arguments", "fails", "says"),
    [
        ("p", [{"tensor": 13}], False, "Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"),
        ("p", ["text"], False, "no attribute 'data_ptr'"),
        ("i", [1.5], False, "TypeError"),
        ("f", ["text"], False, "must be real number"),
        ("t", [1], False, "object must be of type PyCUtensorMap, got int"),
        ("pp", [1], False, "a kernel of 2 parameters was launched with 1"),
        ("i", [1], True, "Triton Error [CUDA]: an illegal address"),
    ],
)
def test_what_cannot_be_launched_is_a_python_exception(built: Path, letters: str, arguments: list[Any], fails: bool, says: str) -> None:
    assert says in launch(built, letters, arguments, fails=fails)[0]


@pytest.mark.parametrize(
    "types",
    [
        ["*bf16", "*fp16", "constexpr", "i32", "i64", "fp32", "i1", "u8", "u32", "fp64", "bf16"],
        ["*fp32", "tensordesc<bf16[64, 128]>", "i32", "tensordesc<bf16[64, 128]>", "constexpr"],
    ],
)
@pytest.mark.parametrize("meta", [None, ["hardware", "hardware"]])
def test_the_letters_agree_with_what_tritons_own_launcher_parses(types: list[str], meta: list[str] | None) -> None:
    """Of this version of Triton: a new one that passes more or other arguments fails here."""
    described = sum(kind.startswith("tensordesc") for kind in types)
    meta = meta and meta[:described]
    source = MAKE_LAUNCHER({}, dict(enumerate(types)), meta)
    parsed = re.search(r'PyArg_ParseTuple\(args, "iiiKKppOOOOOO(\w*)"', source)
    assert parsed, "Triton passes something else before a kernel's own arguments"
    kinds = {"O": "xpt", "d": "eyfd"}
    ours = triton_launcher.letters(types, meta)
    assert len(ours) == len(parsed[1])
    assert all(letter in kinds.get(theirs, "i") for letter, theirs in zip(ours, parsed[1], strict=True)), (ours, parsed[1])


def test_a_launcher_of_another_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "versions").write_text("Triton 3.5.0 and Python 3.11")
    monkeypatch.setenv("GANTLINE_TRITON_LAUNCHER", str(tmp_path))
    with pytest.raises(OSError, match=f"built for Triton 3.5.0 .* this is Triton {re.escape(triton.__version__)}"):
        triton_launcher.install()


def test_without_a_built_launcher_triton_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GANTLINE_TRITON_LAUNCHER", raising=False)
    assert not triton_launcher.install() and driver.make_launcher is MAKE_LAUNCHER
