"""A file of services, for gateways without a Kubernetes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from gantline_gateway.static_services import read_services
from gantline_runtime.errors import ConfigurationError


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
