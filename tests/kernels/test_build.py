"""The CUDA kernels compile, where a compiler is there, and export what `library.py` binds."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gantline_kernels import build, library


def test_the_library_exports_every_bound_function_and_is_taken_wherever_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if build.find_nvcc() is None and not build.library_path().exists():
        pytest.skip("no nvcc: make kernels fetches one")
    assert build.main([]) == 0
    moved = shutil.copy(build.library_path(), tmp_path)
    monkeypatch.setenv(library.VARIABLE, moved)
    bound = library.load.__wrapped__()
    assert bound is not None and bound._name == moved
    assert 15e6 < bound.gantline_sample_long_scratch(256, 128256) < 16e6 < bound.gantline_sample_long_scratch(256, 524288) < 19e6


def test_the_library_is_named_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GANTLINE_CACHE", str(tmp_path))
    first = build.library_path()
    assert first.parent.parent == tmp_path
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    (tmp_path / "other.cu").write_text("int x;\n")
    build.sources_hash.cache_clear()
    try:
        assert build.library_path() != first
    finally:
        build.sources_hash.cache_clear()


def test_without_a_compiler_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GANTLINE_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.main(["--output", str(tmp_path / "x.so")]) == 1
    assert "--fetch" in capsys.readouterr().err


def test_without_the_library_a_call_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    with pytest.raises(OSError, match=r"gantline_kernels\.build"):
        library.call("gantline_prefill_hopper")


@pytest.mark.parametrize("stamp", ["", "0123456789abcdef"])
def test_a_library_of_other_sources_is_refused_with_the_cure(stamp: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its functions have the names of ours, and who knows which arguments."""
    path = _compile_stub(tmp_path, stamp)
    monkeypatch.setenv(library.VARIABLE, str(path))
    cure = f"{path} was built from other sources; build it again: python -m gantline_kernels.build --output {path}"
    with pytest.raises(OSError, match=re.escape(cure)):
        library.load.__wrapped__()


def test_what_was_built_from_other_sources_is_built_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[Path] = []
    monkeypatch.setattr(build, "build", lambda nvcc, output: built.append(output))
    monkeypatch.setattr(build, "find_nvcc", lambda given: Path("nvcc"))
    for name, stamp in (("old", "0123456789abcdef"), ("new", build.sources_hash())):
        (tmp_path / name).mkdir()
        path = _compile_stub(tmp_path / name, stamp)
        assert build.main(["--output", str(path)]) == 0
    assert built == [tmp_path / "old" / "stub.so"]


def _compile_stub(folder: Path, stamp: str) -> Path:
    source, target = folder / "stub.c", folder / "stub.so"
    lines = [f"int {name}(void) {{ return 0; }}" for name in library._SIGNATURES]
    source.write_text("\n".join([*lines, *([f'const char {build._STAMP}[] = "{stamp}";'] if stamp else [])]))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", target, source], check=True)
    return target


def test_a_library_that_is_not_where_the_environment_says_is_missed_aloud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "moved.so"))
    assert library.load.__wrapped__() is None
    assert f"{tmp_path}/moved.so, named by {library.VARIABLE}" in caplog.text
