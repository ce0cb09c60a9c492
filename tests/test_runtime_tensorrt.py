"""The TensorRT engine on doubles of GPU and library, running the real graph of the bundled checkpoint behind them.

What runs here is the engine's own work: profile, padding, splitting, buffers, release, refusals. What the real
libraries do is in `test_tensorrt_api` (their API) and, on a GPU, in `make gpu-check`.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.batch import Batch
from runtime.engines.buckets import Bucket, split
from runtime.errors import EngineError, InputError, NotExecutableError
from runtime.golden import row_cosines
from runtime.settings import EngineSettings
from tests.fake_device import ENUMS, H100, L4, Model, write_plan
from tests.tensorrt_rig import BACKENDS, DIM, PROFILES, Rig, alone, random_batch

pytestmark = pytest.mark.usefixtures("own_cache")

# --- planning

BUCKETS = [Bucket(i, r, t) for i, (r, t) in enumerate(PROFILES)]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([10], [([0], 0)]),
        ([64], [([0], 0)]),
        ([65], [([0], 1)]),
        ([10, 10], [([0, 1], 1)]),
        ([500], [([0], 3)]),
        ([500, 500], [([0, 1], 2)]),
        ([1000], [([0], 3)]),
        ([5] * 9, [(list(range(8)), 1), ([8], 0)]),
        # The long one alone in the only bucket that takes it, the rest together.
        ([5, 1000, 5], [([1], 3), ([0, 2], 1)]),
        ([5] * 9 + [200], [([9, *range(7)], 2), ([7, 8], 1)]),
    ],
)
def test_smallest_bucket_that_fits(lengths: list[int], expected: list[tuple[list[int], int]]) -> None:
    assert [(p.rows, p.bucket.index) for p in split(lengths, BUCKETS)] == expected


def test_every_row_is_in_one_piece_that_fits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 1025, rng.integers(1, 40)).tolist()
        pieces = split(lengths, BUCKETS)
        assert sorted(row for piece in pieces for row in piece.rows) == list(range(len(lengths)))
        for piece in pieces:
            assert len(piece.rows) <= piece.bucket.rows
            assert piece.tokens == max(lengths[row] for row in piece.rows) <= piece.bucket.tokens
            rows, tokens = piece.bucket.padded(len(piece.rows), piece.tokens)
            assert len(piece.rows) <= rows <= min(piece.bucket.rows, 1.5 * len(piece.rows))
            assert piece.tokens <= tokens <= min(piece.bucket.tokens, max(16, 1.5 * piece.tokens))


def test_row_longer_than_every_profile_names_limit_and_cure() -> None:
    with pytest.raises(InputError, match=r"row 1 has 1025 tokens; .* at most 1024\. Truncate .*--profile 1x1025"):
        split([3, 1025], BUCKETS)


# --- running


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
def test_every_way_of_running_gives_the_same_vectors(tmp_path: Path, graph: Model, backend: str, graphs: bool) -> None:
    engine = Rig(tmp_path, graph, backend, settings=EngineSettings(cuda_graphs=graphs)).open()
    for batch in (
        random_batch([1]),
        random_batch([3, 90, 17]),
        random_batch([40] * 8),
        random_batch([12, 700, 5, 300]),
        random_batch([9, 30] * 10),
        random_batch([7, 3], width=1000),  # padding beyond every profile is cut, not run
    ):
        expected = alone(graph, batch)
        for _ in range(4):  # first, captured, replayed, replayed
            assert row_cosines(engine.run(batch), expected).min() > 0.999999
    engine.close()


def test_padding_is_to_the_ladder_with_graphs_and_none_without(tmp_path: Path, graph: Model) -> None:
    rig = Rig(tmp_path, graph)
    engine = rig.open()
    engine.run(random_batch([33, 20, 9, 4, 2]))
    assert rig.library.shapes == [(6, 48)]
    assert (engine.counters.real_tokens, engine.counters.padded_tokens) == (68, 288)
    engine.close()
    exact = Rig(tmp_path, graph, settings=EngineSettings(cuda_graphs=False))
    engine = exact.open()
    engine.run(random_batch([33, 20, 9, 4, 2]))
    assert exact.library.shapes == [(5, 33)]
    engine.close()


def test_nothing_is_allocated_while_running(tmp_path: Path, graph: Model) -> None:
    rig = Rig(tmp_path, graph)
    engine = rig.open()
    before = dict(rig.cuda.calls)
    for seed in range(3):
        engine.run(random_batch([10, 200, 31, 900], seed=seed))
    assert rig.cuda.calls["allocate"] == before["allocate"] == 1 + 3 * len(PROFILES)
    assert rig.cuda.calls["allocate_pinned"] == before["allocate_pinned"] == 3 * len(PROFILES)
    engine.close()


def test_result_survives_the_next_run(tmp_path: Path, graph: Model) -> None:
    """Buffers are reused; what was returned is not one of them."""
    engine = Rig(tmp_path, graph).open()
    first = engine.run(random_batch([10]))
    kept = first.copy()
    engine.run(random_batch([10], seed=1))
    assert np.array_equal(first, kept)
    engine.close()


def test_wrong_length_would_show(tmp_path: Path, graph: Model) -> None:
    """The check above can fail: a row with a wrong length is another vector."""
    engine = Rig(tmp_path, graph).open()
    batch = random_batch([30, 20])
    wrong = Batch(batch.input_ids, batch.lengths - 1)
    assert row_cosines(engine.run(wrong), alone(graph, batch)).min() < 0.999
    engine.close()


# --- release


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_frees_everything(tmp_path: Path, graph: Model, backend: str) -> None:
    rig = Rig(tmp_path, graph, backend)
    engine = rig.open()
    for length in (20, 20, 20, 600, 600, 600):
        engine.run(random_batch([length]))
    engine.close()
    engine.close()
    assert rig.cuda.live == {"memory": 0, "pinned": 0, "streams": 0, "graphs": 0}
    gc.collect()
    assert (len(rig.library.contexts), len(rig.library.engines)) == (0, 0)
    with pytest.raises(EngineError, match="was closed"):
        engine.run(random_batch([3]))


def test_failure_half_way_frees_everything(tmp_path: Path, graph: Model) -> None:
    needed = 4096 + sum(2 * 8 * r * t + 4 * r * DIM for r, t in PROFILES)
    for memory_bytes in (1000, 4096, 8192, needed - 1):
        rig = Rig(tmp_path, graph, memory_bytes=memory_bytes)
        with pytest.raises(EngineError, match="no room"):
            rig.open()
        assert rig.cuda.live == {"memory": 0, "pinned": 0, "streams": 0, "graphs": 0}
    Rig(tmp_path, graph, memory_bytes=needed).open().close()


# --- refusals, each with its own words

REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another GPU": (
        {"changes": {"target": "sm120"}},
        NotExecutableError,
        r"tensorrt:fp32@sm120 was compiled for sm120; the GPU here is NVIDIA L4, sm89\. Build it here",
    ),
    "another GPU of the same kind": (
        {"changes": {"target": "sm89-nvidia-l40s", "builder": {"tensorrt": "11.4.0.106", "gpu": "NVIDIA L40S"}}},
        NotExecutableError,
        r"compiled for NVIDIA L40S; the GPU here is NVIDIA L4, sm89",
    ),
    "no target": ({"changes": {"target": None}}, NotExecutableError, "does not say which GPU"),
    "another version": (
        {"changes": {"builder": {"tensorrt": "11.3.0.1"}}},
        NotExecutableError,
        r"compiled by tensorrt 11\.3\.0\.1; 11\.4\.0\.106 is installed here.*Install tensorrt 11\.3\.0\.1, or build",
    ),
    "unknown version": ({"changes": {"builder": {}}}, NotExecutableError, "by tensorrt an unknown version"),
    "another flavour in the manifest": (
        {"changes": {"builder": {"tensorrt-rtx": "1.7.1.116"}}},
        EngineError,
        "was compiled by tensorrt-rtx; tensorrt does not run its plans",
    ),
}


@pytest.mark.parametrize("case", list(REFUSALS))
def test_refusals_from_the_manifest_come_before_the_plan_is_read(tmp_path: Path, graph: Model, case: str) -> None:
    arguments, kind, words = REFUSALS[case]
    rig = Rig(tmp_path, graph, **arguments)
    rig.path.unlink()  # whoever reads it fails with other words
    with pytest.raises(kind, match=words):
        rig.open()
    assert rig.library.deserialized == 0
    assert rig.cuda.calls == {}


def test_engine_built_for_this_very_gpu_runs(tmp_path: Path, graph: Model) -> None:
    assert L4.target == "sm89-nvidia-l4"
    assert H100.target == "sm90-nvidia-h100-80gb-hbm3"
    Rig(tmp_path, graph, changes={"target": "sm89-nvidia-l4"}).open().close()


def test_plan_of_the_other_flavour(tmp_path: Path, graph: Model) -> None:
    rig = Rig(tmp_path, graph)
    write_plan(rig.path, "tensorrt-rtx", PROFILES, DIM)
    with pytest.raises(EngineError, match="is a plan of tensorrt-rtx, not of tensorrt"):
        rig.open()
    assert rig.library.deserialized == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"ftrt\x00\x01 not a plan", "the archive is broken"), (b"", "cannot be read"), (None, "cannot be read")],
    ids=["damaged", "empty", "missing"],
)
def test_damaged_plan(tmp_path: Path, graph: Model, content: bytes | None, words: str) -> None:
    rig = Rig(tmp_path, graph)
    rig.path.unlink()
    if content is not None:
        rig.path.write_bytes(content)
    with pytest.raises(EngineError, match=words) as caught:
        rig.open()
    assert not isinstance(caught.value, NotExecutableError)  # it should run here, and does not
    assert set(rig.cuda.live.values()) == {0}


def test_plan_with_other_tensors(tmp_path: Path, graph: Model) -> None:
    with pytest.raises(
        EngineError, match=r"input_ids DataType\.FLOAT.*Build the engine from a graph that f2rt exported"
    ):
        Rig(tmp_path, graph, ids="FLOAT").open()


@pytest.mark.parametrize(
    ("flag", "kind", "words"),
    [
        ("MALFORMED_ENGINE", EngineError, "it is damaged"),
        ("VERSION_MISMATCH", NotExecutableError, "another version made it"),
        ("UNSUPPORTED_CC", NotExecutableError, "compiled for other GPUs"),
        ("OLD_CUDA_DRIVER", NotExecutableError, r"driver is too old\. Update the driver"),
        ("OLD_CUDA_RUNTIME", NotExecutableError, "CUDA runtime is too old"),
        ("INSUFFICIENT_GPU_MEMORY", NotExecutableError, "too little memory"),
        (None, NotExecutableError, r"no reason it has a name for \(64\)"),
    ],
)
def test_rtx_says_why_before_it_loads(
    tmp_path: Path, graph: Model, flag: str | None, kind: type[Exception], words: str
) -> None:
    rig = Rig(tmp_path, graph, "tensorrt-rtx")
    rig.library.invalid = int(ENUMS.EngineInvalidityDiagnostics[flag]) if flag else 64
    with pytest.raises(kind, match=words):
        rig.open()
    assert rig.library.deserialized == 0


def test_failure_while_running_carries_the_librarys_words(
    tmp_path: Path, graph: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path, graph)
    engine = rig.open()
    for context in rig.library.contexts:
        monkeypatch.setattr(context, "execute_async_v3", lambda stream, c=context: c._fail("myelin says no"))
    with pytest.raises(EngineError, match=r"tensorrt:fp32 failed on a batch of 1 x 16: myelin says no"):
        engine.run(random_batch([5]))
    engine.close()
