"""A verdict stands while engine, texts, limits and versions are the same; only what does not stand is compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from calibration.texts import texts_sha256, write_lines
from export.report.data import EngineReport, ParityReport, to_json
from runtime.bundle import Bundle, EngineRecord, engine_fingerprint, open_bundle, write_manifest
from runtime.errors import BundleError
from runtime.files import sha256_file
from runtime.gate import refusal
from runtime.policy import Policy
from runtime.tolerances import TOLERANCES
from tests.bundles import edit_engines
from tests.verdicts import FP16, FP32, TEXTS, Run, forget, state

ROOT = Path(__file__).parent.parent
SAME = "nothing it depends on has changed"
NO_REPORT = "parity/report.json is missing, was changed, or is another version's"


@pytest.fixture
def folder(proven_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("F2RT_CACHE", str(shutil.copytree(proven_folder.parent / "cache", tmp_path / "cache")))
    return Path(shutil.copytree(proven_folder, tmp_path / "bundle"))


def edit_report(folder: Path, change: Callable[[EngineReport], EngineReport]) -> None:
    """Change what the report says of each engine, as if an earlier run had written it so: all hashes agree."""
    path = folder / "parity/report.json"
    report = msgspec.json.decode(path.read_bytes(), type=ParityReport)
    report = replace(report, engines=[change(e) for e in report.engines])
    path.write_bytes(to_json(report))
    sha256 = sha256_file(path)
    manifest = open_bundle(folder).manifest
    engines = [
        replace(e, parity=replace(e.parity, report_sha256=sha256) if e.parity else None) for e in manifest.engines
    ]
    write_manifest(folder, replace(manifest, engines=engines))


def test_nothing_changed_runs_nothing(folder: Path) -> None:
    before = state(folder)
    run = Run(folder)
    assert run.report.verdict == "pass"
    assert run.kept == {FP32: SAME, FP16: SAME}
    assert run.lines == []
    assert state(folder) == before


def test_the_command_says_what_it_kept_and_imports_no_torch(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, with nothing but the bundle: not even the checkpoint has to be there."""
    manifest = open_bundle(folder).manifest
    write_manifest(folder, replace(manifest, source=replace(manifest.source, id="./gone")))
    (tmp_path / "texts.jsonl").write_bytes(write_lines(TEXTS))
    script = (
        "import sys, calibration.texts as t\n"
        f"texts = t.read_texts({str(tmp_path / 'texts.jsonl')!r})\n"
        "t.verification_texts = lambda: texts\n"
        "from export.cli import app\n"
        f"try:\n    app(['parity', {str(folder)!r}, '--report-dir', {str(tmp_path / 'out')!r}])\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    text = " ".join(done.stdout.split())
    assert text.count(f"kept from {open_bundle(folder).manifest.engines[0].parity.checked_at}: {SAME}") == 2  # type: ignore[union-attr]
    assert f"on {len(TEXTS)} texts min cosine 1.0000000" in text
    assert (tmp_path / "out/report.json").is_file()


def other_limits(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TOLERANCES, "fp16", replace(TOLERANCES["fp16"], min_cosine=0.9))


def other_onnxruntime(folder: Path, patch: pytest.MonkeyPatch) -> None:
    edit_report(folder, lambda e: replace(e, versions=e.versions | {"onnxruntime": "1.0"}))


def other_f2rt(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("runtime.__version__", "99.0")


def damaged_report(folder: Path, patch: pytest.MonkeyPatch) -> None:
    with (folder / "parity/report.json").open("ab") as file:
        file.write(b" ")


def no_report(folder: Path, patch: pytest.MonkeyPatch) -> None:
    (folder / "parity/report.json").unlink()


def never_compared(folder: Path, patch: pytest.MonkeyPatch) -> None:
    edit_engines(folder, forget(FP16))


def failed(folder: Path, patch: pytest.MonkeyPatch) -> None:
    edit_engines(folder, lambda e: replace(e, parity=replace(e.parity, verdict="fail")))  # type: ignore[type-var]


def another_engine(folder: Path, patch: pytest.MonkeyPatch) -> None:
    edit_engines(folder, lambda e: replace(e, parity=replace(e.parity, fingerprint="0" * 32)))  # type: ignore[type-var]


INSTALLED = importlib.metadata.version("onnxruntime")


@pytest.mark.parametrize(
    ("change", "who", "why"),
    [
        (other_limits, {FP32, FP16}, "the policy changed"),
        (other_onnxruntime, {FP32, FP16}, f"onnxruntime (1.0 to {INSTALLED}) changed"),
        (other_f2rt, {FP32, FP16}, "f2rt (0.1.0 to 99.0) changed"),
        (damaged_report, {FP32, FP16}, NO_REPORT),
        (no_report, {FP32, FP16}, NO_REPORT),
        (never_compared, {FP16}, "it was never compared"),
        (failed, {FP32, FP16}, "it failed the last time"),
        (another_engine, {FP32, FP16}, "its verdict belongs to another engine"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_only_what_does_not_stand_is_compared(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
    who: set[str],
    why: str,
) -> None:
    change(folder, monkeypatch)
    before = open_bundle(folder).manifest
    golden = (folder / "golden.npz").stat()
    run = Run(folder)
    assert run.compared == dict.fromkeys(who, why)
    assert run.computed == 0  # the reference's vectors are recorded
    assert run.report.verdict == "pass"
    assert run.kept == {name: "" if name in who else SAME for name in (FP32, FP16)}
    after = open_bundle(folder).manifest
    assert (folder / "golden.npz").stat().st_ino == golden.st_ino  # the same vectors are not written again
    for old, new in zip(before.engines, after.engines, strict=True):
        assert old.parity or new.full_name in who
        assert new.parity is not None
        assert new.parity.verdict == "pass"
        assert new.parity.report_sha256 == sha256_file(folder / "parity/report.json")
        if old.full_name not in who:
            assert replace(new.parity, report_sha256="") == replace(old.parity, report_sha256="")  # type: ignore[type-var]
    assert Run(folder).lines == []  # and now all stand again


def test_force_compares_all(folder: Path) -> None:
    assert Run(folder, force=True).compared == dict.fromkeys((FP32, FP16), "--force was given")


def test_other_texts(folder: Path) -> None:
    run = Run(folder, TEXTS[:-1])
    assert run.compared == dict.fromkeys((FP32, FP16), "the texts changed")
    assert run.computed == 0  # what PyTorch says of a text does not depend on the others


def test_golden_vectors_that_are_gone_are_made_without_running_an_engine(folder: Path) -> None:
    sha256 = sha256_file(folder / "golden.npz")
    (folder / "golden.npz").unlink()
    manifest = open_bundle_without_golden(folder)
    assert manifest.golden is None
    run = Run(folder)
    assert (run.compared, run.kept) == ({}, {FP32: SAME, FP16: SAME})
    assert open_bundle(folder).manifest.golden is not None
    assert sha256_file(folder / "golden.npz") == sha256


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_golden_vectors_that_are_damaged_are_made_again(folder: Path, damage: str) -> None:
    """Whoever meets them says that parity is the cure."""
    sha256, path = sha256_file(folder / "golden.npz"), folder / "golden.npz"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError) as caught:
        open_bundle(folder)
    assert f"Run: f2rt parity {folder}" in caught.value.cure
    assert Run(folder).compared == {}
    record = open_bundle(folder).manifest.golden
    assert record is not None
    assert record.sha256 == sha256_file(folder / record.file) == sha256


def open_bundle_without_golden(folder: Path) -> object:
    from runtime.bundle import read_manifest

    write_manifest(folder, replace(read_manifest(folder), golden=None))
    return open_bundle(folder).manifest


def test_one_engine_asked_for_by_name_keeps_what_is_known_of_the_others(folder: Path) -> None:
    run = Run(folder, TEXTS[:5], engine_names=[FP16])
    assert run.compared == {FP16: "the texts changed"}
    assert run.kept == {FP32: "it was not asked for", FP16: ""}
    records = {e.full_name: e.parity for e in open_bundle(folder).manifest.engines}
    assert records[FP32].texts_sha256 == texts_sha256(TEXTS)  # type: ignore[union-attr]
    assert records[FP16].texts_sha256 == texts_sha256(TEXTS[:5])  # type: ignore[union-attr]
    assert Run(folder).compared == {FP16: "the texts changed"}


def verdict_of(name: str, **fields: object) -> Callable[[EngineRecord], EngineRecord]:
    return lambda e: replace(e, parity=replace(e.parity, **fields)) if e.full_name == name else e  # type: ignore[type-var,arg-type]


def test_an_edited_report_is_not_carried_over(folder: Path) -> None:
    """fp16 failed; its report was then made to say otherwise. Comparing fp32 must not bless that."""
    edit_report(folder, lambda e: replace(e, verdict="fail") if e.engine == FP16 else e)
    edit_engines(folder, verdict_of(FP16, verdict="fail"))
    path = folder / "parity/report.json"
    path.write_bytes(path.read_bytes().replace(b'"fail"', b'"pass"'))
    run = Run(folder, engine_names=[FP32], force=True)
    assert list(run.kept) == [FP32]
    assert any(
        line.startswith(f"not carried over: the verdict on {FP16}: parity/report.json is not") for line in run.lines
    )
    bundle = open_bundle(folder)
    assert refusal(bundle, bundle.engine(FP32), Policy()) is None
    assert refusal(bundle, bundle.engine(FP16), Policy()) is not None
    assert set(Run(folder).compared) == {FP16}
    assert refusal(open_bundle(folder), open_bundle(folder).engine(FP16), Policy()) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda e: replace(e, made_at="2999-01-01T00:00:00+00:00"), "the engine is newer than its verdict"),
        (lambda e: replace(e, parity=replace(e.parity, texts=999)), "the manifest was edited: it says texts 999"),
    ],
    ids=["newer", "edited"],
)
def test_what_the_gate_refuses_is_compared_again(
    folder: Path, change: Callable[[EngineRecord], EngineRecord], why: str
) -> None:
    """Its cure is to run parity: then parity must not say that nothing has changed."""
    edit_engines(folder, lambda e: change(e) if e.full_name == FP16 else e)
    bundle = open_bundle(folder)
    assert refusal(bundle, bundle.engine(FP16), Policy()) is not None
    run = Run(folder)
    assert set(run.compared) == {FP16}
    assert run.compared[FP16].startswith(why)
    bundle = open_bundle(folder)
    assert refusal(bundle, bundle.engine(FP16), Policy()) is None


def test_verdict_is_that_of_those_asked_for(folder: Path) -> None:
    edit_report(folder, lambda e: replace(e, verdict="fail") if e.engine == FP16 else e)
    assert Run(folder, engine_names=[FP32]).report.verdict == "pass"


@pytest.mark.parametrize("file", ["graphs/fp16.onnx.data", "graphs/fp16.onnx", "tokenizer.json"])
def test_file_changed_behind_the_manifest_is_no_longer_what_was_proven(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[-1] ^= 1
    (folder / file).write_bytes(data)
    before = (folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match=f"{file} was changed after the bundle was made"):
        Run(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_model_given_by_name_must_be_the_source_even_when_all_verdicts_stand(folder: Path, mini_copy: Path) -> None:
    assert Run(folder, model=str(mini_copy)).lines == []
    (mini_copy / "tokenizer_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"tokenizer_config\.json is not the file"):
        Run(folder, model=str(mini_copy))


def add_compiled(folder: Path) -> EngineRecord:
    """Give the bundle an engine for a GPU. Its file is a double: no machine of these tests would run a real one."""
    bundle: Bundle = open_bundle(folder)
    data = b"not compiled"
    (folder / "engines/tensorrt-rtx").mkdir(parents=True, exist_ok=True)
    (folder / "engines/tensorrt-rtx/fp16-sm89.engine").write_bytes(data)
    graph, sha256 = bundle.graph("fp16"), hashlib.sha256(data).hexdigest()
    record = EngineRecord(
        name="tensorrt-rtx:fp16",
        backend="tensorrt-rtx",
        precision="fp16",
        file="engines/tensorrt-rtx/fp16-sm89.engine",
        sha256=sha256,
        fingerprint=engine_fingerprint(bundle.manifest.fingerprint, graph, "tensorrt-rtx", sha256),
        target="sm89",
        graph_sha256=graph.key,
    )
    others = [e for e in bundle.manifest.engines if e.full_name != record.full_name]
    write_manifest(folder, replace(bundle.manifest, engines=[*others, record]))
    return record


def test_engine_that_cannot_run_here_needs_no_reference(folder: Path) -> None:
    name = add_compiled(folder).full_name
    run = Run(folder)
    assert (run.compared, run.computed) == ({}, None)
    assert run.kept == {FP32: SAME, FP16: SAME, name: ""}
    parity = open_bundle(folder).engine(name).parity
    assert parity is not None
    assert parity.verdict == "not_executed"
    before = state(folder)
    assert Run(folder).kept[name] == SAME
    assert state(folder) == before
    # What keeps it from running is not what it was then: it is asked again.
    edit_report(folder, lambda e: replace(e, reason="not executed: no driver") if e.reason else e)
    assert Run(folder).kept[name] == ""


def test_verdict_of_another_machine_stands_where_the_engine_cannot_run(folder: Path) -> None:
    name = add_compiled(folder).full_name
    Run(folder)
    there = {"driver": "1.2"}  # it was run by something that is not installed here
    edit_report(
        folder,
        lambda e: replace(e, verdict="pass", reason="", versions=e.versions | there) if e.engine == name else e,
    )
    edit_engines(
        folder,
        lambda e: replace(e, parity=replace(e.parity, verdict="pass")),  # type: ignore[type-var]
    )
    run = Run(folder)
    assert run.kept[name] == SAME
    assert {e.engine: e.verdict for e in run.report.engines}[name] == "pass"
