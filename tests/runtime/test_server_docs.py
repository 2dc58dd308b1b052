"""docs/server.md tells of every endpoint, field, error, setting and metric."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from gantline_runtime.server import errors, parameters
from gantline_runtime.server.app import ROUTES
from gantline_runtime.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

from tests.runtime.server_process import ROOT

TEXT = (ROOT / "docs" / "server.md").read_text()


def test_the_tables_of_settings_and_metrics_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, "scripts/server_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("method", "path"), [(method, path) for method, path, _ in ROUTES])
def test_every_endpoint_is_documented(method: str, path: str) -> None:
    assert f"`{method} {path.replace(':path', '')}`" in TEXT


def test_every_field_is_documented() -> None:
    models = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
    fields = {name for model in models for name in model.model_fields}
    tables = (parameters.UNSUPPORTED_CHAT, parameters.UNSUPPORTED_COMPLETION, parameters.UNSUPPORTED_MESSAGE)
    refused = {name for table in tables for name in table}
    missing = sorted(name for name in fields | refused | set(parameters.HARMLESS) if f"`{name}`" not in TEXT)
    assert not missing


def test_every_error_code_is_documented() -> None:
    package = ROOT / "runtime" / "gantline_runtime" / "server"
    source = "".join(path.read_text() for path in package.glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', source)) | set(errors._CODES.values())
    assert len(codes) > 15
    assert not sorted(code for code in codes - {"invalid", "queue_full_"} if f"`{code}`" not in TEXT)
