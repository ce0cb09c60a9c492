"""Runs the comparison with PyTorch on a bundle and writes its verdict into the bundle.

The manifest is the commit point: whatever instant the process dies at, verdicts and golden vectors are as they were or
fully updated. The report is written just before it; a report without its manifest counts as none, and is made again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from calibration.texts import Text, texts_sha256
from export.cache import cached_sha256
from export.changes import damage, spare_name
from export.checkpoint import reference_files
from export.hub import Location, locate
from export.lock import Wait, bundle_lock
from export.parity import check_bundle, overall
from export.recorded import RecordedReference
from export.report.data import EngineReport, ParityReport, policy_record, to_json
from export.report.files import DERIVED_FILES, write_all
from export.samples import Progress
from export.verdicts import Request, read_report, recorded, require_intact, run_versions, standing, unexecutable
from runtime import golden
from runtime.bundle import (
    GOLDEN,
    PREVIOUS_REPORT,
    REPORT,
    Bundle,
    EngineRecord,
    ParityRecord,
    open_bundle,
    record_file,
    timestamp,
    with_parity,
    write_manifest,
)
from runtime.errors import BundleError, CheckpointError, InputError, explain_memory_errors
from runtime.files import explain_read_errors, write_atomic
from runtime.gate import report_problem
from runtime.policy import Policy


def prove_bundle(
    folder: Path,
    texts: Sequence[Text],
    *,
    engine_names: Sequence[str] | None = None,
    model: str | None = None,
    report_dir: Path | None = None,
    force: bool = False,
    progress: Progress = lambda label, done, total: None,
    tell: Callable[[str], None] = lambda line: None,
    wait: Wait = Wait(),
    policy: Policy = Policy(),
) -> ParityReport:
    """Compare the engines of a bundle with PyTorch and record golden vectors, report and verdicts.

    A verdict that still stands is kept, unless `force` is given; `tell` is told why the others are compared. The report
    holds all engines, its verdict is that of those asked for. `model` overrides where the checkpoint lies; its files
    must be those the bundle was made from.

    Raises BundleError, CheckpointError, NotFoundError, InputError or OutputError; the bundle's verdicts and golden
    vectors are then as they were.
    """
    open_bundle(folder, golden_too=False)  # where there is no bundle there is nothing to lock
    if not texts:
        raise InputError("there are no texts to compare on.", cure="Give a file with at least one text.")
    cure = (
        "Free memory: PyTorch takes four bytes a weight, an engine about the size of its files; what was done is kept."
    )
    with bundle_lock(folder, "f2rt parity", wait), explain_memory_errors(f"compare {folder} with PyTorch", cure):
        report = _prove(
            open_bundle(folder, golden_too=False), texts, engine_names, model, force, progress, tell, policy
        )
    if report_dir is not None:
        write_all(report, report_dir)
    return report


def look_again(
    folder: Path,
    texts: Sequence[Text],
    *,
    engine_names: Sequence[str] | None = None,
    model: str | None = None,
    report_dir: Path | None = None,
    progress: Progress = lambda label, done, total: None,
    policy: Policy = Policy(),
) -> ParityReport:
    """Compare engines on a few texts without recording anything in the bundle. Raises as `prove_bundle` does."""
    bundle = open_bundle(folder)
    records = bundle.manifest.engines if engine_names is None else [bundle.engine(n) for n in engine_names]
    require_intact(bundle, records)
    with RecordedReference(source_location(bundle, model), bundle.manifest.source) as reference:
        report, _ = check_bundle(
            bundle, reference, texts, engine_names=engine_names, progress=progress, policy=policy, with_stages=False
        )
    report = replace(report, partial=f"a look at {len(texts)} texts, which gives no verdict that counts")
    if report_dir is not None:
        write_all(report, report_dir)
    return report


def _prove(
    bundle: Bundle,
    texts: Sequence[Text],
    engine_names: Sequence[str] | None,
    model: str | None,
    force: bool,
    progress: Progress,
    tell: Callable[[str], None],
    policy: Policy,
) -> ParityReport:
    start = time.perf_counter()
    asked = bundle.manifest.engines if engine_names is None else [bundle.engine(n) for n in engine_names]
    require_intact(bundle, asked)
    location = source_location(bundle, model) if model is not None else None
    old, hash_of_texts = read_report(bundle), texts_sha256(texts)
    found, to_run = _without_reference(bundle, asked, old, Request(hash_of_texts, policy), force, tell)
    current = old is not None and old.coverage.texts_sha256 == hash_of_texts and _golden_is_whole(bundle)
    vectors = None
    if to_run or not current:
        with RecordedReference(location or source_location(bundle, model), bundle.manifest.source) as reference:
            report, vectors = check_bundle(
                bundle, reference, texts, engine_names=to_run, progress=progress, policy=policy
            )
        tell(f"reference: {reference.computed} vectors from PyTorch now, the others from its earlier runs")
        found |= {e.engine: e for e in report.engines}
    else:
        assert old is not None
        report = replace(old, created_at=timestamp(), policy=policy_record(policy))
    report = replace(report, duration_s=round(time.perf_counter() - start, 3))
    report = _merged(bundle, report, old, found, len(texts), tell)
    if vectors is not None or any(not e.kept for e in found.values()):
        record(bundle, report, vectors)
    return report


def _without_reference(
    bundle: Bundle,
    asked: Sequence[EngineRecord],
    old: ParityReport | None,
    request: Request,
    force: bool,
    tell: Callable[[str], None],
) -> tuple[dict[str, EngineReport], list[str]]:
    """Return the results that need no reference (verdicts that stand, engines that cannot run) and who must be run."""
    found: dict[str, EngineReport] = {}
    to_run = []
    for engine in asked:
        name = engine.full_name
        result = "--force was given" if force else standing(bundle, engine, old, request)
        if isinstance(result, EngineReport):
            found[name] = result
            continue
        idle = unexecutable(bundle, engine) if engine.target else None
        if idle is not None:
            found[name] = idle
            continue
        tell(f"comparing {name}: {result}")
        to_run.append(name)
    return found, to_run


def _merged(
    bundle: Bundle,
    report: ParityReport,
    old: ParityReport | None,
    found: dict[str, EngineReport],
    texts: int,
    tell: Callable[[str], None],
) -> ParityReport:
    """Return the report with every engine of the bundle that was ever compared as it is: now, or in the old report."""
    engines = []
    for engine in bundle.manifest.engines:
        result = found.get(engine.full_name)
        if result is None and engine.parity is not None:
            # Only what the report really said: carried over, an edited one would be blessed.
            problem, earlier = report_problem(bundle, engine, engine.parity), recorded(old, engine)
            if problem or earlier is None:
                tell(f"not carried over: the verdict on {engine.full_name}: {problem or 'the report does not name it'}")
            else:
                result = replace(earlier, kept="it was not asked for")
        elif result is not None and not result.kept:
            result = replace(
                result,
                # The clock of the machine that made it may be ahead: it was there before it was compared all the same.
                checked_at=max(report.created_at, engine.made_at),
                texts=texts,
                texts_sha256=report.coverage.texts_sha256,
                versions=run_versions(engine.backend),
                policy_sha256=report.policy.sha256,
            )
        engines += [result] if result else []
    verdict = overall(list(found.values()), report.tokenizer_mismatches, report.stages)
    return replace(report, engines=engines, verdict=verdict)


def _golden_is_whole(bundle: Bundle) -> bool:
    golden_record = bundle.manifest.golden
    return golden_record is not None and damage(bundle, [golden_record]) is None


def source_location(bundle: Bundle, model: str | None) -> Location:
    """Find the checkpoint a bundle was made from and check that its files are the same, byte for byte."""
    source = bundle.manifest.source
    try:
        location = locate(model or source.id, None if model else source.revision)
    except CheckpointError as error:
        raise CheckpointError(
            f"the checkpoint of this bundle ({source.id}) is not at hand: {error.message}",
            cure=f"Name its folder: f2rt parity {bundle.folder} --model FOLDER",
        ) from error
    for file in reference_files(source):
        path = location.folder / file.file
        with explain_read_errors(path, CheckpointError):
            same = path.is_file() and cached_sha256(path) == file.sha256
        if not same:
            raise BundleError(
                f"{path} is not the file this bundle was made from.",
                cure="Export the checkpoint again, or name the right folder with --model.",
            )
    return location


def record(bundle: Bundle, report: ParityReport, vectors: golden.Golden | None) -> None:
    """Write golden.npz, parity/report.json and the manifest, in an order that never leaves a broken bundle.

    Golden vectors that are already there are not written again; None keeps them.
    """
    manifest = bundle.manifest
    golden_record = manifest.golden
    data = golden.pack(vectors) if vectors is not None else b""
    sha256 = hashlib.sha256(data).hexdigest()
    if vectors is not None and not (_golden_is_whole(bundle) and golden_record and golden_record.sha256 == sha256):
        file = spare_name(GOLDEN, [golden_record.file] if golden_record else [])
        write_atomic(bundle.path(file), data)
        golden_record = record_file(bundle.folder, file, sha256=sha256)
    report_data = to_json(report)
    _keep_report(bundle)
    for file in DERIVED_FILES:  # they are of the old report: whoever shows the new one makes them again
        bundle.path(file).unlink(missing_ok=True)
    write_atomic(bundle.path(REPORT), report_data)
    report_sha256 = hashlib.sha256(report_data).hexdigest()
    verdicts = {e.fingerprint: _verdict(e, report_sha256) for e in report.engines}
    write_manifest(bundle.folder, with_parity(manifest, verdicts, golden_record))
    if manifest.golden is not None and manifest.golden != golden_record:
        bundle.path(manifest.golden.file).unlink(missing_ok=True)
    bundle.path(PREVIOUS_REPORT).unlink(missing_ok=True)


def _keep_report(bundle: Bundle) -> None:
    """Give the report that the manifest's verdicts stand on a second name, until the manifest names the next."""
    path = bundle.path(REPORT)
    data = path.read_bytes() if path.is_file() else b""
    current = hashlib.sha256(data).hexdigest()
    if any(e.parity is not None and e.parity.report_sha256 == current for e in bundle.manifest.engines):
        write_atomic(bundle.path(PREVIOUS_REPORT), data)


def _verdict(engine: EngineReport, report_sha256: str) -> ParityRecord:
    checks = engine.checks
    return ParityRecord(
        verdict=engine.verdict,
        fingerprint=engine.fingerprint,
        texts_sha256=engine.texts_sha256,
        texts=engine.texts - engine.omitted,
        min_cosine=min((c.cosine_min for c in checks), default=-1.0),
        mean_cosine=checks[0].cosine_mean if checks else -1.0,
        max_abs_diff=max((c.max_abs_diff for c in checks), default=-1.0),
        report_sha256=report_sha256,
        checked_at=engine.checked_at,
        policy_sha256=engine.policy_sha256,
        calibration_overlap=engine.calibration_overlap,
    )
