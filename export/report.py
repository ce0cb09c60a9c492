"""What a comparison with PyTorch found, as data, as JSON and as a table. Knows no engine and computes no cosine."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text as Line

from runtime.bundle import GraphRecord, Source, Verdict
from runtime.tolerances import Tolerance

REPORT_SCHEMA_VERSION = 2
_COLOURS = {"pass": "green", "fail": "red", "not_executed": "yellow"}


@dataclass(frozen=True)
class WorstText:
    """One of the texts an engine did worst on."""

    id: str
    language: str
    kind: str
    tokens: int
    cosine: float
    excerpt: str


@dataclass(frozen=True)
class Check:
    """One way of running the texts, row by row against the reference.

    `cosine_p01` is the first percentile. `vs_single_min_cosine` compares with the same engine's own vectors for single
    texts, where that makes sense. `problems` holds one sentence per limit that was broken.
    """

    name: str
    rows: int
    cosine_min: float
    cosine_p01: float
    cosine_mean: float
    max_abs_diff: float
    norm_error_max: float
    non_finite: int
    verdict: Verdict
    problems: list[str]
    vs_single_min_cosine: float | None = None


@dataclass(frozen=True)
class TokenMismatch:
    """A text for which the runtime's tokenizer and transformers' give different ids."""

    id: str
    position: int
    found_tokens: int
    expected_tokens: int
    explanation: str


@dataclass(frozen=True)
class EngineReport:
    """All checks of one engine. `diagnosis` names the likely cause of a failure.

    `checked_at`, `texts`, `texts_sha256` and `versions` say when, on what and with what it was compared. `kept` says
    why an earlier result was taken over; it is empty for one of this run.
    `omitted` counts the texts that are longer than the engine was built for: it refuses them.
    """

    engine: str
    precision: str
    fingerprint: str
    verdict: Verdict
    tolerance: Tolerance | None
    checks: list[Check] = field(default_factory=list)
    worst: list[WorstText] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    reason: str = ""
    omitted: int = 0
    checked_at: str = ""
    texts: int = 0
    texts_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    kept: str = ""


@dataclass(frozen=True)
class Coverage:
    """What the texts cover. Token counts include prompt and EOS."""

    texts: int
    texts_sha256: str
    languages: int
    scripts: int
    programming_languages: int
    by_kind: dict[str, int]
    tokens_total: int
    tokens_longest: int
    max_tokens: int
    truncated: int
    prompts_missing: list[str]


@dataclass(frozen=True)
class ParityReport:
    """The content of report.json. `verdict` is that of the engines asked for in the last run, `engines` holds all.

    `graphs` says how each graph was made: what was rescaled, smoothed and left out, and why.
    """

    schema_version: int
    verdict: Verdict
    created_at: str
    bundle_fingerprint: str
    source: Source
    graphs: list[GraphRecord]
    coverage: Coverage
    tokenizer_mismatches: list[TokenMismatch]
    engines: list[EngineReport]
    versions: dict[str, str]
    duration_s: float


def to_json(report: ParityReport) -> bytes:
    """Return report.json's bytes: UTF-8, indented, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def print_report(report: ParityReport, console: Console) -> None:
    """Print verdict, checks and worst texts."""
    c = report.coverage
    console.print(
        f"{c.texts} texts, {c.languages} languages in {c.scripts} scripts, {c.programming_languages} programming "
        f"languages; {c.tokens_total} tokens, the longest text {c.tokens_longest} of {c.max_tokens}, "
        f"{c.truncated} truncated"
    )
    for name in c.prompts_missing:
        console.print(f"the checkpoint has no prompt {name!r}: those texts were taken without one")
    for mismatch in report.tokenizer_mismatches[:5]:
        console.print(f"[red]tokenizer[/]: {mismatch.id}: {mismatch.explanation}", highlight=False)
    if len(report.tokenizer_mismatches) > 5:
        console.print(f"[red]tokenizer[/]: … and {len(report.tokenizer_mismatches) - 5} more texts")
    for graph in report.graphs:
        for line in describe_graph(graph):
            console.print(line, markup=False, highlight=False)
    for engine in report.engines:
        console.print(_engine(engine))
    console.print(_stamp(report.verdict), f"in {report.duration_s:.1f} s")


def describe_graph(graph: GraphRecord) -> list[str]:
    """Return a line for what was rescaled, and one for what INT8 rounds and what it leaves; none for a plain graph."""
    lines = []
    if graph.rescaling:
        first = graph.rescaling[0]
        lines.append(
            f"{graph.precision}: {len(graph.rescaling)} tensors rescaled by powers of two, the first {first.tensor} "
            f"(2^{first.largest_exponent}: {first.reason})"
        )
    if graph.quantization is not None:
        q = graph.quantization
        left = ", ".join(f"{x.tensor} ({x.impact:.0e})" for x in q.excluded) or "nothing"
        lines.append(
            f"{graph.precision}: {q.int8_share:.1%} of the matrix work multiplies in INT8 (at least {q.budget:.0%}); "
            f"left out, by what rounding does to the layer: {left}"
        )
    return lines


def _stamp(verdict: Verdict) -> Line:
    return Line(verdict.upper().replace("_", " "), style=f"bold {_COLOURS[verdict]}")


def _engine(report: EngineReport) -> RenderableType:
    title = Line.assemble((report.engine, "bold"), f"  {report.fingerprint}  ", _stamp(report.verdict))
    if report.kept:
        return Group(title, Line(f"kept from {report.checked_at}: {report.kept}; {report.reason or _numbers(report)}"))
    if report.reason:
        return Group(title, Line(report.reason))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("check")
    for column in (
        "rows",
        "min cosine",
        "1 - min",
        "1 - p01",
        "1 - mean",
        "max |diff|",
        "norm error",
        "non-finite",
        "",
    ):
        table.add_column(column, justify="right")
    for check in report.checks:
        # Near 1 a cosine's digits say nothing; its distance from 1 does.
        distances = (f"{1 - c:.1e}" for c in (check.cosine_min, check.cosine_p01, check.cosine_mean))
        errors = (f"{check.max_abs_diff:.1e}", f"{check.norm_error_max:.1e}", str(check.non_finite))
        table.add_row(
            check.name, str(check.rows), f"{check.cosine_min:.7f}", *distances, *errors, _stamp(check.verdict)
        )
    problems = [Line(f"{check.name}: {p}", style="red") for check in report.checks for p in check.problems]
    causes = [Line(f"likely cause: {text}", style="bold red") for text in report.diagnosis]
    limits = report.tolerance
    assert limits is not None
    limit = Line(
        f"limits for {report.precision}: min cosine {limits.min_cosine}, mean {limits.mean_cosine}, "
        f"max |diff| {limits.max_abs_diff}, norm error {limits.norm_error}",
        style="dim",
    )
    worst = Line("worst texts", style="bold")
    if report.omitted:
        problems.append(Line(f"{report.omitted} texts are longer than the engine takes and were left out"))
    return Group(title, Line(), table, limit, *problems, *causes, Line(), worst, _worst(report))


def _numbers(report: EngineReport) -> str:
    """Return the least favourable numbers of all checks, on one line."""
    checks = report.checks
    if not checks:
        return "it could not be run"
    return (
        f"on {report.texts} texts min cosine {min(c.cosine_min for c in checks):.7f}, "
        f"mean {checks[0].cosine_mean:.7f}, max |diff| {max(c.max_abs_diff for c in checks):.1e}"
    )


def _worst(report: EngineReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("1 - cosine", "tokens", "language", "id", "text"):
        table.add_column(column, justify="right" if column in ("1 - cosine", "tokens") else "left", no_wrap=True)
    for text in report.worst:
        table.add_row(f"{1 - text.cosine:.1e}", str(text.tokens), text.language, Line(text.id), Line(text.excerpt))
    return table
