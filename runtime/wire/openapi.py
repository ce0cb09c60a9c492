"""The HTTP API's description: an OpenAPI 3.1 document from the types that requests are decoded with, and a page of it.

The page is made here, from the document alone: it loads nothing from anywhere else.
"""

from __future__ import annotations

import html
import inspect
import json
from collections.abc import Mapping
from typing import Any

import msgspec

from runtime.bundle import Contract
from runtime.settings import Limits
from runtime.wire import openai_v1

_JSON = "application/json"


def describe(version: str, models: Mapping[str, Contract], limits: Limits, *, needs_key: bool) -> dict[str, Any]:
    """Return the OpenAPI document of a server with these models. A limit that models differ in is the widest."""
    types = (openai_v1.EmbeddingsRequest, openai_v1.EmbeddingsResponse, openai_v1.ErrorResponse)
    (request, response, error), schemas = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    for schema in schemas.values():
        schema["description"] = inspect.cleandoc(schema["description"])
    refusals = {
        status: {"description": text, "content": {_JSON: {"schema": error}}}
        for status, text in (
            ("400", "The request has to change: the message says what is wrong, the limit and the cure"),
            ("401", "No API key, or an unknown one"),
            ("404", "No such model or prompt"),
            ("408", "The body stopped coming"),
            ("413", "The body is too large"),
            ("415", "The body is not JSON, or compressed"),
            ("429", "Full: Retry-After says when to come back"),
            ("500", "The engine failed"),
            (
                "503",
                "Not ready, shutting down, or reading as many bodies as it takes: Retry-After says when to come back",
            ),
            ("504", "Not to be answered within X-Request-Timeout"),
        )
    }
    anything = {"type": "object"}

    def get(summary: str, *, open_to_all: bool = False, statuses: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        answers: dict[str, Any] = {"200": {"description": "OK", "content": {_JSON: {"schema": anything}}}}
        closed = ("401", "500") if not open_to_all else ()
        answers |= {status: refusals[status] for status in (*closed, *statuses)}
        return {"get": {"summary": summary, "responses": answers, **({"security": []} if open_to_all else {}), **more}}

    def text(summary: str, media: str) -> dict[str, Any]:
        described = get(summary)
        described["get"]["responses"]["200"]["content"] = {media: {"schema": {"type": "string"}}}
        return described

    ready = get("Whether every model gives PyTorch's vectors", open_to_all=True)
    ready["get"]["responses"]["503"] = {"description": "One does not", "content": {_JSON: {"schema": anything}}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": list(models)}}
    timeout = {
        "name": "X-Request-Timeout",
        "in": "header",
        "description": "Seconds after which the answer is worth nothing",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
    }
    told = {
        name: {"description": text, "schema": {"type": kind}}
        for name, kind, text in (
            ("X-Request-ID", "string", "The caller's id of the request, or one made for it; refusals have it, too"),
            ("X-F2rt-Fingerprint", "string", "Which engine made the vectors"),
            ("X-F2rt-Truncated", "integer", "How many texts were too long and were cut; absent when none was"),
        )
    }
    answered = {"description": "OK", "headers": told, "content": {_JSON: {"schema": response}}}
    fields = schemas["EmbeddingsRequest"]["properties"]
    contracts = models.values()
    fields["input"] = _input(
        limits,
        max(c.vocab_size for c in contracts),
        min(max(c.max_tokens for c in contracts), limits.max_request_tokens),
    )
    fields["model"] |= {"enum": [*models, "", None], "examples": list(models)}
    fields["dimensions"]["anyOf"] = [
        {"type": "integer", "minimum": 1, "maximum": max(c.dim for c in contracts)},
        {"type": "null"},
    ]
    fields["prompt_name"]["anyOf"][0]["enum"] = sorted({name for c in contracts for name in c.prompts})
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "f2rt",
            "version": version,
            "description": "Embeddings from proven engines; OpenAI's API with a few fields more.",
        },
        "paths": {
            "/v1/embeddings": {
                "post": {
                    "summary": "Embed texts or token ids",
                    "parameters": [timeout],
                    "requestBody": {"required": True, "content": {_JSON: {"schema": request}}},
                    "responses": {"200": answered, **refusals},
                }
            },
            "/v1/models": get("The models of this server"),
            "/v1/models/{name}": get("One of them", statuses=("404",), parameters=[name]),
            "/info": get("Which engines answer, from which checkpoints"),
            "/metrics": text("Prometheus metrics", "text/plain"),
            "/health/live": get("Whether the process answers", open_to_all=True),
            "/health/ready": ready,
        },
        "components": {"schemas": schemas},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _input(limits: Limits, vocab_size: int, max_tokens: int) -> dict[str, Any]:
    """Return the schema of the four forms of `input`; the decoder's own type allows mixtures, refused later."""
    text = {"type": "string", "maxLength": limits.max_text_chars}
    one = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    ids = {"type": "array", "items": one, "minItems": 1, "maxItems": max_tokens}
    many = {"type": "array", "minItems": 1, "maxItems": limits.max_items}
    return {"anyOf": [text, {**many, "items": text}, ids, {**many, "items": ids}]}


def page(document: dict[str, Any]) -> str:
    """Return the document as an HTML page."""
    info = document["info"]
    parts = [f"<h1>{_text(info['title'])} {_text(info['version'])}</h1><p>{_text(info['description'])}</p>"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(
                f"<section><h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation['summary'])}</p>"
            )
            rows = "".join(
                f"<tr><td><code>{status}</code></td><td>{_text(answer['description'])}</td></tr>"
                for status, answer in operation["responses"].items()
            )
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"][_JSON]["schema"]["$ref"].rpartition("/")[2]
                parts.append(_fields(document["components"]["schemas"][schema]))
            parts.append(f"<table>{rows}</table></section>")
    example = json.dumps({"input": ["a text", "another"], "dimensions": 128})
    parts.append(
        "<section><h2>For example</h2><pre>curl -s http://HOST:PORT/v1/embeddings -H 'content-type: application/json' "
        f"\\\n  -d '{_text(example)}'</pre>"
        "<p>The whole description: <a href='openapi.json'>openapi.json</a></p></section>"
    )
    return _PAGE.format(body="\n".join(parts))


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        needed = "required" if name in schema.get("required", ()) else "optional"
        rows.append(
            f"<tr><td><code>{_text(name)}</code></td><td>{_text(_kind(field))}</td><td>{_text(needed)}</td></tr>"
        )
    return f"<p>{_text(schema.get('description', ''))}</p><table>{''.join(rows)}</table>"


def _kind(field: dict[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(_kind(part) for part in field["anyOf"])
    if "enum" in field:
        return " or ".join(json.dumps(value) for value in field["enum"])
    if field.get("type") == "array":
        return f"list of ({_kind(field['items'])})"
    return str(field.get("type", "anything"))


def _text(value: str) -> str:
    return html.escape(value)


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>f2rt API</title><style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }}
section {{ border-top: 1px solid #8884; margin-top: 1.5rem; }}
h2 {{ font-size: 1.1rem; }} table {{ border-collapse: collapse; width: 100%; }}
td {{ padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8882; }}
pre {{ overflow-x: auto; padding: .8rem; background: #8881; }}
</style></head><body>
{body}
</body></html>
"""
