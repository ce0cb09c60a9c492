"""What a comparison of two bundles, or of a bundle and a server, found: as data, as JSON and on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text as Line

from export.diff import Change, shortened
from export.moves import Judgement, Moves

DIFF_SCHEMA_VERSION = 1
_SHOWN_OF_SECTION = 8
_CELL_CHARS = 120
_COLOURS = {"identical": "green", "interchangeable": "green", "re-embed": "red"}


@dataclass(frozen=True)
class Side:
    """One side: an engine of a bundle, or of a server, and why it was taken. `bundle` or `server` is empty."""

    bundle: str
    server: str
    source: str
    revision: str
    bundle_fingerprint: str
    engine: str
    engine_fingerprint: str
    precision: str
    selection: str


@dataclass(frozen=True)
class TextsUsed:
    """The texts: where from, how many were taken of how many different ones, and how many were repetitions."""

    source: str
    texts: int
    of: int
    duplicates: int
    sha256: str


@dataclass(frozen=True)
class Audit:
    """What a server did with the golden texts, and which engines answered. Each finding is a sentence.

    `in_bundle` is the bundle's engine that has the server's fingerprint, None where it has no such engine.
    """

    golden_texts: int
    golden_min_cosine: float | None
    golden_limit: float
    fingerprints: list[str]
    findings: list[str]
    in_bundle: str | None = None
    model: str = ""
    state: str = ""
    version: str = ""


@dataclass(frozen=True)
class DiffReport:
    """The whole. `verdict` is one line in words; `moved`: something moves beyond the limits, or is not what it says.

    `moves` and `judgement` are None where the texts could not be compared and the golden ones were.
    """

    schema_version: int
    verdict: str
    moved: bool
    a: Side
    b: Side
    changes: list[Change]
    texts: TextsUsed
    moves: Moves | None
    judgement: Judgement | None
    audit: Audit | None
    notes: list[str] = field(default_factory=list)


def to_json(report: DiffReport) -> bytes:
    """Return the report as indented JSON; every change with `moves_vectors` besides its fields."""
    data: dict[str, Any] = msgspec.to_builtins(report)
    for change, found in zip(data["changes"], report.changes, strict=True):
        change["moves_vectors"] = found.moves_vectors
    return msgspec.json.format(msgspec.json.encode(data), indent=2) + b"\n"


def print_report(report: DiffReport, console: Console) -> None:
    """Print what changed, how vectors moved and the verdict."""
    for name, side in (("A", report.a), ("B", report.b)):
        where = side.bundle or f"the server at {side.server}"
        what = f"{where}, {side.engine}, fingerprint {side.engine_fingerprint}"
        console.print(Line.assemble((name, "bold"), f": {what}"), soft_wrap=True)
    console.print()
    if report.changes:
        console.print(_changes(report.changes))
    else:
        told = "what the server says of itself" if report.audit else "the two manifests"
        console.print(f"no difference: {told}" + (" is what the bundle says" if report.audit else " are the same"))
    console.print()
    used = report.texts
    sample = f", taken evenly from {used.of:,}" if used.texts < used.of else ""
    twice = f"; {used.duplicates:,} repeat another with the same prompt and count once" if used.duplicates else ""
    console.print(f"{used.texts:,} texts of {used.source}{sample}{twice}", markup=False, soft_wrap=True)
    if report.moves is not None:
        console.print(_moves(report.moves, report.judgement))
        # Rounding alone moves nothing by that much: ten texts with a cosine of 1.0000000 would tell nothing.
        if any(share.texts for share in report.moves.moved):
            console.print()
            console.print(_worst(report.moves))
    if report.audit is not None:
        console.print(_golden(report.audit), markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    for reason in _reasons(report):
        console.print(f"beyond the limit: {reason}", markup=False, soft_wrap=True)
    answer = report.judgement.answer if report.judgement else "identical"
    colour = "red" if report.moved else _COLOURS[answer]
    console.print(Line(report.verdict, style=f"bold {colour}"), soft_wrap=True)


def _reasons(report: DiffReport) -> Iterator[str]:
    if report.judgement is not None:
        yield from report.judgement.reasons
    if report.audit is not None:
        yield from report.audit.findings


def _changes(changes: list[Change]) -> Table:
    table = Table("what changed", "A", "B", "can move vectors of", show_edge=False, pad_edge=False)
    table.columns[0].overflow = table.columns[3].overflow = "fold"
    shown: dict[str, int] = {}
    left: dict[str, list[Change]] = {}
    for change in changes:
        shown[change.section] = shown.get(change.section, 0) + 1
        if shown[change.section] > _SHOWN_OF_SECTION:
            left.setdefault(change.section, []).append(change)
    for place, change in enumerate(changes):
        rest = left.get(change.section, [])
        if change not in rest:
            cells = [_cell(change.a), _cell(change.b), change.reach or "none"]
            table.add_row(Line(f"{change.section}: {change.what}"), *map(Line, cells))
        last = place + 1 == len(changes) or changes[place + 1].section != change.section
        if last and rest:
            reach = next((c.reach for c in rest if c.reach), "none")
            table.add_row(Line(f"{change.section}: {len(rest)} more, see --json"), "", "", Line(reach))
    return table


def _cell(value: str) -> str:
    value = shortened(value)
    return value if len(value) <= _CELL_CHARS else f"{value[: _CELL_CHARS - 1]}…"


def _moves(moves: Moves, judgement: Judgement | None) -> Table:
    table = Table("how vectors moved", "found", "limit", show_edge=False, pad_edge=False)
    # What is measured against what it has to reach; without a judgement there is nothing to reach.
    limits = msgspec.to_builtins(judgement.limits) if judgement else {}

    def row(what: str, found: str, limit: float | None = None) -> None:
        table.add_row(what, found, "" if limit is None else f"{limit:g}")

    dims = f"{moves.dim_a}" if moves.dim_a == moves.dim_b else f"{moves.dim_a} and {moves.dim_b}: not comparable"
    row("dimensions", dims)
    if moves.cosine is not None:
        c = moves.cosine
        row("cosine: smallest", f"{c.min:.7f}", limits.get("min_cosine"))
        row("cosine: p01, p10, median, p90", ", ".join(f"{v:.7f}" for v in (c.p01, c.p10, c.median, c.p90)))
        row("cosine: mean", f"{c.mean:.7f}", limits.get("mean_cosine"))
        for share in moves.moved:
            row(f"texts further than {share.more_than:g} from 1", f"{share.share:.1%} ({share.texts:,})")
    if moves.max_abs_diff is not None:
        row("largest move of a value", f"{moves.max_abs_diff:.2g}", limits.get("max_abs_diff"))
    overlap = limits.get("top10_overlap")
    row("top-10 neighbours kept, A within A and B within B", f"{moves.top10_overlap:.1%}", overlap)
    if moves.mixed_top10_overlap is not None and moves.mixed_found_again is not None:
        row("top-10 kept, asking B's vectors of an index of A", f"{moves.mixed_top10_overlap:.1%}", overlap)
        row("texts whose B finds their own A first", f"{moves.mixed_found_again:.1%}")
    return table


def _worst(moves: Moves) -> Table:
    table = Table("moved most", "language", "prompt", "tokens", "cosine", "text", show_edge=False, pad_edge=False)
    table.columns[5].no_wrap = True
    for t in moves.worst:
        cells = (t.id, t.language, t.prompt or "", str(t.tokens), f"{t.cosine:.7f}", t.excerpt)
        table.add_row(*map(Line, cells))
    return table


def _golden(audit: Audit) -> str:
    found = "not comparable" if audit.golden_min_cosine is None else f"min cosine {audit.golden_min_cosine:.7f}"
    engine = f"{audit.in_bundle} of the bundle, by its fingerprint" if audit.in_bundle else "none of the bundle"
    return (
        f"server: f2rt {audit.version}, model {audit.model}, {audit.state}; its engine is {engine}; "
        f"{audit.golden_texts} golden texts through it: {found}, the limit is {audit.golden_limit:g}"
    )
