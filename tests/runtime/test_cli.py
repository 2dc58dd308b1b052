"""The command line: help that a person can use, one line for an error, exit codes and last words for Kubernetes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gantline_kernels import api, library
from gantline_runtime import cli, logs, termination
from gantline_runtime.commands import check_env
from gantline_runtime.commands.display import LoadingDisplay
from gantline_runtime.config import EngineConfig, ServerConfig
from gantline_runtime.errors import CheckpointError
from gantline_runtime.foreign_flags import FOREIGN_FLAGS
from gantline_runtime.termination import Reason

from tests.runtime.server_fakes import write_model


@pytest.fixture
def last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "termination"
    monkeypatch.setenv("GANTLINE_TERMINATION_LOG", str(path))
    return path


@pytest.fixture
def root_log() -> Iterator[None]:
    """Puts the process's logging back as it was."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def _command(monkeypatch: pytest.MonkeyPatch, error: BaseException | None) -> None:
    module = types.ModuleType("tests_command", "Does a thing.\n\nMore.")

    def run(args: Any) -> int:
        if error is not None:
            raise error
        return 7

    vars(module).update(add_arguments=lambda parser: parser.add_argument("--speed", type=int, default=1), run=run)
    monkeypatch.setitem(sys.modules, "tests_command", module)
    monkeypatch.setitem(cli.COMMANDS, "thing", ("tests_command", "does a thing"))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text and summary in text for name, (_, summary) in cli.COMMANDS.items())


def test_without_a_command_the_overview_is_shown_and_the_exit_code_says_that_nothing_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 64
    assert "usage: gantline COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_has_a_help_that_says_what_it_does_and_describes_each_flag(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec(cli.COMMANDS[name][0]) is None:
        pytest.skip(f"{cli.COMMANDS[name][0]} is not here")
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: gantline {name}") and len(text.split("\n\n")[1]) > 20


def test_a_command_gets_its_flags_and_its_exit_code_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    _command(monkeypatch, None)
    assert cli.main(["thing", "--speed", "3"]) == 7


@pytest.mark.parametrize("arguments", [["nothing"], ["thing", "--spee=3"], ["thing", "--speed=fast"], ["thing", "extra"], ["serve"]])
def test_a_bad_command_line_is_one_line_and_a_reason(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last_word: Path
) -> None:
    _command(monkeypatch, None)
    assert cli.main(arguments) == 64
    assert capsys.readouterr().err.startswith("gantline: ")
    message = termination.parse(last_word.read_text())
    assert message is not None and message.reason is Reason.INVALID_CONFIGURATION and message.cure


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        (["--tensor-parallel-size", "2"], "For --tensor-parallel-size of other engines give --tp."),
        (["--session-len=9", "--gpu_memory_utilization=0.9"], "give --cache-max-entry-count, a share"),
        (["--enable-lora"], "give nothing: adapters"),
        (["--gpu-memory"], "See `gantline serve --help`."),
    ],
)
def test_flags_of_other_engines_are_told_what_they_are_called_here(
    flags: list[str], cure: str, capsys: pytest.CaptureFixture[str], last_word: Path
) -> None:
    assert cli.main(["serve", "model", *flags]) == 64
    assert cure in capsys.readouterr().err


def test_what_flags_of_other_engines_are_called_here_is_a_flag() -> None:
    ours = {item.name for cls in (EngineConfig, ServerConfig) for item in dataclasses.fields(cls)}
    named = {flag for text in FOREIGN_FLAGS.values() for flag in re.findall("--([a-z-]+)", text)}
    assert {name.removeprefix("no-").replace("-", "_") for name in named} <= ours
    assert not ours & {flag.removeprefix("--").replace("-", "_") for flag in FOREIGN_FLAGS}


@pytest.mark.parametrize(
    "flags", [["--tp=3"], ["--cache-max-entry-count=2"], ["--port=high"], ["--step-timeout=nan"], ["--backend=fast"], ["--block-size=17"]]
)
def test_a_bad_setting_of_the_server_is_refused_before_anything_starts(flags: list[str], tmp_path: Path, last_word: Path) -> None:
    assert cli.main(["serve", str(tmp_path), *flags]) == 64
    assert json.loads(last_word.read_text())["reason"] == "InvalidConfiguration"


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (CheckpointError("the file is broken", cure="Copy it again."), 65, "InvalidCheckpoint"),
        (RuntimeError("CUDA error: device-side assert triggered"), 70, "CudaError"),
        (ZeroDivisionError("oops"), 70, "InternalError"),
    ],
)
def test_an_error_is_one_line_an_exit_code_and_a_termination_message(
    error: Exception, code: int, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], last_word: Path
) -> None:
    _command(monkeypatch, error)
    assert cli.main(["thing"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("gantline: ") and str(error) in lines[-1]
    assert (len(lines) == 1) == isinstance(error, CheckpointError), "only a defect of ours comes with a traceback"
    assert json.loads(last_word.read_text())["reason"] == reason


def test_an_interrupt_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _command(monkeypatch, KeyboardInterrupt())
    assert cli.main(["thing"]) == 130 and capsys.readouterr().err == ""


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _command(monkeypatch, None)
    monkeypatch.setitem(sys.modules, "tests_command", None)

    def missing(path: str) -> Any:
        raise ModuleNotFoundError("no", name="zmq")

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert cli.main(["thing"]) == 64
    assert "zmq" in capsys.readouterr().err


def test_the_command_line_starts_without_loading_torch_or_a_server() -> None:
    code = (
        "import sys; from gantline_runtime import cli; cli.main(['--version']); assert not {'torch', 'starlette', 'zmq'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("gantline ")


def test_the_api_process_never_loads_torch() -> None:
    code = "import sys, gantline_runtime.commands.serve; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- generate


def test_generate_refuses_what_it_can_before_loading_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str], root_log: None) -> None:
    model = write_model(tmp_path / "m", template="{{ raise_exception('no chats') }}")
    for arguments, cause in (
        (["Hello"], "no chats"),
        (["Hello", "--max-tokens=0"], "max_new_tokens is 0"),
        (["Hello", "--temperature=3"], "temperature is 3.0"),
        (["\udcff"], "not UTF-8"),
        (["Hello", "--raw", "--system=x"], "--system needs a chat template"),
        (["Hello", "--top-p=nan"], "top_p is nan"),
    ):
        assert cli.main(["generate", str(model), *arguments]) in (64, 65)
        assert cause in capsys.readouterr().err


# ---- check-env


def test_check_env_says_what_works_here_and_fails_if_something_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["check-env", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] and found["torch"]["status"] == "ok" and {"python", "memory", "triton", "cuda"} <= found.keys()
    monkeypatch.setattr(check_env, "_PACKAGES", ("no-such-package",))
    assert cli.main(["check-env"]) == 1
    text = capsys.readouterr().out
    assert "! no-such-package" in text and "1 problems" in text


@pytest.mark.parametrize(("named", "said"), [("", "not built"), ("/moved.so", "not at /moved.so, where GANTLINE_KERNELS_LIBRARY says")])
def test_check_env_says_on_a_gpu_that_tritons_kernels_serve_alone(named: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_env, "_try_backend", lambda *_: "")
    monkeypatch.setattr(api, "select", lambda *_: "cuda")
    monkeypatch.setenv(library.VARIABLE, named)
    monkeypatch.setattr(library.build, "library_path", lambda: Path("/nowhere"))
    gpu = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: True))
    (found,) = (finding for finding in check_env._backends(gpu) if finding.name == "cuda library")
    assert found.status == "note" and found.value.startswith(f"{said}, so Triton's kernels serve alone: run python")


# ---- what a person sees


def test_loading_is_logged_in_tenths_where_nobody_watches(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gantline.load")
    with LoadingDisplay(bar=False) as display:
        for done in range(1001):
            display.show(types.SimpleNamespace(phase="weights", done=done, total=1000))
        display.show(types.SimpleNamespace(phase="cache", done=0, total=0))
    assert 10 <= len(caplog.records) <= 12


def test_loading_draws_a_bar_for_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadingDisplay(bar=True) as display:
        for done in (0, 512 << 20, 1 << 30):
            display.show(types.SimpleNamespace(phase="weights", done=done, total=1 << 30))
    assert "weights" in capsys.readouterr().err


def test_a_json_log_line_holds_its_fields_and_its_exception(capsys: pytest.CaptureFixture[str], root_log: None) -> None:
    logs.configure("info", "json")
    try:
        raise ValueError("x")
    except ValueError:
        logging.getLogger("a.b").exception("it\nfailed", extra=logs.fields(request_id="r", count=2))
    logging.getLogger("a").debug("unseen")
    (line,) = capsys.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["message"], record["count"]) == ("error", "a.b", "it\nfailed", 2)
    assert "ValueError: x" in record["exception"] and record["time"].endswith("Z")


def test_a_text_log_line_reads_like_one(capsys: pytest.CaptureFixture[str], root_log: None) -> None:
    logs.configure("info", "text")
    logging.getLogger("a").warning("careful", extra=logs.fields(seconds=1.5, nothing=None))
    assert capsys.readouterr().err.rstrip().endswith("warning: careful seconds=1.5")
