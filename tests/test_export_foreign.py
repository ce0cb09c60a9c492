"""Graphs that other tools exported, really exported here by torch: fused, proven, and recorded as what they are."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from bench.stock_export import export_stock
from calibration.texts import Text, verification_texts
from export.build import add_engine
from export.checkpoint import Checkpoint
from export.cli import app
from export.external_data import ALIGNMENT_BYTES
from export.foreign import open_foreign
from export.hub import locate
from export.parity import check_bundle
from export.pipeline import export_bundle
from export.precision import Precision
from export.profiles import Profile
from export.prove import prove_bundle
from export.reference import Reference
from export.report.data import EngineReport
from runtime.bundle import Bundle, bundle_files, check_hash, open_bundle
from runtime.embedder import open_embedder
from runtime.errors import EngineError, InputError, NotFoundError
from runtime.files import sha256_file
from tests.hostile import make_hostile

ROOT = Path(__file__).parent.parent
Stock = Callable[[str], Path]


@pytest.fixture(scope="module")
def texts() -> list[Text]:
    return [t for t in verification_texts() if len(t.text) < 250][::17]


def adopt(checkpoint: Checkpoint, source: Path, target: Path) -> Bundle:
    foreign = open_foreign(source, checkpoint.config)
    return export_bundle(checkpoint, target, [foreign.precision], foreign=foreign)


def edited(folder: Path, target: Path, change: Callable[[ir.Model], None]) -> Path:
    """Copy an export and change its model file; the data file stays as it is."""
    shutil.copytree(folder, target)
    model = ir.load(target / "model.onnx")
    change(model)
    ir.save(model, target / "model.onnx")
    return target


def node(kind: str, *inputs: ir.Value, **attributes: object) -> ir.Node:
    return ir.Node("", kind, list(inputs), ir.convenience.convert_attributes(attributes))


def report_of(bundle: Bundle, reference: Reference, texts: Sequence[Text]) -> EngineReport:
    (engine,) = check_bundle(bundle, reference, texts)[0].engines
    return engine


def half(source: Path, folder: Path) -> Path:
    """Convert an export to float16 with ONNX Runtime's own tool, as many published files were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = convert_float_to_float16(onnx.load(source / "model.onnx"))
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder


def test_stock_export_keeps_the_contract(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    given = stock("dynamic")
    bundle = adopt(checkpoint, given, tmp_path / "bundle")
    path = bundle.path("graphs/fp32.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path, load_external_data=False)

    def signature(value: onnx.ValueInfoProto) -> tuple[str, int, list[str | int]]:
        tensor = value.type.tensor_type
        return value.name, tensor.elem_type, [d.dim_param or d.dim_value for d in tensor.shape.dim]

    whole, real = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT
    assert [signature(v) for v in model.graph.input] == [
        ("input_ids", whole, ["batch", "sequence"]),
        ("attention_mask", whole, ["batch", "sequence"]),
    ]
    assert [signature(v) for v in model.graph.output] == [("sentence_embedding", real, ["batch", 256])]
    added = [n.op_type for n in model.graph.node if n.name.startswith("f2rt.")]
    assert added == ["ReduceSum", "Sub", "GatherND", "LpNormalization"]  # no positions: this graph makes its own
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    offsets = [int(next(e.value for e in t.external_data if e.key == "offset")) for t in external]
    assert len(external) >= 46
    assert all(offset % ALIGNMENT_BYTES == 0 for offset in offsets)
    assert path.stat().st_size < 500_000
    assert b"site-packages" not in path.read_bytes()  # the exporting machine's stack traces


def test_manifest_says_where_the_graph_came_from(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    given = stock("dynamic")
    bundle = adopt(checkpoint, given, tmp_path / "bundle")
    (graph,) = bundle.manifest.graphs
    origin = graph.origin
    assert origin is not None
    assert origin.id == str(given)
    assert origin.producer.startswith("pytorch 2.13")
    assert {f.file: f.sha256 for f in origin.files} == {
        name: sha256_file(given / name) for name in ("model.onnx", "model.onnx.data")
    }
    assert (origin.hidden_states, origin.dropped_outputs, origin.generated_inputs) == ("last_hidden_state", [], [])
    assert any("graph by pytorch" in flag for flag in bundle.manifest.engines[0].flags)
    for record in bundle_files(bundle.manifest):
        check_hash(bundle, record)
    shown = CliRunner().invoke(app, ["inspect", str(bundle.folder)])
    assert "by pytorch" in shown.output
    assert "not f2rt's own" in shown.output
    again = adopt(checkpoint, given, tmp_path / "again").manifest
    assert again.engines[0].fingerprint == bundle.manifest.engines[0].fingerprint


@pytest.mark.parametrize(
    ("kind", "generated"),
    [("dynamic", 0), ("legacy", 1), ("past", 8)],
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


def test_builders_say_what_to_do_instead(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    bundle = adopt(checkpoint, stock("dynamic"), tmp_path / "bundle")
    before = (bundle.folder / "manifest.json").read_bytes()
    profiles = (Profile(1, 64),)
    with pytest.raises(InputError, match=r"engines are built in fp16.* is pytorch .*--from-onnx") as refused:
        add_engine(bundle.folder, "tensorrt-rtx", Precision.FP32, profiles, target="sm89")
    assert "without --from-onnx, with --precision fp16" in refused.value.cure
    with pytest.raises(NotFoundError, match="without --from-onnx"):
        add_engine(bundle.folder, "tensorrt-rtx", Precision.FP16, profiles, target="sm89")
    assert (bundle.folder / "manifest.json").read_bytes() == before


def test_half_graph_is_compiled_when_all_of_it_is_half(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    """What comes out is unproven as any engine; one matrix product in float32 and the builder refuses."""
    given = half(stock("legacy"), tmp_path / "half")
    bundle = adopt(checkpoint, given, tmp_path / "bundle")
    built = add_engine(bundle.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89")
    assert built.record.parity is None

    mixed = adopt(checkpoint, stock("half"), tmp_path / "mixed")  # torch keeps the rotation's product in float32
    with pytest.raises(EngineError, match="--from-onnx"):
        add_engine(mixed.folder, "tensorrt-rtx", Precision.FP16, (Profile(1, 64),), target="sm89")
    assert not (mixed.folder / "engines").exists()


def test_fault_while_weights_stream_keeps_the_old_bundle(checkpoint: Checkpoint, stock: Stock, tmp_path: Path) -> None:
    target = tmp_path / "bundles" / "mini"
    export_bundle(checkpoint, target, [Precision.FP32])
    before = (target / "manifest.json").read_bytes()

    class FaultError(Exception):
        pass

    def strike(step: object, done: int) -> None:
        if "given" in step.label and done > 0.5 * step.total:  # type: ignore[attr-defined]
            raise FaultError

    foreign = open_foreign(stock("dynamic"), checkpoint.config)
    with pytest.raises(FaultError):
        export_bundle(checkpoint, target, [Precision.FP32], strike, foreign=foreign)
    assert (target / "manifest.json").read_bytes() == before
    assert [p.name for p in target.parent.iterdir()] == ["mini"]


def test_command(mini: Path, stock: Stock, tmp_path: Path) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "bundle")
    done = run(app, ["export", str(mini), "--from-onnx", str(stock("legacy")), "--out", out])
    assert done.exit_code == 0, done.output
    assert "it is the graph of pytorch" in done.output
    assert "f2rt parity" in done.output


def test_folder_with_weights_needs_no_checkpoint_besides(mini_copy: Path, stock: Stock, tmp_path: Path) -> None:
    """As sentence-transformers keeps it: the checkpoint's folder with the graph in onnx/."""
    shutil.copytree(stock("dynamic"), mini_copy / "onnx")
    (mini_copy / "onnx" / "model_extra.onnx").write_bytes(b"another")
    out = tmp_path / "bundle"
    done = CliRunner().invoke(app, ["export", "--from-onnx", str(mini_copy), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "also holds onnx/model_extra.onnx" in done.output.replace("\n", " ").replace("  ", " ")
    manifest = open_bundle(out).manifest
    assert manifest.source.id == str(mini_copy)
    assert manifest.graphs[0].origin is not None


# Memory of its own is what counts: mapped files can be dropped at any time. Kibibytes, sampled all the while.
WATCHED = """
import sys, threading, time
from pathlib import Path
from export.checkpoint import Checkpoint
from export.foreign import open_foreign
from export.hub import locate
from export.pipeline import export_bundle

most, ended = 0, threading.Event()

def watch():
    global most
    while not ended.wait(0.01):
        (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon")]
        most = max(most, int(line.split()[1]))

thread = threading.Thread(target=watch)
thread.start()
try:
    checkpoint = Checkpoint.open(locate(sys.argv[1]))
    foreign = open_foreign(Path(sys.argv[2]), checkpoint.config)
    export_bundle(checkpoint, Path(sys.argv[3]), [foreign.precision], foreign=foreign)
finally:
    ended.set()
    thread.join()
print(most)
"""


@pytest.mark.slow
def test_graph_above_two_gigabytes_is_streamed(tmp_path: Path) -> None:
    """A real stock export of the 0.6B shape, 2.4 GB, taken in by a process that never holds 0.5 GB of its own."""
    from export.synth import write_checkpoint

    write_checkpoint("0.6B", tmp_path / "checkpoint")
    given = export_stock(tmp_path / "checkpoint", tmp_path / "given")
    assert (given / "model.onnx.data").stat().st_size > 2 << 30
    command = [sys.executable, "-c", WATCHED, str(tmp_path / "checkpoint"), str(given), str(tmp_path / "bundle")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 500_000
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.graphs[0].data.size_bytes > 2 << 30
    onnx.checker.check_model(str(bundle.path("graphs/fp32.onnx")), full_check=True)
    text = [dataclasses.replace(t) for t in verification_texts() if len(t.text) < 60][:3]
    assert prove_bundle(bundle.folder, text).verdict == "pass"
