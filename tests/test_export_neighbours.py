"""Neighbours: overlap as it is defined, with copies, and for sets too small."""

from __future__ import annotations

import numpy as np
import pytest

from export import neighbours
from export.neighbours import top_k_overlap


def rows(count: int, seed: int = 0) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    values = np.random.default_rng(seed).standard_normal((count, 24)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def by_hand(reference: np.ndarray, found: np.ndarray, k: int) -> float:  # type: ignore[type-arg]
    shared = []
    for i in range(len(reference)):
        near = [np.argsort(np.where(np.arange(len(v)) == i, np.inf, -(v @ v[i])))[:k] for v in (reference, found)]
        shared.append(len(set(near[0].tolist()) & set(near[1].tolist())) / k)
    return float(np.mean(shared))


@pytest.mark.parametrize("k", [1, 10, 50])
def test_as_worked_out_text_by_text_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch, k: int) -> None:
    reference = rows(70)
    found = reference + 0.2 * rows(70, 1)
    expected = by_hand(reference, found, k)
    assert 0.05 < expected < 1
    assert top_k_overlap(reference, found, k) == pytest.approx(expected)
    monkeypatch.setattr(neighbours, "_BLOCK_ROWS", 16)
    assert top_k_overlap(reference, found, k) == pytest.approx(expected)


def test_copies_of_a_text_do_not_count_as_lost_neighbours() -> None:
    """Twenty copies of one vector: any ten of them are its ten nearest."""
    reference = np.concatenate([np.repeat(rows(1), 20, axis=0), rows(30, 3)])
    order = np.random.default_rng(5).permutation(20)
    assert top_k_overlap(reference, np.concatenate([reference[order], reference[20:]]), 10) == 1.0


@pytest.mark.parametrize(("count", "k"), [(0, 10), (1, 10), (2, 10), (5, 100)])
def test_few_texts(count: int, k: int) -> None:
    assert top_k_overlap(rows(count), rows(count), k) == 1.0
