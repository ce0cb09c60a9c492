"""The INT8 measurements: both commands on the mini checkpoint, turns, and peers in processes of their own."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from typer.testing import CliRunner

from bench.__main__ import app
from bench.inputs import private_cache, short_texts
from bench.int8_quality import INT8, UINT8, score
from bench.int8_speed import FP32, MIXED, OURS, SHAPES, make_batches
from bench.kernels import session_options
from bench.latency import TORCH, TORCH_BF16
from bench.other_forms import DYNAMIC, NAMES, STATIC, WEIGHTS
from bench.peers import PEERS, Peer, PeerError, PeerKind, start_peer
from bench.turns import InProcess, take_turns
from export.checkpoint import Checkpoint
from export.graphs import TWIN
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.reference import Reference
from runtime.batch import Batch, make_batch
from runtime.bundle import open_bundle
from tests.hostile import make_hard

Vectors = NDArray[np.float32]


def run(results: Path, *arguments: str) -> dict[str, object]:
    """Run one measurement; return what its last line says, which is what it wrote."""
    done = CliRunner().invoke(app, [*arguments, "--work", str(results / "work"), "--results", str(results)])
    assert done.exit_code == 0, done.output
    said: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((results / f"{arguments[0]}.json").read_text()) == said
    assert not list((results / "work").iterdir())
    return said


def table(results: Path, name: str) -> list[list[str]]:
    """The rows of the table for people, without their head."""
    lines = [line for line in (results / f"{name}.md").read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.slow
def test_int8_speed_has_a_row_for_every_contestant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.int8_speed.LEAST", 1)
    said = run(tmp_path, "int8-speed", "--size", "mini", "--seconds", "0", "--calibration-texts", "8")
    peers = [peer.name for peer in PEERS]
    expected = [OURS, FP32, NAMES[DYNAMIC], NAMES[WEIGHTS], TORCH, TORCH_BF16, *peers]
    rows = table(tmp_path, "int8-speed")
    assert [row[:2] for row in rows] == [[label, name] for label in (*SHAPES, MIXED) for name in expected]
    not_measured = said["not_measured"]
    assert isinstance(not_measured, dict)
    for row in rows:
        assert (row[2] == "not measured") == (row[1] in not_measured)
    notes = (tmp_path / "int8-speed.md").read_text()
    for name, reason in not_measured.items():
        assert name in peers
        assert f"- {name}: not measured: {reason}" in notes
    assert said["integer_kernels_used"] is True
    shapes = said["shapes"]
    assert isinstance(shapes, list)
    for shape in shapes:
        # How far the other tools' forms fall depends on the CPU: without VNNI their 8-bit sums saturate.
        assert all(-1 <= cosine <= 1 + 1e-9 for cosine in shape["min_cosine"].values())
        assert min(shape["min_cosine"][name] for name in (OURS, FP32)) > 0.9
        assert shape["min_cosine"][TORCH] == pytest.approx(1)
        assert shape["fastest_peer"] in (TORCH, TORCH_BF16, *peers)
        assert set(shape["times_ms"]) == set(expected) - set(not_measured)
        assert {len(times) for times in shape["times_ms"].values()} == {1}


@pytest.mark.slow
def test_int8_quality_has_a_row_for_every_contestant(tmp_path: Path) -> None:
    options = ["--checkpoints", "mini,hard", "--texts", "30", "--calibration-texts", "24"]
    said = run(tmp_path, "int8-quality", *options)
    expected = [UINT8, INT8, NAMES[DYNAMIC], NAMES[STATIC], NAMES[WEIGHTS]]
    rows = table(tmp_path, "int8-quality")
    assert [row[:2] for row in rows] == [[name, engine] for name in ("mini", "hard") for engine in expected]
    checkpoints = said["checkpoints"]
    assert isinstance(checkpoints, list)
    for found in checkpoints:
        for scores in found["engines"].values():
            assert [s["dim"] for s in scores] == [8, 16, 32, 64, 128, 256]
            assert all(-1 <= s["min"] <= s["p01"] <= s["mean"] <= 1 + 1e-6 for s in scores)
    hard = {name: scores[-1]["min"] for name, scores in checkpoints[1]["engines"].items()}
    assert min(hard[UINT8], hard[INT8]) > 0.98
    assert max(hard[NAMES[DYNAMIC]], hard[NAMES[STATIC]]) < 0.9


def test_score_tells_vectors_apart() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 32)).astype(np.float32)
    same, other = score(vectors, vectors, 16), score(vectors[::-1], vectors, 16)
    assert (same.min, same.overlap, same.is_kept) == (pytest.approx(1), 1.0, True)
    assert other.min < 0.5
    assert other.overlap < 0.5
    assert not other.is_kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["int8-quality", "--checkpoints", "mini,harder"], "no checkpoint harder"),
        (["int8-speed", "--size", "1B"], "no size '1B'"),
    ],
)
def test_unknown_names_are_refused(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path / "results")])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "results").exists()


def test_batches_are_the_same_in_every_run() -> None:
    one, two = make_batches(1000, 0), make_batches(1000, 0)
    assert {label: batch.input_ids.shape[0] for label, batch in one.items()} == {
        **{label: shape[0] for label, shape in SHAPES.items()},
        MIXED: 32,
    }
    for label, batch in one.items():
        np.testing.assert_array_equal(batch.input_ids, two[label].input_ids)
    assert one[MIXED].lengths.min() >= 8
    assert one[MIXED].lengths.max() <= 256
    assert len(set(one[MIXED].lengths)) > 16


def test_hard_twin_computes_the_same_function(mini: Path, tmp_path: Path, reference: Reference) -> None:
    """Factors of 64 that cancel, on the channels that the recipe draws."""
    folder = make_hard(mini, tmp_path / "hard")
    ids = reference.tokenize("how do I list the files of a package", 64)
    np.testing.assert_allclose(Reference(locate(str(folder))).embed(ids), reference.embed(ids), atol=1e-6)
    name = "layers.0.input_layernorm.weight"
    weights = [load_file(path / "model.safetensors")[name].astype(np.float32) for path in (folder, mini)]
    assert np.flatnonzero(weights[0] != weights[1]).tolist() == [55, 172, 225]


# --- kernels


def test_products_left_out_of_int8_run_in_large_blocks(mini: Path, tmp_path: Path) -> None:
    """The kernel's default, blocks of 32, costs a quarter of their time."""
    with private_cache(tmp_path):
        opened = Checkpoint.open(locate(str(mini)))
        export_bundle(opened, tmp_path / "b", [Precision.INT8], calibration=short_texts(8))
    graph = open_bundle(tmp_path / "b").path(TWIN)
    options = session_options(graph)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    attributes = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
    assert attributes
    # The largest power of two that divides the input's width.
    assert [a["block_size"] for a in attributes] == [min(256, a["K"] & -a["K"]) for a in attributes]


# --- turns


def vectors_of(batch: Batch) -> Vectors:
    return np.ones((len(batch.lengths), 4), np.float32)


class Failing(InProcess):
    """A contestant that works twice."""

    def __init__(self) -> None:
        super().__init__("failing", vectors_of)
        self.left = 2

    def time_ms(self, batch: Batch) -> float:
        self.left -= 1
        if self.left < 0:
            raise PeerError("it is gone.")
        return super().time_ms(batch)


def test_turns_rotate_and_leave_out_who_fails() -> None:
    order: list[str] = []

    def noting(name: str) -> InProcess:
        def noted(batch: Batch) -> Vectors:
            order.append(name)
            return vectors_of(batch)

        return InProcess(name, noted)

    batch = make_batch([[1, 2], [3]], 0)
    turns = take_turns([noting("a"), noting("b"), Failing()], batch, "a", 0.0, 4, 10)
    assert " ".join(order) == "a b  a b  b a  a b  b a".replace("  ", " ")
    assert {name: len(times) for name, times in turns.times_ms.items()} == {"a": 4, "b": 4}
    assert turns.failed == {"failing": "it is gone."}
    assert turns.min_cosine == {"a": pytest.approx(1), "b": pytest.approx(1)}


# --- peers: a real process that speaks the protocol stands for a tool that is not installed

WORKER = """
import base64, json, struct, sys
print("a library's greeting", file=sys.stderr)
print(json.dumps({"ready": {"versions": {}, "computes_in": "python"}}), flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if "batch" in told:
        rows = told["batch"]["input_ids"]
        print(json.dumps({"rows": len(rows)}), flush=True)
    elif "run" in told:
        print(json.dumps({"ms": 1.5}), flush=True)
    else:
        values = [float(x) for row in rows for x in (row[0], len(row))]
        blob = base64.b64encode(struct.pack(f"<{len(values)}f", *values)).decode()
        print(json.dumps({"vectors": blob, "dim": 2}), flush=True)
"""


def worker(tmp_path: Path, script: str) -> Peer:
    path = tmp_path / "worker.py"
    path.write_text(textwrap.dedent(script))
    return Peer("peer", [sys.executable, str(path)], tmp_path / "log")


def test_peer_answers_and_ends(tmp_path: Path) -> None:
    peer = worker(tmp_path, WORKER)
    assert peer.facts == {"versions": {}, "computes_in": "python"}
    for rows in ([[7, 8], [9]], [[5]]):
        batch = make_batch(rows, 0)
        assert peer.time_ms(batch) == 1.5
        width = max(map(len, rows))
        np.testing.assert_array_equal(peer.vectors(batch), np.array([[r[0], width] for r in rows], np.float32))
    peer.close()
    assert peer._process.returncode == 0


def test_peer_that_dies_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"peer ended with status 1: ValueError: no such model"):
        worker(tmp_path, "raise ValueError('no such model')")
    peer = worker(tmp_path, WORKER.replace('print(json.dumps({"ms": 1.5}), flush=True)', "raise MemoryError('full')"))
    with pytest.raises(PeerError, match=r"peer ended with status 1: MemoryError: full"):
        peer.time_ms(make_batch([[1]], 0))


@pytest.mark.parametrize("line", ["not json", "{}", '"ready"'])
def test_peer_that_talks_nonsense_is_an_error(tmp_path: Path, line: str) -> None:
    with pytest.raises(PeerError, match="peer answered"):
        worker(tmp_path, f"print({line!r}, flush=True)")


def test_peer_that_hangs_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.peers._LOADING_S", 0.3)
    with pytest.raises(PeerError, match="did not answer within"):
        worker(tmp_path, "import time; time.sleep(60)")


def test_peer_without_its_environment_is_not_measured(mini: Path, tmp_path: Path) -> None:
    kind = PeerKind("A tool", ".venv-nowhere", "peer_openvino.py", "int8")
    assert start_peer(kind, mini, 1, tmp_path) == (
        "there is no environment .venv-nowhere; `make bench-peers` creates it"
    )
