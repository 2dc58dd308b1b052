"""docs/server.md tells of every endpoint, field, error, setting and metric."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from gantline_runtime.server import errors, parameters
from gantline_runtime.server.routes import ROUTES

from tests.runtime.server_process import ROOT

TEXT = (ROOT / "docs" / "server.md").read_text()


def test_the_tables_of_settings_and_metrics_are_those_of_the_code() -> None:
    done = subprocess.run([sys.executable, "scripts/server_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("method", "path"), [(route.method, route.name) for route in ROUTES])
def test_every_endpoint_is_documented(method: str, path: str) -> None:
    assert f"`{method} {path}`" in TEXT


def test_every_field_is_documented() -> None:
    fields = {name for route in ROUTES if route.body is not None for name in route.body.model_fields}
    tables = [table for name, table in vars(parameters).items() if name.startswith("UNSUPPORTED_")]
    assert len(fields) > 30 and len(tables) > 4
    refused = {name for table in tables for name in table}
    missing = sorted(name for name in fields | refused | set(parameters.HARMLESS) if f"`{name}`" not in TEXT)
    assert not missing


def test_every_error_code_is_documented() -> None:
    package = ROOT / "runtime" / "gantline_runtime" / "server"
    source = "".join(path.read_text() for path in package.glob("*.py"))
    codes = set(re.findall(r'code="([a-z_]+)"', source)) | set(errors._CODES.values())
    assert len(codes) > 15
    assert not sorted(code for code in codes - {"invalid", "deadline"} if f"`{code}`" not in TEXT)
