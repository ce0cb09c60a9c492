"""Graphs that other tools exported, really exported here by torch: fused, recorded as what they are, and compiled."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from typer.testing import CliRunner

from bench.stock_export import export_stock
from calibration.texts import verification_texts
from export.build import add_engine
from export.checkpoint import Checkpoint
from export.cli import app
from export.external_data import ALIGNMENT_BYTES
from export.foreign import open_foreign
from export.pipeline import export_bundle
from export.precision import Precision
from export.profiles import Profile
from export.prove import prove_bundle
from runtime.bundle import bundle_files, check_hash, open_bundle
from runtime.errors import EngineError, InputError, NotFoundError
from runtime.files import sha256_file
from tests.foreign import Stock, adopt, half

ROOT = Path(__file__).parent.parent


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


@pytest.mark.slow
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
