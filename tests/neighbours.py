"""What INT8 is judged by: cosines at every dimension, and whether neighbours stay neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch, make_batch

Vectors = NDArray[np.float32]

# What INT8 has to keep on the verification split, at every trained dimension from SMALLEST_DIM on.
MIN_COSINE, MEAN_COSINE, OVERLAP = 0.99, 0.998, 0.95
SMALLEST_DIM = 32
_BATCH_TOKENS = 8192


def embed(run: Callable[[Batch], Vectors], sequences: Sequence[Sequence[int]], pad_id: int) -> Vectors:
    """Run all sequences in batches of similar length; return float32 [sequences, dim] in their order."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    vectors: dict[int, Vectors] = {}
    start = 0
    for stop in range(1, len(order) + 1):
        full = stop == len(order) or (stop - start + 1) * len(sequences[order[stop]]) > _BATCH_TOKENS
        if full:
            rows = order[start:stop]
            vectors |= dict(zip(rows, run(make_batch([sequences[i] for i in rows], pad_id)), strict=True))
            start = stop
    return np.stack([vectors[i] for i in range(len(order))])


def cut(vectors: Vectors, dim: int) -> Vectors:
    """Cut to the first `dim` values, then normalize."""
    part = vectors[:, :dim].astype(np.float64)
    unit: Vectors = (part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float32)
    return unit


def overlap(found: Vectors, expected: Vectors, count: int = 10) -> float:
    """Return the mean part of each text's `count` nearest other texts that both sets of unit vectors agree on."""

    def nearest(vectors: Vectors) -> NDArray[np.int64]:
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -2)
        return np.argsort(-scores, axis=1, kind="stable")[:, :count]

    pairs = zip(nearest(found), nearest(expected), strict=True)
    return float(np.mean([len(set(a) & set(b)) / count for a, b in pairs]))
