"""Rebuild `families.tsv`, the language family of every ISO 639-3 code that Glottolog knows.

    python -m calibration.glottolog --work DIR [--out FOLDER]

A command of its own, because the texts do not depend on it: those are rebuilt without this one download.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from calibration.families import CONSTRUCTED, ISOLATE, families_path
from calibration.pins import GLOTTOLOG, MACROLANGUAGES
from calibration.sources import fetch
from runtime.errors import F2rtError
from runtime.files import write_atomic

_HEADER: Final = """\
# Language family, then the ISO 639-3 codes of its languages. Derived from Glottolog 5.1 by Harald Hammarström,
# Robert Forkel, Martin Haspelmath and Sebastian Bank, https://glottolog.org, CC BY 4.0. Changed: only the root of
# each classification is kept, isolates are one group, entries for bookkeeping are left out, macrolanguages are added.
# Written by calibration/glottolog.py.
"""
# Glottolog's own name for what is not a family by descent, and for entries it does not believe in.
_CONSTRUCTED: Final = "Artificial Language"
_RETIRED: Final = "Bookkeeping"


def read_families(path: Path) -> dict[str, str]:
    """Code -> family, from Glottolog's `languages.csv`. Dialects and families that have a code are included."""
    with path.open(encoding="utf-8", newline="") as file:
        languoids = {row["ID"]: row for row in csv.DictReader(file)}
    families = {}
    for languoid in languoids.values():
        # A dialect of an isolate names that isolate as its family.
        root = languoids[languoid["Family_ID"] or languoid["ID"]]
        family = root["Name"] if root["Level"] == "family" else ISOLATE
        if languoid["ISO639P3code"] and family != _RETIRED:
            families[languoid["ISO639P3code"]] = CONSTRUCTED if family == _CONSTRUCTED else family
    return families | {code: families[member] for code, member in MACROLANGUAGES.items()}


def write_families(families: Mapping[str, str]) -> bytes:
    """The table as bytes: families by name, codes in order."""
    codes: dict[str, list[str]] = {}
    for code, family in sorted(families.items()):
        codes.setdefault(family, []).append(code)
    lines = (f"{family}\t{' '.join(codes[family])}\n" for family in sorted(codes))
    return (_HEADER + "".join(lines)).encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 after a message: the file missing or not the pinned one, the table not writable."""
    parser = argparse.ArgumentParser(prog="python -m calibration.glottolog", description="Rebuild the families.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloaded file")
    parser.add_argument("--out", type=Path, help="folder to write to (default: that of the committed file)")
    options = parser.parse_args(arguments)
    path: Path = (options.out or families_path().parent) / families_path().name
    try:
        families = read_families(fetch(GLOTTOLOG, options.work))
        data = write_families(families)
        write_atomic(path, data)
    except F2rtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{path}: {len(data):,} bytes, {len(families):,} codes, {len(set(families.values()))} families")
    return 0


if __name__ == "__main__":
    sys.exit(main())
