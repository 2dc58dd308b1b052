"""The operator's settings: complete, checked, documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gantline_operator.conditions import EventReason, Reason
from gantline_operator.main import main
from gantline_operator.settings import OperatorSettings, documented_settings, from_environment
from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError

OPERATIONS = (Path(__file__).parents[2] / "docs/operations.md").read_text()


def test_variables_and_flags_are_read_and_a_flag_wins() -> None:
    environment = {"GANTLINE_WATCH_NAMESPACES": "a, b", "GANTLINE_WORKERS": "3", "GANTLINE_IMAGE_CUDA": "r/i:1", "PATH": "/bin"}
    settings = from_environment(environment, ["--workers=5"])
    assert settings == OperatorSettings(watch_namespaces=("a", "b"), workers=5, image_cuda="r/i:1")
    assert settings.images == {"cuda": "r/i:1"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GANTLINE_WATCH_NAMESPACE": "a"}, "unknown setting GANTLINE_WATCH_NAMESPACE"),
        ({"GANTLINE_WORKERS": "many"}, "GANTLINE_WORKERS"),
        ({"GANTLINE_WORKERS": "0"}, "from 1 to 64"),
        ({"GANTLINE_WATCH_NAMESPACES": "a,B"}, "'B' is not a namespace's name"),
        ({"GANTLINE_IMAGE_PULL_POLICY": "Sometimes"}, "expected one of"),
        ({"GANTLINE_LOG_LEVEL": "loud"}, "expected one of"),
        ({"GANTLINE_LEASE": "gantline"}, "expected namespace/name"),
    ],
)
def test_what_is_wrong_is_refused_by_name(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        from_environment(environment)
    assert caught.value.cure


def test_a_wrong_setting_ends_the_process_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(log))
    monkeypatch.setenv("GANTLINE_WORKRES", "3")
    assert main([]) == 64
    assert "GANTLINE_WORKRES" in capsys.readouterr().err
    message = termination.parse(log.read_text())
    assert message is not None
    assert message.reason is termination.Reason.INVALID_CONFIGURATION


def test_every_setting_is_documented_as_it_is() -> None:
    table = OPERATIONS.split("<!-- settings")[1].split("<!-- end of settings -->")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert rows == [list(row) for row in documented_settings()]


def test_every_reason_and_event_has_its_line() -> None:
    rows = [line for line in OPERATIONS.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert {reason.value for reason in Reason} <= named
    events = OPERATIONS.split("## Events")[1].split("##")[0]
    assert {reason.value for reason in EventReason} <= set(re.findall(r"`(\w+)`", events))


def test_reasons_of_containers_are_reasons_of_conditions() -> None:
    peaceful = {termination.Reason.COMPLETED, termination.Reason.DRAINED}
    assert {reason.value for reason in termination.Reason if reason not in peaceful} <= {reason.value for reason in Reason}
