"""Verdicts, numbers and the headline as every written form of the report spells them."""

from __future__ import annotations

from export.report.data import ParityReport, Threshold

VERDICTS = {"pass": "PASS", "fail": "FAIL", "not_executed": "NOT EXECUTED"}


def headline(report: ParityReport) -> str:
    """Say what the verdict means, in one sentence."""
    passed = [e.engine for e in report.engines if e.verdict == "pass"]
    failed = [e.engine for e in report.engines if e.verdict == "fail"]
    idle = len(report.engines) - len(passed) - len(failed)
    parts = [
        f"{_engines(len(passed))} within every limit" if passed else "",
        f"{_engines(len(failed))} outside the limits: {', '.join(failed)}" if failed else "",
        f"{_engines(idle)} not executed on this machine, so not proven" if idle else "",
    ]
    return "; ".join(p for p in parts if p) + "."


def _engines(count: int) -> str:
    return f"{count} engine" if count == 1 else f"{count} engines"


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
