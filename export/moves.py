"""How far vectors move from one engine to another, and whether an index has to be embedded again. Pure numpy.

All vectors are float32 unit vectors, row i of both sets being the same text's. Cosines are taken in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calibration.texts import Text
from export.neighbours import cross_overlap, found_again, top_k_overlap
from runtime.errors import BundleError
from runtime.golden import row_cosines
from runtime.policy import Policy
from runtime.tolerances import Tolerance

Vectors = NDArray[np.float32]
Answer = Literal["identical", "interchangeable", "re-embed"]

MORE_THAN = (1e-6, 1e-4, 1e-2)
WORST_TEXTS = 10
_NEIGHBOURS = 10
_EXCERPT_CHARS = 48


@dataclass(frozen=True)
class Cosines:
    """The cosine of each text's two vectors: the smallest, percentiles and the mean."""

    min: float
    p01: float
    p10: float
    median: float
    p90: float
    mean: float


@dataclass(frozen=True)
class Share:
    """How many texts have a cosine that is lower than 1 by more than `more_than`, and their part of all."""

    more_than: float
    texts: int
    share: float


@dataclass(frozen=True)
class MovedText:
    """One of the texts that moved most. `excerpt` holds printable characters alone."""

    id: str
    language: str
    prompt: str | None
    tokens: int
    cosine: float
    excerpt: str


@dataclass(frozen=True)
class Moves:
    """How the vectors of `texts` texts moved.

    `top10_overlap`: how many of a text's ten nearest within A are its nearest within B. `mixed_top10_overlap`: how many
    an index of A still finds when it is asked with B. `mixed_found_again`: the share of texts whose B finds their own A
    first. What needs a common space is None where `dim_a` and `dim_b` differ. `max_abs_diff` is the largest difference
    of a single value.
    """

    texts: int
    dim_a: int
    dim_b: int
    equal: bool
    cosine: Cosines | None
    moved: list[Share]
    max_abs_diff: float | None
    top10_overlap: float
    mixed_top10_overlap: float | None
    mixed_found_again: float | None
    worst: list[MovedText]


@dataclass(frozen=True)
class Judgement:
    """What follows for an index: the answer, one line in words, every limit that was broken, and whose limits."""

    answer: Answer
    line: str
    reasons: list[str]
    precision: str
    policy: str
    limits: Tolerance


def measure(texts: Sequence[Text], tokens: Sequence[int], a: Vectors, b: Vectors) -> Moves:
    """Compare the vectors of the same texts, [texts, dim of A] and [texts, dim of B]; `tokens` are shown with them."""
    own = top_k_overlap(a, b, _NEIGHBOURS)
    if a.shape[1] != b.shape[1]:
        return Moves(len(texts), a.shape[1], b.shape[1], False, None, [], None, own, None, None, [])
    cosines = row_cosines(a, b)
    low, tenth, middle, high = np.quantile(cosines, [0.01, 0.1, 0.5, 0.9]).tolist()
    worst = np.argsort(cosines, kind="stable")[:WORST_TEXTS]
    counts = [(limit, int(np.count_nonzero(1 - cosines > limit))) for limit in MORE_THAN]
    return Moves(
        texts=len(texts),
        dim_a=a.shape[1],
        dim_b=b.shape[1],
        equal=bool(np.array_equal(a, b)),
        cosine=Cosines(float(cosines.min()), low, tenth, middle, high, float(cosines.mean())),
        moved=[Share(limit, count, count / len(texts)) for limit, count in counts],
        max_abs_diff=float(np.abs(a.astype(np.float64) - b).max()),
        top10_overlap=own,
        mixed_top10_overlap=cross_overlap(a, b, _NEIGHBOURS),
        mixed_found_again=found_again(a, b),
        worst=[
            MovedText(t.id, t.language, t.prompt, tokens[i], float(cosines[i]), excerpt(t.text))
            for i, t in ((int(i), texts[int(i)]) for i in worst)
        ],
    )


def less_precise(precisions: Sequence[str], policy: Policy) -> str:
    """Return the one of these precisions that the policy asks least of. Raises BundleError for one it does not know."""
    for name in precisions:
        if name not in policy.limits:
            raise BundleError(
                f"there are no limits for the precision {name!r}; there are for: {', '.join(sorted(policy.limits))}.",
                cure="Update f2rt.",
            )
    return min(precisions, key=lambda name: policy.tolerance(name).min_cosine)


def judge(moves: Moves, precision: str, policy: Policy = Policy()) -> Judgement:
    """Say whether vectors may stay, by the limits a policy sets engines of this precision against PyTorch."""
    limits = policy.tolerance(precision)
    reasons = _broken(moves, limits)
    if reasons:
        answer: Answer = "re-embed"
        line = f"re-embed: {reasons[0]}" + (f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else "")
    elif moves.equal:
        answer, line = "identical", "identical vectors"
    else:
        assert moves.cosine is not None
        answer = "interchangeable"
        line = (
            f"interchangeable within {_distance(moves.cosine.min)} of a cosine of 1: no re-embed needed "
            f"(the limit for {precision} is {_distance(limits.min_cosine)})"
        )
    return Judgement(answer, line, reasons, precision, policy.name, limits)


def _broken(moves: Moves, limits: Tolerance) -> list[str]:
    """Return a sentence for each limit that the move breaks, the gravest first."""
    if moves.cosine is None:
        return [
            f"vectors of {moves.dim_a} and of {moves.dim_b} dimensions cannot be compared, nor be in one index",
            *_below("top-10 overlap", moves.top10_overlap, limits.top10_overlap),
        ]
    assert moves.max_abs_diff is not None
    assert moves.mixed_top10_overlap is not None
    far = [f"a value moved by {moves.max_abs_diff:.2g}, the limit is {limits.max_abs_diff:g}"]
    return [
        *_below("smallest cosine", moves.cosine.min, limits.min_cosine),
        *_below("mean cosine", moves.cosine.mean, limits.mean_cosine),
        *(far if moves.max_abs_diff > limits.max_abs_diff else []),
        *_below("top-10 overlap", moves.top10_overlap, limits.top10_overlap),
        *_below("top-10 overlap of B's queries in an index of A", moves.mixed_top10_overlap, limits.top10_overlap),
    ]


def _below(what: str, value: float, limit: float) -> list[str]:
    return [f"the {what} is {value:.6g}, the limit is {limit:g}"] if value < limit else []


def _distance(cosine: float) -> str:
    return f"{max(1 - cosine, 0.0):.2g}"


def excerpt(text: str) -> str:
    """Return the beginning of a text on one line, without what a terminal would act on."""
    line = " ".join(text.split())[:_EXCERPT_CHARS]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
