"""The gateway's settings: complete, checked, documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gantline_gateway.main import main
from gantline_gateway.settings import GatewaySettings, documented_settings, from_environment
from gantline_gateway.static_services import read_services
from gantline_runtime import termination
from gantline_runtime.errors import ConfigurationError

DOCUMENT = (Path(__file__).parents[2] / "docs/gateway.md").read_text()


def test_variables_and_flags_are_read_and_a_flag_wins() -> None:
    environment = {"GANTLINE_GATEWAY_HOLD_TIMEOUT": "60", "GANTLINE_GATEWAY_PORT": "9", "PATH": "/bin", "GANTLINE_WORKERS": "3"}
    settings = from_environment(environment, ["--port=80", "--services=a.yaml", "--watch-namespaces=a,b"])
    assert settings == GatewaySettings(hold_timeout=60.0, port=80, services=Path("a.yaml"), watch_namespaces=("a", "b"))


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"GANTLINE_GATEWAY_HOLD_TIMEOT": "5"}, "unknown setting GANTLINE_GATEWAY_HOLD_TIMEOT"),
        ({"GANTLINE_GATEWAY_HOLD_TIMEOUT": "long"}, "GANTLINE_GATEWAY_HOLD_TIMEOUT is 'long'"),
        ({"GANTLINE_GATEWAY_HOLD_TIMEOUT": "nan"}, "expected 0 to 86400 seconds"),
        ({"GANTLINE_GATEWAY_PORT": "70000"}, "from 0 to 65535"),
        ({"GANTLINE_GATEWAY_LOG_FORMAT": "xml"}, "expected one of auto, json, text"),
    ],
)
def test_what_is_wrong_is_refused_by_name(environment: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        from_environment(environment)
    assert caught.value.cure


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("services: [{name: a, replica: []}]", "unknown field `replica`"),
        ("services: [{name: a, replicas: [ftp://x]}]", "'ftp://x' is not an address"),
        ("services: [{name: a}, {name: a}]", "lists a service twice"),
        ("services: [", "services.yaml"),
    ],
)
def test_a_file_of_services_that_cannot_be_used_is_refused_with_the_place(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "services.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=re.escape(words)) as caught:
        read_services(tmp_path / "services.yaml")
    assert caught.value.cure


def test_a_wrong_setting_ends_the_process_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(log))
    monkeypatch.setenv("GANTLINE_GATEWAY_HOLD_TIMEOT", "3")
    assert main([]) == 64
    assert "GANTLINE_GATEWAY_HOLD_TIMEOT" in capsys.readouterr().err
    message = termination.parse(log.read_text())
    assert message is not None
    assert message.reason is termination.Reason.INVALID_CONFIGURATION


def test_every_setting_is_documented_as_it_is() -> None:
    table = DOCUMENT.split("<!-- settings")[1].split("<!-- end of settings -->")[0]
    rows = [[cell.strip().strip("`") for cell in line.strip("|\n").split("|")] for line in table.splitlines() if line.startswith("| `")]
    assert rows == [list(row) for row in documented_settings()]
