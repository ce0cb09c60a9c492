"""The lines of the GPU check's result, and the table that people read. Needs the standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One line of the result. `status` is ok, skipped or failed; only an ok line has numbers."""

    check: str
    engine: str
    size: str
    status: str
    reason: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)


COLUMNS = ["check", "engine", "size", "rows x tokens", "median ms", "texts/s", "against best torch", "result"]


def table(rows: list[Row]) -> list[list[str]]:
    """Return the rows as texts under COLUMNS. A ratio above 1: faster than the fastest torch at that shape."""
    best: dict[tuple[str, int, int], float] = {}
    for row in rows:
        if row.status == "ok" and row.check == "latency" and row.engine.startswith("torch"):
            key = (row.size, row.numbers["rows"], row.numbers["tokens"])
            best[key] = min(best.get(key, float("inf")), row.numbers["median_ms"])
    lines = []
    for row in rows:
        n, shape, ratio = row.numbers, "", ""
        if "rows" in n:
            shape = f"{n['rows']} x {n['tokens']}"
            torch_ms = best.get((row.size, n["rows"], n["tokens"]))
            if torch_ms and "median_ms" in n:
                ratio = f"{torch_ms / n['median_ms']:.2f}"
        result = f"{row.status}: {row.reason}" if row.reason else row.status
        if "min_cosine" in n:
            result += f", min cosine {n['min_cosine']:.6f} on {n['texts']} texts"
        if "build_s" in n:
            result += f", built in {n['build_s']} s, loaded in {n['load_s']} s"
        median, rate = (f"{n[k]:.3f}" if k in n else "" for k in ("median_ms", "texts_per_s"))
        lines.append([row.check, row.engine, row.size, shape, median, rate, ratio, result])
    return lines


def plain(lines: list[list[str]]) -> str:
    """Return a table for a terminal."""
    widths = [max(len(line[i]) for line in [COLUMNS, *lines]) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in [COLUMNS, *lines]
    )


def markdown(lines: list[list[str]], facts: dict[str, Any], command: str, note: str) -> str:
    """Return the same table for a page."""
    body = [COLUMNS, ["---"] * len(COLUMNS), *lines]
    where = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    cells = "\n".join(f"| {' | '.join(line)} |" for line in body)
    return f"# GPU check\n\n```\n{command}\n```\n\n{cells}\n\n- {note}\n- {where}\n"
