"""The gate: what was found of an engine, held against the limits of a policy, one threshold at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from export.report.data import Check, Retrieval, Tasks, Threshold
from runtime.tolerances import Tolerance

# One query more or less moves a mean over fewer queries by over two points: that would be noise, not loss.
MIN_GATED_QUERIES = 50


def thresholds(
    checks: Sequence[Check],
    tasks: Tasks | None,
    limits: Tolerance,
    *,
    tokenizer_mismatches: int,
    calibrated: bool,
    calibration_overlap: int | None,
) -> list[Threshold]:
    """Return every limit with the least favourable value found, and where it was found.

    `calibration_overlap` counts the texts that also shaped the engine's ranges, None where the calibration texts are
    not known: for a `calibrated` engine that fails.
    """
    found = [
        _worst("min cosine", checks, lambda c: c.cosine_min, ">=", limits.min_cosine),
        _worst("mean cosine", checks, lambda c: c.cosine_mean, ">=", limits.mean_cosine),
        _worst("max |diff|", checks, lambda c: c.max_abs_diff, "<=", limits.max_abs_diff),
        _worst("norm error", checks, lambda c: c.norm_error_max, "<=", limits.norm_error),
        _worst("values not finite", checks, lambda c: float(c.non_finite), "<=", 0.0),
    ]
    if tasks is not None:
        found.append(judged("top-10 overlap", tasks.top10_overlap, ">=", limits.top10_overlap, f"{tasks.texts} texts"))
        gated = [r for r in tasks.retrieval if r.queries >= MIN_GATED_QUERIES]
        if gated:
            worst = max(gated, key=loss_points)
            found.append(
                judged("retrieval loss, points", loss_points(worst), "<=", limits.retrieval_loss_points, worst.name)
            )
    found.append(judged("texts tokenized otherwise", float(tokenizer_mismatches), "<=", 0.0))
    if calibrated:
        overlap = None if calibration_overlap is None else float(calibration_overlap)
        where = "the bundle does not say what it was calibrated on: export again" if overlap is None else ""
        found.append(judged("texts also calibrated on", overlap, "<=", 0.0, where))
    return found


def loss_points(retrieval: Retrieval) -> float:
    """Return how many points of 100 of nDCG@10 or R@1 the engine loses against PyTorch, the larger of the two."""
    losses = (
        retrieval.reference_ndcg10 - retrieval.ndcg10,
        retrieval.reference_recall1 - retrieval.recall1,
    )
    return round(100 * max(losses), 6)


def judged(name: str, value: float | None, sense: Literal[">=", "<="], limit: float, where: str = "") -> Threshold:
    """Return a threshold with its verdict; a value that could not be taken fails, and so does NaN."""
    kept = value is not None and (value >= limit if sense == ">=" else value <= limit)
    return Threshold(name, value, sense, limit, "pass" if kept else "fail", where)


def _worst(
    name: str, checks: Sequence[Check], value: Callable[[Check], float], sense: Literal[">=", "<="], limit: float
) -> Threshold:
    if not checks:
        return judged(name, None, sense, limit, "nothing was run")
    check = (min if sense == ">=" else max)(checks, key=value)
    return judged(name, value(check), sense, limit, check.name)
