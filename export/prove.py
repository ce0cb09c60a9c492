"""Runs the comparison with PyTorch on a bundle and writes its verdict into the bundle.

The manifest is the commit point: whatever instant the process dies at, the bundle is as it was, or fully updated, or
(only when its golden texts change) unproven and refused by the runtime.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from calibration.texts import Text
from export.config import CONFIG
from export.conventions import TOKENIZER
from export.hub import Location, locate
from export.parity import check_bundle
from export.reference import Reference
from export.report import EngineReport, ParityReport, to_json
from export.samples import Progress
from runtime import golden
from runtime.bundle import (
    GOLDEN,
    REPORT,
    Bundle,
    ParityRecord,
    open_bundle,
    record_file,
    with_parity,
    write_manifest,
)
from runtime.errors import BundleError, CheckpointError
from runtime.files import sha256_file, write_atomic


def prove_bundle(
    folder: Path,
    texts: Sequence[Text],
    *,
    engine_names: Sequence[str] | None = None,
    model: str | None = None,
    report_dir: Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> ParityReport:
    """Compare the engines of a bundle with PyTorch and record golden vectors, report and verdicts.

    `model` overrides where the checkpoint lies; its files must be those the bundle was made from. Raises BundleError,
    CheckpointError, NotFoundError, InputError or OutputError. A bundle is never left broken; when the disk fills while
    new golden vectors are recorded it may be left unproven, and the runtime then refuses it.
    """
    bundle = open_bundle(folder)
    reference = Reference(source_location(bundle, model))
    report, vectors = check_bundle(bundle, reference, texts, engine_names=engine_names, progress=progress)
    record(bundle, report, vectors)
    if report_dir is not None:
        write_atomic(report_dir / Path(REPORT).name, to_json(report))
    return report


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
    for file in source.files:
        # What decides a vector; a changed model card does not matter.
        if not (file.file.endswith(".safetensors") or file.file in (CONFIG, TOKENIZER)):
            continue
        path = location.folder / file.file
        if not path.is_file() or sha256_file(path) != file.sha256:
            raise BundleError(
                f"{path} is not the file this bundle was made from.",
                cure="Export the checkpoint again, or name the right folder with --model.",
            )
    return location


def record(bundle: Bundle, report: ParityReport, vectors: golden.Golden) -> None:
    """Write golden.npz, parity/report.json and the manifest, in an order that never leaves a broken bundle."""
    data = golden.pack(vectors)
    sha256 = hashlib.sha256(data).hexdigest()
    manifest = bundle.manifest
    if manifest.golden is None or manifest.golden.sha256 != sha256:
        if manifest.golden is not None:
            write_manifest(bundle.folder, with_parity(manifest, {}, None))
        write_atomic(bundle.path(GOLDEN), data)
    report_data = to_json(report)
    write_atomic(bundle.path(REPORT), report_data)
    verdicts = {e.fingerprint: _verdict(report, e, hashlib.sha256(report_data).hexdigest()) for e in report.engines}
    write_manifest(bundle.folder, with_parity(manifest, verdicts, record_file(bundle.folder, GOLDEN, sha256=sha256)))


def _verdict(report: ParityReport, engine: EngineReport, report_sha256: str) -> ParityRecord:
    checks = engine.checks
    return ParityRecord(
        verdict=engine.verdict,
        fingerprint=engine.fingerprint,
        texts_sha256=report.coverage.texts_sha256,
        texts=report.coverage.texts,
        min_cosine=min((c.cosine_min for c in checks), default=-1.0),
        mean_cosine=checks[0].cosine_mean if checks else -1.0,
        max_abs_diff=max((c.max_abs_diff for c in checks), default=-1.0),
        report_sha256=report_sha256,
        checked_at=report.created_at,
    )
