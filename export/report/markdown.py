"""report.md: the verdict in a form that fits a pull-request comment. GitHub cuts those at 65,536 characters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from export.gate import loss_points
from export.report.data import EngineReport, ParityReport
from export.report.words import VERDICTS, distance, guilty_steps, headline, number, value_of

_MARKS = {"pass": "✅", "fail": "❌", "not_executed": "⚪"}
_SHOWN_WORST = 5


def to_markdown(report: ParityReport) -> str:
    """Return the report: verdict, one line per engine, broken limits, scores, worst texts."""
    parts = [
        f"## {_MARKS[report.verdict]} {VERDICTS[report.verdict]}: parity of `{report.source.id}` with PyTorch",
        headline(report),
        f"Bundle `{report.bundle_fingerprint}`, compared {report.created_at}; policy {report.policy.name} "
        f"`{report.policy.sha256[:16]}`; {report.coverage.texts} texts in {report.coverage.languages} languages, "
        f"{report.coverage.tokens_total} tokens.",
        _table(
            ["engine", "verdict", "1 - min cosine", "1 - mean", "top-10", "retrieval loss", "fingerprint"],
            [_engine_row(e) for e in report.engines],
        ),
    ]
    parts += [f"- tokenizer: `{m.id}`: {_escape(m.explanation)}" for m in report.tokenizer_mismatches[:5]]
    for engine in report.engines:
        parts += _problems(engine)
    parts += [_stages(report), _retrieval(report), *(_worst(e) for e in report.engines if e.worst)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _engine_row(engine: EngineReport) -> list[str]:
    name, verdict = f"`{engine.engine}`", f"{_MARKS[engine.verdict]} {VERDICTS[engine.verdict]}"
    if not engine.checks:
        return [name, verdict, "", "", "", "", f"`{engine.fingerprint}`"]
    tasks = engine.tasks
    loss = max((loss_points(r) for r in tasks.retrieval), default=None) if tasks else None
    return [
        name,
        verdict,
        distance(min(c.cosine_min for c in engine.checks)),
        distance(engine.checks[0].cosine_mean),
        f"{tasks.top10_overlap:.4f}" if tasks else "",
        "" if loss is None else f"{loss:.2f}",
        f"`{engine.fingerprint}`",
    ]


def _problems(engine: EngineReport) -> list[str]:
    broken = [t for t in engine.thresholds if t.verdict == "fail"]
    if not broken and not engine.diagnosis:
        return []
    lines = [f"### `{engine.engine}` is outside the limits"]
    lines += [
        f"- {t.name}: found {value_of(t)}, allowed {t.sense} {number(t.limit)}"
        + (f" ({_escape(t.where)})" if t.where else "")
        for t in broken
    ]
    lines += [f"- likely cause: {_escape(d)}" for d in engine.diagnosis]
    return ["\n".join(lines)]


def _stages(report: ParityReport) -> str:
    if not report.stages:
        return ""
    rows = [
        [
            s.name,
            VERDICTS[s.verdict],
            "" if s.cosine_min is None else distance(s.cosine_min),
            _escape(s.guilty or s.reason),
        ]
        for s in report.stages
    ]
    table = _table(["stage", "verdict", "1 - min cosine", "error enters"], rows)
    steps = "\n".join(f"- {_escape(step)}" for step in guilty_steps(report.stages))
    return _details("From PyTorch to each graph", f"{table}\n\n{steps}" if steps else table)


def _retrieval(report: ParityReport) -> str:
    engines = [e for e in report.engines if e.tasks is not None]
    if not engines or engines[0].tasks is None:
        return ""
    rows = []
    for place, first in enumerate(engines[0].tasks.retrieval):
        scores = [e.tasks.retrieval[place] for e in engines if e.tasks and len(e.tasks.retrieval) > place]
        rows.append([f"{first.name}, nDCG@10", f"{first.reference_ndcg10:.4f}", *(f"{r.ndcg10:.4f}" for r in scores)])
        rows.append([f"{first.name}, R@1", f"{first.reference_recall1:.4f}", *(f"{r.recall1:.4f}" for r in scores)])
    rows.append(["Spearman", "1", *(f"{e.tasks.spearman:.6f}" for e in engines if e.tasks)])
    return _details("Retrieval and neighbours", _table(["score", "PyTorch", *(f"`{e.engine}`" for e in engines)], rows))


def _worst(engine: EngineReport) -> str:
    rows = [
        [distance(w.cosine), str(w.tokens), w.language, f"`{_escape(w.command)}`"] for w in engine.worst[:_SHOWN_WORST]
    ]
    table = _table(["1 - cosine", "tokens", "language", "again"], rows)
    return _details(f"Worst texts of <code>{engine.engine}</code>", table)


def _details(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _escape(text: str) -> str:
    """Keep a text within its table cell, and out of HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
