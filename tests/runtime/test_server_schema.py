"""The OpenAPI document says what the server does: it is valid, complete, and requests made from it never end in a 5xx.

GANTLINE_FUZZ=10000 has as many requests made from the schemas as the walk of test_server_fuzz.py.
"""

from __future__ import annotations

import html.parser
import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from gantline_runtime.server.openapi import build_document, build_page
from gantline_runtime.server.routes import ROUTES
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from tests.runtime.server_fakes import write_model
from tests.runtime.server_process import ServerProcess, running

EXAMPLES = max(8, int(os.environ.get("GANTLINE_FUZZ", "0")) // len(ROUTES))
DOCUMENT = build_document(ROUTES, "0")
CHECKED = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
schema = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    model = write_model(tmp_path_factory.mktemp("schema") / "echo", session_len=200)
    with running(model, "--drain-delay=0") as server:
        yield server


@schema.parametrize()
@settings(
    max_examples=EXAMPLES, deadline=None, phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck), database=None
)
def test_requests_made_from_the_document_are_answered_as_it_says(case: Any, server: ServerProcess) -> None:
    if isinstance(case.body, dict):
        case.body.pop("timeout", None)  # a time too short is a 504, as it says
    case.call_and_validate(base_url=server.url, checks=CHECKED)


def test_the_document_is_that_of_the_running_server_and_names_every_endpoint(server: ServerProcess) -> None:
    document = server.get("/openapi.json").json()
    assert document["paths"] == DOCUMENT["paths"] and document["openapi"] == "3.1.0"
    assert {(method.upper(), path) for path, item in document["paths"].items() for method in item} == {(r.method, r.name) for r in ROUTES}
    for route in ROUTES:
        if route.body is not None:
            assert set(document["components"]["schemas"][route.body.__name__]["properties"]) == {
                field.alias or name for name, field in route.body.model_fields.items()
            }


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href"):
                self.addresses.append(value or "")
            if name == "id":
                self.ids.add(value or "")


def test_the_page_shows_every_endpoint_and_field_and_needs_nothing_from_elsewhere(server: ServerProcess) -> None:
    response = server.get("/docs")
    assert response.headers["content-type"].startswith("text/html") and "default-src 'none'" in response.headers["content-security-policy"]
    page = _Page()
    page.feed(response.text)
    assert all(address == "openapi.json" or address[1:] in page.ids for address in page.addresses)
    assert not {"script", "link", "img", "iframe"} & set(page.tags) and "url(" not in response.text
    for route in ROUTES:
        assert route.name in response.text
        assert all(f"<code>{name}</code>" in response.text for name in (route.body.model_fields if route.body else ()))


def test_what_is_written_on_the_page_is_text() -> None:
    document = {**DOCUMENT, "info": {"title": "<script>", "version": "<b>", "description": "&"}}
    assert "<script>" not in build_page(document) and "<b>" not in build_page(document).replace("<b>GET</b>", "").replace("<b>POST</b>", "")
