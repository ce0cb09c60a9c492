"""The graph's structure and what it computes, with nothing but onnxruntime and tokenizers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from tokenizers import Tokenizer

from calibration.texts import verification_texts
from export.checkpoint import Checkpoint
from export.encoder import OUTPUT, build_encoder, rotary_tables
from export.external_data import ALIGNMENT_BYTES, DataLayout
from export.reference import Reference
from runtime.bundle import Bundle
from runtime.golden import row_cosines
from runtime.tolerances import TOLERANCES

STANDARD_OPS = {
    "Add",
    "Attention",
    "Cast",
    "Expand",
    "Gather",
    "GatherND",
    "LpNormalization",
    "MatMul",
    "Mul",
    "RMSNormalization",
    "Range",
    "ReduceSum",
    "Reshape",
    "RotaryEmbedding",
    "Shape",
    "Sigmoid",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.path("graphs/fp32.onnx"), load_external_data=False)


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def attribute(node: onnx.NodeProto, name: str) -> object:
    return next(onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def test_model_is_valid(bundle: Bundle) -> None:
    onnx.checker.check_model(str(bundle.path("graphs/fp32.onnx")), full_check=True)


def test_inputs_and_output_are_the_contract(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    assert [signature(v) for v in model.graph.input] == [
        ("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"]),
        ("attention_mask", onnx.TensorProto.INT64, ["batch", "sequence"]),
    ]
    assert [signature(v) for v in model.graph.output] == [
        ("sentence_embedding", onnx.TensorProto.FLOAT, ["batch", checkpoint.config.hidden_size])
    ]


def test_only_standard_operators_of_one_opset(model: onnx.ModelProto) -> None:
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 23)]
    assert {n.op_type for n in model.graph.node} <= STANDARD_OPS
    assert {n.domain for n in model.graph.node} == {""}


def test_one_attention_a_layer_causal_but_in_the_last(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    attention = nodes(model, "Attention")
    config = checkpoint.config
    assert len(attention) == config.layers
    for node in attention:
        assert attribute(node, "q_num_heads") == config.heads
        assert attribute(node, "kv_num_heads") == config.kv_heads  # grouped: K and V are not expanded
    *others, last = attention
    assert [attribute(n, "is_causal") for n in others] == [1] * (config.layers - 1)
    assert [len(n.input) for n in others] == [3] * (config.layers - 1)  # no mask
    assert attribute(last, "is_causal") == 0
    assert last.input[3] == "key_mask.out"


def test_no_mask_subgraph_and_no_guards(model: onnx.ModelProto) -> None:
    """A BxSxS mask shows as Where, Trilu, comparisons or a Tile; guards as IsNaN and Where."""
    kinds = Counter(n.op_type for n in model.graph.node)
    for kind in ("Where", "IsNaN", "Trilu", "Less", "LessOrEqual", "GreaterOrEqual", "Equal", "And", "Tile", "Concat"):
        assert kinds[kind] == 0
    assert [n.name for n in nodes(model, "Expand")] == ["position_ids"]
    assert kinds["Cast"] == 1  # attention_mask to bool for the last layer, one [batch, 1, 1, sequence]


def test_last_layer_works_on_the_pooled_token_only(model: onnx.ModelProto, checkpoint: Checkpoint) -> None:
    """Infer shapes with concrete sizes: behind the pool every matrix product has one row a text."""
    batch, sequence = 3, 11
    concrete = onnx.ModelProto()
    concrete.CopyFrom(model)
    for value in concrete.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (batch, sequence), strict=True):
            dim.dim_value = size
    inferred = onnx.shape_inference.infer_shapes(concrete, data_prop=True)
    rows = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][:2] for v in inferred.graph.value_info}
    last = f"layers.{checkpoint.config.layers - 1}."
    for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert rows[f"{last}{part}.out"] == [batch, 1], part
        assert rows[f"layers.0.{part}.out"] == [batch, sequence], part
    for part in ("self_attn.k_proj", "self_attn.v_proj"):
        assert rows[f"{last}{part}.out"] == [batch, sequence], part


def test_every_weight_is_placed_once_and_aligned(checkpoint: Checkpoint) -> None:
    layout = DataLayout("x.data")
    build_encoder(checkpoint.config, layout, producer_version="test")
    sources = Counter(e.source for e in layout.entries if e.source)
    assert sources == dict.fromkeys(checkpoint.config.weight_shapes(), 1)
    assert all(e.offset % ALIGNMENT_BYTES == 0 for e in layout.entries)
    ends = [e.offset + e.size_bytes for e in layout.entries]
    assert all(end <= entry.offset for end, entry in zip(ends, layout.entries[1:], strict=False))


def test_rotary_tables_follow_the_definition(checkpoint: Checkpoint) -> None:
    cos, sin = rotary_tables(checkpoint.config)
    position, pair = 777, 5
    angle = position * checkpoint.config.rope_theta ** (-2 * pair / checkpoint.config.head_dim)
    assert cos[position, pair] == pytest.approx(np.cos(angle), abs=1e-4)
    assert sin[position, pair] == pytest.approx(np.sin(angle), abs=1e-4)
    assert cos.shape == (checkpoint.config.max_positions, checkpoint.config.head_dim // 2)


def test_graph_alone_gives_transformers_vectors(bundle: Bundle, reference: Reference, checkpoint: Checkpoint) -> None:
    """Nothing of the runtime: an onnxruntime session, the tokenizer file, and the contract in the manifest."""
    tokenizer = Tokenizer.from_file(str(bundle.path("tokenizer.json")))
    session = onnxruntime.InferenceSession(bundle.path("graphs/fp32.onnx"), providers=["CPUExecutionProvider"])
    texts = [t.text for t in verification_texts() if 0 < len(t.text) < 300][::12]
    rows = [tokenizer.encode(text).ids for text in texts]
    width = max(map(len, rows)) + 3
    input_ids = np.array([r + [checkpoint.contract.pad_id] * (width - len(r)) for r in rows])
    attention_mask = np.array([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    (found,) = session.run([OUTPUT], {"input_ids": input_ids, "attention_mask": attention_mask})
    expected = np.stack([reference.embed(reference.tokenize(text, 1024)) for text in texts])
    assert len(texts) >= 20
    assert row_cosines(found, expected).min() >= TOLERANCES["fp32"].min_cosine
    assert np.abs(found - expected).max() < 1e-5


def test_what_stands_in_the_padding_changes_nothing(bundle: Bundle) -> None:
    session = onnxruntime.InferenceSession(bundle.path("graphs/fp32.onnx"), providers=["CPUExecutionProvider"])
    mask = np.array([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1]])
    ids = np.array([[11, 12, 15986, 0, 0, 0], [1, 2, 3, 4, 5, 15986]])
    other = ids.copy()
    other[0, 3:] = [900, 15986, 77]
    (a,) = session.run(None, {"input_ids": ids, "attention_mask": mask})
    (b,) = session.run(None, {"input_ids": other, "attention_mask": mask})
    np.testing.assert_array_equal(a, b)


def test_positions_reach_the_models_limit_and_no_further(bundle: Bundle, checkpoint: Checkpoint) -> None:
    session = onnxruntime.InferenceSession(bundle.path("graphs/fp32.onnx"), providers=["CPUExecutionProvider"])
    n = checkpoint.config.max_positions + 1
    ones = np.ones((1, n), np.int64)
    with pytest.raises(Exception, match=r"position|sequence|rotary|out of"):
        session.run(None, {"input_ids": ones, "attention_mask": ones})


def test_building_the_graph_needs_neither_torch_nor_weights(mini: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from export.checkpoint import Checkpoint\nfrom export.hub import locate\n"
        "from export.encoder import build_encoder\nfrom export.external_data import DataLayout\n"
        f"c = Checkpoint.open(locate({str(mini)!r}))\n"
        "c.weights.read = c.weights.rows = None\n"
        "print(len(build_encoder(c.config, DataLayout('d'), producer_version='t').graph))\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 100
