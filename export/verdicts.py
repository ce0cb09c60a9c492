"""Which verdicts still stand: those of the same engine, on the same texts, by the same limits and the same versions.

A failure never stands, since it may have been the machine's: the engine is compared again. Runs no engine but to see
whether a compiled one can be opened here.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable
from dataclasses import dataclass, replace

import msgspec

import runtime
from export.changes import UNCHANGED, damage, difference
from export.parity import not_executed
from export.reference import reference_versions
from export.report.data import REPORT_SCHEMA_VERSION, EngineReport, ParityReport
from runtime.bundle import REPORT, Bundle, EngineRecord, FileRecord
from runtime.errors import BundleError, EngineError, MissingExtraError, NotExecutableError, OutOfMemoryError
from runtime.files import sha256_file
from runtime.gate import is_older, report_problem
from runtime.loader import open_raw_engine
from runtime.packages import installed_version
from runtime.policy import Policy
from runtime.settings import EngineSettings

_RUNNERS = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-cuda": "onnxruntime-gpu",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}


def run_versions(backend: str) -> dict[str, str]:
    """Return the versions of what compares an engine of this backend, as far as it is installed here."""
    found = {"f2rt": runtime.__version__, **reference_versions()}
    for package in ("tokenizers", _RUNNERS.get(backend, backend)):
        try:
            found[package] = installed_version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # such an engine cannot run here, so nothing here can have changed for it
    return found


def read_report(bundle: Bundle) -> ParityReport | None:
    """Return the bundle's report; None when it has none that this version can read."""
    try:
        report = msgspec.json.decode(bundle.path(REPORT).read_bytes(), type=ParityReport)
    except (OSError, msgspec.DecodeError):
        return None
    return report if report.schema_version == REPORT_SCHEMA_VERSION else None


def recorded(report: ParityReport | None, record: EngineRecord) -> EngineReport | None:
    """Return what a report says of an engine, or None."""
    engines = report.engines if report else []
    return next((e for e in engines if (e.engine, e.fingerprint) == (record.full_name, record.fingerprint)), None)


@dataclass(frozen=True)
class Request:
    """What a verdict is asked for: the hash of the texts, and the policy."""

    texts_sha256: str
    policy: Policy = Policy()


def why_stale(bundle: Bundle, record: EngineRecord, report: ParityReport | None, request: Request) -> str | None:
    """Return why an engine's verdict does not stand for these texts and this policy, or None."""
    parity, old = record.parity, recorded(report, record)
    if parity is None:
        return "it was never compared"
    if parity.fingerprint != record.fingerprint:
        return "its verdict belongs to another engine"
    if parity.verdict == "fail":
        return "it failed the last time"
    if old is None or sha256_file(bundle.path(REPORT)) != parity.report_sha256:
        return f"{REPORT} is missing, was changed, or is another version's"
    if problem := report_problem(bundle, record, parity):
        return problem
    if is_older(record, parity):
        return "the engine is newer than its verdict"
    if parity.texts_sha256 != request.texts_sha256:
        return "the texts changed"
    if parity.policy_sha256 != request.policy.sha256:
        return "the policy changed"
    now = run_versions(record.backend)
    return difference({name: version for name, version in old.versions.items() if name in now}, now)


def standing(bundle: Bundle, record: EngineRecord, report: ParityReport | None, request: Request) -> EngineReport | str:
    """Return the recorded result of an engine if it stands, else why it does not.

    "Not executed" stands only where the engine still cannot be run, and for the same reason.
    """
    why, old = why_stale(bundle, record, report, request), recorded(report, record)
    if why is not None or old is None:
        return why or "it was never compared"
    if old.verdict == "not_executed":
        now = unexecutable(bundle, record)
        if now is None or now.reason != old.reason:
            return "what kept it from being executed has changed"
    return replace(old, kept=UNCHANGED)


def unexecutable(bundle: Bundle, record: EngineRecord) -> EngineReport | None:
    """Return the report of an engine that cannot be run here, None of one that can be opened, or fails otherwise."""
    try:
        open_raw_engine(bundle, record, EngineSettings()).close()
    except (NotExecutableError, MissingExtraError) as error:
        return not_executed(record, error)
    except OutOfMemoryError:
        raise
    except EngineError:
        return None  # the comparison will meet it again, and report it
    return None


def require_intact(bundle: Bundle, records: Iterable[EngineRecord]) -> None:
    """Check that the files of these engines are those the manifest names. Raises BundleError for the first that is not.

    A verdict stands for a fingerprint, and the fingerprint for these bytes.
    """
    files: list[FileRecord] = [bundle.manifest.tokenizer]
    for record in records:
        files += bundle.graph(record.precision).files
        path = bundle.path(record.file)
        if path.is_file():
            files.append(FileRecord(record.file, record.sha256, path.stat().st_size))
        else:
            raise BundleError(f"{path} is missing from the bundle.", cure="Build the engine again.")
    problem = damage(bundle, files)
    if problem:
        raise BundleError(
            f"{bundle.folder}: {problem} after the bundle was made.",
            cure="Export the checkpoint again, and build what was compiled.",
        )
