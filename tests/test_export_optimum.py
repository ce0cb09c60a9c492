"""Real exports by optimum-onnx, from an environment of its own; skipped where that was not created."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.optimum import KINDS, QUANTIZED, REFUSED, STAMP, export_optimum
from calibration.texts import verification_texts
from export.build import add_engine
from export.checkpoint import Checkpoint
from export.parity import check_bundle
from export.precision import Precision
from export.profiles import Profile
from export.reference import Reference
from runtime.errors import EngineError, InputError
from tests.foreign import adopt

pytestmark = pytest.mark.skipif(
    not STAMP.is_file(), reason="no environment with optimum-onnx here; `make optimum-check` creates .venv-optimum"
)

TEXTS = [t for t in verification_texts() if len(t.text) < 250][::17]
OUTPUTS = {"sentence-transformers": "token_embeddings"}
DROPPED = {"sentence-transformers": 1, "with-past": 8}


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in REFUSED])
def test_export_is_taken_in_and_proven(
    kind: str, mini: Path, checkpoint: Checkpoint, reference: Reference, tmp_path: Path
) -> None:
    bundle = adopt(checkpoint, export_optimum(mini, tmp_path, kind), tmp_path / "bundle")
    (graph,) = bundle.manifest.graphs
    origin = graph.origin
    assert origin is not None
    assert graph.precision == ("fp16" if kind == "fp16" else "fp32")
    assert graph.opset == (14 if kind == "opset 14" else 18)
    assert origin.hidden_states == OUTPUTS.get(kind, "last_hidden_state")
    assert len(origin.dropped_outputs) == DROPPED.get(kind, 0)
    assert origin.generated_inputs == ([] if kind == "sentence-transformers" else ["position_ids"])
    (engine,) = check_bundle(bundle, reference, TEXTS)[0].engines
    assert engine.verdict == "pass"
    if kind == "fp16":
        with pytest.raises(EngineError, match="matrix products of the graph are not fp16"):
            add_engine(bundle.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89")


@pytest.mark.parametrize("kind", REFUSED)
def test_export_is_refused(kind: str, mini: Path, checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = export_optimum(mini, tmp_path, kind)
    words = "is quantized" if kind == QUANTIZED else "is a text-generation export: it gives logits"
    with pytest.raises(InputError, match=words):
        adopt(checkpoint, source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
