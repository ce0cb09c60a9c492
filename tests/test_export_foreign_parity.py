"""Graphs that other tools exported, compared with PyTorch: those that are right pass, and every fault is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from bench.stock_export import export_stock
from calibration.texts import Text, verification_texts
from export.checkpoint import Checkpoint
from export.hub import locate
from export.parity import check_bundle
from export.prove import prove_bundle
from export.reference import Reference
from export.report.data import EngineReport
from runtime.bundle import Bundle, open_bundle
from runtime.embedder import open_embedder
from tests.foreign import Stock, adopt, edited, half, node
from tests.hostile import make_hostile


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [t for t in verification_texts() if len(t.text) < 250][::17]


def report_of(bundle: Bundle, reference: Reference, texts: Sequence[Text]) -> EngineReport:
    (engine,) = check_bundle(bundle, reference, texts)[0].engines
    return engine


@pytest.mark.parametrize(
    ("kind", "generated"),
    [("dynamic", 0), ("legacy", 1), pytest.param("past", 8, marks=pytest.mark.slow)],
    ids=["default export", "with position_ids", "with a past"],
)
def test_parity_proves_it(
    checkpoint: Checkpoint,
    stock: Stock,
    reference: Reference,
    texts: list[Text],
    tmp_path: Path,
    kind: str,
    generated: int,
) -> None:
    bundle = adopt(checkpoint, stock(kind), tmp_path / "bundle")
    origin = bundle.manifest.graphs[0].origin
    assert origin is not None
    assert len(origin.generated_inputs) == generated
    assert len(origin.dropped_outputs) == (8 if kind == "past" else 0)
    report = report_of(bundle, reference, texts)
    assert report.verdict == "pass"
    assert {"single", "batch", "equal length", "padded"} <= {c.name for c in report.checks}
    assert min(c.cosine_min for c in report.checks) > 1 - 1e-9


def test_proven_graph_answers(checkpoint: Checkpoint, stock: Stock, bundle: Bundle, tmp_path: Path) -> None:
    """From the export to the runtime, whose golden check it passes; the vectors are those of our own graph."""
    texts = [t for t in verification_texts() if len(t.text) < 100][::9]
    folder = adopt(checkpoint, stock("legacy"), tmp_path / "bundle").folder
    assert prove_bundle(folder, texts).verdict == "pass"
    words = ["a short text", "ein etwas längerer Text, damit gepolstert wird", "x"]
    there, here = open_embedder(open_bundle(folder)).embed(words), open_embedder(bundle).embed(words)
    np.testing.assert_allclose(there.vectors, here.vectors, atol=1e-6)
    assert there.fingerprint != here.fingerprint


def narrow_inputs(model: ir.Model) -> None:
    """Ids and mask of type int32, as some exports have them, in operators that take no other type beside it."""
    one = ir.Value(name="int32.one", const_value=ir.tensor(np.array(1, np.int32), name="int32.one"))
    model.graph.register_initializer(one)
    for value in list(model.graph.inputs):
        product = node("Mul", value, one)
        cast = node("Cast", product.outputs[0], to=ir.DataType.INT64)
        product.outputs[0].name, cast.outputs[0].name = f"{value.name}.narrow", f"{value.name}.wide"
        model.graph.insert_before(next(iter(model.graph)), [product, cast])
        ir.convenience.replace_all_uses_with(value, cast.outputs[0])
        product.replace_input_with(0, value)
        value.type = ir.TensorType(ir.DataType.INT32)


def no_mask(model: ir.Model) -> None:
    """A graph that is causal and takes no mask: all columns count."""
    ids, mask = model.graph.inputs
    shape = node("Shape", ids)
    ones = node("ConstantOfShape", shape.outputs[0], value=ir.tensor(np.ones(1, np.int64)))
    shape.outputs[0].name, ones.outputs[0].name = "ids.shape", "all.ones"
    model.graph.insert_before(next(iter(model.graph)), [shape, ones])
    ir.convenience.replace_all_uses_with(mask, ones.outputs[0])
    model.graph.inputs.remove(mask)


def pooled_besides(model: ir.Model) -> None:
    """Outputs as sentence-transformers calls them, with a vector that is pooled in another way."""
    (hidden,) = model.graph.outputs
    hidden.name = "token_embeddings"
    mean = node("ReduceMean", hidden, keepdims=0)
    axes = ir.Value(name="the.axis", const_value=ir.tensor(np.array([1]), name="the.axis"))
    model.graph.register_initializer(axes)
    mean.resize_inputs(2)
    mean.replace_input_with(1, axes)
    mean.outputs[0].name = "sentence_embedding"
    mean.outputs[0].type, mean.outputs[0].shape = hidden.type, ir.Shape(["batch", 256])
    model.graph.append(mean)
    model.graph.outputs.append(mean.outputs[0])


def our_names_inside(model: ir.Model) -> None:
    """An inner value has the name of our output, and the only output a name of its own."""
    (hidden,) = model.graph.outputs
    hidden.name = "encoded"
    next(n for n in model.graph if n.op_type == "Sigmoid").outputs[0].name = "sentence_embedding"


@pytest.mark.parametrize("change", [narrow_inputs, no_mask, pooled_besides, our_names_inside])
def test_variations_are_brought_to_the_contract(
    checkpoint: Checkpoint,
    stock: Stock,
    reference: Reference,
    texts: list[Text],
    tmp_path: Path,
    change: Callable[[ir.Model], None],
) -> None:
    given = edited(stock("dynamic"), tmp_path / "given", change)
    bundle = adopt(checkpoint, given, tmp_path / "bundle")
    onnx.checker.check_model(str(bundle.path("graphs/fp32.onnx")), full_check=True)
    assert report_of(bundle, reference, texts[:20]).verdict == "pass"
    origin = bundle.manifest.graphs[0].origin
    assert origin is not None
    expected = {"pooled_besides": "token_embeddings", "our_names_inside": "encoded"}
    assert origin.hidden_states == expected.get(change.__name__, "last_hidden_state")
    assert origin.dropped_outputs == (["sentence_embedding"] if change is pooled_besides else [])


@pytest.mark.parametrize("maker", ["torch", "onnxruntime"])
def test_half_precision_is_recorded_as_such(
    checkpoint: Checkpoint, stock: Stock, reference: Reference, texts: list[Text], tmp_path: Path, maker: str
) -> None:
    given = stock("half") if maker == "torch" else half(stock("legacy"), tmp_path / "given")
    bundle = adopt(checkpoint, given, tmp_path / "bundle")
    assert [g.precision for g in bundle.manifest.graphs] == ["fp16"]
    assert [e.name for e in bundle.manifest.engines] == ["onnxruntime:fp16"]
    output = onnx.load(bundle.path("graphs/fp16.onnx"), load_external_data=False).graph.output[0]
    assert output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    report = report_of(bundle, reference, texts[:20])
    assert report.verdict == "pass"
    assert report.precision == "fp16"
    assert 1e-9 < 1 - min(c.cosine_min for c in report.checks) < 1e-4  # it did run in half precision


def test_half_precision_that_overflows_is_caught(mini: Path, texts: list[Text], tmp_path: Path) -> None:
    """A function-preserving twin of the checkpoint: the plain cast of its export gives NaN."""
    folder = make_hostile(mini, tmp_path / "hostile", "everything")
    given = half(export_stock(folder, tmp_path / "export", "legacy"), tmp_path / "given")
    bundle = adopt(Checkpoint.open(locate(str(folder))), given, tmp_path / "bundle")
    report = report_of(bundle, Reference(locate(str(folder))), texts[:10])
    assert report.verdict == "fail"
    assert any("not finite" in line for line in report.diagnosis)
    assert any("cannot overflow: export without --from-onnx" in line for line in report.diagnosis)
    assert any("a pass there says nothing" in notice for notice in bundle.manifest.notices)


def change_weights(folder: Path, target: Path, names: Sequence[str]) -> Path:
    """Scale weights in an export, wherever they lie in its data file."""
    shutil.copytree(folder, target)
    model = onnx.load(target / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place and any(name in tensor.name for name in names):
            with (target / "model.onnx.data").open("r+b") as file:
                file.seek(int(place["offset"]))
                values = np.frombuffer(file.read(int(place["length"])), np.float32)
                file.seek(int(place["offset"]))
                file.write((values * np.float32(1.25) + np.float32(0.01)).tobytes())
    return target


def test_other_weights_are_caught_and_named(
    checkpoint: Checkpoint, stock: Stock, reference: Reference, texts: list[Text], tmp_path: Path
) -> None:
    one = change_weights(stock("dynamic"), tmp_path / "one", ["layers.2.input_layernorm.weight"])
    report = report_of(adopt(checkpoint, one, tmp_path / "a"), reference, texts[:10])
    assert report.verdict == "fail"
    assert "the weight layers.2.input_layernorm.weight of the checkpoint is not in the graph" in report.diagnosis
    everything = change_weights(stock("dynamic"), tmp_path / "all", [""])
    report = report_of(adopt(checkpoint, everything, tmp_path / "b"), reference, texts[:10])
    assert report.verdict == "fail"
    assert any("46 of 46 weights" in line and "another checkpoint" in line for line in report.diagnosis)


def test_other_computation_is_caught(
    checkpoint: Checkpoint, stock: Stock, reference: Reference, texts: list[Text], tmp_path: Path
) -> None:
    """The rotation turned the wrong way round: every weight is right, and the vectors are not."""

    def turn(model: ir.Model) -> None:
        (sine,) = [n for n in model.graph if n.op_type == "Sin"]
        sine.op_type = "Cos"

    given = edited(stock("dynamic"), tmp_path / "given", turn)
    report = report_of(adopt(checkpoint, given, tmp_path / "bundle"), reference, texts[:10])
    assert report.verdict == "fail"
    assert any("all 46 weights of the checkpoint are in the graph" in line for line in report.diagnosis)


def test_rewritten_half_graph_is_diagnosed_by_content(
    checkpoint: Checkpoint, stock: Stock, reference: Reference, texts: list[Text], tmp_path: Path
) -> None:
    """Names and orientations of a foreign graph are its own; the diagnosis reads neither, in either precision."""

    def turn(model: ir.Model) -> None:
        next(n for n in model.graph if n.op_type == "Sin").op_type = "Cos"

    given = edited(stock("half"), tmp_path / "given", turn)
    report = report_of(adopt(checkpoint, given, tmp_path / "bundle"), reference, texts[:10])
    assert report.verdict == "fail"
    assert any("all 46 weights" in line for line in report.diagnosis)
