"""What JSON Schema cannot say of an embeddings request, said to schemathesis: valid requests are then accepted ones."""

from __future__ import annotations

import os
from typing import Any

import schemathesis

EOS_ID = int(os.environ["EOS_ID"])
LEAST_TIMEOUT_S = 30
NUMBERS = (int, float)


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Let token ids end with the model's EOS and come without a prompt, one source of a prompt, and time to answer."""
    timeout = (case.headers or {}).get("X-Request-Timeout")
    if timeout is not None and 0 < _number(timeout) < LEAST_TIMEOUT_S:
        case.headers["X-Request-Timeout"] = str(LEAST_TIMEOUT_S)
    body = case.body
    if not isinstance(body, dict):
        return
    given = body.get("input")
    rows = given if isinstance(given, list) else []
    if rows and all(type(item) in NUMBERS for item in rows):
        rows = [rows]
    if rows and all(isinstance(row, list) for row in rows):
        for row in rows:
            if row:
                row[-1] = EOS_ID if type(row[-1]) in NUMBERS else row[-1]
        _drop(body, "prompt", "prompt_name", "input_type")
    if body.get("input_type") is not None:
        _drop(body, "prompt", "prompt_name")
    if body.get("prompt") is not None:
        _drop(body, "prompt_name")


def _drop(body: dict[str, Any], *names: str) -> None:
    for name in names:
        if isinstance(body.get(name), str):  # another type is a mistake made on purpose, and stays
            body[name] = None


def _number(text: object) -> float:
    try:
        return float(str(text))
    except ValueError:
        return 0.0
