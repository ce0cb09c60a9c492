"""How many of a text's nearest neighbours stay the same when its vectors come from elsewhere. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 512
# Similarities closer than this are one: copies of a text must not push each other out of the ten nearest.
TIE = 1e-6


def top_k_overlap(reference: NDArray[np.float32], found: NDArray[np.float32], k: int) -> float:
    """Return the mean share of each row's k nearest rows in `found` that are among its nearest in `reference` too.

    Both are unit vectors [texts, dim] of the same texts; a text is no neighbour of itself. A neighbour counts as shared
    when its similarity in the reference reaches that of the k-th nearest there, less `TIE`. With fewer than k + 1 texts
    k is cut down; 1.0 for fewer than two.
    """
    texts = len(reference)
    k = min(k, texts - 1)
    if k < 1:
        return 1.0
    shared = 0
    for start in range(0, texts, _BLOCK_ROWS):
        rows = np.arange(start, min(start + _BLOCK_ROWS, texts))
        expected, here = (v[rows].astype(np.float32) @ v.T for v in (reference, found))
        for similarities in (expected, here):
            similarities[np.arange(len(rows)), rows] = -np.inf
        bound = np.partition(expected, texts - k, axis=1)[:, texts - k, None] - TIE
        nearest = np.argpartition(here, texts - k, axis=1)[:, texts - k :]
        shared += int(np.count_nonzero(np.take_along_axis(expected, nearest, axis=1) >= bound))
    return shared / (texts * k)
