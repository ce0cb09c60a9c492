"""What INT8 is judged by besides the cosine: whether neighbours stay neighbours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


def cut(vectors: Vectors, dim: int) -> Vectors:
    """Cut to the first `dim` values, then normalize."""
    part = vectors[:, :dim].astype(np.float64)
    return (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32)


def overlap(found: Vectors, expected: Vectors, count: int = 10) -> float:
    """Return the mean part of each text's `count` nearest other texts that both sets of unit vectors agree on."""

    def nearest(vectors: Vectors) -> NDArray[np.int64]:
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -2)
        return np.argsort(-scores, axis=1, kind="stable")[:, :count]

    pairs = zip(nearest(found), nearest(expected), strict=True)
    return float(np.mean([len(set(a) & set(b)) / count for a, b in pairs]))
