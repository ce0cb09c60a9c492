"""The language family of an ISO 639-3 code, after Glottolog: what reports group natural languages by.

The table is `families.tsv`, written by `calibration.glottolog`: a line per family with all its codes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

ISOLATE: Final = "Isolate"
CONSTRUCTED: Final = "Constructed"
UNKNOWN: Final = "Unknown"
NOT_A_LANGUAGE: Final = "Not a language"
"""What the codes for no, several and an undetermined language belong to."""

_SPECIAL: Final = frozenset(("mul", "und", "zxx"))


def families_path() -> Path:
    """Where the committed table lies, beside this module."""
    return Path(__file__).with_name("families.tsv")


def family_of(language: str) -> str:
    """The top-level family of a natural language, by its ISO 639-3 code: "Indo-European", "Turkic", ...

    `ISOLATE` and `CONSTRUCTED` each count as one family, `UNKNOWN` is any code that the table lacks. Names of
    programming languages do not belong here: "ada" and "cfm" are codes of natural languages too, so look at a text's
    kind first.
    """
    return NOT_A_LANGUAGE if language in _SPECIAL else _families().get(language, UNKNOWN)


@cache
def _families() -> dict[str, str]:
    return parse_families(families_path().read_text(encoding="utf-8"))


def parse_families(table: str) -> dict[str, str]:
    """Code -> family, from the text of a table. Lines that start with # are comments."""
    lines = [line.split("\t") for line in table.splitlines() if not line.startswith("#")]
    return {code: family for family, codes in lines for code in codes.split(" ")}
