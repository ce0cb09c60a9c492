"""Why an engine failed: looks for the known causes and names the one that fits.

Runs only after a failure. Each hypothesis is tested against the reference, so what it says is measured, not guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.hub import locate
from export.reference import Reference, unit
from export.weights import Weights, to_float32
from runtime.bundle import Bundle, EngineRecord
from runtime.errors import F2rtError
from runtime.golden import row_cosines
from runtime.tolerances import WEIGHT_MAX_ABS_DIFF

if TYPE_CHECKING:
    from export.parity import Sample

_PROBED_TEXTS = 8
_MATCH = 0.9999
_TRANSPOSED = ".transposed"


def diagnose(
    bundle: Bundle,
    record: EngineRecord,
    reference: Reference,
    samples: Sequence[Sample],
    vectors: NDArray[np.float32],
) -> list[str]:
    """Return one sentence per cause found, the most specific first; empty when nothing known fits."""
    causes = _non_finite(samples, vectors)
    try:
        weights = Checkpoint.open(locate(bundle.manifest.source.id, bundle.manifest.source.revision)).weights
        causes += compare_weights(bundle, record, weights)
    except F2rtError as error:
        causes.append(f"the weights could not be compared: {error}")
    return causes + _pooling(reference, samples, vectors)


def compare_weights(bundle: Bundle, record: EngineRecord, weights: Weights) -> list[str]:
    """Compare every weight of an fp32 graph with the checkpoint's, bit for bit."""
    graph = bundle.graph(record.precision)
    found = []
    for name, value in ir.load(bundle.path(graph.model.file)).graph.initializers.items():
        source = name.removesuffix(_TRANSPOSED)
        if source not in weights or value.const_value is None:
            continue
        here = value.const_value.numpy()
        there = to_float32(weights.read(source))
        there = there.T if name.endswith(_TRANSPOSED) else there
        if here.shape != there.shape:
            found.append(f"the weight {source} has shape {here.shape} in the graph, {there.shape} in the checkpoint")
            continue
        worst = float(np.abs(here - there).max())
        if not worst <= WEIGHT_MAX_ABS_DIFF:
            zero = " and is all zero there" if not here.any() else ""
            found.append(f"the weight {source} differs in the graph by up to {worst:.3g}{zero}")
    return found


def _non_finite(samples: Sequence[Sample], vectors: NDArray[np.float32]) -> list[str]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if not len(bad):
        return []
    first = samples[int(bad[0])]
    return [f"{len(bad)} vectors are not finite, the first for {first.text.id} ({len(first.ids)} tokens): overflow"]


def _pooling(reference: Reference, samples: Sequence[Sample], vectors: NDArray[np.float32]) -> list[str]:
    """Test whether the vectors are those of another token, of the mean, or of a text without its EOS."""
    rows = [i for i, s in enumerate(samples) if 4 <= len(s.ids) <= 128 and np.isfinite(vectors[i]).all()]
    rows = rows[:_PROBED_TEXTS]
    if not rows:
        return []
    hidden = [reference.hidden(samples[i].ids) for i in rows]
    hypotheses = {
        "the token before the last is pooled": [unit(h[-2]) for h in hidden],
        "the first token is pooled": [unit(h[0]) for h in hidden],
        "the mean of all tokens is pooled": [unit(h.mean(axis=0)) for h in hidden],
        "EOS is dropped: the vector is that of the text without it": [
            reference.embed(samples[i].ids[:-1]) for i in rows
        ],
    }
    here = vectors[rows]
    own = row_cosines(here, np.stack([samples[i].vector for i in rows])).min()
    if own >= _MATCH:
        long = bool(np.abs(np.linalg.norm(here, axis=1) - 1).max() > 1e-3)
        return ["the vectors are not normalized"] if long else []
    return [
        f"{text} (cosine to that {cosine:.5f}, to the right vector {own:.5f})"
        for text, expected in hypotheses.items()
        if (cosine := row_cosines(here, np.stack(expected)).min()) >= _MATCH
    ]
