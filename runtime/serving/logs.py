"""Log lines for people or for machines. Texts are never logged, and keys neither.

One line per request on the logger `f2rt.access`: id, model, protocol, status, sizes, times, fingerprint.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

access_log = logging.getLogger("f2rt.access")
_MAX_CHARS = 100


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what a record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level, logger and message, with the fields as NAME=VALUE; what is not printable is escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        return super().format(record) + "".join(f" {name}={_shown(value)}" for name, value in fields.items())


def configure(style: str) -> None:
    """Send f2rt's log to standard error as `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


def cut(text: str) -> str:
    """Return what a caller sent, short enough for a log line."""
    return text[:_MAX_CHARS]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
