"""Triton kernels made beforehand, where there is no GPU: complete, found again by whoever serves, and nothing else is needed then."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gantline_kernels import prebuilt
from gantline_kernels.absent_gpu import Chip
from gantline_runtime import compilation, prebuild
from gantline_runtime.checkpoint import Checkpoint
from gantline_runtime.cli import main
from gantline_runtime.engine_messages import EngineReport
from gantline_runtime.errors import ConfigurationError
from gantline_runtime.model_runner import ModelRunner
from gantline_runtime.prebuilt_models import ModelVariant, read_variants, select_variants
from gantline_runtime.server.lifecycle import State
from gantline_runtime.server.metrics import Metrics

from tests import warm
from tests.kernels.compiled import compiled_folder

ROOT = Path(__file__).parents[2]
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "vocab_size": 1000,
    "max_position_embeddings": 128,
    "dtype": "bfloat16",
}
SERVE = """
import json, sys
from pathlib import Path
from gantline_kernels import prebuilt
from gantline_kernels.absent_gpu import absent_gpus
from gantline_runtime import prebuild
from gantline_runtime.prebuilt_models import read_variants
from triton.backends.nvidia.compiler import CUDABackend

def refuse(*arguments):
    raise AssertionError("a kernel is compiled")

if sys.argv[2] == "cannot compile":
    CUDABackend.add_stages = refuse
(variant,) = read_variants(Path(sys.argv[1]), [1])
with absent_gpus(compiles=True) as gpus:
    prebuild.run_steps(gpus, variant, 80, prebuild.random_steps(7, int(sys.argv[3])))
print(json.dumps(vars(prebuilt.counts)))
"""
KEYS = """
import sys
from pathlib import Path
from gantline_runtime import prebuild
from gantline_runtime.prebuilt_models import read_variants
(variant,) = read_variants(Path(sys.argv[1]), [1])
print(*sorted(launch.key for launch in prebuild.note_launches(variant, [80])))
"""


LIBRARIES = ("torch", "torch._dynamo", "triton")
"""Nothing of ours: what reads the environment as it is imported is what these tests are about."""


def run_python(*arguments: str, fresh: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: what was compiled stays with a process. `fresh`: not even a fork of one that has imported libraries."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "GANTLINE_TRITON"))}
    environment = inherited | {"OMP_NUM_THREADS": "1"} | environment
    if not fresh:
        return warm.run(arguments, environment, preload=LIBRARIES, timeout_s=600)
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def serve(config: Path, *, can_compile: bool = False, steps: int = 20, **environment: str) -> tuple[dict[str, int], str]:
    """Run steps drawn at random on a GPU that is not there -> (kernels by where they came from, standard error)."""
    done = run_python("-c", SERVE, str(config), "can compile" if can_compile else "cannot compile", str(steps), **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "config.json"
    file.write_text(json.dumps(SMALL))
    return file


@pytest.fixture(scope="module")
def kernels(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command makes of the small model, for compute capability 8.0. What these very modules made before is not compiled again."""
    modules = b"".join(Path(module.__file__).read_bytes() for module in (prebuild, prebuilt))
    kept = compiled_folder(f"prebuilt-{hashlib.sha256(modules).hexdigest()[:8]}")
    folder = tmp_path_factory.mktemp("kernels")
    command = ["-m", "gantline_runtime.cli", "prebuild-kernels", "--config", str(config), "--targets", "80", "--reuse", str(kept)]
    done = run_python(*command, "--out", str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"kernels in {folder}" in done.stdout
    return folder


def test_a_fresh_process_launches_what_was_made_beforehand_and_compiles_nothing(config: Path, kernels: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    kernels.rename(moved)
    try:
        moved.chmod(0o555)
        counts, errors = serve(config, GANTLINE_TRITON_KERNELS=str(moved), TRITON_CACHE_DIR="/proc/none/cache")
    finally:
        moved.chmod(0o755)
        moved.rename(kernels)
    assert counts["image"] >= 15 and counts["cache"] == counts["compiled"] == 0
    assert "cannot be written" not in errors, "nothing is to be written"


def test_what_a_folder_lacks_is_said_and_nothing_is_compiled_for_it(config: Path, kernels: Path, tmp_path: Path) -> None:
    command = ["-m", "gantline_runtime.cli", "prebuild-kernels", "--config", str(config), "--check", "--targets"]
    environment = {"GANTLINE_TRITON_KERNELS": str(kernels), "TRITON_CACHE_DIR": "/proc/none/cache", "TMPDIR": "/proc/none"}
    whole = run_python(*command, "80", **environment)
    assert (whole.returncode, whole.stdout) == (0, f"{config.parent.name}, tp 1, architecture 80: nothing is lacking\n"), whole.stderr
    gone = next(path for path in sorted(kernels.iterdir()) if list(path.glob("_decode.json")))
    gone.rename(tmp_path / "gone")
    try:
        less = run_python(*command, "80", "86", **environment)
    finally:
        (tmp_path / "gone").rename(gone)
    first, second = less.stdout.splitlines()
    assert less.returncode == 1 and first.endswith("architecture 80: lacks 1: _decode"), less.stderr
    assert int(second.split("lacks ")[1].split(":")[0]) > 15


def test_what_an_earlier_run_kept_is_copied_and_the_rest_is_compiled_and_kept(config: Path, kernels: Path, tmp_path: Path) -> None:
    kept, made = tmp_path / "kept", tmp_path / "made"
    shutil.copytree(kernels, kept)
    marked, gone, *_ = sorted(file.relative_to(kept) for file in kept.glob("*/*.cubin"))
    (kept / marked).write_bytes(b"copied")
    shutil.rmtree((kept / gone).parent)
    command = ["-m", "gantline_runtime.cli", "prebuild-kernels", "--config", str(config), "--targets", "80"]
    done = run_python(*command, "--reuse", str(kept), "--out", str(made))
    assert done.returncode == 0, done.stderr[-4000:]
    files = {file.relative_to(kernels) for file in kernels.rglob("*") if file.is_file()}
    assert {file.relative_to(made) for file in made.rglob("*") if file.is_file()} == files
    assert (made / marked).read_bytes() == b"copied"
    assert (made / gone).read_bytes() == (kept / gone).read_bytes() == (kernels / gone).read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_machine_with_a_gpu_makes_them_too(kernels: Path) -> None:
    assert len(list(kernels.glob("*/*.cubin"))) >= 15


def test_only_what_a_launch_needs_is_kept(kernels: Path) -> None:
    for folder in (path for path in kernels.iterdir() if path.is_dir()):
        assert sorted(file.suffix for file in folder.iterdir()) == [".cubin", ".json"], folder.name
    assert not list(kernels.glob(".*"))


def test_without_them_kernels_are_compiled_and_kept_where_there_is_room(config: Path, tmp_path: Path) -> None:
    """Also where Triton's folder cannot be written to, as under a read-only root."""
    environment = {"TRITON_CACHE_DIR": "/proc/none/cache", "TMPDIR": str(tmp_path)}
    first, errors = serve(config, can_compile=True, steps=1, **environment)
    assert first["compiled"] >= 5 and first["image"] == first["cache"] == 0
    assert "/proc/none/cache cannot be written to" in errors and str(tmp_path) in errors
    second, _ = serve(config, steps=1, **environment)
    assert second == {"image": 0, "cache": first["compiled"], "compiled": 0}


def test_keys_depend_neither_on_the_process_nor_on_its_folders(config: Path, kernels: Path, tmp_path: Path) -> None:
    again = run_python("-c", KEYS, str(config), fresh=True, HOME=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path), PYTHONHASHSEED="2")
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout.split() == sorted(path.name for path in kernels.iterdir() if path.is_dir())


FULL = os.environ.get("GANTLINE_FULL_MATRIX") == "1"


@pytest.mark.parametrize(("name", "tp"), [("qwen2.5-7b-awq", 2), *([("llama-3.1-8b", 1), ("mistral-7b-v0.1", 1)] if FULL else [])])
def test_batches_drawn_at_random_need_no_other_kernels(name: str, tp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the `triton` backend nor on the `cuda` backend with its library, whose own kernels are not Triton's."""
    from gantline_kernels import hopper_sampling, library

    monkeypatch.setattr(library, "load", lambda: object())
    monkeypatch.setattr(library, "call", lambda name, *arguments: None)
    monkeypatch.setattr(hopper_sampling, "_scratch_bytes", lambda rows, size: 1024)
    variant = next(variant for variant in select_variants([name.removesuffix("-awq")]) if (variant.name, variant.tp) == (name, tp))
    foreseen = {launch.key for launch in prebuild.note_launches(variant, [90])}
    for backend in ("triton", "cuda"):
        needed = prebuild.note_launches(variant, [90], prebuild.random_steps(3, 25), backend=backend)
        assert len(needed) > 15
        assert not [launch.name for launch in needed if launch.key not in foreseen], backend


@pytest.mark.parametrize(("backend", "name"), [("triton", "H100"), ("cuda", "H100"), ("cuda", "A100")])
def test_what_a_start_loads_is_all_that_batches_drawn_at_random_launch(backend: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is loaded in a step waits for the device, and all who decode with it: Triton's kernels, and the library's by what its
    functions choose from. Penalties, which are loaded by their first request, have no kernels of their own here."""
    from gantline_kernels import hopper_sampling, library
    from gantline_kernels.absent_gpu import absent_gpus

    called: set[tuple[object, ...]] = set()
    monkeypatch.setattr(library, "load", lambda: object())
    monkeypatch.setattr(library, "call", lambda name, *arguments: called.add(_library_variant(name, arguments)))
    monkeypatch.setattr(hopper_sampling, "_scratch_bytes", lambda rows, size: 1024)
    variant = next(variant for variant in select_variants(["llama-3.1-8b"]) if variant.tp == 1)
    loaded: list[int] = []
    early: set[tuple[object, ...]] = set()

    def steps(checkpoint: Checkpoint, tp: int, chips: Sequence[Chip]) -> Iterator[prebuild.Step]:
        """Those drawn at random, once everything is loaded."""
        chip = next(chip for chip in chips if chip.name == name)
        gpus.current = chip
        runners[chip].load_kernels(prebuild._limits(checkpoint), prebuild._BLOCK_SIZE)
        loaded.append(len(gpus.launches))
        early.update(called)
        yield from prebuild.random_steps(5, 60)(checkpoint, tp, [chip])

    runners: dict[Chip, ModelRunner] = {}
    make = prebuild._make_runner
    monkeypatch.setattr(prebuild, "_make_runner", lambda *args: runners.setdefault(args[2], make(*args)))
    with absent_gpus() as gpus:
        prebuild.run_steps(gpus, variant, 90 if name == "H100" else 80, steps, backend)
    assert loaded[0] > (15 if backend == "triton" else 8)
    assert not [launch.name for launch in gpus.launches[loaded[0] :]]
    assert not called - early, "of the library"
    expected = {"H100": {"gantline_prefill_hopper", "gantline_decode_hopper"}, "A100": {"gantline_linear_few_rows"}}
    assert backend == "triton" or expected[name] <= {function for function, *_ in called}


def _library_variant(name: str, arguments: tuple[object, ...]) -> tuple[object, ...]:
    """What a function of the library chooses its kernel from, beside what a model fixes."""
    at = {
        "gantline_gated_linear_hopper": 9,  # columns of a tile
        "gantline_split_linear_hopper": 9,  # parts
    }
    if name == "gantline_prefill_hopper":
        return name, bool(arguments[10])  # whether parts are joined
    if name == "gantline_linear_few_rows":
        return name, arguments[7] > 8, arguments[10]  # rows, whether it is gated
    return (name, arguments[at[name]]) if name in at else (name,)


def test_an_unknown_architecture_or_model_is_refused(config: Path) -> None:
    (variant,) = read_variants(config.parent, [1])
    with pytest.raises(ConfigurationError, match="architecture 75"):
        prebuild.note_launches(variant, [75])
    with pytest.raises(ConfigurationError, match="'llama-9'"):
        list(select_variants(["llama-9"]))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        list(read_variants(config.parent / "none.json", [1]))
    assert main(["prebuild-kernels", "--out", "/proc/none", "--models", "llama-9"]) != 0


def test_every_model_of_the_list_can_be_split_as_it_says() -> None:
    from gantline_kernels.absent_gpu import absent_gpus

    for variant in select_variants([]):
        with absent_gpus() as gpus:
            prebuild.run_steps(gpus, variant, 90, lambda checkpoint, tp, chips: [])


def test_kernels_of_another_triton_are_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "versions").write_text("Triton 3.5.0")
    with caplog.at_level(logging.WARNING):
        assert not prebuilt._fits(tmp_path) and not prebuilt._fits(tmp_path / "none")
    assert "made for Triton 3.5.0" in caplog.text and "No such file" in caplog.text
    prebuilt.write_versions(tmp_path)
    assert prebuilt._fits(tmp_path)


def test_metrics_tell_where_kernels_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gantline_kernels.prebuilt", SimpleNamespace(counts=prebuilt.Counts(image=21, compiled=2)))
    metrics = Metrics("1")
    metrics.engine(EngineReport(kernels=compilation.loaded_kernels()))
    text = metrics.render(State.READY).decode()
    assert 'gantline_triton_kernels_total{source="image"} 21.0' in text and 'gantline_triton_kernels_total{source="compiled"} 2.0' in text


def test_layers_of_both_kinds_are_run_where_a_model_has_a_window_in_some() -> None:
    mixed = {**SMALL, "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 40}
    launches = prebuild.note_launches(ModelVariant("mixed", mixed, 1), [90])
    windows = {launch.source.constants[(launch.source.fn.arg_names.index("WINDOW"),)] for launch in launches if launch.name == "_decode"}
    assert windows == {False, True}
