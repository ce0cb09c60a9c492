"""Warm-up: every shape that matters runs before the first request, so that none pays for it, and costs are learned."""

from __future__ import annotations

import time

from runtime.batch import make_batch
from runtime.serving.pipeline import Pipeline

_SHAPES = ((1, 16), (4, 16), (1, 64), (4, 64), (1, 256), (4, 256))


def warm_up(pipeline: Pipeline, seconds: float = 2.0) -> int:
    """Run an engine's buckets, or a few shapes of one without any, up to twice; returns the number of batches.

    Twice, since a CUDA graph is captured when a shape comes back; the cost is learned from each shape's latest time.
    Must not be called while the pipeline serves. Raises EngineError.
    """
    embedder = pipeline.embedder
    contract, buckets = embedder.contract, embedder.loaded.engine.buckets
    shapes = [(b.rows, b.tokens) for b in buckets] or [shape for shape in _SHAPES if shape[1] <= contract.max_tokens]
    ran, end_s = 0, time.perf_counter() + seconds
    took: dict[tuple[int, int], float] = {}  # each shape's latest time
    for rows, tokens in [*shapes, *shapes]:
        if not buckets and ran and time.perf_counter() > end_s:
            break
        batch = make_batch([[contract.eos_id] * tokens] * rows, contract.pad_id)
        began_s = time.perf_counter()
        embedder.run(batch)
        took[rows, tokens] = time.perf_counter() - began_s
        ran += 1
    if 1 < ran <= len(shapes):  # a slow engine has run each shape once, and the very first time says little
        del took[shapes[0]]
    for (rows, tokens), took_s in took.items():
        pipeline.learn(rows, tokens, took_s)
    return ran
