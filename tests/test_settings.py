"""Settings of the operator and of the gateway: complete, checked, documented, and no name means one thing here and another there."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from gantline_gateway import main as gateway_main
from gantline_gateway import settings as gateway
from gantline_gateway.settings import GatewaySettings
from gantline_operator import main as operator_main
from gantline_operator import settings as operator
from gantline_operator.settings import OperatorSettings
from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Program:
    name: str
    prefix: str
    settings: Any
    """Its dataclass."""
    read: Callable[[Mapping[str, str], Sequence[str]], Any]
    documented: Callable[[], list[tuple[str, str, str, str]]]
    document: Path
    main: Callable[[list[str]], int]
    misspelt: str


OPERATOR = Program(
    "operator", operator.PREFIX, OperatorSettings, operator.from_environment, operator.documented_settings, DOCS / "operations.md",
    operator_main.main, "GANTLINE_WORKRES",
)  # fmt: skip
GATEWAY = Program(
    "gateway", gateway.PREFIX, GatewaySettings, gateway.from_environment, gateway.documented_settings, DOCS / "gateway.md",
    gateway_main.main, "GANTLINE_GATEWAY_HOLD_TIMEOT",
)  # fmt: skip
PROGRAMS = pytest.mark.parametrize("program", [OPERATOR, GATEWAY], ids=lambda program: program.name)


@pytest.mark.parametrize(
    ("program", "environment", "arguments", "expected"),
    [
        (
            OPERATOR,
            {"GANTLINE_WATCH_NAMESPACES": "a, b", "GANTLINE_WORKERS": "3", "GANTLINE_IMAGE_CUDA": "r/i:1", "PATH": "/bin"},
            ["--workers=5"],
            {"watch_namespaces": ("a", "b"), "workers": 5, "image_cuda": "r/i:1"},
        ),
        (
            GATEWAY,
            {"GANTLINE_GATEWAY_HOLD_TIMEOUT": "60", "GANTLINE_GATEWAY_PORT": "9", "PATH": "/bin", "GANTLINE_WORKERS": "3"},
            ["--port=80", "--services=a.yaml", "--watch-namespaces=a,b"],
            {"hold_timeout": 60.0, "port": 80, "services": Path("a.yaml"), "watch_namespaces": ("a", "b")},
        ),
    ],
)
def test_variables_and_flags_are_read_and_a_flag_wins(
    program: Program, environment: dict[str, str], arguments: list[str], expected: dict[str, object]
) -> None:
    assert program.read(environment, arguments) == program.settings(**expected)


def test_images_are_those_that_are_set() -> None:
    assert OperatorSettings(image_cuda="r/i:1").images == {"cuda": "r/i:1"}


@pytest.mark.parametrize(
    ("program", "environment", "words"),
    [
        (OPERATOR, {"GANTLINE_WATCH_NAMESPACE": "a"}, "unknown setting GANTLINE_WATCH_NAMESPACE"),
        (OPERATOR, {"GANTLINE_WORKERS": "many"}, "GANTLINE_WORKERS"),
        (OPERATOR, {"GANTLINE_WORKERS": "0"}, "from 1 to 64"),
        (OPERATOR, {"GANTLINE_WATCH_NAMESPACES": "a,B"}, "'B' is not a namespace's name"),
        (OPERATOR, {"GANTLINE_IMAGE_PULL_POLICY": "Sometimes"}, "expected one of"),
        (OPERATOR, {"GANTLINE_LOG_LEVEL": "loud"}, "expected one of"),
        (OPERATOR, {"GANTLINE_LEASE": "gantline"}, "expected namespace/name"),
        (GATEWAY, {"GANTLINE_GATEWAY_HOLD_TIMEOT": "5"}, "unknown setting GANTLINE_GATEWAY_HOLD_TIMEOT"),
        (GATEWAY, {"GANTLINE_GATEWAY_HOLD_TIMEOUT": "long"}, "GANTLINE_GATEWAY_HOLD_TIMEOUT is 'long'"),
        (GATEWAY, {"GANTLINE_GATEWAY_HOLD_TIMEOUT": "nan"}, "expected 0 to 86400 seconds"),
        (GATEWAY, {"GANTLINE_GATEWAY_PORT": "70000"}, "from 0 to 65535"),
        (GATEWAY, {"GANTLINE_GATEWAY_LOG_FORMAT": "xml"}, "expected one of auto, json, text"),
    ],
)
def test_what_is_wrong_is_refused_by_name(program: Program, environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        program.read(environment, [])
    assert caught.value.cure


@PROGRAMS
def test_a_wrong_setting_ends_the_process_with_a_message(
    program: Program, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(log))
    monkeypatch.setenv(program.misspelt, "3")
    assert program.main([]) == 64
    assert program.misspelt in capsys.readouterr().err
    message = termination.parse(log.read_text())
    assert message is not None
    assert message.reason is termination.Reason.INVALID_CONFIGURATION


@PROGRAMS
def test_every_setting_is_documented_as_it_is(program: Program) -> None:
    table = program.document.read_text().split("<!-- settings")[1].split("<!-- end of settings -->")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert rows == [list(row) for row in program.documented()]


def test_one_name_means_one_thing() -> None:
    """The gateway's variables begin with the operator's prefix, so none of the operator's may begin with the gateway's."""
    ours = [operator.PREFIX + item.name.upper() for item in fields(OperatorSettings)]
    assert [name for name in ours if name.startswith(gateway.PREFIX)] == []
