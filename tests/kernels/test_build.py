"""The CUDA kernels compile, where a compiler is there, and export what `library.py` binds."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gantline_kernels import build, library

_FAT_MAGIC, _INTERMEDIATE, _MACHINE = 0xBA55ED50, 1, 2


@pytest.fixture(scope="module")
def built() -> Path:
    if build.find_nvcc() is None and not build.library_path().exists():
        pytest.skip("no nvcc: make kernels fetches one")
    assert build.main([]) == 0
    return build.library_path()


def test_the_library_exports_every_bound_function_and_is_taken_wherever_it_lies(
    built: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = shutil.copy(built, tmp_path)
    monkeypatch.setenv(library.VARIABLE, moved)
    bound = library.load.__wrapped__()
    assert bound is not None and bound._name == moved
    assert 15e6 < bound.gantline_sample_long_scratch(256, 128256) < 16e6 < bound.gantline_sample_long_scratch(256, 524288) < 19e6


def test_kernels_for_any_gpu_are_machine_code_of_8_0_and_9_0_and_what_newer_gpus_compile(built: Path) -> None:
    general = [path for path in build._SOURCES.glob("*.cu") if not path.stem.endswith("_hopper")]
    others = [code for code in fat_binaries(built.read_bytes()) if code != {(_MACHINE, 80), (_MACHINE, 90), (_INTERMEDIATE, 80)}]
    assert general and len(list(fat_binaries(built.read_bytes()))) - len(others) == len(general)
    assert all(code == {(_MACHINE, 90)} for code in others)


def fat_binaries(data: bytes) -> Iterator[set[tuple[int, int]]]:
    """Of each that `nvcc` has linked into a file (its layout: `fatbinary_section.h` and what `cuobjdump` prints): kinds of code, and for
    which architecture."""
    at = data.find(struct.pack("<I", _FAT_MAGIC))
    while at >= 0:
        _, _, header_size, size = struct.unpack_from("<IHHQ", data, at)
        begin, end, found = at + header_size, at + header_size + size, set()
        while begin < end:
            kind, _, entry_header, entry_size = struct.unpack_from("<HHIQ", data, begin)
            (architecture,) = struct.unpack_from("<I", data, begin + 28)
            found.add((kind, architecture))
            begin += entry_header + entry_size
        yield found
        at = data.find(struct.pack("<I", _FAT_MAGIC), end)


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
