"""The CUDA kernels compile, where a compiler is there, and export what `library.py` binds."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from gantline_kernels import build, library


def test_the_library_exports_every_bound_function() -> None:
    nvcc, path = build.find_nvcc(), build.library_path()
    if not path.exists():
        if nvcc is None:
            pytest.skip("no nvcc: make kernels fetches one")
        build.build(nvcc, path)
    bound = ctypes.CDLL(str(path))
    assert all(hasattr(bound, name) for name in library._SIGNATURES)
    assert 15e6 < bound.gantline_sample_long_scratch(256, 128256) < 16e6 < bound.gantline_sample_long_scratch(256, 524288) < 19e6


def test_the_library_is_named_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GANTLINE_CACHE", str(tmp_path))
    build.library_path.cache_clear()
    try:
        first = build.library_path()
        assert first.parent.parent == tmp_path
        monkeypatch.setattr(build, "_SOURCES", tmp_path)
        (tmp_path / "other.cu").write_text("int x;\n")
        build.library_path.cache_clear()
        assert build.library_path() != first
    finally:
        build.library_path.cache_clear()


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


def test_a_library_of_other_sources_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C library is one that has none of our functions."""
    libc = next(path for path in Path("/").glob("*/*/libc.so.6"))
    monkeypatch.setenv(library.VARIABLE, str(libc))
    with pytest.raises(OSError, match=rf"{libc} has no gantline_\w+: it was built from other sources"):
        library.load.__wrapped__()


def test_a_library_that_is_not_where_the_environment_says_is_missed_aloud(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "moved.so"))
    assert library.load.__wrapped__() is None
    assert f"{tmp_path}/moved.so, named by {library.VARIABLE}" in caplog.text
