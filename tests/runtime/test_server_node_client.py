"""OpenAI's client for Node, unchanged, over every endpoint that it has and we offer. Skipped, with the reason, where it cannot be had."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import running

VERSION = "6.49.0"
SCRIPT = Path(__file__).with_name("openai_client.mjs")
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "gantline" / f"openai-node-{VERSION}"


def _installed_client() -> Path:
    """The folder that has the client in its node_modules; installed once, beside and then renamed."""
    if CACHE.is_dir():
        return CACHE
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    made = CACHE.with_name(f"{CACHE.name}.{os.getpid()}")
    made.mkdir(parents=True)
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--silent", "--prefix", str(made), f"openai@{VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm could not install openai@{VERSION}: {done.stderr.strip()[-200:] or done.returncode}")
        with contextlib.suppress(OSError):  # another worker was faster
            made.rename(CACHE)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return CACHE


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    client = _installed_client()
    model = write_model(tmp_path_factory.mktemp("node") / "echo", session_len=600)
    with running(model, "--drain-delay=0") as server:
        command = ["node", str(SCRIPT), str(client), f"{server.url}/v1", "echo"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_models_chats_and_completions_are_answered(found: dict[str, Any]) -> None:
    assert found["models"] == ["echo"] and found["retrieved"] == "echo"
    assert found["chat"] == found["chatStream"] == found["chatRunner"] == "Grüße, 世界 😀"
    assert found["chatStreamUsage"]["completion_tokens"] == found["chatUsage"]["completion_tokens"] == len("Grüße, 世界 😀".encode()) + 1
    assert found["completion"] == "abcabc" and found["completionStream"] == "abc"


def test_embeddings_arrive_as_numbers(found: dict[str, Any]) -> None:
    assert found["embeddings"] == [[pytest.approx(0.6), 0.0, pytest.approx(0.8), 0.0]] * 2


def test_responses_stream_their_events(found: dict[str, Any]) -> None:
    assert found["response"] == found["responseStream"] == "héllo"
    assert found["responseEvents"][:2] == ["response.created", "response.in_progress"]
    assert found["responseEvents"][-2:] == ["response.output_item.done", "response.completed"]


def test_errors_carry_status_code_and_field(found: dict[str, Any]) -> None:
    assert found["errors"] == [
        [400, "invalid_value", "messages"],
        [400, "unsupported_parameter", "store"],
        [404, "model_not_found", "model"],
    ]
