"""INT8: how good its vectors are on checkpoints made to break it, and that the graphs are what they claim to be."""

from __future__ import annotations

import itertools
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import quantize_dynamic
from typer.testing import CliRunner

from calibration.texts import Text, calibration_texts, check_disjoint, verification_texts
from export import int8
from export.checkpoint import Checkpoint
from export.cli import app
from export.config import EncoderConfig
from export.encoder import build_encoder
from export.external_data import DataLayout, write
from export.graphs import measure
from export.hub import locate
from export.int8 import Grid, groups, round_rows, row_scales, search
from export.pipeline import export_bundle
from export.precision import Precision
from export.quantize import fold
from export.report.terminal import describe_graph
from export.sensitivity import exclusions
from export.weights import to_float32
from runtime.batch import Batch
from runtime.bundle import Bundle, open_bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine, session_options
from runtime.errors import InputError
from runtime.golden import row_cosines
from runtime.loader import select
from runtime.settings import EngineSettings
from runtime.tokenizer import Instruction, TextTokenizer
from tests.hostile import HOSTILE, make_hard, make_hostile
from tests.narrow import rounded_vectors
from tests.neighbours import MEAN_COSINE, MIN_COSINE, OVERLAP, SMALLEST_DIM, cut, embed, overlap


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.MonkeyPatch().setenv("F2RT_CACHE", str(tmp_path_factory.mktemp("cache")))


class Made(dict[str, Bundle]):
    """Bundles with fp32 and INT8 by the checkpoint's name, made once when first asked for."""

    def __init__(self, mini: Path, root: Path, calibration: Sequence[Text]) -> None:
        self._mini, self._root, self._calibration = mini, root, calibration

    def __missing__(self, name: str) -> Bundle:
        mini, folder = self._mini, self._root / name
        makers = {"mini": lambda: mini, "hard": lambda: make_hard(mini, folder)}
        checkpoint = Checkpoint.open(locate(str(makers.get(name, lambda: make_hostile(mini, folder, name))())))
        precisions = [Precision.FP32, Precision.INT8]
        target = self._root / f"{name}.bundle"
        self[name] = export_bundle(checkpoint, target, precisions, calibration=self._calibration)
        return self[name]


@pytest.fixture(scope="module")
def made(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Made of a quarter of the calibration texts: quick, and good enough for most of the verification texts."""
    return Made(mini, tmp_path_factory.mktemp("int8"), calibration_texts()[::4])


@pytest.fixture(scope="module")
def made_of_all(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Made as `f2rt export` does by default."""
    return Made(mini, tmp_path_factory.mktemp("int8-all"), calibration_texts())


def engine_on(bundle: Bundle, file: str) -> OnnxRuntimeEngine:
    path = bundle.path(file)
    settings, exact = EngineSettings(), file == "graphs/int8-uint8.onnx"
    return OnnxRuntimeEngine(path, name="x", precision="int8", fingerprint="", settings=settings, exact=exact)


def token_ids(bundle: Bundle, step: int = 1) -> list[list[int]]:
    """Tokenize every `step`-th verification text with its prompt."""
    contract = bundle.manifest.contract
    texts = verification_texts()[::step]
    rendered = [contract.prompts.get(t.prompt or "", "") + t.text for t in texts]
    tokenizer = TextTokenizer(bundle.path(bundle.manifest.tokenizer.file), contract)
    return [item.ids for item in tokenizer.encode(rendered, Instruction(prompt=""))]


def run_as(bundle: Bundle, file: str, sequences: list[list[int]]) -> NDArray[np.float32]:
    """Run the form for ONNX Runtime as it is served, the one for TensorRT with every float16 result rounded."""
    if file == "graphs/int8.onnx":
        return rounded_vectors(bundle.path(file), sequences)
    return embed(engine_on(bundle, file).run, sequences, bundle.manifest.contract.pad_id)


def check_quality(bundle: Bundle, file: str, step: int) -> None:
    """Compare with the fp32 graph, which parity holds to PyTorch, at every trained dimension from 32 on."""
    contract = bundle.manifest.contract
    sequences = token_ids(bundle, step)
    expected = embed(engine_on(bundle, "graphs/fp32.onnx").run, sequences, contract.pad_id)
    found = run_as(bundle, file, sequences)
    for dim in [d for d in contract.trained_dims if d >= SMALLEST_DIM]:
        a, b = cut(found, dim), cut(expected, dim)
        cosines, agreement = row_cosines(a, b), overlap(a, b)
        shown = f"dim {dim}: min {cosines.min():.5f}, mean {cosines.mean():.5f}, top-10 overlap {agreement:.4f}"
        assert cosines.min() >= MIN_COSINE, shown
        assert cosines.mean() >= MEAN_COSINE, shown
        assert agreement >= OVERLAP, shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mini", "hard", *sorted(HOSTILE)])
def test_quality_on_the_whole_verification_split(made_of_all: Made, name: str) -> None:
    check_quality(made_of_all[name], "graphs/int8-uint8.onnx", step=1)


@pytest.mark.parametrize("name", ["mini", "hard", pytest.param("everything", marks=pytest.mark.slow)])
def test_quality_on_part_of_the_verification_split(made: Made, name: str) -> None:
    check_quality(made[name], "graphs/int8-uint8.onnx", step=8)


@pytest.mark.parametrize("name", ["hard", pytest.param("everything", marks=pytest.mark.slow)])
def test_quality_of_the_graph_for_tensorrt(made: Made, name: str) -> None:
    """Node by node what the Q/DQ nodes and float16 results say: the numbers TensorRT's kernels stand for."""
    check_quality(made[name], "graphs/int8.onnx", step=8)


def test_plain_dynamic_quantization_fails_where_ours_holds(made: Made, tmp_path: Path) -> None:
    bundle = made["hard"]
    plain = tmp_path / "plain.onnx"
    quantize_dynamic(bundle.path("graphs/fp32.onnx"), plain, op_types_to_quantize=["MatMul"], per_channel=True)
    sequences, pad = token_ids(bundle, 8), bundle.manifest.contract.pad_id
    expected = embed(engine_on(bundle, "graphs/fp32.onnx").run, sequences, pad)
    engine = OnnxRuntimeEngine(plain, name="x", precision="int8", fingerprint="", settings=EngineSettings())
    cosines = row_cosines(embed(engine.run, sequences, pad), expected)
    assert cosines.min() < 0.9
    assert cosines.mean() < MEAN_COSINE


def test_calibration_and_verification_are_disjoint() -> None:
    check_disjoint(calibration_texts(), verification_texts())


def unfused(path: Path) -> Callable[[Batch], NDArray[np.float32]]:
    """Return how a graph runs node by node: what it computes, whatever 8-bit kernels this CPU has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda b: np.asarray(
        session.run(None, {"input_ids": b.input_ids, "attention_mask": b.attention_mask})[0], np.float32
    )


def test_twins_are_the_same_function(made: Made, tmp_path: Path) -> None:
    """The uint8 form with its zero point moved to int8 gives the same vectors: same grid, same integers."""
    bundle = made["mini"]
    model = onnx.load(bundle.path("graphs/int8-uint8.onnx"), load_external_data=False)
    (zero,) = [t for t in model.graph.initializer if t.name.startswith("zero_point")]
    assert onnx.numpy_helper.to_array(zero) == 128
    zero.CopyFrom(onnx.numpy_helper.from_array(np.array(0, np.int8), zero.name))
    del model.graph.value_info[:]
    shutil.copyfile(bundle.path("graphs/int8.onnx.data"), tmp_path / "int8.onnx.data")
    onnx.save(model, tmp_path / "int8.onnx")
    sequences = [s for s in token_ids(bundle, 40) if len(s) <= 128]
    pad = bundle.manifest.contract.pad_id
    a, b = (
        embed(unfused(path), sequences, pad) for path in (tmp_path / "int8.onnx", bundle.path("graphs/int8-uint8.onnx"))
    )
    # A sum rounded otherwise can tip a value over to the next integer; more than a few do not.
    assert row_cosines(a, b).min() > 0.9998
    assert np.median(np.abs(a - b).max(axis=1)) < 1e-3


def test_the_fast_kernels_compute_what_the_graph_says(made: Made) -> None:
    bundle = made["mini"]
    sequences = [s for s in token_ids(bundle, 40) if len(s) <= 128]
    pad = bundle.manifest.contract.pad_id
    fast = embed(engine_on(bundle, "graphs/int8-uint8.onnx").run, sequences, pad)
    plain = embed(unfused(bundle.path("graphs/int8-uint8.onnx")), sequences, pad)
    assert row_cosines(fast, plain).min() > 0.9998


def test_twins_hold_the_same_scales_bit_for_bit(made: Made) -> None:
    bundle = made["hard"]
    graphs = {f: ir.load(bundle.path(f"graphs/{f}.onnx")).graph.initializers for f in ("int8", "int8-uint8")}
    scales: dict[str, dict[str, list[bytes]]] = {}
    for file, initializers in graphs.items():
        for name, value in initializers.items():
            stem, found, _ = name.rpartition(".scale.")
            if found and value.const_value is not None:
                # One graph holds float16 and the other float32: widened, equal numbers are equal bytes.
                numbers = value.const_value.numpy().astype(np.float64)
                scales.setdefault(stem, {}).setdefault(file, []).append(numbers.tobytes())
    both = [set(itertools.chain(*found.values())) for found in scales.values() if len(found) == 2]
    assert len(both) > 28
    assert all(len(numbers) == 1 for numbers in both)
    assert graphs["int8"]["layers.0.mlp.up_proj.weight.transposed"].dtype == ir.DataType.INT8


def test_integer_kernels_are_really_used(made: Made, tmp_path: Path) -> None:
    bundle = made["mini"]
    options = session_options(exact=True)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(bundle.path("graphs/int8-uint8.onnx"), options, providers=["CPUExecutionProvider"])
    nodes = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    record = bundle.graph("int8").quantization
    assert record is not None
    names = {line.tensor for line in record.excluded}
    weights_only = sum(len(g.matrices) for g in groups(config_of(bundle)) if g.input in names)
    assert nodes["MatMulIntegerToFloat"] == 28 - weights_only
    assert nodes["MatMulNBits"] == weights_only
    assert nodes["MatMul"] == nodes["DequantizeLinear"] == 0


@pytest.mark.skipif(platform.machine() != "x86_64", reason="about kernels of x86")
@pytest.mark.parametrize("wide", [True, False], ids=["vnni", "avx2"])
def test_weights_keep_the_type_that_has_the_fast_kernels(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    """As uint8 they have no VNNI and no AMX kernels; as int8 they saturate without."""
    monkeypatch.setattr("runtime.engines.onnxruntime.has_wide_int8_products", lambda: wide)
    options = session_options(exact=True)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    graph = made["mini"].path("graphs/int8-uint8.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph
    types = {weight.name: weight.data_type for weight in optimized.initializer}
    products = [node for node in optimized.node if node.op_type == "MatMulIntegerToFloat"]
    assert {types[node.input[1]] for node in products} == {onnx.TensorProto.INT8 if wide else onnx.TensorProto.UINT8}


def config_of(bundle: Bundle) -> EncoderConfig:
    return Checkpoint.open(locate(bundle.manifest.source.id)).config


def test_graph_for_tensorrt_follows_its_rules(made: Made) -> None:
    """Symmetric, scalar activation scales, weight scales per output channel, one pair for q, k, v and for gate, up."""
    path = made["mini"].path("graphs/int8.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = ir.load(path)
    kinds = Counter(node.op_type for node in model.graph)
    forbidden = {"DynamicQuantizeLinear", "MatMulInteger", "QLinearMatMul"}
    assert not forbidden & set(kinds)
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            x, scale, zero = node.inputs
            assert scale is not None
            assert zero is not None
            assert x is not None
            assert scale.shape is not None
            assert scale.shape.rank() == 0
            assert zero.dtype == ir.DataType.INT8
            assert zero.const_value is not None
            assert zero.const_value.numpy() == 0
            assert all(user.op_type == "DequantizeLinear" for user, _ in node.outputs[0].uses())
        if node.op_type == "Attention":
            for value in node.inputs[:3]:
                assert value is not None
                producer = value.producer()
                assert producer is not None
                assert producer.op_type == "Cast"
    grid = next(n for n in model.graph if n.name == "layers.1.input_layernorm.grid")
    assert sorted(str(user.name)[-6:] for user, _ in grid.outputs[0].uses()) == ["k_proj", "q_proj", "v_proj"]
    for node in model.graph:
        if node.op_type == "MatMul":
            weight = node.inputs[1]
            assert weight is not None
            dequantize = weight.producer()
            assert dequantize is not None
            assert dequantize.op_type == "DequantizeLinear"
            assert dequantize.attributes["axis"].value == 1


def test_record_says_what_was_done_and_keeps_the_budget(made: Made) -> None:
    record = open_bundle(made["hard"].folder).graph("int8")
    assert record.quantization is not None
    assert record.twin is not None
    assert record.calibration_sha256
    assert record.quantization.budget == 0.9
    assert 0.9 <= record.quantization.int8_share <= 1
    inputs = {line.tensor: line for line in record.quantization.inputs}
    assert len(inputs) + len(record.quantization.excluded) == 16
    assert inputs["layers.0.input_layernorm"].alpha is not None
    assert all(line.method.split()[0] in ("max", "percentile", "mse") for line in inputs.values())
    left_out = {line.tensor for line in record.quantization.excluded}
    assert not left_out & set(inputs)
    engine = made["hard"].engine("onnxruntime:int8")
    assert engine.file == "graphs/int8-uint8.onnx"
    assert engine.calibration_sha256 == record.calibration_sha256


def test_smoothing_alone_changes_nothing(made: Made, tmp_path: Path) -> None:
    """All folds, in float32, with nothing rounded: what is left is rounding of float32, not function."""
    bundle = made["hard"]
    checkpoint = Checkpoint.open(locate(bundle.manifest.source.id))
    texts = [t for t in calibration_texts() if len(t.text) < 200][::8]
    measured = measure(checkpoint, bundle.folder, bundle.graph("fp32"), texts, lambda step, done: None)

    def read(name: str) -> NDArray[np.float32]:
        return to_float32(checkpoint.weights.read(name))

    grids = {g.input: search(g, checkpoint.config, measured.statistics, read) for g in groups(checkpoint.config)}
    assert max(float(grid.factors.max() / grid.factors.min()) for grid in grids.values()) > 16
    layout = DataLayout("smoothed.data")
    plan = fold(checkpoint.config, grids, measured.statistics, checkpoint.weights)
    model = build_encoder(checkpoint.config, layout, producer_version="test", plan=plan)
    write(layout, checkpoint.weights, tmp_path / "smoothed.data", lambda count: None)
    ir.save(model, tmp_path / "smoothed.onnx")
    engine = OnnxRuntimeEngine(
        tmp_path / "smoothed.onnx", name="x", precision="fp32", fingerprint="", settings=EngineSettings()
    )
    sequences = [s for s in token_ids(bundle, 25) if len(s) <= 256]
    pad = bundle.manifest.contract.pad_id
    difference = embed(engine.run, sequences, pad) - embed(engine_on(bundle, "graphs/fp32.onnx").run, sequences, pad)
    assert np.abs(difference).max() <= 1e-6


def test_auto_chooses_int8_once_it_has_passed_where_it_is_faster(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.prove import prove_bundle

    folder = Path(shutil.copytree(made["mini"].folder, tmp_path / "bundle"))
    report = prove_bundle(folder, [t for t in verification_texts() if len(t.text) < 200][::20])
    assert {e.engine: e.verdict for e in report.engines} == {"onnxruntime:fp32": "pass", "onnxruntime:int8": "pass"}
    for fast, chosen in ((True, "onnxruntime:int8"), (False, "onnxruntime:fp32")):
        monkeypatch.setattr("runtime.loader.has_fast_int8_products", lambda fast=fast: fast)
        assert select(open_bundle(folder), "auto")[0].name == chosen


def test_row_scales_are_float16_numbers_that_cut_nothing_off() -> None:
    largest = np.array([0.0, 1e-9, 1e-3, 0.5, 127.0, 4000.0], np.float32)
    scales = row_scales(largest)
    assert (scales == scales.astype(np.float16).astype(np.float32)).all()
    assert (scales * 127 >= largest).all()
    assert (scales[2:] <= largest[2:] / 127 * 1.01).all()
    assert scales[0] == 2**-20


def test_round_rows_is_off_by_half_a_step_at_most() -> None:
    matrix = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    steps = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(round_rows(matrix) - matrix) <= steps * 0.5001).all()


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (1000, 700), (3, 70_000)])
def test_round_rows_in_blocks_is_round_rows(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=shape).astype(np.float32)
    matrix[0] = 0
    factors = np.exp2(rng.normal(size=shape[1])).astype(np.float32)
    smoothed = matrix * factors
    scales = np.maximum(np.abs(smoothed).max(axis=1, keepdims=True) / np.float32(127), np.float32(1e-30))
    before = matrix.copy()
    np.testing.assert_array_equal(round_rows(matrix, factors), np.rint(smoothed / scales) * scales)
    np.testing.assert_array_equal(round_rows(smoothed), round_rows(matrix, factors))
    np.testing.assert_array_equal(matrix, before)


def test_exclusions_take_the_most_harmful_within_the_budget() -> None:
    work = {"a": 1.0, "b": 1.0, "c": 8.0, "d": 90.0}
    impact = {"a": 5.0, "b": 30.0, "c": 60.0, "d": 5.0}
    assert exclusions(impact, work, 0.9) == ["b", "c"]
    assert exclusions(impact, work, 0.98) == ["b", "a"]  # c does not fit
    assert exclusions(impact, work, 1.0) == []
    assert exclusions(dict.fromkeys(work, 1.0), dict.fromkeys(work, 1.0), 0.5) == []  # nothing stands out


def test_a_smaller_budget_leaves_more_out(made: Made, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(locate(made["mini"].manifest.source.id))
    bundle = export_bundle(
        checkpoint, tmp_path / "b", [Precision.INT8], int8_budget=1.0, calibration=calibration_texts()[::32]
    )
    record = bundle.graph("int8").quantization
    assert record is not None
    assert (record.int8_share, record.excluded) == (1.0, [])
    assert [g.precision for g in bundle.manifest.graphs] == ["int8"]
    files = sorted(p.name for p in bundle.path("graphs").iterdir())
    assert files == ["int8-uint8.onnx", "int8.onnx", "int8.onnx.data", "int8.plan.npz"]


@pytest.mark.parametrize("budget", ["0", "-1", "1.01", "nan"])
def test_budget_out_of_range(mini: Path, tmp_path: Path, budget: str) -> None:
    arguments = ["export", str(mini), "--out", str(tmp_path / "b"), "--precision", "int8", "--int8-budget", budget]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert "INT8 budget" in done.output
    assert not (tmp_path / "b").exists()


def test_smoothing_and_range_are_searched_for_each_input(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fixed choice is as good, for any input; and what is best differs between them."""
    bundle = made["hard"]
    checkpoint = Checkpoint.open(locate(bundle.manifest.source.id))
    texts = [t for t in calibration_texts() if len(t.text) < 200][::8]
    measured = measure(checkpoint, bundle.folder, bundle.graph("fp32"), texts, lambda step, done: None)

    def searched() -> list[Grid]:
        return [
            search(g, checkpoint.config, measured.statistics, lambda name: to_float32(checkpoint.weights.read(name)))
            for g in groups(checkpoint.config)
        ]

    best = searched()
    assert len({grid.alpha for grid in best}) > 2
    assert len({grid.method for grid in best}) > 1
    alphas = int8.ALPHAS
    monkeypatch.setattr(int8, "RATIOS", ())
    monkeypatch.setattr(int8, "RANGE_PERCENTILES", ())
    gained = []
    for alpha in (alphas[0], 0.5, alphas[-1]):
        monkeypatch.setattr(int8, "ALPHAS", (alpha,))
        fixed = searched()
        assert all(one.error <= other.error for one, other in zip(best, fixed, strict=True))
        gained.append(sum(one.error < 0.95 * other.error for one, other in zip(best, fixed, strict=True)))
    assert min(gained) > 0


def test_search_without_rows_is_an_error(made: Made) -> None:
    from calibration.statistics import Statistics

    checkpoint = Checkpoint.open(locate(made["mini"].manifest.source.id))
    group = groups(checkpoint.config)[0]
    with pytest.raises(InputError, match="no rows of layers"):
        search(group, checkpoint.config, Statistics({}, 0), lambda name: to_float32(checkpoint.weights.read(name)))


def test_a_dead_layer_is_no_trouble(mini_copy: Path, tmp_path: Path) -> None:
    """Pruned: a norm of zeros makes every input after it zero."""
    from safetensors.numpy import load_file, save_file

    path = mini_copy / "model.safetensors"
    tensors = {k: np.array(v) for k, v in load_file(path).items()}
    tensors["layers.2.post_attention_layernorm.weight"][:] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    checkpoint = Checkpoint.open(locate(str(mini_copy)))
    precisions = [Precision.FP32, Precision.INT8]
    bundle = export_bundle(checkpoint, tmp_path / "b", precisions, calibration=calibration_texts()[::32])
    sequences, pad = token_ids(bundle, 40), bundle.manifest.contract.pad_id
    expected = embed(engine_on(bundle, "graphs/fp32.onnx").run, sequences, pad)
    for file in ("graphs/int8.onnx", "graphs/int8-uint8.onnx"):
        assert row_cosines(run_as(bundle, file, sequences), expected).min() >= MIN_COSINE


def test_report_says_what_was_left_out(made: Made) -> None:
    (line,) = describe_graph(made["hard"].graph("int8"))
    assert "of the matrix work multiplies in INT8 (at least 90%)" in line
    assert "mlp.gated (" in line
    rescaled = describe_graph(made["everything"].graph("int8"))
    assert "rescaled by powers of two" in rescaled[0]
