"""What a bundle's record of an engine must say before it answers, each reason not to, and what may be waived."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime import golden, loader
from runtime.bundle import REPORT, Bundle, EngineRecord, ParityRecord, open_bundle, record_file, write_manifest
from runtime.embedder import open_embedder
from runtime.errors import BundleError, NotExecutableError, UnverifiedError
from runtime.gate import Gate, Refusal, refusal
from runtime.loader import load_engine, select
from runtime.policy import Policy
from runtime.tolerances import TOLERANCES
from tests.bundles import edit_engines, edit_manifest_verdicts, edit_verdicts, without_golden

FP32 = "onnxruntime:fp32"
WAIVED = Gate(allow_unverified=True)
LOOSE = Policy("loose", dict(TOLERANCES) | {"fp32": replace(TOLERANCES["fp32"], min_cosine=0.9)})
TIGHT = Policy("tight", dict(TOLERANCES) | {"fp32": replace(TOLERANCES["fp32"], norm_error=0.0)})
CALIBRATED = "c" * 64


def verdict(bundle: Bundle) -> ParityRecord:
    (engine,) = bundle.manifest.engines
    assert engine.parity is not None
    return engine.parity


def never(folder: Path) -> Bundle:
    return edit_engines(folder, lambda e: replace(e, parity=None))


def older(folder: Path) -> Bundle:
    edit_verdicts(folder, checked_at="2026-01-01T00:00:00+00:00")
    return edit_engines(folder, lambda e: replace(e, made_at="2026-01-01T00:00:01+00:00"))


def calibrated(folder: Path, overlap: int | None) -> Bundle:
    edit_verdicts(folder, calibration_overlap=overlap)
    return edit_engines(folder, lambda e: replace(e, calibration_sha256=CALIBRATED))


def edited_report(folder: Path) -> Bundle:
    path = folder / REPORT
    path.write_bytes(path.read_bytes().replace(b'"pass"', b'"fail"', 1))
    return open_bundle(folder)


def replaced_report(folder: Path, data: bytes) -> Bundle:
    """Put another file in the report's place, and its hash into the manifest."""
    (folder / REPORT).write_bytes(data)
    return edit_manifest_verdicts(folder, report_sha256=hashlib.sha256(data).hexdigest())


def other_report(folder: Path) -> Bundle:
    data = (folder / REPORT).read_bytes()
    return replaced_report(folder, data.replace(verdict(open_bundle(folder)).fingerprint.encode(), b"0" * 32))


def empty_report(folder: Path) -> Bundle:
    return replaced_report(folder, b"")


def no_report(folder: Path) -> Bundle:
    (folder / REPORT).unlink()
    return open_bundle(folder)


REFUSED: dict[str, tuple[Callable[[Path], Bundle], str, str]] = {
    "never compared": (never, "never compared with PyTorch", "Run: f2rt parity"),
    "failed": (
        lambda f: edit_verdicts(f, verdict="fail", min_cosine=0.9432),
        r"its verdict is fail \(smallest cosine 0\.943200, the limit for fp32 is 0\.99999\)",
        "Run: f2rt parity",
    ),
    "failed otherwise": (
        lambda f: edit_verdicts(f, verdict="fail"),
        r"its verdict is fail \(see parity/report\.json\)",
        "Run: f2rt parity",
    ),
    "not executed": (
        lambda f: edit_verdicts(f, verdict="not_executed"),
        "its verdict is not_executed",
        "on a machine that can execute it",
    ),
    "another engine's": (
        lambda f: edit_verdicts(f, fingerprint="abc" * 10),
        r"its verdict belongs to another engine, abcabcabcabc and not [0-9a-f]{12}",
        "Run: f2rt parity",
    ),
    "older": (
        older,
        r"its verdict of 2026-01-01T00:00:00\+00:00 is older than the engine, which was made 2026-01-01T00:00:01\+00",
        "Run: f2rt parity",
    ),
    "another policy": (
        lambda f: edit_verdicts(f, policy_sha256=LOOSE.sha256),
        f"under the policy {LOOSE.sha256[:12]}; asked for is default, {Policy().sha256[:12]}",
        "; or name that one with --policy FILE",
    ),
    "before there were policies": (
        lambda f: edit_verdicts(f, policy_sha256=""),
        f"under no recorded policy; asked for is default, {Policy().sha256[:12]}",
        "Run: f2rt parity",
    ),
    "calibration texts": (
        lambda f: calibrated(f, 3),
        r"3 of the \d+ texts it was compared on also shaped its ranges; none may",
        "not calibrated on",
    ),
    "calibration texts, whose is not known": (
        lambda f: edit_verdicts(f, calibration_overlap=3),
        r"3 of the \d+ texts it was compared on also shaped its ranges; none may",
        "not calibrated on",
    ),
    "unknown calibration": (
        lambda f: calibrated(f, None),
        "not known whether the texts it was compared on shaped its ranges .calibration texts cccccccccccc.; none may",
        "not calibrated on",
    ),
    "edited report": (
        edited_report,
        r"parity/report\.json is not the one its verdict stands on: SHA-256 [0-9a-f]{12} and not [0-9a-f]{12}",
        "Run: f2rt parity",
    ),
    "a verdict turned in the manifest": (
        lambda f: edit_manifest_verdicts(edit_verdicts(f, verdict="fail").folder, verdict="pass"),
        r"the manifest was edited: it says verdict pass, and parity/report\.json says fail",
        "Run: f2rt parity",
    ),
    "more texts in the manifest": (
        lambda f: edit_manifest_verdicts(f, texts=5000),
        r"the manifest was edited: it says texts 5000, and parity/report\.json says \d+",
        "Run: f2rt parity",
    ),
    "a report of other engines": (
        other_report,
        r"parity/report\.json, which its verdict stands on, does not name it",
        "Run: f2rt parity",
    ),
    "no report at all": (
        empty_report,
        r"parity/report\.json, which its verdict stands on, is no report: Input data was truncated",
        "Run: f2rt parity",
    ),
    "report is gone": (
        no_report,
        r"its verdict stands on parity/report\.json, which cannot be read: No such file",
        "Run: f2rt parity",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_without_a_verdict_that_stands_it_does_not_answer(bundle_copy: Bundle, case: str) -> None:
    change, reason, cure = REFUSED[case]
    changed = change(bundle_copy.folder)
    for name in ("auto", FP32):
        for choose in (select, load_engine):
            with pytest.raises(UnverifiedError, match=reason) as caught:
                choose(changed, name)
            assert FP32 in caught.value.message
            assert str(changed.folder) in caught.value.message
            assert cure in caught.value.cure
            assert f"f2rt parity {changed.folder}" in caught.value.cure


@pytest.mark.parametrize("case", [case for case in REFUSED if "report" not in case])  # both verdicts stand on it
def test_auto_passes_over_it_with_the_reason(bundle_copy: Bundle, case: str) -> None:
    """The other engine is slower, and verified: it goes first, allowed or not."""
    change, _, _ = REFUSED[case]
    slow = replace(bundle_copy.manifest.engines[0], target="slow", name="onnxruntime:other")
    report = bundle_copy.path(REPORT).read_bytes().replace(FP32.encode(), slow.full_name.encode())
    slow = replace(slow, parity=replace(verdict(bundle_copy), report_sha256=hashlib.sha256(report).hexdigest()))
    (bad,) = change(bundle_copy.folder).manifest.engines
    bundle_copy.path(REPORT).write_bytes(report)  # the good one's verdict stands on it
    both = replace(bundle_copy, manifest=replace(bundle_copy.manifest, engines=[bad, slow]))
    for gate in (Gate(), WAIVED):
        record, why = select(both, "auto", gate=gate)
        assert record == slow
        assert why.startswith("fastest engine that runs here and has a passing verdict; passed over")
    found = refusal(both, bad, Policy())
    assert found is not None
    assert f"{FP32} ({found.reason})" in why


def test_another_engines_name_does_not_take_its_verdict_along(bundle_copy: Bundle) -> None:
    renamed = edit_engines(bundle_copy.folder, lambda e: replace(e, name="onnxruntime:int8"))
    with pytest.raises(UnverifiedError, match=r"report\.json, which its verdict stands on, does not name it"):
        select(renamed, "onnxruntime:int8")


def test_a_graph_elsewhere_is_not_the_one_that_was_proven(bundle_copy: Bundle) -> None:
    """The same bytes, and beside them weights that no hash is known of."""
    folder = bundle_copy.folder
    shutil.copytree(folder / "graphs", folder / "old")
    moved = edit_engines(folder, lambda e: replace(e, file="old/fp32.onnx"))
    for gate in (Gate(), WAIVED):
        with pytest.raises(UnverifiedError, match=r"runs old/fp32\.onnx, which is not the fp32 graph of the bundle"):
            load_engine(moved, gate=gate)


def test_a_verdict_that_falls_while_the_engine_is_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [None, Refusal("it has failed meanwhile", "Ask again.")]
    monkeypatch.setattr(loader, "refusal", lambda *given: answers.pop(0))
    with pytest.raises(UnverifiedError, match="may not answer: it has failed meanwhile"):
        load_engine(bundle)


def test_what_a_verdict_may_leave_open(bundle_copy: Bundle) -> None:
    """An engine without ranges from text has no overlap to know; one of an older f2rt has no date."""
    folder = bundle_copy.folder
    checked_at = verdict(bundle_copy).checked_at
    for made_at in ("", checked_at):
        edit_engines(folder, lambda e, at=made_at: replace(e, made_at=at))  # type: ignore[misc]
        for overlap, calibration in ((0, None), (None, None), (0, CALIBRATED)):
            edit_engines(folder, lambda e, c=calibration: replace(e, calibration_sha256=c))  # type: ignore[misc]
            changed = edit_verdicts(folder, calibration_overlap=overlap)
            assert select(changed, "auto")[0] == changed.manifest.engines[0]


def test_the_policy_asked_for_is_the_one_it_was_proven_under(bundle_copy: Bundle) -> None:
    loose = edit_verdicts(bundle_copy.folder, policy_sha256=LOOSE.sha256)
    loaded = load_engine(loose, gate=Gate(LOOSE))
    assert (loaded.policy, loaded.unverified) == (LOOSE, "")
    loaded.engine.close()
    with pytest.raises(UnverifiedError) as caught:
        load_engine(loose, gate=Gate(TIGHT))
    assert f"{LOOSE.sha256[:12]}; asked for is tight, {TIGHT.sha256[:12]}" in caught.value.message
    assert f"f2rt parity {loose.folder} --policy FILE" in caught.value.cure


def test_the_golden_check_takes_the_policys_limits(bundle_copy: Bundle) -> None:
    """No float32 vector has a length of exactly 1, which is what this policy asks for."""
    tight = edit_verdicts(bundle_copy.folder, policy_sha256=TIGHT.sha256)
    with pytest.raises(UnverifiedError, match=r"length is off by .* the limit for fp32 is 0\.0"):
        load_engine(tight, gate=Gate(TIGHT))


# --- allowed unverified


@pytest.mark.parametrize("case", list(REFUSED))
def test_allowed_it_answers_and_says_what_it_lacks(bundle_copy: Bundle, case: str) -> None:
    change, _, _ = REFUSED[case]
    changed = change(bundle_copy.folder)
    found = refusal(changed, changed.manifest.engines[0], Policy())
    assert found is not None
    for name in ("auto", FP32):
        loaded = load_engine(changed, name, gate=WAIVED)
        assert loaded.unverified == found.reason
        assert not loaded.expected.stand_in
        loaded.engine.close()
    assert "allowed though unverified" in select(changed, "auto", gate=WAIVED)[1]


def test_a_verified_engine_stays_verified_where_others_are_allowed(bundle: Bundle) -> None:
    loaded = load_engine(bundle, gate=WAIVED)
    assert loaded.unverified == ""
    assert "passing verdict" in loaded.selection
    loaded.engine.close()


def test_auto_takes_one_that_is_known_to_miss_a_limit_last(bundle: Bundle) -> None:
    (good,) = bundle.manifest.engines
    failed = replace(good, parity=replace(verdict(bundle), verdict="fail"))
    unknown = replace(good, name="onnxruntime:other", parity=None)
    both = replace(bundle, manifest=replace(bundle.manifest, engines=[failed, unknown]))
    record, why = select(both, "auto", gate=WAIVED)
    assert record == unknown
    assert f"passed over {FP32} (its verdict is fail" in why
    record, _ = select(both, "auto", {unknown.full_name: "it broke"}, WAIVED)
    assert record == failed


def gpu(bundle: Bundle) -> Bundle:
    (good,) = bundle.manifest.engines
    record = EngineRecord("magic:fp32", "magic", "fp32", good.file, good.sha256, good.fingerprint)
    return replace(bundle, manifest=replace(bundle.manifest, engines=[record]))


def test_what_cannot_run_here_is_no_matter_of_verdicts(bundle: Bundle) -> None:
    with pytest.raises(NotExecutableError, match="does not run magic engines"):
        select(gpu(bundle), "magic:fp32", gate=WAIVED)
    with pytest.raises(UnverifiedError, match=r"no engine of .* magic:fp32 \(never compared"):
        select(gpu(bundle), "auto", gate=WAIVED)


def test_golden_vectors_that_are_there_are_never_waived(bundle_copy: Bundle) -> None:
    never(bundle_copy.folder)
    expected = golden.load(bundle_copy)
    path = bundle_copy.path("golden.npz")
    path.write_bytes(golden.pack(replace(expected, embeddings=np.roll(expected.embeddings, 1, axis=1))))
    with pytest.raises(BundleError, match="SHA-256"):
        load_engine(open_bundle_with_hash(bundle_copy.folder, fix=False), gate=WAIVED)
    with pytest.raises(UnverifiedError) as caught:
        load_engine(open_bundle_with_hash(bundle_copy.folder, fix=True), gate=WAIVED)
    assert "does not reproduce PyTorch" in caught.value.message
    assert "An engine known to be wrong never answers" in caught.value.message


def open_bundle_with_hash(folder: Path, *, fix: bool) -> Bundle:
    manifest = open_bundle(folder).manifest
    if fix:
        write_manifest(folder, replace(manifest, golden=record_file(folder, "golden.npz")))
    return open_bundle(folder)


def test_hashes_and_fingerprint_are_never_waived(bundle_copy: Bundle) -> None:
    never(bundle_copy.folder)
    forged = edit_engines(bundle_copy.folder, lambda e: replace(e, fingerprint="0" * 32))
    with pytest.raises(UnverifiedError, match="its parts give"):
        load_engine(forged, gate=WAIVED)
    graph = bundle_copy.path("graphs/fp32.onnx.data")
    data = bytearray(graph.read_bytes())
    data[100] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleError, match=r"fp32\.onnx\.data has SHA-256"):
        load_engine(open_bundle(bundle_copy.folder), gate=WAIVED)


def test_without_golden_vectors_its_own_first_ones_stand_in(bundle_copy: Bundle) -> None:
    bare = without_golden(bundle_copy.folder)
    with pytest.raises(UnverifiedError, match=r"holds no golden\.npz"):
        load_engine(bare)
    # The verdict stands: what is lacking is the golden vectors alone.
    embedder = open_embedder(bare, gate=WAIVED)
    loaded = embedder.loaded
    assert loaded.unverified == "the bundle has no golden vectors, so it is compared with its own first ones alone"
    assert loaded.expected.stand_in
    assert len(loaded.expected.texts) == 5
    assert loaded.golden_cosine > 0.99999
    own = embedder.embed(loaded.expected.texts, prompt="").vectors
    assert golden.row_cosines(own, loaded.expected.embeddings).min() > 0.99999
    wrong = np.roll(own, 1, axis=1)
    with pytest.raises(UnverifiedError, match="does not reproduce its own first vectors"):
        golden.compare(loaded.engine, wrong, loaded.expected, TOLERANCES["fp32"])
    embedder.close()
    both = never(bundle_copy.folder)
    embedder = open_embedder(both, gate=WAIVED)
    assert embedder.loaded.unverified.startswith("never compared with PyTorch; the bundle has no golden vectors")
    embedder.close()
