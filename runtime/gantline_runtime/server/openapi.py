"""The OpenAPI 3.1 document of this server, made from the routes and the models that requests are checked with; and the same as a page.

The page is plain HTML without scripts or anything from elsewhere, so it works wherever the server is reached, also without the internet.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from gantline_runtime.server.access import OPEN_PATHS

if TYPE_CHECKING:
    from gantline_runtime.server.routes import Endpoint

__all__ = ["build_document", "build_page"]

_REFERENCE = "#/components/schemas/{model}"
_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"enum": ["authentication_error", "invalid_request_error", "rate_limit_error", "server_error"]},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_STATUSES = {
    "400": "The request is at fault; `param` names the field.",
    "401": "The server asks for an API key, and this is none of its own.",
    "403": "This API key is not an internal one.",
    "404": "There is no such model, or no such path.",
    "405": "The path takes another method.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large.",
    "415": "The body's type is not application/json.",
    "429": "The queue is full; Retry-After tells when to ask again.",
    "500": "The engine gave up this request, or the server failed.",
    "503": "No requests are taken now; Retry-After tells when to ask again.",
    "504": "The answer was not complete within the time that it was allowed to take.",
}
_WITH_BODY = frozenset({"400", "408", "413", "415", "429", "504"})
_EVENTS = "Events whose data are objects of JSON, the last of all `[DONE]` (but for responses, whose events have names)."


def build_document(routes: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The document as plain data."""
    bodies = {route.body for route in routes}
    models = list(dict.fromkeys(model for route in routes for model in (route.body, route.answer) if model is not None))
    references, definitions = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
    schemas = _take_nulls(definitions["$defs"], [references[body, "validation"] for body in bodies if body is not None])
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        body, answer = (None if model is None else references[model, "validation"] for model in (route.body, route.answer))
        paths.setdefault(route.name, {})[route.method.lower()] = _operation(route, body, answer)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Gantline",
            "version": version,
            "description": "A model, served as OpenAI's clients expect it. A null field counts as left out; unknown fields are refused.",
        },
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Error": _ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "Where the server has `--api-keys`."}},
        },
    }


def _operation(route: Endpoint, body: Any, answer: Any) -> dict[str, Any]:
    plain = {"type": "object" if route.media_type == "application/json" else "string"}
    content: dict[str, Any] = {route.media_type: {"schema": answer or plain}}
    if route.streams:
        content["text/event-stream"] = {"schema": {"description": _EVENTS}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status, text in _STATUSES.items():
        if (status == "401" and route.path in OPEN_PATHS) or (status == "403" and not route.path.startswith("/internal/")):
            continue
        if route.body is not None or status not in _WITH_BODY:
            responses[status] = {"description": text, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {"summary": route.summary, "operationId": route.handler.__name__, "responses": responses}
    if route.path not in OPEN_PATHS:
        operation["security"] = [{"key": []}, {}]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    parameters = re.findall(r"{(\w+)}", route.name)
    described = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters]
    described += [{"name": name, "in": "query", "description": text, "schema": {"type": "string"}} for name, text in route.query.items()]
    if described:
        operation["parameters"] = described
    return operation


def _take_nulls(schemas: dict[str, Any], bodies: Sequence[Any]) -> dict[str, Any]:
    """All schemas; in those that `bodies` and their members refer to, null is taken as the server takes it."""
    names: set[str] = set()
    found = {name for body in bodies for name in _references(body)}
    while found - names:
        names |= found
        found = {other for name in names for other in _references(schemas[name])}
    return {name: _take_null(schema) if name in names else schema for name, schema in schemas.items()}


def _references(schema: Any) -> set[str]:
    """Names of the schemas that `schema` refers to."""
    if isinstance(schema, dict):
        own = {schema["$ref"].rsplit("/", 1)[1]} if isinstance(schema.get("$ref"), str) else set()
        return own.union(*map(_references, schema.values()))
    return set().union(*map(_references, schema)) if isinstance(schema, list) else set()


def _take_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of a body whose members may all be null, which counts as left out (`protocol.Body`). Required ones stay required."""
    required = schema.get("required", ())
    properties = {
        name: member if name in required or _takes_null(member) else {"anyOf": [member, {"type": "null"}]}
        for name, member in schema.get("properties", {}).items()
    }
    return {**schema, "properties": properties} if properties else schema


def _takes_null(member: dict[str, Any]) -> bool:
    return any(option.get("type") == "null" for option in member.get("anyOf", ()))


# ---- the page

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1b1f;background:#fff}"
    "code{font:14px ui-monospace,monospace;background:#f3f3f5;padding:.1em .3em;border-radius:3px}"
    "table{border-collapse:collapse;width:100%;margin:.5rem 0 1rem}td,th{border-bottom:1px solid #ddd;padding:.3rem .5rem;text-align:left;"
    "vertical-align:top}summary{cursor:pointer;padding:.4rem 0}b{font-weight:600}"
    "@media(prefers-color-scheme:dark){body{color:#e4e4e8;background:#1b1b1f}code{background:#2b2b31}td,th{border-color:#444}}"
)


def build_page(document: dict[str, Any]) -> str:
    """The document as one page of HTML."""
    schemas = document["components"]["schemas"]
    parts = [_endpoint(method, path, operation) for path, item in document["paths"].items() for method, operation in item.items()]
    parts.append("<h2>Bodies and answers</h2>")
    parts += [_model(name, schema) for name, schema in schemas.items() if schema.get("properties")]
    info = document["info"]
    title = f"{_text(info['title'])} {_text(info['version'])}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1><p>{_text(info['description'])}</p>"
        f'<p>The same for programs: <a href="openapi.json"><code>/openapi.json</code></a>.</p>{"".join(parts)}</body></html>'
    )


def _endpoint(method: str, path: str, operation: dict[str, Any]) -> str:
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    rows = [("body", _kind(body))] if body is not None else []
    answers = operation["responses"]["200"]["content"]
    rows += [("answer", ", or ".join(_answer(kind, content["schema"]) for kind, content in answers.items()))]
    rows += [(_text(status), _text(answer["description"])) for status, answer in operation["responses"].items() if status != "200"]
    table = "".join(f"<tr><td>{name}</td><td>{text}</td></tr>" for name, text in rows)
    heading = f"<b>{method.upper()}</b> <code>{_text(path)}</code> {_text(operation['summary'])}"
    return f"<details><summary>{heading}</summary><table>{table}</table></details>"


def _answer(kind: str, schema: dict[str, Any]) -> str:
    return _kind(schema) if "$ref" in schema else f"<code>{_text(kind)}</code>"


def _model(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        f"<tr><td><code>{_text(field)}</code></td><td>{_kind(member)}</td>"
        f"<td>{'required' if field in required else _default(member)}</td></tr>"
        for field, member in schema["properties"].items()
    ]
    intro = _text(schema.get("description", "").split("\n\n")[0])
    header = "<tr><th>field</th><th>value</th><th>default</th></tr>"
    return f'<h3 id="{_text(name)}">{_text(name)}</h3><p>{intro}</p><table>{header}{"".join(rows)}</table>'


def _default(member: dict[str, Any]) -> str:
    value = member.get("default", next((option["default"] for option in member.get("anyOf", ()) if "default" in option), None))
    return "" if value is None else f"<code>{_text(value)}</code>"


def _kind(schema: dict[str, Any]) -> str:
    """A schema in few words, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f'<a href="#{_text(name)}">{_text(name)}</a>'
    options = [option for option in schema.get("anyOf", ()) if option.get("type") != "null"]
    if options:
        return " or ".join(dict.fromkeys(_kind(option) for option in options))
    for key in ("enum", "const"):
        if key in schema:
            values = schema[key] if key == "enum" else [schema[key]]
            return ", ".join(f"<code>{_text(value)}</code>" for value in values)
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}{_bounds(schema, 'minItems', 'maxItems')}"
    name = schema.get("type", "anything")
    return _text(name) + _bounds(schema, "minimum", "maximum") + _bounds(schema, "minLength", "maxLength")


def _bounds(schema: dict[str, Any], low: str, high: str) -> str:
    if low not in schema and high not in schema:
        return ""
    return f" ({_text(schema.get(low, ''))} to {_text(schema.get(high, ''))})"


def _text(value: object) -> str:
    return html.escape(str(value))
