"""The list of what a GPU must show: every step can be begun, and time that is short is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.acceptance import STEPS, Step, run_steps

ROOT = Path(__file__).parents[2]


def test_steps_that_fail_end_late_or_find_no_time_are_each_named(tmp_path: Path) -> None:
    steps = (
        Step("good", 1, "-c print('{model}')"), Step("bad", 1, "-c raise(SystemExit(3))"),
        Step("too-long", 1000, "-c pass"), Step("late", 1, "-c __import__('time').sleep(100)"),
    )  # fmt: skip
    outcomes, left = run_steps(steps, Path("m"), tmp_path / "out", 16.0)
    assert [(one.name, one.code, one.last_line) for one in outcomes] == [("good", 0, "m"), ("bad", 3, ""), ("late", None, "")]
    assert left == ["too-long"]
    assert [entry["code"] for entry in json.loads((tmp_path / "out/acceptance.json").read_text())] == [0, 3, None]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_every_step_names_a_module_and_options_that_it_has(step: Step) -> None:
    module, *options = step.command.removeprefix("-m ").split()
    if module == "pytest":
        assert (ROOT / options[-1]).is_file()
        return
    source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
    missing = [option for option in options if option.startswith("--") and f'"{option}"' not in source]
    assert not missing, f"{module} has no {missing}"


def test_every_file_with_tests_for_a_gpu_is_run_by_a_step() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text() and path != Path(__file__)]
    assert sorted(str(path.relative_to(ROOT)) for path in marked) == sorted(
        step.command.split()[-1] for step in STEPS if step.command.startswith("-m pytest ")
    )
