"""The report on a terminal: coverage, then verdict, checks, limits and worst texts of every engine."""

from __future__ import annotations

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text as Line

from export.report.data import EngineReport, ParityReport
from export.report.words import guilty_steps, headline
from runtime.bundle import GraphRecord, Verdict

_SHOWN_WORST = 5
_COLOURS = {"pass": "green", "fail": "red", "not_executed": "yellow"}


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
    if report.stages:
        console.print(Line("from PyTorch to each graph", style="bold"))
        console.print(_stages(report))
        for step in guilty_steps(report.stages):
            console.print(step, markup=False, highlight=False)
    console.print(headline(report), markup=False, highlight=False)
    policy = f"policy {report.policy.name} {report.policy.sha256[:12]}"
    console.print(_stamp(report.verdict), f"in {report.duration_s:.1f} s, {policy}")


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
    for t in report.thresholds:
        if t.verdict == "fail":
            found = "unknown" if t.value is None else f"{t.value:.7g}"
            problems.append(Line(f"{t.name} is {found}, allowed {t.sense} {t.limit:g} ({t.where})", style="red"))
    worst = Line("worst texts", style="bold")
    if report.omitted:
        problems.append(Line(f"{report.omitted} texts are longer than the engine takes and were left out"))
    return Group(title, Line(), table, limit, *_tasks(report), *problems, *causes, Line(), worst, _worst(report))


def _tasks(report: EngineReport) -> list[Line]:
    tasks = report.tasks
    if tasks is None:
        return []
    lines = [
        f"neighbours shared: top-10 {tasks.top10_overlap:.4f}, top-100 {tasks.top100_overlap:.4f}; "
        f"Spearman {tasks.spearman:.6f}"
    ]
    lines += [
        f"{r.name}: nDCG@10 {r.ndcg10:.4f} (PyTorch {r.reference_ndcg10:.4f}), "
        f"R@1 {r.recall1:.4f} (PyTorch {r.reference_recall1:.4f})"
        for r in tasks.retrieval
    ]
    return [Line(line) for line in lines]


def _stages(report: ParityReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for column in ("stage", "", "1 - min", "where the error enters"):
        table.add_column(column, justify="right" if column == "1 - min" else "left")
    for stage in report.stages:
        distance = "" if stage.cosine_min is None else f"{1 - stage.cosine_min:.1e}"
        table.add_row(stage.name, _stamp(stage.verdict), distance, Line(stage.guilty or stage.reason))
    return table


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
    for text in report.worst[:_SHOWN_WORST]:
        table.add_row(f"{1 - text.cosine:.1e}", str(text.tokens), text.language, Line(text.id), Line(text.excerpt))
    return table
