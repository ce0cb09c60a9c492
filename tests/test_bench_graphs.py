"""The comparison of graphs, run briefly: what it says is measured on real exports and a real compiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import bench.graphs
from bench.compiler_says import ask
from bench.graphs import OURS, OWN_HALF, SHAPES, TORCH, TORCH_HALF, TORCH_OLD, measure
from runtime.errors import InputError


@pytest.mark.slow
def test_graphs_side_by_side(stock: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    # The exports of this test run, which are the same.
    monkeypatch.setattr(bench.graphs, "export_stock", lambda checkpoint, folder, kind: stock(kind))
    result = measure("mini", tmp_path, 0.0, given=stock("past"))
    given = f"given: {stock('past').name}"
    assert [row[0] for row in result.rows] == [OURS, TORCH, TORCH_OLD, TORCH_HALF, given, OWN_HALF]
    assert result.data["agree"] is True
    nodes = {row[0]: int(row[1]) for row in result.rows}
    assert nodes[OURS] < nodes[TORCH] / 3
    sayings = {row[0]: row[-1] for row in result.rows}
    assert sayings[OURS] == "parses, does not compile"  # fused attention in float32
    assert sayings[OWN_HALF].startswith("builds")
    assert any("Attention operation was not supported" in note for note in result.notes)
    shapes = result.data["shapes"]
    assert isinstance(shapes, list)
    assert [(s["rows"], s["tokens"]) for s in shapes] == SHAPES
    for shape in shapes:
        assert set(shape["median_ms"]) == {OURS, TORCH, TORCH_OLD, given}
        assert shape["repetitions"] >= 5


def test_unknown_size(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no size '7B'"):
        measure("7B", tmp_path, 0.0)


def test_compiler_that_cannot_read_a_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    saying = ask(tmp_path / "x.onnx", "sm89")
    assert (saying.parsed, saying.built) == (False, False)
    assert saying.errors >= 1
    assert saying.messages
    assert "parser errors" in saying.short
