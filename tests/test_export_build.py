"""Engines in a bundle: built, kept, replaced, refused, and never half there."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from calibration.texts import verification_texts
from export import builder
from export.build import Outcome, add_engine
from export.builder import resolve_target
from export.changes import manifest_after
from export.cli import app
from export.parity import check_bundle
from export.precision import Precision
from export.profiles import PRESETS, Profile, parse_profiles
from export.reference import Reference
from export.timing_cache import timing_cache_path
from runtime.bundle import Bundle, EngineRecord, open_bundle
from runtime.engines.cuda import Device
from runtime.errors import (
    BundleError,
    InputError,
    MissingExtraError,
    NotExecutableError,
    NotFoundError,
    UnverifiedError,
)
from runtime.files import sha256_file
from runtime.loader import select
from tests.bundles import edit_engines
from tests.fake_device import L4, FakeCuda
from tests.serving import ROOT, child_environment

RTX = "tensorrt-rtx"
SMALL = (Profile(1, 64),)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make sure that there is none: on the machines of CI there is none anyway."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


# --- in the bundle


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
    assert len(list((folder / "engines" / RTX).iterdir())) == 2


def test_engine_made_by_other_rules_is_built_again(narrow_copy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one from before there were any: what f2rt asked of a compiler then, and of its plan, is not known."""
    folder = narrow_copy.folder
    assert add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89").record.builder["build rules"] == "1"

    def forget(engine: EngineRecord) -> EngineRecord:
        return replace(engine, builder={k: v for k, v in engine.builder.items() if k != "build rules"})

    edit_engines(folder, forget)
    words = "this f2rt builds by other rules (1) than the one that made it (rules not recorded)"
    assert add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89").reason == words
    assert not add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89").built
    monkeypatch.setattr("export.build.BUILD_RULES", 2)
    again = add_engine(folder, RTX, Precision.FP16, SMALL, target="sm89")
    assert again.reason == "this f2rt builds by other rules (2) than the one that made it (1)"


def test_int8_engine_says_its_share_of_weights_and_of_work(int8_copy: Bundle) -> None:
    """And every product of the graph is listed in int8, in a bucket of one token as in a longer one."""
    record = add_engine(int8_copy.folder, RTX, Precision.INT8, (Profile(1, 1), Profile(1, 64)), target="sm80").record
    quantization = int8_copy.graph("int8").quantization
    assert quantization is not None
    (weights,) = [flag for flag in record.flags if flag.endswith("% of their weights")]
    count = int(weights.split()[0])
    work = (
        f"{quantization.int8_share:.1%} of the matrix work in int8, of which the budget asks 90%; it is not the share"
    )
    assert any(flag.startswith(work) for flag in record.flags), record.flags
    listed = f"; of {2 * count} that the graph has in int8, {2 * count} are listed so"
    assert any(flag.endswith(listed) for flag in record.flags), record.flags


def test_engine_outlives_another_form_for_onnxruntime(int8_copy: Bundle) -> None:
    """No compiler reads it: neither a change of it nor damage to it is the engine's."""
    folder = int8_copy.folder
    add_engine(folder, RTX, Precision.INT8, SMALL, target="sm89")
    bundle = open_bundle(folder)
    graphs = [replace(g, twin=g.twin and replace(g.twin, sha256="0" * 64)) for g in bundle.manifest.graphs]
    told: list[str] = []
    after = manifest_after(bundle, replace(bundle.manifest, graphs=graphs, engines=[]), told.append)
    assert f"{RTX}:int8@sm89" in [e.full_name for e in after.engines], told
    twin = bundle.path("graphs/int8-uint8.onnx")
    twin.write_bytes(twin.read_bytes()[:-1] + b"x")
    assert not add_engine(folder, RTX, Precision.INT8, SMALL, target="sm89").built
    assert add_engine(folder, RTX, Precision.INT8, SMALL, target="sm120").built
    model = bundle.path("graphs/int8.onnx")
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"int8\.onnx was changed after the export"):
        add_engine(folder, RTX, Precision.INT8, SMALL, target="sm80")


def test_what_was_only_compiled_is_not_executed_and_not_served(
    narrow_copy: Bundle, reference: Reference, no_gpu: None
) -> None:
    add_engine(narrow_copy.folder, RTX, Precision.FP16, SMALL, target="sm89")
    add_engine(narrow_copy.folder, "onnxruntime-cuda", "fp16", ())
    bundle = open_bundle(narrow_copy.folder)
    texts = [t for t in verification_texts() if len(t.text) < 100][:8]
    report, _ = check_bundle(bundle, reference, texts)
    verdicts = {e.engine: e.verdict for e in report.engines}
    assert verdicts["tensorrt-rtx:fp16@sm89"] == verdicts["onnxruntime-cuda:fp16"] == "not_executed"
    assert verdicts["onnxruntime:fp32"] == "pass"
    reasons = {e.engine: e.reason for e in report.engines}
    assert "NVIDIA driver" in reasons["tensorrt-rtx:fp16@sm89"] or "no GPU" in reasons["tensorrt-rtx:fp16@sm89"]
    with pytest.raises(NotExecutableError, match=r"NVIDIA driver|no GPU"):
        select(bundle, "tensorrt-rtx:fp16")
    with pytest.raises(UnverifiedError, match=r"tensorrt-rtx:fp16@sm89 \(never compared with PyTorch\)"):
        select(bundle, "auto")


def test_several_profiles_one_engine(narrow_copy: Bundle) -> None:
    """A preset compiles with the bucket that takes any text of the model."""
    profiles = parse_profiles("latency", 1024)
    done = add_engine(narrow_copy.folder, RTX, "fp16", profiles, target="sm89")
    assert done.record.profiles == ["1x64", "8x128", "8x512", "1x1024"]
    assert not any("distributive" in flag for flag in done.record.flags)


@pytest.mark.parametrize(
    ("backend", "precision", "target", "error", "words"),
    [
        ("openvino", "fp16", "sm89", InputError, "tensorrt, tensorrt-rtx"),
        (RTX, "fp32", "sm89", InputError, "float32"),
        (RTX, "fp16", "sm90", InputError, "It builds for: sm75, sm80, sm86, sm89, sm120, sm121"),
        (RTX, "fp16", "ampere", InputError, "'ampere'"),
        (RTX, "fp16", None, InputError, r"no target was given and there is no GPU here: .*--target sm75,sm80"),
        ("onnxruntime-cuda", "fp16", "sm89", InputError, "compiles nothing and takes no target"),
    ],
    ids=["backend", "precision", "gpu", "word", "no target", "target for a graph"],
)
def test_refusals(
    narrow_copy: Bundle,
    backend: str,
    precision: str,
    target: str | None,
    error: type[Exception],
    words: str,
    no_gpu: None,
) -> None:
    before = (narrow_copy.folder / "manifest.json").read_bytes()
    with pytest.raises(error, match=words):
        add_engine(narrow_copy.folder, backend, precision, SMALL, target=target)
    assert (narrow_copy.folder / "manifest.json").read_bytes() == before
    assert not (narrow_copy.folder / "engines").exists()


def test_profile_beyond_the_graph_is_refused(narrow_copy: Bundle) -> None:
    for profile in (Profile(1, 1025), Profile(0, 5), Profile(3, 0)):
        with pytest.raises(InputError, match=f"the profile {profile} is outside of what the graph takes: 1 to 1024"):
            add_engine(narrow_copy.folder, RTX, "fp16", (Profile(1, 8), profile), target="sm89")
    for profile in (Profile(3_000_000_000, 1), Profile(20_000, 1024)):
        with pytest.raises(InputError, match=f"the profile {profile} makes tensors of") as caught:
            add_engine(narrow_copy.folder, RTX, "fp16", (profile,), target="sm89")
        assert caught.value.cure == "Give it fewer rows or tokens."
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


# --- TensorRT, whose library is not here


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """TensorRT-RTX's real builder in the place of TensorRT's, without what only the former has; and a double of a GPU.

    The calls are the same, their types are checked against TensorRT 11 in test_tensorrt_api.
    """
    rtx = pytest.importorskip("tensorrt_rtx")

    class Module:
        def __getattr__(self, name: str) -> Any:
            if name == "ComputeCapability":
                raise AttributeError(name)
            return getattr(rtx, name)

    monkeypatch.setattr(builder, "load_library", lambda backend: Module())
    monkeypatch.setattr(builder, "CudaRuntime", FakeCuda)
    monkeypatch.setattr(builder, "inspect_plan", lambda *arguments: "")
    return Module()


def test_tensorrt_takes_no_target(stand_in: Any) -> None:
    assert resolve_target("tensorrt", None).name == "sm89-nvidia-l4"
    with pytest.raises(InputError, match="compiles for the GPU it runs on and takes no target"):
        resolve_target("tensorrt", "sm89")


def test_tensorrt_keeps_its_timings(
    narrow_copy: Bundle, stand_in: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path / "cache"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TensorRT-RTX times nothing; its cache is empty
        first = add_engine(narrow_copy.folder, "tensorrt", "fp16", SMALL).record
        (cache,) = (tmp_path / "cache" / "timing").iterdir()
        assert first.target == "sm89-nvidia-l4"
        assert first.builder["gpu"] == "NVIDIA L4"
        assert "kernels timed" in first.flags
        narrow_copy.path(first.file).unlink()
        again = add_engine(narrow_copy.folder, "tensorrt", "fp16", SMALL)
        assert again.reason == "its file is missing or was changed"
        assert "timings of an earlier build reused" in again.record.flags
        assert list((tmp_path / "cache" / "timing").iterdir()) == [cache]
        add_engine(narrow_copy.folder, "tensorrt", "fp16", (Profile(2, 32),))
        assert len(list((tmp_path / "cache" / "timing").iterdir())) == 2  # other profiles, other timings


def test_engine_for_the_gpu_here_is_built_again_for_another_driver(
    narrow_copy: Bundle, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device_is(device: Device) -> Outcome:
        monkeypatch.setattr(builder, "CudaRuntime", lambda: FakeCuda(device))
        return add_engine(narrow_copy.folder, "tensorrt", "fp16", SMALL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        device_is(L4)
        assert not device_is(L4).built
        newer = device_is(replace(L4, driver="590.1"))
        assert newer.reason == "the driver is 590.1 now, it was 580.82.07"
        assert newer.record.builder["driver"] == "590.1"
        # Where the driver cannot be asked, what it was is taken to be so still.
        assert not device_is(replace(L4, driver="")).built
        assert device_is(replace(L4, cuda="13.1")).reason == "the cuda driver is 13.1 now, it was 13.0"


def test_timing_caches_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("F2RT_CACHE", str(tmp_path))
    keys = [["graph", "11.4"], ["graph", "11.5"], ["graph11.4"], ["graph", "11.4", "1x64"]]
    assert len({timing_cache_path(key) for key in keys}) == len(keys)


# --- out of room in the middle


LIMITED = """
import resource, sys
from pathlib import Path
from export.build import Outcome, add_engine
from export.profiles import Profile
from runtime.errors import F2rtError
which, limit = sys.argv[2], int(sys.argv[3])
import tensorrt_rtx  # loaded before the limit, as it would be on a machine that runs full later
if limit < 0:  # so much more than now
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() - limit
resource.setrlimit(getattr(resource, which), (limit, resource.RLIM_INFINITY))
try:
    add_engine(Path(sys.argv[1]), "tensorrt-rtx", "fp16", (Profile(1, 32),), target="sm89")
except F2rtError as error:
    print(type(error).__name__, error)
    sys.exit(3)
"""


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


def limited(folder: Path, which: str, limit: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), which, str(limit)],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def with_engine(narrow_copy: Bundle) -> Bundle:
    """A bundle with an engine that a failing build must not touch."""
    add_engine(narrow_copy.folder, RTX, "fp16", SMALL, target="sm89")
    return open_bundle(narrow_copy.folder)


def test_disk_full_in_the_middle_of_the_plan(with_engine: Bundle) -> None:
    """A file may not grow beyond 8 MB: the plan is cut off half-way, as by a full disk."""
    before = files(with_engine.folder)
    done = limited(with_engine.folder, "RLIMIT_FSIZE", 8 << 20)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith("OutputError cannot write ")
    assert "Nothing was changed" in done.stdout
    assert files(with_engine.folder) == before


def test_out_of_memory_in_the_middle_of_a_build(with_engine: Bundle) -> None:
    """Wherever memory runs out: our error, or the library's own death. The bundle is as it was in either case."""
    before = files(with_engine.folder)
    told = 0
    for megabytes in (5, 20, 60, 100):
        done = limited(with_engine.folder, "RLIMIT_AS", -(megabytes << 20))
        assert done.returncode != 0, megabytes
        if done.returncode == 3:
            told += 1
            assert done.stdout.startswith(("OutOfMemoryError", "EngineError")), done.stdout
        strays = {name for name in files(with_engine.folder) if name.endswith(".part")}
        assert {k: v for k, v in files(with_engine.folder).items() if k not in strays} == before
    assert told
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_killed_before_the_manifest_is_written(with_engine: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new plan is there and the manifest old: the old engine is whole, and the next build cleans up."""
    before = files(with_engine.folder)
    old = with_engine.engine("tensorrt-rtx:fp16")

    def die(folder: Path, manifest: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("export.build.write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        add_engine(with_engine.folder, RTX, "fp16", (Profile(1, 32),), target="sm89")
    monkeypatch.undo()
    now = files(with_engine.folder)
    assert {name: now[name] for name in before} == before
    assert len(now) == len(before) + 1
    part = with_engine.folder / "engines" / RTX / ".fp16-sm89.engine.x1y2.part"
    part.write_bytes(b"of a build that was killed")
    add_engine(with_engine.folder, RTX, "fp16", (Profile(2, 16),), target="sm89")
    plans = list((with_engine.folder / "engines" / RTX).iterdir())
    assert plans == [with_engine.path(open_bundle(with_engine.folder).engine("tensorrt-rtx:fp16").file)]
    assert old.file not in {str(p) for p in plans}


# --- the command


def test_profiles() -> None:
    assert parse_profiles("1x64, 8x256", 1024) == (Profile(1, 64), Profile(8, 256))
    assert parse_profiles("latency", 512) == PRESETS["latency"]
    assert parse_profiles("latency", 1024) == (*PRESETS["latency"], Profile(1, 1024))
    assert parse_profiles("throughput", 40_960)[-1] == Profile(1, 8192)
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
    cuda = ["build", str(narrow_copy.folder), "--backend", "onnxruntime-cuda", "--precision", "fp32,fp16"]
    assert run(app, cuda).output.count("built ") == 2


@pytest.mark.parametrize(
    ("precision", "target", "words"),
    [("fp16", "sm89,sm999", "does not build for 'sm999'"), ("fp16,int8", "sm89", "no int8 graph")],
)
def test_nothing_is_built_of_a_list_with_something_wrong_in_it(
    narrow_copy: Bundle, precision: str, target: str, words: str
) -> None:
    arguments = ["build", str(narrow_copy.folder), "--backend", RTX, "--precision", precision, "--target", target]
    done = CliRunner().invoke(app, [*arguments, "--profile", "1x32"])
    assert done.exit_code == 2
    assert words in " ".join(done.output.split())
    assert not (narrow_copy.folder / "engines").exists()


def test_build_command_without_target_and_gpu_names_the_cure(narrow_copy: Bundle, no_gpu: None) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from export.cli import main; main()",
            "build",
            str(narrow_copy.folder),
            "--backend",
            RTX,
        ],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--target sm75,sm80,sm86,sm89" in done.stderr.replace("\n", "")
