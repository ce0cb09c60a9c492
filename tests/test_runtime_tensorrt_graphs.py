"""What the TensorRT engine keeps between runs, on doubles: CUDA graphs of shapes that come back, and RTX's kernels."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.engines import tensorrt
from runtime.golden import row_cosines
from runtime.settings import EngineSettings
from tests.fake_device import L4, Model
from tests.tensorrt_rig import PROFILES, Rig, alone, random_batch

pytestmark = pytest.mark.usefixtures("own_cache")

# --- CUDA graphs


def test_graph_is_captured_when_a_shape_comes_back_and_replayed_after(tmp_path: Path, graph: Model) -> None:
    rig = Rig(tmp_path, graph)
    engine = rig.open()
    seen = []
    for length in (20, 21, 22, 24, 17):  # one padded shape, five exact ones
        engine.run(random_batch([length]))
        seen.append((engine.counters.captured, engine.counters.replayed))
    assert seen == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert rig.cuda.live["graphs"] == 1
    engine.run(random_batch([60]))
    engine.run(random_batch([60]))
    assert (engine.counters.captured, rig.cuda.live["graphs"]) == (2, 2)
    engine.run(random_batch([20]))  # the first graph is still good
    assert engine.counters.replayed == 4
    engine.close()


def test_graphs_switched_off(tmp_path: Path, graph: Model) -> None:
    rig = Rig(tmp_path, graph, settings=EngineSettings(cuda_graphs=False))
    engine = rig.open()
    for _ in range(4):
        engine.run(random_batch([20]))
    assert (engine.counters.runs, engine.counters.captured, rig.cuda.calls["begin_capture"]) == (4, 0, 0)
    assert len(rig.library.contexts) == len(PROFILES)
    engine.close()


def test_shape_not_used_for_longest_makes_room(tmp_path: Path, graph: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "MOST_GRAPHS", 2)
    rig = Rig(tmp_path, graph)
    engine = rig.open()
    for length in (16, 32, 16, 32, 16, 64, 64):
        engine.run(random_batch([length]))
    assert (engine.counters.captured, engine.counters.evicted, rig.cuda.live["graphs"]) == (3, 1, 2)
    replayed = engine.counters.replayed
    engine.run(random_batch([16]))  # kept: it was used after 32
    assert engine.counters.replayed == replayed + 1
    gc.collect()
    assert len(rig.library.contexts) == len(PROFILES) + 2
    engine.close()


@pytest.mark.parametrize("side", ["CUDA", "TensorRT"])
def test_plan_that_cannot_be_captured_runs_without(
    tmp_path: Path, graph: Model, caplog: pytest.LogCaptureFixture, side: str
) -> None:
    rig = Rig(tmp_path, graph)
    rig.cuda.fail_end_capture = side == "CUDA"
    rig.library.uncapturable = side == "TensorRT"
    engine = rig.open()
    batch = random_batch([20])
    with caplog.at_level(logging.WARNING, "f2rt.engine"):
        for _ in range(4):
            assert row_cosines(engine.run(batch), alone(graph, batch)).min() > 0.999999
    assert (engine.counters.captured, engine.counters.capture_failures, engine.counters.replayed) == (0, 1, 0)
    assert "no CUDA graph for 1 x 24" in caplog.text
    assert rig.cuda.live["graphs"] == 0
    engine.close()


def test_rtx_captures_by_itself(tmp_path: Path, graph: Model) -> None:
    """TensorRT-RTX knows when the specialized kernels of a shape are ready; we only keep the shape's context."""
    rig = Rig(tmp_path, graph, "tensorrt-rtx")
    engine = rig.open()
    for _ in range(4):
        engine.run(random_batch([20]))
    assert (engine.counters.captured, rig.cuda.calls["begin_capture"]) == (0, 0)
    strategies = sorted(c.config.cuda_graph_strategy.name for c in rig.library.contexts)
    assert strategies == ["DISABLED"] * len(PROFILES) + ["WHOLE_GRAPH_CAPTURE"]
    assert {c.config.dynamic_shapes_kernel_specialization_strategy.name for c in rig.library.contexts} == {"LAZY"}
    engine.close()


# --- the runtime cache of TensorRT-RTX


def test_kernels_are_kept_for_the_next_process(tmp_path: Path, graph: Model) -> None:
    first = Rig(tmp_path, graph, "tensorrt-rtx")
    engine = first.open()
    engine.run(random_batch([20]))
    engine.close()
    files = list((tmp_path / "cache" / "runtime").iterdir())
    assert len(files) == 1
    assert files[0].read_bytes() == b"rtx[[1, 24]]"
    second = Rig(tmp_path, graph, "tensorrt-rtx").open()
    assert next(iter(second._runtime_cache._cache.kernels)) == (1, 24)  # type: ignore[union-attr, attr-defined]
    before = files[0].stat().st_mtime_ns
    second.close()
    assert files[0].stat().st_mtime_ns == before  # nothing new, nothing written
    other = Rig(tmp_path, graph, "tensorrt-rtx", device=replace(L4, driver="580.95.05"))
    engine = other.open()
    engine.run(random_batch([50]))
    engine.close()
    assert len(list((tmp_path / "cache" / "runtime").iterdir())) == 2  # another driver, another file


def test_runtime_cache_that_does_not_fit_is_replaced(
    tmp_path: Path, graph: Model, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(tmp_path, graph, "tensorrt-rtx")
    engine = rig.open()
    engine.run(random_batch([20]))
    engine.close()
    (file,) = (tmp_path / "cache" / "runtime").iterdir()
    file.write_bytes(b"garbage")
    with caplog.at_level(logging.WARNING, "f2rt.engine"):
        engine = rig.open()
    assert "does not fit this machine" in caplog.text
    engine.run(random_batch([20]))
    engine.close()
    assert file.read_bytes() == b"rtx[[1, 24]]"


def test_runtime_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, graph: Model, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    rig = Rig(tmp_path, graph, "tensorrt-rtx")
    with caplog.at_level(logging.WARNING, "f2rt.engine"):
        engine = rig.open()
        engine.run(random_batch([20]))
        engine.close()
    assert "was not saved" in caplog.text
    assert set(rig.cuda.live.values()) == {0}
