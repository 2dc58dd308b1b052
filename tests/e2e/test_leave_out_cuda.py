"""The small image's torch: what stands in for the CUDA libraries that it is linked with."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="the stubs are compiled with gcc")

SOURCES = {
    "nvidia/cu13/lib/libcublas.so.13": "int cublasCreate(void) { return 7; } int cublasOther(void) { return 1; }",
    "nvidia/cu13/lib/libcudart.so.13": "int cudaGetDeviceCount(int *n) { *n = 0; return 100; }",
    "nvidia/cu13/lib/libnvJitLink.so.13": "int nvJitLink(void) { return 0; }",
    "torch/lib/libtorch_cuda_linalg.so": "int cusolver(void); int solve(void) { return cusolver(); }",
    "torch/lib/libtorch.so": """
        int cublasCreate(void), cudaGetDeviceCount(int *);
        int add(int a, int b) { return a + b; }
        int devices(void) { int n = 5; return cudaGetDeviceCount(&n) ? n : -1; }
        int multiply_on_gpu(void) { return cublasCreate(); }
    """,
}
LINKED = {"torch/lib/libtorch.so": ["nvidia/cu13/lib/libcublas.so.13", "nvidia/cu13/lib/libcudart.so.13"]}


@pytest.fixture(scope="module")
def leave_out_cuda() -> ModuleType:
    spec = importlib.util.spec_from_file_location("leave_out_cuda", ROOT / "scripts/leave_out_cuda.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(leave_out_cuda: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A torch of a few functions, linked as the real one is, after its CUDA has been left out."""
    folder = tmp_path_factory.mktemp("site-packages")
    for name, source in SOURCES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".c").write_text(source)
        linked = [folder / library for library in LINKED.get(name, [])]
        options = [f"-Wl,-soname,{path.name}", "-Wl,-rpath,$ORIGIN/../../nvidia/cu13/lib"]
        subprocess.run(["gcc", "-shared", "-fPIC", *options, path.with_suffix(".c"), *linked, "-o", path], check=True)
        path.with_suffix(".c").unlink()
    for unused in ("torch/include/torch.h", "nvidia/cu13/include/cublas.h", "torch/bin/ptxas"):
        (folder / unused).parent.mkdir(parents=True, exist_ok=True)
        (folder / unused).touch()
    shutil.copy(folder / "nvidia/cu13/lib/libcudart.so.13", folder / "cudart")
    leave_out_cuda.main(folder)
    return folder


def call(site: Path, expression: str) -> subprocess.CompletedProcess[str]:
    """With every symbol resolved when the library is loaded, as Python loads its own modules."""
    code = f"import ctypes, os; torch = ctypes.CDLL({str(site / 'torch/lib/libtorch.so')!r}, mode=os.RTLD_NOW); print({expression})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_torch_loads_and_computes_and_finds_no_gpu(site: Path) -> None:
    assert call(site, "torch.add(2, 3), torch.devices()").stdout == "5 0\n"
    assert (site / "nvidia/cu13/lib/libcudart.so.13").read_bytes() == (site / "cudart").read_bytes()


def test_a_call_into_what_was_left_out_ends_with_its_name_and_the_cure(site: Path) -> None:
    done = call(site, "torch.multiply_on_gpu()")
    assert done.returncode == -6
    assert done.stderr == "gantline: cublasCreate of CUDA was called, and this image is for CPUs: use the one made for GPUs\n"


def test_what_nothing_is_linked_with_is_gone(site: Path) -> None:
    files = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert files == {"cudart", "torch/lib/libtorch.so", "nvidia/cu13/lib/libcublas.so.13", "nvidia/cu13/lib/libcudart.so.13"}
