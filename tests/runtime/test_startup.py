"""What a start of `gantline serve` consists of, and what it does not wait for."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gantline_runtime import reading_ahead
from gantline_runtime.child_process import became_process_at
from gantline_runtime.gpu_opening import open_gpu
from gantline_runtime.reading_ahead import ReadingAhead

from tests.runtime.server_process import REAL, ROOT, ServerProcess, running

MODEL = ROOT / "examples" / "tiny-model"
PHASES = ("launch", "import", "device", "workspace", "weights", "cache", "warm-up")
"""One after the other."""

pytestmark = pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="the tiny model is not here")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[ServerProcess, float]]:
    """A server that is ready, and the seconds that took as its parent sees them."""
    began = time.monotonic()
    with running(MODEL, "--drain-delay=0", "--device=cpu", "--num-cache-blocks=64", program=REAL, imports=True) as server:
        yield server, time.monotonic() - began


def test_the_phases_of_a_start_add_up_to_the_time_from_its_exec(server: tuple[ServerProcess, float]) -> None:
    seconds = {phase: server[0].metric("gantline_startup_seconds", phase=phase) for phase in (*PHASES, "listen", "tokenizer", "total")}
    assert min(seconds.values()) >= 0
    assert seconds["total"] <= server[1] + 0.05, "no longer than its parent waited"
    assert seconds["total"] >= 0.6 * server[1] - 0.5, "it counts from the exec, imports and all"
    assert 0.5 * seconds["total"] <= sum(seconds[phase] for phase in PHASES) <= seconds["total"] + 0.05
    assert seconds["launch"] < seconds["listen"] < seconds["total"]


def _rank_processes(parent: int) -> list[int]:
    children = [int(pid) for task in Path(f"/proc/{parent}/task").iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in children if b"gantline_runtime.rank_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_all_ranks_import_at_once_and_answer_together(server: tuple[ServerProcess, float]) -> None:
    """The second rank was started only when the first had imported."""
    question = {"prompt": "The licence", "max_tokens": 8, "temperature": 0}
    with running(MODEL, "--drain-delay=0", "--device=cpu", "--num-cache-blocks=64", "--tp=2", program=REAL) as two:
        (rank,) = _rank_processes(two.engine_pid)
        later = became_process_at(rank) - became_process_at(two.engine_pid)
        importing = two.metric("gantline_startup_seconds", phase="import")
        assert later < importing / 2, f"rank 1 started {later:.2f} s after rank 0, which imported for {importing:.2f} s"
        answers = [asked.post("/v1/completions", question).json()["choices"][0]["text"] for asked in (server[0], two)]
        assert answers[0] == answers[1]
    assert not Path(f"/proc/{rank}").exists()


NOT_BEFORE_READY = {
    "torch._dynamo": "traces; 1 s",
    "torch._inductor": "compiles what was traced",
    "torch._refs": "operators of tensors without values, which only tracing has; with the next three 0.4 s of processor time",
    "torch._prims": "as _refs",
    "torch._decomp": "as _refs",
    "torch._meta_registrations": "as _refs",
    "sympy": "tracing's sizes; 0.5 s",
    "networkx": "graphs of what is compiled",
    "transformers": "2 s; only a model without an implementation of ours needs it",
    "safetensors": "files are read by the loader",
    "scipy": "nothing needs it",
    "pandas": "nothing needs it",
    "xgrammar": "its processes compile grammars when a request has one",
    "jinja2": "templates are the API process's",
    "pydantic": "requests are judged by the API process",
    "starlette": "HTTP is the API process's",
    "uvicorn": "HTTP is the API process's",
    "fastapi": "HTTP is the API process's",
    "prometheus_client": "metrics are told by the API process",
    "huggingface_hub": "models are fetched by another command",
    "requests": "as huggingface_hub",
    "httpx": "as huggingface_hub",
}
"""What the engine's process must not import before it is ready, and why it would be a waste."""
ENGINE = """
import json, sys
from pathlib import Path
from gantline_runtime import engine_process
importing = engine_process._begin_import("gantline_runtime.engine")
importing.join()
from gantline_runtime.config import EngineConfig
from gantline_runtime.engine import LLMEngine
from gantline_runtime.messages import EngineRequest, SamplingParams
engine = LLMEngine(Path(sys.argv[1]), EngineConfig(device="cpu", num_cache_blocks=64))
for logprobs in (None, 0):
    sampling = SamplingParams(max_new_tokens=2, temperature=0.0, ignore_eos=True, num_logprobs=logprobs)
    engine.add_request(EngineRequest(request_id=f"smoke-{logprobs}", prompt_ids=[1, 2, 3], sampling=sampling))
    while engine.has_work():
        engine.step()
print(json.dumps(sorted(sys.modules)))
"""


def test_the_engine_imports_nothing_before_ready_that_it_does_not_need() -> None:
    done = subprocess.run([sys.executable, "-P", "-c", ENGINE, str(MODEL)], capture_output=True, text=True, timeout=300, check=True)
    imported = set(json.loads(done.stdout))
    assert {"torch", "gantline_runtime.executor"} <= imported
    assert {name: reason for name, reason in NOT_BEFORE_READY.items() if name in imported} == {}


def test_what_torch_was_imported_without_is_there_for_who_traces() -> None:
    program = (
        "from gantline_runtime.torch_import import complete_torch, without_tracing\n"
        "with without_tracing():\n"
        "    import torch\n"
        "print('_meta_registrations' in vars(torch), torch.ones(2).sum().item())\n"
        "complete_torch()\n"
        "from torch._subclasses.fake_tensor import FakeTensorMode\n"
        "print('_meta_registrations' in vars(torch), list(torch.linalg.svd(torch.empty(3, 4, device='meta'))[0].shape))\n"
        "with FakeTensorMode():\n"
        "    print(list(torch.nn.functional.interpolate(torch.empty(1, 1, 4), scale_factor=2).shape))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == ["False 2.0", "True [3, 3]", "[1, 1, 8]"]


def test_a_process_knows_when_it_was_started() -> None:
    before = time.monotonic()
    program = "import time; time.sleep(0.5); from gantline_runtime.child_process import became_process_at; print(became_process_at())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert before - 0.02 <= float(done.stdout) <= time.monotonic() - 0.5
    assert became_process_at() < before


DRIVER = """
#include <stdio.h>
static int note(const char *text) { printf("%s\\n", text); fflush(stdout); return 0; }
int cuInit(unsigned flags) { return note(flags ? "bad flags" : "cuInit"); }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return note(ordinal == 3 ? "cuDeviceGet" : "bad ordinal"); }
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = context;
    return note(device == 43 ? "retained" : "bad device") + RETAINED;
}
"""


@pytest.mark.parametrize("refusal", [0, 2])
def test_the_gpu_is_opened_by_the_drivers_own_calls_and_a_refusal_is_left_to_torch(refusal: int, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", f"-DRETAINED={refusal}", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True
    )
    program = (
        "import os\n"
        "from gantline_runtime.gpu_opening import begin_opening, open_gpu\n"
        "thread = begin_opening('auto', 3)\n"
        "thread.join()\n"
        "print(open_gpu(3), begin_opening('cpu'), os.environ['CUDA_MODULE_LOADING'])\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-u", "-c", program], capture_output=True, text=True, timeout=60, check=True, env=environment)
    assert done.stdout.splitlines() == [*["cuInit", "cuDeviceGet", "retained"] * 2, f"{not refusal} None LAZY"]


def test_without_a_driver_no_gpu_is_opened() -> None:
    assert open_gpu(0, "libcuda-that-is-not-there.so") is False


def _cached_share(path: Path) -> float:
    """Of a file's pages, those in the page cache."""
    with path.open("rb") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        size = path.stat().st_size
        address = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0)))
        pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        assert libc.mincore(address, ctypes.c_size_t(size), pages) == 0
        libc.munmap(address, ctypes.c_size_t(size))
    return sum(page & 1 for page in pages) / len(pages)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A folder of files that are on disk alone, and of what is no file."""
    for name in ("a.safetensors", "b.safetensors", "c.bin"):
        (tmp_path / name).write_bytes(os.urandom(24 << 20))
        with (tmp_path / name).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _cached_share(tmp_path / "a.safetensors") > 0:
        pytest.skip("a file system that lives in memory")
    os.mkfifo(tmp_path / "0.safetensors")
    return tmp_path


def test_weights_are_read_from_disk_while_the_engine_imports(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading_ahead, "_CHUNK_BYTES", 2 << 20)
    ReadingAhead(weights, most_bytes=30 << 20).join()
    assert _cached_share(weights / "a.safetensors") == 1
    assert 0.2 < _cached_share(weights / "b.safetensors") < 1
    assert _cached_share(weights / "c.bin") == 0
    read, preadv = list[int](), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *given: (read.append(len(given[1][0])), preadv(*given))[1])
    ReadingAhead(weights, most_bytes=24 << 20).join()
    assert set(read) == {1}, "what is there is not read again"
    ReadingAhead(weights).join()
    assert _cached_share(weights / "b.safetensors") == 1


@pytest.mark.parametrize("sharded", [False, True])
def test_copies_beside_what_is_loaded_are_not_read_ahead(weights: Path, sharded: bool) -> None:
    """Mistral's repositories hold all weights twice, and the other copy comes first by its name."""
    if sharded:
        placed = {"weight_map": {"model.norm.weight": "b.safetensors"}}
        (weights / "model.safetensors.index.json").write_text(json.dumps(placed))
    else:
        (weights / "b.safetensors").rename(weights / "model.safetensors")
    ReadingAhead(weights).join()
    assert _cached_share(weights / "a.safetensors") == 0
    assert _cached_share(weights / ("b.safetensors" if sharded else "model.safetensors")) == 1


def test_reading_ahead_ends_when_loading_begins_and_minds_no_file_that_cannot_be_read(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading_ahead, "_CHUNK_BYTES", 1 << 20)
    begun, go_on = threading.Event(), threading.Event()
    monkeypatch.setattr(reading_ahead, "_is_cached", lambda *_: bool(begun.set()) or not go_on.wait(60))
    ahead = ReadingAhead(weights)
    assert begun.wait(60)
    ahead.stop()
    go_on.set()
    ahead.join()
    assert _cached_share(weights / "a.safetensors") < 0.9
    ReadingAhead(weights / "absent").join()
    (weights / "1.safetensors").symlink_to("nothing")
    ReadingAhead(weights).join()
