"""TensorRT-RTX engines, really compiled, for GPUs that are not here; and everything the builder refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.texts import calibration_texts, verification_texts
from export.build import add_engine
from export.builder import build_engine
from export.checkpoint import Checkpoint
from export.cli import app
from export.parity import check_bundle
from export.pipeline import export_bundle
from export.precision import Precision
from export.profiles import PRESETS, Profile, parse_profiles
from export.reference import Reference
from runtime.bundle import Bundle, open_bundle
from runtime.errors import BundleError, EngineError, InputError, MissingExtraError, NotFoundError, UnverifiedError
from runtime.files import sha256_file
from runtime.loader import select

RTX = "tensorrt-rtx"
SMALL = (Profile(1, 64),)


@pytest.fixture(scope="module")
def narrow_bundle(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    patch = pytest.MonkeyPatch()
    patch.setenv("F2RT_CACHE", str(tmp_path_factory.mktemp("cache")))
    texts = [t for t in calibration_texts() if len(t.text) < 300][::20]
    target = tmp_path_factory.mktemp("narrow") / "mini"
    precisions = [Precision.FP32, Precision.FP16, Precision.BF16]
    bundle = export_bundle(checkpoint, target, precisions, calibration=texts)
    patch.undo()
    return bundle


@pytest.fixture
def narrow_copy(narrow_bundle: Bundle, tmp_path: Path) -> Bundle:
    return open_bundle(Path(shutil.copytree(narrow_bundle.folder, tmp_path / "bundle")))


@pytest.mark.parametrize("target", ["sm80", "sm89", "sm120"])
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_rtx_builds_without_a_gpu(narrow_bundle: Bundle, precision: Precision, target: str) -> None:
    seen: list[str] = []
    built = build_engine(
        narrow_bundle.path(f"graphs/{precision}.onnx"),
        RTX,
        precision,
        SMALL,
        target=target,
        progress=lambda label, done, total: seen.append(label),
    )
    # At the least the weights are in it, at two bytes each.
    assert len(built.data) > 2 * 6_000_000
    assert built.target == target
    assert built.builder[RTX].startswith("1.7")
    assert seen


def test_engine_is_recorded_and_kept_until_something_changes(narrow_copy: Bundle, narrow_bundle: Bundle) -> None:
    folder = narrow_copy.folder
    first = add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89")
    assert (first.built, first.reason) == (True, "the bundle had none")
    bundle = open_bundle(folder)
    record = bundle.engine("tensorrt-rtx:fp16@sm89")
    assert sha256_file(bundle.path(record.file)) == record.sha256
    assert record.profiles == ["1x64"]
    assert record.parity is None
    kept = add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89")
    assert (kept.built, kept.record.sha256) == (False, record.sha256)
    other = add_engine(folder, RTX, Precision.FP16, (Profile(2, 32),), target="sm89")
    assert (other.built, other.reason) == (True, "the profiles changed")
    assert not bundle.path(record.file).exists()  # the new one was written beside it, and then it went
    bundle.path(other.record.file).write_bytes(b"damaged")
    again = add_engine(folder, RTX, Precision.FP16, (Profile(2, 32),), target="sm89")
    assert (again.built, again.reason) == (True, "its file is missing or was changed")
    assert [p.name for p in (folder / "engines/tensorrt-rtx").iterdir()] == [Path(again.record.file).name]
    graph = bundle.path("graphs/fp16.onnx.data")
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"fp16\.onnx\.data was changed after the export"):
        add_engine(folder, RTX, Precision.FP16, SMALL, target="sm120")
    shutil.copyfile(narrow_bundle.path("graphs/fp16.onnx.data"), graph)
    add_engine(folder, RTX, Precision.FP16, SMALL, target="sm120")
    names = [e.full_name for e in open_bundle(folder).manifest.engines if e.backend == RTX]
    assert names == ["tensorrt-rtx:fp16@sm89", "tensorrt-rtx:fp16@sm120"]


def test_what_was_only_compiled_is_not_executed_and_not_served(narrow_copy: Bundle, reference: Reference) -> None:
    add_engine(narrow_copy.folder, RTX, Precision.FP16, SMALL, target="sm89")
    bundle = open_bundle(narrow_copy.folder)
    texts = [t for t in verification_texts() if len(t.text) < 100][:8]
    report, _ = check_bundle(bundle, reference, texts)
    verdicts = {e.engine: e.verdict for e in report.engines}
    assert verdicts["tensorrt-rtx:fp16@sm89"] == "not_executed"
    assert verdicts["onnxruntime:fp32"] == "pass"
    with pytest.raises(UnverifiedError, match="never compared"):
        select(bundle, "tensorrt-rtx:fp16")


@pytest.mark.parametrize(
    ("backend", "precision", "target", "error", "words"),
    [
        ("openvino", "fp16", "sm89", InputError, "tensorrt, tensorrt-rtx"),
        (RTX, "fp32", "sm89", InputError, "float32"),
        (RTX, "fp16", "sm90", InputError, "It builds for: sm"),
        (RTX, "fp16", "ampere", InputError, "'ampere'"),
    ],
    ids=["backend", "precision", "gpu", "word"],
)
def test_refusals(
    narrow_copy: Bundle, backend: str, precision: str, target: str, error: type[Exception], words: str
) -> None:
    before = (narrow_copy.folder / "manifest.json").read_bytes()
    with pytest.raises(error, match=words):
        add_engine(narrow_copy.folder, backend, Precision(precision), SMALL, target=target)
    assert (narrow_copy.folder / "manifest.json").read_bytes() == before
    assert not (narrow_copy.folder / "engines").exists()


def test_full_tensorrt_says_how_to_install_it(narrow_copy: Bundle) -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtraError, match=r"f2rt\[tensorrt\]"):
            add_engine(narrow_copy.folder, "tensorrt", Precision.FP16, SMALL)
    else:
        pytest.skip("full TensorRT is installed here")


def test_graph_the_bundle_lacks(bundle: Bundle) -> None:
    with pytest.raises(NotFoundError, match="has no fp16 graph"):
        add_engine(bundle.folder, RTX, Precision.FP16, SMALL, target="sm89")


def test_graph_of_another_precision_is_refused_before_compiling(narrow_bundle: Bundle) -> None:
    """An engine that silently came out FP32 would run, and only be slow."""
    with pytest.raises(EngineError, match=r"matrix products of the graph are not fp16: .* DataType\.FLOAT"):
        build_engine(narrow_bundle.path("graphs/fp32.onnx"), RTX, Precision.FP16, SMALL, target="sm89")


def test_unreadable_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"cannot read x\.onnx"):
        build_engine(tmp_path / "x.onnx", RTX, Precision.FP16, SMALL, target="sm89")


def test_profiles() -> None:
    assert parse_profiles("1x64, 8x256", 1024) == (Profile(1, 64), Profile(8, 256))
    assert parse_profiles("latency", 1024) == PRESETS["latency"]
    assert parse_profiles("latency", 100) == (Profile(1, 64), Profile(8, 100))
    for text in ("fast", "0x64", "1x0", "8", "1x64,,"):
        with pytest.raises(InputError, match="is no profile"):
            parse_profiles(text, 1024)
    with pytest.raises(InputError, match="limit of 512"):
        parse_profiles("1x513", 512)


def test_build_command(narrow_copy: Bundle) -> None:
    arguments = ["build", str(narrow_copy.folder), "--backend", RTX, "--target", "sm80,sm89", "--profile", "1x32"]
    run = CliRunner().invoke
    done = run(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.output.count("built ") == 2
    assert run(app, arguments).output.count("kept ") == 2
    assert run(app, [*arguments[:-1], "9x9999"]).exit_code == 2
