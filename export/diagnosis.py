"""Why an engine failed: looks for the known causes and names the one that fits.

Runs only after a failure. Each hypothesis is tested against the reference, so what it says is measured, not guessed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import runtime
from export.checkpoint import Checkpoint
from export.encoder import build_encoder
from export.external_data import DataLayout
from export.precision import Precision
from export.reference import ReferenceVectors, unit
from export.samples import Sample
from export.weights import Weights, to_float32
from runtime.bundle import Bundle, EngineRecord
from runtime.errors import F2rtError
from runtime.golden import row_cosines
from runtime.tolerances import WEIGHT_MAX_ABS_DIFF

_PROBED_TEXTS = 8
_MATCH = 0.995  # a fault elsewhere in the graph may come with the one that is looked for
_LENGTH_ERROR = 1e-3
_NAMED = 5
_TRANSPOSED = ".transposed"


def diagnose(
    bundle: Bundle,
    record: EngineRecord,
    reference: ReferenceVectors,
    samples: Sequence[Sample],
    vectors: NDArray[np.float32] | None,
) -> list[str]:
    """Return one sentence per cause found, the most specific first; empty when nothing known fits.

    `vectors` are the engine's for single texts, or None when it did not run.
    """
    causes = [] if vectors is None else _non_finite(samples, vectors)
    try:
        checkpoint = Checkpoint.open(reference.location)
        model = ir.load(bundle.path(bundle.graph(record.precision).model.file))
        if bundle.graph(record.precision).origin:
            if causes and record.precision == Precision.FP16:
                causes.append("f2rt's own fp16 graph is made so that it cannot overflow: export without --from-onnx")
            causes += compare_foreign_weights(model, checkpoint.weights)
        elif record.precision == Precision.FP32:
            causes += compare_weights(model, checkpoint.weights) + compare_nodes(model, checkpoint)
    except F2rtError as error:
        causes.append(f"the graph could not be compared with the checkpoint: {error}")
    return causes if vectors is None else causes + _pooling(reference, samples, vectors)


def compare_nodes(model: ir.Model, checkpoint: Checkpoint) -> list[str]:
    """Compare the nodes of an fp32 graph with those this f2rt writes for the checkpoint; names what differs."""
    if (model.producer_name, model.producer_version) != ("f2rt", runtime.__version__):
        return []
    expected = build_encoder(checkpoint.config, DataLayout("unused"), producer_version=runtime.__version__)
    here, there = ({str(n.name): _spell(n) for n in m.graph} for m in (model, expected))
    names = [n for n in there | here if here.get(n) != there.get(n)]
    return [f"the node {n} is {here.get(n, 'absent')}, and should be {there.get(n, 'absent')}" for n in names[:_NAMED]]


def _spell(node: ir.Node) -> str:
    inputs = ", ".join(_spell_input(v) for v in node.inputs)
    # A float attribute is a float32 once it was saved.
    values = {
        n: np.float32(a.value) if a.type == ir.AttributeType.FLOAT else a.value for n, a in node.attributes.items()
    }
    attributes = "".join(f", {name}={values[name]}" for name in sorted(values))
    return f"{node.op_type}({inputs}{attributes})"


def _spell_input(value: ir.Value | None) -> str:
    """Return a value's name; for a small constant its content, since that is what a change would hide in."""
    if value is None:
        return "-"
    constant = value.const_value
    return str(constant.numpy().tolist()) if constant is not None and constant.size <= 4 else str(value.name)


def compare_weights(model: ir.Model, weights: Weights) -> list[str]:
    """Compare every weight of an fp32 graph with the checkpoint's, bit for bit; names what differs."""
    found = []
    for name, value in model.graph.initializers.items():
        source = name.removesuffix(_TRANSPOSED)
        if source not in weights or value.const_value is None:
            continue
        here = value.const_value.numpy()
        there = to_float32(weights.read(source))
        there = there.T if name.endswith(_TRANSPOSED) else there
        if here.shape != there.shape:
            found.append(f"the weight {source} has shape {here.shape} in the graph, {there.shape} in the checkpoint")
            continue
        with np.errstate(invalid="ignore"):
            worst = float(np.abs(here - there).max())
        if not worst <= WEIGHT_MAX_ABS_DIFF:
            zero = " and is all zero there" if not here.any() else ""
            found.append(f"the weight {source} differs in the graph by up to {worst:.3g}{zero}")
    more = [f"… and {len(found) - _NAMED} more weights"] if len(found) > _NAMED else []
    return found[:_NAMED] + more


def compare_foreign_weights(model: ir.Model, weights: Weights) -> list[str]:
    """Look for each weight of the checkpoint in a graph with names and orientations of its own, by content alone."""
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    floats = [t for t in tensors if t.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16) and t.size > 1]
    dtypes = {t.dtype.numpy() for t in floats}
    # Compared as float32: a half-precision export widens some of its rounded weights again.
    there = {_digest(t.numpy().astype(np.float32)) for t in floats}
    names = [n for n in weights.names() if n != "lm_head.weight" and not n.endswith("inv_freq")]
    lost = [n for n in names if not any(_either_way(to_float32(weights.read(n)), d) & there for d in dtypes)]
    if not lost:
        return [f"all {len(names)} weights of the checkpoint are in the graph: what differs is how it computes"]
    if 2 * len(lost) > len(names):
        return [
            f"{len(lost)} of {len(names)} weights of the checkpoint are not in the graph: it was exported from another "
            "checkpoint, or rewritten afterwards"
        ]
    found = [f"the weight {name} of the checkpoint is not in the graph" for name in lost[:_NAMED]]
    return found + ([f"… and {len(lost) - _NAMED} more weights"] if len(lost) > _NAMED else [])


def _either_way(values: NDArray[np.float32], dtype: np.dtype[Any]) -> set[bytes]:
    """Return the digests of a tensor as it stands and transposed, rounded to `dtype` and widened again."""
    with np.errstate(over="ignore"):
        rounded = values.astype(dtype).astype(np.float32)
    return {_digest(rounded), _digest(rounded.T)}


def _digest(values: NDArray[Any]) -> bytes:
    digest = hashlib.sha256(str(values.shape).encode())
    digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.digest()


def _non_finite(samples: Sequence[Sample], vectors: NDArray[np.float32]) -> list[str]:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if not len(bad):
        return []
    first = samples[int(bad[0])]
    return [f"{len(bad)} vectors are not finite, the first for {first.text.id} ({len(first.ids)} tokens): overflow"]


def _pooling(reference: ReferenceVectors, samples: Sequence[Sample], vectors: NDArray[np.float32]) -> list[str]:
    """Test whether the vectors are those of another token, of the mean, or of a text without its EOS."""
    rows = [i for i, s in enumerate(samples) if 4 <= len(s.ids) <= 128 and np.isfinite(vectors[i]).all()]
    rows = rows[:_PROBED_TEXTS]
    if not rows:
        return []
    hidden = [reference.hidden(samples[i].ids) for i in rows]
    # Causality makes the state before EOS the same whether EOS follows or not, so one hypothesis covers both faults.
    hypotheses = {
        "the token before the last is pooled, or EOS is dropped": [unit(h[-2]) for h in hidden],
        "the first token is pooled": [unit(h[0]) for h in hidden],
        "the mean of all tokens is pooled": [unit(h.mean(axis=0)) for h in hidden],
    }
    here = vectors[rows]
    own = float(row_cosines(here, np.stack([samples[i].vector for i in rows])).min())
    if own >= _MATCH:
        long = bool(np.abs(np.linalg.norm(here, axis=1) - 1).max() > _LENGTH_ERROR)
        return ["the vectors are not normalized"] if long else []
    scores = {text: float(row_cosines(here, np.stack(v)).min()) for text, v in hypotheses.items()}
    text, cosine = max(scores.items(), key=lambda item: item[1])
    return [f"{text} (cosine to that {cosine:.5f}, to the right vector {own:.5f})"] if cosine >= _MATCH else []
