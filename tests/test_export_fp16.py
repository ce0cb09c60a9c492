"""FP16 that is safe by construction: hostile twins of the bundled checkpoint, the plan, and the graph's structure."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calibration.texts import calibration_texts, verification_texts
from export.checkpoint import Checkpoint
from export.encoder import build_encoder
from export.external_data import DataLayout, write
from export.graphs import measure, rescale_plan
from export.hub import locate
from export.parity import check_bundle
from export.pipeline import export_bundle
from export.precision import Precision
from export.reference import Reference
from export.report.ci import github_annotations, to_junit
from export.report.words import headline
from export.rescale import ACTIVATION_LIMIT, RescalePlan, balance, plan_rescaling
from export.weights import absmax
from runtime.batch import make_batch
from runtime.bundle import Bundle
from runtime.engines.onnxruntime import OnnxRuntimeEngine
from runtime.golden import row_cosines
from runtime.loader import open_raw_engine
from runtime.settings import EngineSettings
from runtime.tolerances import tolerance
from tests.hostile import HOSTILE, make_hostile
from tests.narrow import cast_plainly, cast_without_rescaling, rounded_vectors

TEXTS = [t for t in verification_texts() if len(t.text) < 200][::20]
CALIBRATION = [t for t in calibration_texts() if len(t.text) < 400][::8]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    patch = pytest.MonkeyPatch()
    patch.setenv("F2RT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module", params=sorted(HOSTILE))
def hostile(request: pytest.FixtureRequest, mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hostile(mini, tmp_path_factory.mktemp("hostile") / request.param, request.param)


@pytest.fixture(scope="module")
def hostile_bundle(hostile: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    target = tmp_path_factory.mktemp("bundle") / hostile.name
    checkpoint = Checkpoint.open(locate(str(hostile)))
    return export_bundle(checkpoint, target, [Precision.FP32, Precision.FP16], calibration=CALIBRATION)


def vectors(bundle: Bundle, precision: str, ids: list[list[int]]) -> NDArray[np.float32]:
    engine = open_raw_engine(bundle, bundle.engine(f"onnxruntime:{precision}"), EngineSettings())
    return engine.run(make_batch(ids, bundle.manifest.contract.pad_id))


def test_hostile_twin_computes_the_same_function(hostile: Path, reference: Reference) -> None:
    twin = Reference(locate(str(hostile)))
    for text in TEXTS[:6]:
        ids = reference.tokenize(text.text, 1024)
        assert np.abs(twin.embed(ids) - reference.embed(ids)).max() < 1e-5


def test_a_plain_cast_fails_where_ours_holds(
    hostile: Path, hostile_bundle: Bundle, reference: Reference, tmp_path: Path
) -> None:
    """The plain cast: the same fp32 graph with every tensor in float16. Both are rounded in the same way."""
    ids = [reference.tokenize(t.text, 1024) for t in TEXTS]
    expected = np.stack([reference.embed(i) for i in ids])
    ours = row_cosines(rounded_vectors(hostile_bundle.path("graphs/fp16.onnx"), ids), expected)
    assert ours.min() >= tolerance("fp16").min_cosine
    answered = row_cosines(vectors(hostile_bundle, "fp16", ids), expected)
    assert answered.min() >= tolerance("fp16").min_cosine
    plain = cast_plainly(hostile_bundle.path("graphs/fp32.onnx"), tmp_path)
    cosines = row_cosines(rounded_vectors(plain, ids), expected)  # a row that is not finite counts as -1
    if hostile.name != "outliers":  # float16 holds those; INT8 is where they hurt
        assert cosines.min() < 0.9


def test_without_rescaling_what_passes_65504_is_lost(
    hostile: Path, hostile_bundle: Bundle, reference: Reference, tmp_path: Path
) -> None:
    """Wide residuals and norms alone save the stream and outliers, and nothing else."""
    ids = [reference.tokenize(t.text, 1024) for t in TEXTS[:6]]
    expected = vectors(hostile_bundle, "fp32", ids)
    graph = cast_without_rescaling(Checkpoint.open(locate(str(hostile))), tmp_path)
    lost = row_cosines(rounded_vectors(graph, ids), expected).max() == -1
    assert lost == (hostile.name not in ("residual", "outliers"))


def test_the_report_finds_a_graph_that_overflows(mini: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime on CPU gives good vectors for it; the stages say what a GPU would."""
    monkeypatch.setattr("export.graphs.rescale_plan", lambda checkpoint, measured: RescalePlan())
    location = locate(str(make_hostile(mini, tmp_path / "gated", "gated")))
    precisions = [Precision.FP32, Precision.FP16, Precision.BF16]
    bundle = export_bundle(Checkpoint.open(location), tmp_path / "b", precisions, calibration=CALIBRATION)
    report, _ = check_bundle(bundle, Reference(location), TEXTS[:5])
    stages = {stage.name: stage for stage in report.stages}
    assert stages["fp16 graph"].verdict == "fail"
    assert stages["fp16 graph"].guilty == "layer 0: the first with values that are not finite"
    assert stages["fp32 graph"].verdict == stages["bf16 graph"].verdict == "pass", "bfloat16 reaches as far as float32"
    assert {e.verdict for e in report.engines} == {"pass"}, "on CPU"
    assert report.verdict == "fail"
    assert "fp16 graph: misses its limits with results rounded as on a GPU; layer 0: the first" in headline(report)
    assert b'<testsuite name="graphs" tests="1" failures="1"' in to_junit(report)
    assert any("parity of the fp16 graph" in line for line in github_annotations(report))
    fp32, _ = check_bundle(bundle, Reference(location), TEXTS[:5], engine_names=["onnxruntime:fp32"])
    assert fp32.verdict == "pass", "what was not asked for"


def test_parity_passes_for_fp16_in_every_way_of_running(hostile_bundle: Bundle, hostile: Path) -> None:
    report, _ = check_bundle(hostile_bundle, Reference(locate(str(hostile))), TEXTS[:15])
    assert [(e.engine, e.verdict) for e in report.engines] == [
        ("onnxruntime:fp32", "pass"),
        ("onnxruntime:fp16", "pass"),
    ]


def test_rescaled_fp32_graph_equals_the_original(hostile: Path, hostile_bundle: Bundle, tmp_path: Path) -> None:
    """The plan alone, in float32: what is left is rounding, not function."""
    checkpoint = Checkpoint.open(locate(str(hostile)))
    plan = plan_of(checkpoint, hostile_bundle)
    assert plan.lines or hostile.name == "outliers"
    layout = DataLayout("rescaled.data")
    model = build_encoder(checkpoint.config, layout, producer_version="test", plan=plan)
    write(layout, checkpoint.weights, tmp_path / "rescaled.data", lambda count: None)
    ir.save(model, tmp_path / "rescaled.onnx")
    engine = OnnxRuntimeEngine(
        tmp_path / "rescaled.onnx", name="x", precision="fp32", fingerprint="", settings=EngineSettings()
    )
    ids = [[*range(5, 5 + n), 15986] for n in (1, 7, 30, 64)]
    batch = make_batch(ids, 15984)
    assert np.abs(engine.run(batch) - vectors(hostile_bundle, "fp32", ids)).max() <= 1e-6


def plan_of(checkpoint: Checkpoint, bundle: Bundle) -> RescalePlan:
    measured = measure(checkpoint, bundle.folder, bundle.graph("fp32"), CALIBRATION, lambda step, done: None)
    return rescale_plan(checkpoint, measured)


def test_plan_is_in_the_manifest_with_its_reasons(hostile: Path, hostile_bundle: Bundle) -> None:
    graph = hostile_bundle.graph("fp16")
    assert graph.calibration_sha256
    assert hostile_bundle.engine("onnxruntime:fp16").calibration_sha256 == graph.calibration_sha256
    expected = {
        "gated": "layers.0.mlp.gated",
        "values": "layers.0.self_attn.v_proj",
        "residual": "layers.0.mlp.down_proj",
        "projections": "layers.0.self_attn.q_proj",
    }
    named = {line.tensor for line in graph.rescaling}
    if hostile.name in expected:
        assert expected[hostile.name] in named
    assert all(line.reason and line.largest_exponent for line in graph.rescaling)


def test_a_tame_checkpoint_is_left_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "b", [Precision.FP32, Precision.FP16], calibration=CALIBRATION)
    assert bundle.graph("fp16").rescaling == []


def test_narrow_graph_keeps_what_must_stay_wide(checkpoint: Checkpoint) -> None:
    model = ir.to_proto(
        build_encoder(checkpoint.config, DataLayout("x"), producer_version="t", precision=Precision.FP16)
    )
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for name, kind in kinds.items():
        if name.endswith("norm.weight") or name.startswith("rotary"):
            assert kind == single, name
        elif name.endswith(("_proj.weight.transposed", "embed_tokens.weight")):
            assert kind == half, name
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "RMSNormalization" and node.name != "layers.0.input_layernorm":
            source = producers[node.input[0]]
            assert source.op_type in ("Add", "Reshape"), node.name  # the residual stream, or heads widened before
        if node.op_type == "Attention":
            for value in node.input[:3]:
                cast = producers[value]
                assert cast.op_type == "Cast"
                assert cast.attribute[0].i == single
            (reader,) = [n for n in model.graph.node if node.output[0] in n.input]
            assert (reader.op_type, reader.attribute[0].i) == ("Cast", half)


def test_bf16_graph_is_made_and_has_no_cpu_engine(checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(checkpoint, tmp_path / "b", [Precision.BF16], calibration=CALIBRATION)
    assert [g.precision for g in bundle.manifest.graphs] == ["bf16"]
    assert bundle.manifest.engines == []
    onnx.checker.check_model(str(bundle.path("graphs/bf16.onnx")), full_check=True)
    assert sorted(p.name for p in bundle.path("graphs").iterdir()) == [
        *("bf16.onnx", "bf16.onnx.data", "bf16.plan.npz")
    ]


def test_balance_keeps_both_sides_in_range() -> None:
    activation = np.array([1.0, 1e6, 1e6, 1.0, 0.0, 1.0], np.float32)
    weight = np.array([0.1, 0.1, 1e-7, 1e-7, 0.0, 1e5], np.float32)
    exponents = balance(activation, weight)
    assert exponents[0] == 0
    assert exponents[4] == 0
    shifted = np.ldexp(activation, -exponents.astype(np.int32))
    assert (shifted <= ACTIVATION_LIMIT).all()
    assert exponents[3] > 0  # a column that would lose its bits is raised
    assert exponents[5] < 0  # one that is too heavy is lowered, while the activation has room


def test_a_weight_beyond_float16_is_named(mini: Path, tmp_path: Path) -> None:
    from runtime.errors import CheckpointError

    folder = make_hostile(mini, tmp_path / "h", "residual")
    name = "layers.0.mlp.down_proj.weight"
    tensors = {key: np.array(value) for key, value in load_file(folder / "model.safetensors").items()}
    tensors[name][3, 5] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(locate(str(folder)))
    rows, columns = absmax(checkpoint.weights, name)
    assert (rows.shape, columns.shape) == ((256,), (320,))
    assert rows[3] == columns[5] > 65504
    with pytest.raises(CheckpointError, match=f"{name}.*float16 ends at 65504"):
        cast_without_rescaling(checkpoint, tmp_path)


def test_missing_statistics_are_an_error(checkpoint: Checkpoint) -> None:
    from calibration.statistics import Statistics

    with pytest.raises(KeyError):
        plan_rescaling(checkpoint.config, Statistics({}, 0), lambda name: absmax(checkpoint.weights, name))
