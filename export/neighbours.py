"""How many of a text's nearest neighbours stay the same when its vectors come from elsewhere. Pure numpy.

All vectors are float32 unit vectors [texts, dim], finite, row i of each set being the same text's. A text is no
neighbour of itself. A neighbour counts as shared when its similarity in the reference reaches that of the reference's
k-th nearest, less `TIE`: where several texts are equally near, any of them will do, so that copies of a text, which no
index can tell apart, lower nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

# Similarities closer than this are one: copies of a text must not push each other out of the ten nearest.
TIE = 1e-6
# Similarities held at once. numpy's partial sorts copy them, so that a block takes about five times its 64 MiB.
_BLOCK_VALUES = 1 << 24

Vectors = NDArray[np.float32]


def top_k_overlap(reference: Vectors, found: Vectors, k: int) -> float:
    """Return the mean share of each text's k nearest in `found` that are among its nearest in `reference` too.

    With fewer than k + 1 texts k is cut down; 1.0 for fewer than two.
    """
    return _overlap(reference, found, found, k)


def cross_overlap(index: Vectors, queries: Vectors, k: int) -> float:
    """Return what is left of each text's k nearest when an index of `index` is asked with the vectors of `queries`.

    The mean share of rows of `index` nearest to a text's vector in `queries` that are also among the nearest to its
    own vector in `index`: whether both kinds of vectors can be mixed in one index. Cut down as in `top_k_overlap`.
    """
    return _overlap(index, queries, index, k)


def found_again(index: Vectors, queries: Vectors) -> float:
    """Return the share of texts whose vector in `queries` has none nearer in `index` than that text's own.

    1.0 for no texts.
    """
    hits = 0
    for rows in _blocks(len(index)):
        similarities = queries[rows] @ index.T
        own = similarities[np.arange(len(rows)), rows]
        hits += int(np.count_nonzero(own >= similarities.max(axis=1) - TIE))
    return hits / len(index) if len(index) else 1.0


def _overlap(reference: Vectors, queries: Vectors, index: Vectors, k: int) -> float:
    """Return how much of each text's k nearest in `reference` its vector in `queries` finds in `index`."""
    texts = len(reference)
    k = min(k, texts - 1)
    if k < 1:
        return 1.0
    shared = 0
    for rows in _blocks(texts):
        expected, here = reference[rows] @ reference.T, queries[rows] @ index.T
        for similarities in (expected, here):
            similarities[np.arange(len(rows)), rows] = -np.inf
        bound = np.partition(expected, texts - k, axis=1)[:, texts - k, None] - np.float32(TIE)
        nearest = np.argpartition(here, texts - k, axis=1)[:, texts - k :]
        shared += int(np.count_nonzero(np.take_along_axis(expected, nearest, axis=1) >= bound))
    return shared / (texts * k)


def _blocks(texts: int) -> Iterator[NDArray[np.intp]]:
    """Yield the rows of all texts in blocks whose similarities to all texts fit into memory."""
    size = max(_BLOCK_VALUES // max(texts, 1), 1)
    for start in range(0, texts, size):
        yield np.arange(start, min(start + size, texts))
