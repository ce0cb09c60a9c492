"""Two texts, and how a refusal of texts must read."""

from __future__ import annotations

from pathlib import Path

from calibration.texts import Text
from runtime.errors import InputError

A, B = Text("1", "a", "query"), Text("2", "b")


def check(error: InputError, path: Path, expected: list[str]) -> None:
    message = str(error)
    assert error.cure, message
    assert error.cure in message
    assert str(path) in message
    assert len(message) < 600
    for part in expected:
        assert part in message, message
