"""Verdicts, numbers and the headline as every written form of the report spells them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isfinite

from export.report.data import ParityReport, Stage, Threshold

VERDICTS = {"pass": "PASS", "fail": "FAIL", "not_executed": "NOT EXECUTED"}


def headline(report: ParityReport) -> str:
    """Say what the verdict means, in one sentence."""
    passed = [e.engine for e in report.engines if e.verdict == "pass"]
    failed = [e.engine for e in report.engines if e.verdict == "fail"]
    idle = len(report.engines) - len(passed) - len(failed)
    other = [e.engine for e in report.engines if e.policy_sha256 and e.policy_sha256 != report.policy.sha256]
    idle_graphs = sorted({g.precision for g in report.graphs} - {e.precision for e in report.engines})
    lost = broken_graphs(report.stages, (e.precision for e in report.engines))
    parts = [
        report.partial,
        f"{_engines(len(passed))} within every limit" if passed else "",
        f"{_engines(len(failed))} outside the limits: {', '.join(failed)}" if failed else "",
        f"{_engines(idle)} not executed on this machine, so not proven" if idle else "",
        *map(broken, lost),
        f"{', '.join(idle_graphs)}: not executed, no engine of it was compared" if idle_graphs else "",
        f"of these under another policy than {report.policy.name}: {', '.join(other)}" if other else "",
    ]
    return ("; ".join(p for p in parts if p) or "nothing was compared") + "."


def _engines(count: int) -> str:
    return f"{count} engine" if count == 1 else f"{count} engines"


def broken_graphs(stages: Sequence[Stage], precisions: Iterable[str]) -> list[Stage]:
    """Return the narrow graphs of these precisions that miss their limits once every result is rounded as on a GPU.

    An engine on CPU, which widens float16, may give good vectors for such a graph all the same.
    """
    asked = set(precisions) - {"fp32"}
    return [s for s in stages if s.verdict == "fail" and s.precision in asked and s.name == f"{s.precision} graph"]


def broken(stage: Stage) -> str:
    """Say what a graph that misses its limits does."""
    return f"{stage.name}: misses its limits with results rounded as on a GPU; {stage.guilty}".rstrip("; ")


def guilty_steps(stages: Sequence[Stage]) -> list[str]:
    """Name the step of each precision that adds most to the error after the last layer; none where there is one step.

    Each precision's steps begin where the fp32 graph's end.
    """
    ends = {s.name: s.layers[-1].size for s in stages if s.layers}
    chains: dict[str, list[str]] = {}
    for stage in stages:
        if stage.layers:
            chains.setdefault(stage.precision, []).append(stage.name)
    trunk = chains.get("fp32", [])
    said = []
    for precision, own in chains.items():
        chain = own if own is trunk else trunk + own
        if len(chain) < 2:
            continue
        befores = [0.0, *(ends[name] for name in chain[:-1])]
        # From infinity on nothing grows any more: the first to get there is the guilty one.
        growth = [ends[name] - before if isfinite(before) else 0.0 for name, before in zip(chain, befores, strict=True)]
        worst = max(range(len(chain)), key=growth.__getitem__)
        if growth[worst] > 0:
            name, before = chain[worst], befores[worst]
            said.append(f"{precision}: the largest step is {name}, from {before:.1e} to {ends[name]:.1e}")
    return said


def distance(cosine: float) -> str:
    """Return 1 - cosine: near 1 a cosine's own digits say nothing."""
    return f"{max(1 - cosine, 0.0):.1e}"


def number(value: float) -> str:
    """Return a number as people read it."""
    if value == 0 or (abs(value) >= 1 and value == round(value)):
        return f"{value:.0f}"
    return f"{value:.1e}" if abs(value) < 1e-3 else f"{value:.6g}"


def value_of(threshold: Threshold) -> str:
    """Return what was found for a threshold; a cosine near 1 as its distance from 1."""
    if threshold.value is None:
        return "unknown"
    if "cosine" in threshold.name and threshold.value > 0.99999:
        return f"1 - {1 - threshold.value:.1e}"
    return number(threshold.value)
