"""Fixtures that files share: the bundled checkpoint, and what is made once for the whole run, or for one worker."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import onnxruntime
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

from bench.stock_export import export_stock
from calibration.texts import Text, calibration_texts, verification_texts, write_lines
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from export.reference import Reference
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.bundle import Bundle, open_bundle
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from tests.fake_device import Model
from tests.http_client import client_of
from tests.project import ALL, SAME, Project
from tests.serving import ServerProcess
from tests.serving_in_process import BIG, InProcess
from tests.tiny import write_tiny
from tests.verdicts import TEXTS

ROOT = Path(__file__).resolve().parent.parent
Shared = Callable[[str, Callable[[Path], object]], Path]

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("f2rt", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("f2rt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the README's commands, which take longest: one worker is at them while others do the rest."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Make a folder once for all workers of this run: the others wait, and read what the first one made."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    root.mkdir(exist_ok=True)

    def make(name: str, write: Callable[[Path], object]) -> Path:
        with FileLock(root / f"{name}.lock"):
            done = root / f"{name}.done"
            if not done.exists():
                shutil.rmtree(root / name, ignore_errors=True)
                write(root / name)
                done.touch()
        return root / name

    return make


@pytest.fixture(scope="session", autouse=True)
def f2rt_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this run's own: no test leans on what an earlier run computed."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("F2RT_CACHE", str(folder))
        yield folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the test's own, and an empty one."""
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def mini() -> Path:
    return ROOT / "checkpoints" / "mini"


@pytest.fixture
def mini_copy(mini: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(mini, tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def checkpoint(mini: Path) -> Checkpoint:
    return Checkpoint.open(locate(str(mini)))


@pytest.fixture(scope="session")
def reference(mini: Path) -> Reference:
    return Reference(locate(str(mini)))


@pytest.fixture(scope="session")
def verification() -> list[Text]:
    return verification_texts()


@pytest.fixture(scope="session")
def calibration() -> list[Text]:
    return calibration_texts()


@pytest.fixture(scope="session")
def bundle(checkpoint: Checkpoint, shared: Shared) -> Bundle:
    """A bundle proven on a seventh of the short verification texts. Read only."""

    def make(folder: Path) -> None:
        export_bundle(checkpoint, folder / "mini", [Precision.FP32])
        texts = [t for t in verification_texts() if len(t.text) < 400][::7]
        assert prove_bundle(folder / "mini", texts).verdict == "pass"

    return open_bundle(shared("bundle", make) / "mini")


@pytest.fixture(scope="session")
def graph(bundle: Bundle) -> Model:
    """The bundled checkpoint's fp32 graph in ONNX Runtime: what the double computes."""
    session = onnxruntime.InferenceSession(str(bundle.path("graphs/fp32.onnx")), providers=["CPUExecutionProvider"])

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(session.run(["sentence_embedding"], {"input_ids": ids, "attention_mask": mask})[0])

    return run


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    opened = open_embedder(bundle)
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def server(bundle: Bundle) -> Iterator[ServerProcess]:
    """A server in a process of its own, one for all files of a worker: it is asked, and never told to change."""
    with ServerProcess(bundle.folder) as running:
        yield running
        assert running.process.poll() is None, "the server died:\n" + "\n".join(running.log)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[EmbeddingClient]:
    with server.client() as opened:
        yield opened


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, options=BIG) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[InProcess]:
    """A server with an HTTP port, in the test's process."""
    with InProcess(open_embedder(bundle), http=True) as server:
        yield server


@pytest.fixture
def web(served: InProcess) -> Iterator[httpx.Client]:
    """A client of it; after the test the same server still gives the right vector."""
    with client_of(served) as client:
        yield client
        assert client.get("/health/ready").status_code == 200
        assert client.post("/v1/embeddings", json={"input": "still here"}).status_code == 200


@pytest.fixture
def bundle_copy(bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(bundle.folder, tmp_path / "bundle")))


@pytest.fixture(scope="session")
def narrow_bundle(checkpoint: Checkpoint, shared: Shared) -> Bundle:
    """A bundle in fp32, fp16 and bf16, shaped by a few calibration texts and not proven. Read only."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("F2RT_CACHE", str(folder / "cache"))
            texts = [t for t in calibration_texts() if len(t.text) < 300][::20]
            precisions = [Precision.FP32, Precision.FP16, Precision.BF16]
            export_bundle(checkpoint, folder / "mini", precisions, calibration=texts)

    return open_bundle(shared("narrow", make) / "mini")


@pytest.fixture(scope="session")
def int8_bundle(checkpoint: Checkpoint, shared: Shared) -> Bundle:
    """A bundle with fp32 and int8 engines, proven on a few texts. Read only."""

    def make(folder: Path) -> None:
        calibration = [t for t in calibration_texts() if len(t.text) < 300][::20]
        export_bundle(checkpoint, folder / "mini", [Precision.FP32, Precision.INT8], calibration=calibration)
        texts = [t for t in verification_texts() if len(t.text) < 300][::48]
        assert prove_bundle(folder / "mini", texts).verdict == "pass"

    return open_bundle(shared("int8", make) / "mini")


@pytest.fixture(scope="session")
def tiny_bundle(shared: Shared) -> Bundle:
    """A bundle of 16 dimensions and 256 tokens. Read only."""

    def make(folder: Path) -> None:
        folder.mkdir()
        checkpoint = Checkpoint.open(locate(str(write_tiny(folder / "checkpoint"))))
        export_bundle(checkpoint, folder / "bundle", [Precision.FP32])
        texts = [t for t in verification_texts() if len(t.text) < 300][::48]
        assert prove_bundle(folder / "bundle", texts).verdict == "pass"

    return open_bundle(shared("tiny", make) / "bundle")


@pytest.fixture
def narrow_copy(narrow_bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(narrow_bundle.folder, tmp_path / "bundle")))


@pytest.fixture(scope="session")
def proven_folder(checkpoint: Checkpoint, shared: Shared) -> Path:
    """A bundle with two engines, proven on `TEXTS`; what the proof left in its cache is beside it. Read only."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("F2RT_CACHE", str(folder / "cache"))
            calibration = [t for t in calibration_texts() if len(t.text) < 250][:4]
            export_bundle(checkpoint, folder / "mini", [Precision.FP32, Precision.FP16], calibration=calibration)
            assert prove_bundle(folder / "mini", TEXTS).verdict == "pass"

    return shared("proven", make) / "mini"


@pytest.fixture
def project(shared: Shared, tmp_path: Path) -> Project:
    """A copy of a tiny project whose bundle was made and given verdicts."""

    def make(folder: Path) -> None:
        folder.mkdir()
        write_tiny(folder / "checkpoint")
        project = Project(folder)
        project.texts.write_bytes(write_lines(calibration_texts()[:20]))
        found = project.export()
        assert found == dict.fromkeys(ALL, ("wrote", "the bundle is new"))

    shutil.copytree(shared("project", make), tmp_path / "p")
    project = Project(tmp_path / "p")
    # The manifest names the checkpoint's folder.
    assert project.export() == dict.fromkeys(ALL, ("kept", SAME))
    project.prove()
    return project


@pytest.fixture(scope="session")
def stock(mini: Path, shared: Shared) -> Callable[[str], Path]:
    """Real `torch.onnx.export`s of stock transformers, by kind (bench.stock_export), each made once. Read only."""
    return lambda kind: shared(f"stock-{kind}", lambda folder: export_stock(mini, folder, kind))


@pytest.fixture
def int8_copy(int8_bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(int8_bundle.folder, tmp_path / "bundle")))
