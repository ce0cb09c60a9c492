"""The one home of every number that decides whether vectors count as equal.

Parity, the golden check at load and the tests read these, or the policy that overrides some of them for a deployment
(`runtime/policy.py`). Cosines are taken per row, in float64,
against the PyTorch float32 reference.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """What an engine of one precision must reach.

    `min_cosine` bounds the worst row, `mean_cosine` the mean over rows, `max_abs_diff` any single value of the unit
    vector, and `norm_error` how far a row's length may be from 1. Cosine alone hides damage: `top10_overlap` is the
    mean share of a text's ten nearest neighbours that must be PyTorch's, and `retrieval_loss_points` how many points
    of 100 of nDCG@10 or R@1 an engine may lose against PyTorch on a labelled set.
    """

    min_cosine: float
    mean_cosine: float
    max_abs_diff: float
    norm_error: float
    top10_overlap: float = 0.9
    retrieval_loss_points: float = 1.0


TOLERANCES: dict[str, Tolerance] = {
    "fp32": Tolerance(min_cosine=0.99999, mean_cosine=0.999999, max_abs_diff=1e-3, norm_error=1e-5),
    # A cosine of 0.9995 lets a unit vector move by sqrt(2 x 0.0005) = 0.032 in all.
    "fp16": Tolerance(min_cosine=0.9995, mean_cosine=0.9999, max_abs_diff=0.032, norm_error=1e-5),
    "bf16": Tolerance(min_cosine=0.9995, mean_cosine=0.9999, max_abs_diff=0.032, norm_error=1e-5),
    # sqrt(2 x 0.03) = 0.245.
    "int8": Tolerance(min_cosine=0.97, mean_cosine=0.99, max_abs_diff=0.245, norm_error=1e-5),
}

# The weights in a graph are the checkpoint's, widened: not one bit may differ.
WEIGHT_MAX_ABS_DIFF = 0.0


def tolerance(precision: str) -> Tolerance:
    """Return the tolerance of a precision; raises KeyError for one that has none."""
    return TOLERANCES[precision]
