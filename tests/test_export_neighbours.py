"""Neighbour overlap: against the definition written out, at its edges, with copies, in blocks and at scale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from export import neighbours
from export.neighbours import TIE, cross_overlap, found_again, top_k_overlap

ROOT = Path(__file__).parent.parent
Vectors = NDArray[np.float32]


def unit(rows: int, dim: int = 16, seed: int = 0) -> Vectors:
    values = np.random.default_rng(seed).standard_normal((rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def nudged(vectors: Vectors, size: float, seed: int = 1) -> Vectors:
    moved = vectors + size * unit(*vectors.shape, seed=seed)
    return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def by_definition(reference: Vectors, queries: Vectors, index: Vectors, k: int) -> float:
    """The same, one text at a time, with sorted lists and without arithmetic in blocks."""
    k = min(k, len(reference) - 1)
    shares = []
    for i in range(len(reference)):
        others = [j for j in range(len(reference)) if j != i]
        expected = {j: float(reference[i] @ reference[j]) for j in others}
        here = {j: float(queries[i] @ index[j]) for j in others}
        bound = sorted(expected.values(), reverse=True)[k - 1] - TIE
        nearest = sorted(others, key=lambda j: -here[j])[:k]
        shares.append(sum(expected[j] >= bound for j in nearest) / k)
    return float(np.mean(shares))


@pytest.mark.parametrize("k", [1, 3, 10, 100])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0])
def test_it_is_the_definition(k: int, size: float) -> None:
    reference = unit(60)
    found = nudged(reference, size)
    assert top_k_overlap(reference, found, k) == pytest.approx(by_definition(reference, found, found, k))
    assert cross_overlap(reference, found, k) == pytest.approx(by_definition(reference, found, reference, k))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = unit(101)
    found = nudged(reference, 0.5)
    whole = top_k_overlap(reference, found, 10), cross_overlap(reference, found, 10), found_again(reference, found)
    for values in (1, 101 * 7, 101 * 100):
        monkeypatch.setattr(neighbours, "_BLOCK_VALUES", values)
        assert whole == (
            top_k_overlap(reference, found, 10),
            cross_overlap(reference, found, 10),
            found_again(reference, found),
        )


def test_equal_vectors_share_everything_and_unrelated_ones_what_chance_gives() -> None:
    vectors = unit(500, 64)
    assert top_k_overlap(vectors, vectors, 10) == cross_overlap(vectors, vectors, 10) == found_again(vectors, vectors)
    assert top_k_overlap(vectors, vectors, 10) == 1.0
    other = unit(500, 64, seed=5)
    assert top_k_overlap(vectors, other, 10) < 0.05
    assert found_again(vectors, other) < 0.05


def test_a_rotated_space_keeps_its_neighbours_and_cannot_be_mixed() -> None:
    """What another checkpoint of the same dimension does to an index: each is fine alone, together they are noise."""
    vectors = unit(300, 32)
    turn, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((32, 32)))
    turned = (vectors @ turn).astype(np.float32)
    assert top_k_overlap(vectors, turned, 10) > 0.99
    assert cross_overlap(vectors, turned, 10) < 0.2
    assert found_again(vectors, turned) < 0.1


def test_copies_do_not_lower_the_overlap() -> None:
    """Twenty copies are all equally near: which ten of them are found is chance, and no loss."""
    distinct = unit(30)
    copies = np.concatenate([np.repeat(distinct[:1], 20, axis=0), distinct[1:]])
    # float32 noise, below what counts as a tie, puts the copies into another order.
    noisy = nudged(copies, 1e-7)
    assert top_k_overlap(copies, noisy, 10) == 1.0
    assert cross_overlap(copies, noisy, 10) == 1.0
    assert found_again(copies, noisy) == 1.0


def test_a_text_is_no_neighbour_of_itself() -> None:
    """Two pairs that exchange partners: with a text as its own nearest neighbour, half would seem kept."""
    a, b = np.eye(2, dtype=np.float32)
    assert top_k_overlap(np.stack([a, a, b, b]), np.stack([a, b, a, b]), 1) == 0.0


@pytest.mark.parametrize("texts", [0, 1])
def test_fewer_than_two_texts_have_no_neighbours_to_lose(texts: int) -> None:
    assert top_k_overlap(unit(texts), unit(texts, seed=3), 10) == 1.0
    assert cross_overlap(unit(texts), unit(texts, seed=3), 10) == 1.0
    assert found_again(unit(texts), unit(texts)) == 1.0


def test_k_is_cut_down_to_the_other_texts() -> None:
    """Of three texts the ten nearest are the two others, whatever their order."""
    assert top_k_overlap(unit(3), unit(3, seed=3), 10) == 1.0
    assert top_k_overlap(unit(3), unit(3, seed=3), 2) == 1.0


def test_dimensions_may_differ_within_each_set() -> None:
    """Neighbours need no common space: a shortened vector is compared with a full one."""
    vectors = unit(50, 32)
    short = vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1, keepdims=True)
    assert 0.1 < top_k_overlap(vectors, short, 10) < 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_memory_stays_bounded() -> None:
    """16,000 texts have 256 million similarities, 1 GB a set; in blocks they take a few hundred MB."""
    script = (
        "import numpy as np\n"
        "from export.neighbours import top_k_overlap\n"
        "v = np.random.default_rng(0).standard_normal((16_000, 4), dtype=np.float32)\n"
        "v /= np.linalg.norm(v, axis=1, keepdims=True)\n"
        "assert top_k_overlap(v, v, 10) == 1.0\n"
        # Not getrusage: its peak is the parent's, where that was larger before exec.
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 1024 * int(done.stdout) < 700e6
