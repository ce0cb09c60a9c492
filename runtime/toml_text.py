"""Values as TOML spells them: the standard library reads TOML and does not write it."""

from __future__ import annotations

import json


def toml_value(value: str | float | bool) -> str:
    """Return a string, number or truth value as TOML.

    A JSON string is a TOML string, but for surrogates, which TOML does not know, and DEL, which it wants escaped.
    """
    if isinstance(value, float):
        return repr(value)  # infinity is inf, other than in JSON
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
