"""The habits of the house, held by tests: layout, imports, pins, entry points."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE_ROOTS = {
    "operator": {"gantline_operator"},
    "runtime": {"gantline_runtime", "gantline_gateway"},
    "kernels": {"gantline_kernels"},
    "quant": {"gantline_quant"},
    "devcluster": {"gantline_devcluster"},
}
"""The packages of each."""


@pytest.mark.parametrize("name", SOURCE_ROOTS)
def test_a_source_root_is_never_a_package(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()
    assert {p.name for p in (ROOT / name).iterdir() if (p / "__init__.py").exists()} == SOURCE_ROOTS[name]


def test_no_top_level_folder_shadows_the_standard_library() -> None:
    code = "import operator, collections; assert operator.add(1, 2) == 3; assert 'lib' in operator.__file__, operator.__file__"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, check=True)
    packages = {p.name for p in ROOT.iterdir() if (p / "__init__.py").exists()}
    assert not packages & set(sys.stdlib_module_names)


def test_every_pin_is_a_plain_name_and_version() -> None:
    for file in (ROOT / "requirements").glob("*.txt"):
        for line in file.read_text().splitlines():
            assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*(\[[a-z0-9,]+\])?==[A-Za-z0-9.+!]+( ; .+)?", line), f"{file.name}: {line}"


def test_the_operator_and_the_runtime_are_pinned_to_the_same_set_as_development() -> None:
    everything = set((ROOT / "requirements/all.txt").read_text().splitlines())
    for part in ("operator", "runtime"):
        missing = set((ROOT / f"requirements/{part}.txt").read_text().splitlines()) - everything
        assert not missing, f"{part}: {sorted(missing)}"


def test_the_operator_carries_no_torch() -> None:
    names = {line.split("==")[0] for line in (ROOT / "requirements/operator.txt").read_text().splitlines()}
    assert not names & {"torch", "triton", "transformers", "numpy"}


@pytest.mark.parametrize("package", ["gantline_operator", "gantline_gateway"])
def test_the_operators_image_imports_without_torch_transformers_or_numpy(package: str) -> None:
    code = (
        f"import sys, pkgutil, importlib, {package}\n"
        f"for m in pkgutil.walk_packages({package}.__path__, '{package}.'): importlib.import_module(m.name)\n"
        "bad = {'torch', 'triton', 'transformers', 'numpy', 'zmq', 'gantline_kernels'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_make_targets_that_documents_name_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.M))
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    named = {t for d in documents for t in re.findall(r"`make ([a-z0-9-]+)", d.read_text())}
    assert named <= targets, sorted(named - targets)


def test_ci_calls_the_target_that_the_readme_names() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text()


def test_every_entry_point_can_be_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["scripts"].values():
        module, function = target.split(":")
        subprocess.run([sys.executable, "-c", f"from {module} import {function}"], cwd=ROOT, check=True)


NAMES = ("pypi" + ".org", "files.python" + "hosted", "proxy.gol" + "ang", "registry." + "npmjs", "deb.deb" + "ian", "/work" + "/main")
TEXTS = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ""}


def test_no_file_of_the_project_names_a_registry_or_a_machine() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    texts = {name: _text(ROOT / name) for name in files if Path(name).suffix in TEXTS}
    assert not [name for name, text in texts.items() if any(host in text for host in NAMES)]


def test_the_list_of_modules_is_made_from_their_docstrings() -> None:
    subprocess.run([sys.executable, "scripts/module_lines.py", "--check"], cwd=ROOT, check=True)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (UnicodeDecodeError, FileNotFoundError):
        return ""
