"""Task agreement: scores against ones worked out by hand, and sets that hold what their names say."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from calibration.texts import Text, verification_texts
from export.gate import judged, loss_points, thresholds
from export.report.data import Check, Retrieval, Tasks
from export.tasks import LabelledSet, labelled_sets, measure, scores, spearman
from runtime.tolerances import TOLERANCES


def unit_rows(rows: int, dim: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def test_ndcg_and_recall_as_worked_out_by_hand() -> None:
    """One query; documents at falling similarity; the second and third hits are relevant."""
    angles = np.array([0.0, 0.1, 0.2, 0.3, 0.4])
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    labelled = LabelledSet("x", [0], [0, 1, 2, 3, 4], [{2, 3}])
    gain = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = 1 + 1 / math.log2(3)
    ndcg, recall = scores(labelled, vectors)
    assert ndcg == pytest.approx(gain / ideal)
    assert recall == 0
    assert scores(LabelledSet("x", [0], [0, 1, 2], [{1}]), vectors) == (1.0, 1.0)


def test_spearman_shares_ranks_among_equals_and_knows_direction() -> None:
    """Similarities 1, 1, 0 and 0.8, 0.6, 0: ranks 2.5, 2.5, 1 and 3, 2, 1 correlate with sqrt(3) / 2."""
    a = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    assert spearman(a, a) == pytest.approx(1)
    b = unit_rows(40, 16, 1)
    assert spearman(b, b) == pytest.approx(1)
    assert abs(spearman(b, unit_rows(40, 16, 2))) < 0.2
    assert spearman(b[:2], b[:2]) == 1.0


def test_the_shipped_texts_hold_three_labelled_sets() -> None:
    texts = verification_texts()
    by_name = {s.name: s for s in labelled_sets(texts)}
    assert {name: len(s.queries) for name, s in by_name.items()} == {
        "article to its translations": 420,
        "docstring to code": 110,
        "title to text in its language": 174,
    }
    for labelled in by_name.values():
        assert all(relevant <= set(labelled.documents) for relevant in labelled.relevant)
        assert all(
            relevant and query not in relevant
            for query, relevant in zip(labelled.queries, labelled.relevant, strict=True)
        )
    code = by_name["docstring to code"]
    for query, relevant in zip(code.queries, code.relevant, strict=True):
        (answer,) = relevant
        assert texts[query].id == texts[answer].id + "?"
        assert texts[answer].kind == "code"
    articles = by_name["article to its translations"]
    numbers = {i: texts[i].id.rsplit("/", 1)[1] for i in articles.documents}
    assert all(
        {numbers[r] for r in relevant} == {numbers[q]}
        for q, relevant in zip(articles.queries, articles.relevant, strict=True)
    )


def test_the_same_vectors_agree_and_other_vectors_do_not() -> None:
    texts = [Text(f"t{i}", str(i)) for i in range(200)]
    vectors, others = unit_rows(200, 32, 1), unit_rows(200, 32, 2)
    same = measure(texts, vectors, vectors)
    assert (same.top10_overlap, same.top100_overlap) == (1.0, 1.0)
    assert same.spearman == pytest.approx(1.0)
    assert same.retrieval == []
    different = measure(texts, others, vectors)
    assert different.top10_overlap < 0.2
    assert abs(different.spearman) < 0.1


GOOD = Check("single", 10, 0.999, 0.999, 0.9995, 0.01, 1e-7, 0, "pass", [])
SET = Retrieval("set", 100, 100, 0.80, 0.70, 0.80, 0.70)
TASKS = Tasks(100, 0.95, 0.97, 0.99, [SET])


def verdicts(
    check: Check = GOOD, tasks: Tasks | None = TASKS, mismatches: int = 0, overlap: int | None = 0
) -> set[str]:
    found = thresholds(
        [check],
        tasks,
        TOLERANCES["int8"],
        tokenizer_mismatches=mismatches,
        calibrated=True,
        calibration_overlap=overlap,
    )
    return {t.name for t in found if t.verdict == "fail"}


def test_every_threshold_can_fail_alone() -> None:
    assert verdicts() == set()
    assert verdicts(replace(GOOD, cosine_min=0.96)) == {"min cosine"}
    assert verdicts(replace(GOOD, cosine_mean=0.98)) == {"mean cosine"}
    assert verdicts(replace(GOOD, cosine_min=float("nan"))) == {"min cosine"}
    assert verdicts(replace(GOOD, max_abs_diff=0.3)) == {"max |diff|"}
    assert verdicts(replace(GOOD, norm_error_max=1e-4)) == {"norm error"}
    assert verdicts(replace(GOOD, non_finite=1)) == {"values not finite"}
    assert verdicts(tasks=replace(TASKS, top10_overlap=0.89)) == {"top-10 overlap"}
    assert verdicts(tasks=replace(TASKS, retrieval=[replace(SET, ndcg10=0.78)])) == {"retrieval loss, points"}
    assert verdicts(tasks=replace(TASKS, retrieval=[replace(SET, recall1=0.68)])) == {"retrieval loss, points"}
    assert verdicts(mismatches=1) == {"texts tokenized otherwise"}
    assert verdicts(overlap=1) == {"texts also calibrated on"}
    assert verdicts(overlap=None) == {"texts also calibrated on"}


def test_a_small_labelled_set_is_shown_and_not_gated() -> None:
    """One query of ten is ten points: that would be noise."""
    few = Tasks(100, 0.95, 0.97, 0.99, [Retrieval("few", 10, 20, 0.5, 0.5, 0.6, 0.6)])
    assert verdicts(tasks=few) == set()


def test_a_gain_is_no_loss_and_limits_include_their_ends() -> None:
    assert loss_points(Retrieval("x", 50, 50, 0.9, 0.9, 0.8, 0.8)) == pytest.approx(-10)
    assert judged("a", 1.0, "<=", 1.0).verdict == "pass"
    assert judged("a", 0.97, ">=", 0.97).verdict == "pass"
    assert judged("a", float("nan"), "<=", 1.0).verdict == "fail"
    assert judged("a", None, "<=", 1.0).verdict == "fail"
