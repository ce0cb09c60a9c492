"""TensorRT engines in a bundle, on doubles: chosen, proven, refused; and what this machine says without a GPU."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from calibration.texts import verification_texts
from export.parity import check_bundle
from export.reference import Reference
from export.report.terminal import print_report
from runtime import golden
from runtime.batch import make_batch
from runtime.bundle import Bundle, engine_fingerprint, open_bundle, write_manifest
from runtime.embedder import open_embedder
from runtime.engines import tensorrt
from runtime.engines.cuda import CudaRuntime
from runtime.engines.tensorrt_library import load_library
from runtime.errors import EngineError, InputError, MissingExtraError, NotExecutableError, UnverifiedError
from runtime.golden import row_cosines
from runtime.loader import load_engine, select
from tests.bundles import forge_report
from tests.fake_device import DOUBLED, ENUMS, FakeCuda, FakeTensorRT, Model, public_names, write_plan
from tests.tensorrt_rig import BACKENDS, DIM, PROFILES, VERSIONS, record_for

pytestmark = pytest.mark.usefixtures("own_cache")


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
    profiles = [f"{r}x{t}" for r, t in PROFILES]
    made = record_for(bundle.path(file), backend, file=file, target=target, profiles=profiles)
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


def test_auto_on_a_machine_without_gpu_serves_from_cpu(bundle_copy: Bundle, no_gpu: CudaRuntime) -> None:
    """The same bundle, for real, where nothing of NVIDIA's is: passed over with the reason, an error by name."""
    added = add_engine(bundle_copy, "tensorrt-rtx", "sm89")
    loaded = load_engine(added)
    assert loaded.record.name == "onnxruntime:fp32"
    loaded.engine.close()
    with pytest.raises(NotExecutableError, match=r"NVIDIA driver|no GPU"):
        load_engine(added, "tensorrt-rtx:fp32")
