"""The TensorRT engine on doubles of GPU and library, running the real graph of the bundled checkpoint behind them.

What runs here is the engine's own work: profile, padding, splitting, graphs, buffers, refusals, release. What the real
libraries do is in `test_tensorrt_api` (their API) and, on a GPU, in `make gpu-check`.
"""

from __future__ import annotations

import gc
import io
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray
from rich.console import Console

from calibration.texts import verification_texts
from export.parity import check_bundle
from export.reference import Reference
from export.report.terminal import print_report
from runtime import golden
from runtime.batch import Batch, make_batch
from runtime.bundle import Bundle, EngineRecord, engine_fingerprint, open_bundle, write_manifest
from runtime.embedder import open_embedder
from runtime.engines import tensorrt
from runtime.engines.buckets import Bucket, split
from runtime.engines.cuda import CudaRuntime, Device
from runtime.engines.tensorrt import TensorRTEngine
from runtime.engines.tensorrt_library import load_library
from runtime.errors import EngineError, InputError, MissingExtraError, NotExecutableError, UnverifiedError
from runtime.files import sha256_file
from runtime.golden import row_cosines
from runtime.loader import load_engine, select
from runtime.settings import EngineSettings
from tests.bundles import forge_report
from tests.fake_device import (
    DOUBLED,
    ENUMS,
    H100,
    L4,
    FakeCuda,
    FakeTensorRT,
    Model,
    Profiles,
    public_names,
    write_plan,
)

PROFILES: Profiles = [(1, 64), (8, 128), (8, 512), (1, 1024)]
DIM = 256
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116"}
BACKENDS = list(VERSIONS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def graph(bundle: Bundle) -> Model:
    """The bundled checkpoint's fp32 graph in ONNX Runtime: what the double computes."""
    session = onnxruntime.InferenceSession(str(bundle.path("graphs/fp32.onnx")), providers=["CPUExecutionProvider"])

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0])

    return run


def record_for(path: Path, backend: str, **changes: Any) -> EngineRecord:
    """A record as `f2rt build` writes it for an L4."""
    record = EngineRecord(
        name=f"{backend}:fp32",
        backend=backend,
        precision="fp32",
        file=f"engines/{path.name}",
        sha256=sha256_file(path),
        fingerprint="f" * 32,
        builder={"f2rt": "0.1.0", backend: VERSIONS[backend]},
        profiles=[f"{r}x{t}" for r, t in PROFILES],
        target="sm89",
    )
    return replace(record, **changes)


class Rig:
    """An engine with the doubles behind it."""

    def __init__(
        self, folder: Path, model: Model, backend: str = "tensorrt", *, profiles: Profiles = PROFILES,
        device: Device = L4, settings: EngineSettings = EngineSettings(), memory_bytes: int = 1 << 40,
        changes: dict[str, Any] | None = None, **plan: Any,
    ) -> None:  # fmt: skip
        self.path = folder / "plan.engine"
        write_plan(self.path, backend, profiles, DIM, **plan)
        self.record = record_for(self.path, backend, **(changes or {}))
        self.cuda = FakeCuda(device, memory_bytes=memory_bytes)
        self.library = FakeTensorRT(self.cuda, model, version=VERSIONS[backend])
        self._settings = settings

    def open(self) -> TensorRTEngine:
        library: Any = self.library
        return TensorRTEngine(self.path, self.record, self._settings, cuda=self.cuda, library=library)


def random_batch(lengths: list[int], *, width: int | None = None, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return make_batch([rng.integers(0, 15_000, n).tolist() for n in lengths], 15_984, width=width)


def alone(graph: Model, batch: Batch) -> NDArray[np.float32]:
    """Each row by itself and unpadded."""
    rows = zip(batch.input_ids, batch.lengths, strict=True)
    return np.concatenate([graph(ids[None, :n], np.ones((1, n), np.int64)) for ids, n in rows])


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


# --- the real edge of this machine


def test_missing_library_says_how_to_install_it() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"tensorrt is not installed here.*f2rt\[tensorrt\]"):
            load_library("tensorrt")
    else:
        pytest.skip("full TensorRT is installed here")


@pytest.fixture
def no_gpu() -> CudaRuntime:
    """CUDA Python for real, on a machine without a driver or a GPU."""
    pytest.importorskip("cuda.bindings.runtime")
    cuda = CudaRuntime()
    try:
        cuda.device()
    except NotExecutableError:
        return cuda
    pytest.skip("there is a GPU here")


def test_no_driver_and_no_gpu_are_said(no_gpu: CudaRuntime) -> None:
    with pytest.raises(NotExecutableError, match=r"no usable NVIDIA driver|no GPU that this process may use"):
        no_gpu.device()


def test_cuda_python_takes_our_arguments(no_gpu: CudaRuntime) -> None:
    """Without a device every call fails, but as CUDA's own error: a wrong argument would be a TypeError."""
    memory = np.zeros(16, np.uint8)
    calls = [
        lambda: no_gpu.allocate(16),
        lambda: no_gpu.free(256),
        lambda: no_gpu.allocate_pinned(16),
        lambda: no_gpu.free_pinned(memory),
        no_gpu.create_stream,
        lambda: no_gpu.destroy_stream(256),
        lambda: no_gpu.synchronize(256),
        lambda: no_gpu.copy_to_device(256, memory, 256),
        lambda: no_gpu.copy_to_host(memory, 256, 256),
        lambda: no_gpu.begin_capture(256),
        lambda: no_gpu.end_capture(256),
        lambda: no_gpu.launch(256, 256),
        lambda: no_gpu.destroy_graph(256),
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"CUDA failed: .*cudaError"):
            call()


def test_doubles_offer_what_the_real_library_has() -> None:
    real = pytest.importorskip("tensorrt_rtx")
    for name, double in DOUBLED.items():
        assert public_names(double) <= set(dir(getattr(real, name))), name
    config = set(vars(DOUBLED["IRuntimeConfig"]())) - {"strategy", "cache"}
    assert config <= set(dir(real.IRuntimeConfig))
    for name, double in vars(ENUMS).items():
        for member in double:
            assert int(getattr(getattr(real, name), member.name)) == int(member.value), (name, member)


# --- in a bundle


@pytest.fixture
def device(graph: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """The doubles in the places where the loader finds GPU and library."""
    cuda = FakeCuda()

    def library(backend: str) -> FakeTensorRT:
        return FakeTensorRT(cuda, graph, version=VERSIONS[backend])

    monkeypatch.setattr(tensorrt, "CudaRuntime", lambda: cuda)
    monkeypatch.setattr(tensorrt, "load_library", library)
    yield cuda
    assert set(cuda.live.values()) == {0}


def add_engine(bundle: Bundle, backend: str, target: str, *, proven: bool = True) -> Bundle:
    """Put an engine for `target` into a bundle as if it had been built, and proven where it runs."""
    manifest = open_bundle(bundle.folder).manifest
    file = f"engines/{backend}/fp32-{target}.engine"
    write_plan(bundle.path(file), backend, PROFILES, DIM, target=target)
    made = record_for(bundle.path(file), backend, file=file, target=target)
    mark = engine_fingerprint(manifest.fingerprint, bundle.graph("fp32"), backend, made.sha256)
    parity = replace(manifest.engines[0].parity, fingerprint=mark) if proven else None  # type: ignore[type-var]
    record = replace(made, fingerprint=mark, parity=parity)
    write_manifest(bundle.folder, replace(manifest, engines=[*manifest.engines, record]))
    return forge_report(bundle.folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parity_of_an_engine_on_the_doubles(
    bundle_copy: Bundle, reference: Reference, device: FakeCuda, backend: str
) -> None:
    """All of parity's ways of running: batches, other orders, equal lengths, 1024 wide padding."""
    with_engine = add_engine(bundle_copy, backend, "sm89", proven=False)
    short = [t for t in verification_texts() if len(t.text) < 20 and not t.prompt][:3]
    texts = short + [t for t in verification_texts() if 60 < len(t.text) < 200][::60]
    report, _ = check_bundle(with_engine, reference, texts, engine_names=[f"{backend}:fp32"])
    (engine,) = report.engines
    assert (engine.verdict, engine.diagnosis) == ("pass", [])
    assert {c.name for c in engine.checks} >= {"single", "batch", "permuted", "equal length", "padded", "dim 128"}


def test_parity_leaves_out_what_the_engine_does_not_take(
    bundle_copy: Bundle, reference: Reference, device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "PROFILES", [(4, 70)])
    short = add_engine(bundle_copy, "tensorrt", "sm89", proven=False)
    texts = [t for t in verification_texts() if 60 < len(t.text) < 400][::100]
    report, _ = check_bundle(short, reference, texts)
    cpu, gpu = report.engines
    assert (cpu.verdict, gpu.verdict, cpu.omitted) == ("pass", "pass", 0)
    assert 0 < gpu.omitted < len(texts)
    assert gpu.checks[0].rows == len(texts) - gpu.omitted
    screen = Console(file=io.StringIO(), width=200)
    print_report(report, screen)
    assert f"{gpu.omitted} texts are longer than the engine takes" in screen.file.getvalue()  # type: ignore[attr-defined]
    long = [t for t in verification_texts() if len(t.text) > 400][:2]
    report, _ = check_bundle(short, reference, long, engine_names=["tensorrt:fp32"])
    assert report.engines[0].verdict == "not_executed"
    assert "every text is longer than the 70 tokens" in report.engines[0].reason


def test_auto_takes_the_gpu_engine_and_says_why(bundle_copy: Bundle, device: FakeCuda) -> None:
    added = add_engine(add_engine(bundle_copy, "tensorrt-rtx", "sm120"), "tensorrt-rtx", "sm89")
    record = added.engine("tensorrt-rtx:fp32@sm89")
    # fp16 in name only: fp32 stands in no speed order, since no builder makes it.
    renamed = [replace(e, name=e.name.replace("rtx:fp32", "rtx:fp16")) for e in added.manifest.engines]
    other = shutil.copytree(added.folder, added.folder.parent / "renamed")
    write_manifest(other, replace(added.manifest, engines=renamed))
    chosen, why = select(forge_report(other), "auto")
    assert chosen.full_name == "tensorrt-rtx:fp16@sm89"
    assert "fastest engine that runs here" in why
    assert "tensorrt-rtx:fp16@sm120 (tensorrt-rtx:fp16@sm120 was compiled for sm120; the GPU here is NVIDIA L4" in why
    # By name alone: the one for this machine. By full name: what was asked for, or an error.
    assert select(added, "tensorrt-rtx:fp32") == (record, "asked for by name")
    with pytest.raises(NotExecutableError, match="compiled for sm120"):
        select(added, "tensorrt-rtx:fp32@sm120")


def test_loading_proves_the_engine_on_the_golden_texts(bundle_copy: Bundle, device: FakeCuda) -> None:
    added = add_engine(bundle_copy, "tensorrt", "sm89")
    loaded = load_engine(added, "tensorrt:fp32")
    assert loaded.golden_cosine > 0.99999
    expected = golden.load(added)
    vectors = loaded.engine.run(make_batch(expected.ids, added.manifest.contract.pad_id))
    assert row_cosines(vectors, expected.embeddings).min() > 0.99999
    loaded.engine.close()


def test_text_longer_than_the_engine_is_a_bad_request(
    bundle_copy: Bundle, device: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never cut in silence: the request is refused with the item, the limit and the cure, and the rest is answered."""
    monkeypatch.setitem(globals(), "PROFILES", [(4, 200)])
    embedder = open_embedder(add_engine(bundle_copy, "tensorrt", "sm89"), "tensorrt:fp32")
    assert embedder.embed(["short", "word " * 100]).vectors.shape == (2, DIM)
    with pytest.raises(InputError, match=r"item 1 has \d+ tokens; the engine tensorrt:fp32 was built for at most 200"):
        embedder.embed(["short", "word " * 300])
    embedder.close()


def test_auto_on_a_machine_without_gpu_serves_from_cpu(bundle_copy: Bundle, no_gpu: CudaRuntime) -> None:
    """The same bundle, for real, where nothing of NVIDIA's is: passed over with the reason, an error by name."""
    added = add_engine(bundle_copy, "tensorrt-rtx", "sm89")
    loaded = load_engine(added)
    assert loaded.record.name == "onnxruntime:fp32"
    loaded.engine.close()
    with pytest.raises(NotExecutableError, match=r"NVIDIA driver|no GPU"):
        load_engine(added, "tensorrt-rtx:fp32")


def test_changed_plan_is_noticed_before_it_is_opened(bundle_copy: Bundle, device: FakeCuda) -> None:
    added = add_engine(bundle_copy, "tensorrt", "sm89")
    record = added.engine("tensorrt:fp32")
    data = bytearray(added.path(record.file).read_bytes())
    data[-2] ^= 1
    added.path(record.file).write_bytes(bytes(data))
    with pytest.raises(Exception, match="SHA-256"):
        load_engine(added, "tensorrt:fp32")


def test_unproven_engine_is_refused_on_its_own_gpu(bundle_copy: Bundle, device: FakeCuda) -> None:
    added = add_engine(bundle_copy, "tensorrt", "sm89", proven=False)
    with pytest.raises(UnverifiedError, match="never compared"):
        load_engine(added, "tensorrt:fp32")
    assert load_engine(added).record.name == "onnxruntime:fp32"
