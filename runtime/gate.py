"""The gate: whether what a bundle records of an engine lets it answer, under a policy.

It reads verdicts and runs nothing; `runtime.golden` is the check that runs the engine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from runtime.bundle import PREVIOUS_REPORT, REPORT, Bundle, EngineRecord, ParityRecord
from runtime.policy import Policy, read_policy

_HASH_DIGITS = 12  # of a hash in a message: enough to tell two apart, short enough to read


@dataclass(frozen=True)
class Gate:
    """What is asked of an engine: the limits, and whether one that was not shown to keep them may answer as well.

    `allow_unverified` waives the verdict alone: hashes, fingerprint, tokenizer and golden vectors are always checked.
    """

    policy: Policy = field(default_factory=Policy)
    allow_unverified: bool = False


@dataclass(frozen=True)
class Refusal:
    """Why an engine may not answer, in few words, and what to do. `failed`: it was compared, and missed a limit."""

    reason: str
    cure: str
    failed: bool = False


def open_gate(policy_file: str, allow_unverified: bool = False) -> Gate:
    """Return the gate of a policy file, or of the shipped policy for "". Raises InputError as `read_policy`."""
    return Gate(read_policy(Path(policy_file) if policy_file else None), allow_unverified)


def refusal(bundle: Bundle, record: EngineRecord, policy: Policy) -> Refusal | None:
    """Return why the verdict on an engine does not let it answer under this policy, or None when it does."""
    parity = record.parity
    if parity is None:
        return Refusal("never compared with PyTorch", _run_parity(bundle, policy))
    if parity.fingerprint != record.fingerprint:
        reason = (
            f"its verdict belongs to another engine, {_short(parity.fingerprint)} and not {_short(record.fingerprint)}"
        )
        return Refusal(reason, _run_parity(bundle, policy))
    if parity.policy_sha256 != policy.sha256:
        under = f"the policy {_short(parity.policy_sha256)}" if parity.policy_sha256 else "no recorded policy"
        shipped = parity.policy_sha256 == Policy().sha256
        instead = "leave --policy out, for the shipped one" if shipped else "name that one with --policy FILE"
        return Refusal(
            f"its verdict was reached under {under}; asked for is {policy.name}, {_short(policy.sha256)}",
            f"{_run_parity(bundle, policy)}; or {instead}.",
            failed=parity.verdict == "fail",
        )
    if parity.verdict != "pass":
        return _not_passed(bundle, record, parity, policy)
    problem = report_problem(bundle, record, parity)
    if problem:
        return Refusal(problem, _run_parity(bundle, policy))
    if is_older(record, parity):
        reason = f"its verdict of {parity.checked_at} is older than the engine, which was made {record.made_at}"
        return Refusal(reason, _run_parity(bundle, policy))
    return _overlapping(bundle, record, parity, policy)


def is_older(record: EngineRecord, parity: ParityRecord) -> bool:
    """Return whether a verdict is older than the engine. Manifests of older versions do not say when it was made."""
    # Both are ISO 8601 in UTC, so their order is that of text.
    return bool(record.made_at) and parity.checked_at < record.made_at


def _not_passed(bundle: Bundle, record: EngineRecord, parity: ParityRecord, policy: Policy) -> Refusal:
    if parity.verdict == "not_executed":
        cure = f"{_run_parity(bundle, policy)}, on a machine that can execute it."
        return Refusal("its verdict is not_executed", cure)
    limit = policy.tolerance(record.precision).min_cosine
    why = f"see {REPORT}"
    if parity.min_cosine < limit:
        why = f"smallest cosine {parity.min_cosine:.6f}, the limit for {record.precision} is {limit:g}"
    return Refusal(f"its verdict is {parity.verdict} ({why})", _run_parity(bundle, policy), failed=True)


def _overlapping(bundle: Bundle, record: EngineRecord, parity: ParityRecord, policy: Policy) -> Refusal | None:
    # Texts that shaped an engine's ranges flatter it.
    if parity.calibration_overlap is None and record.calibration_sha256 is not None:
        reason = (
            f"it is not known whether the texts it was compared on shaped its ranges (calibration texts "
            f"{_short(record.calibration_sha256)}); none may"
        )
    elif parity.calibration_overlap:
        reason = (
            f"{parity.calibration_overlap} of the {parity.texts} texts it was compared on also shaped its ranges; "
            "none may"
        )
    else:
        return None
    return Refusal(reason, f"{_run_parity(bundle, policy)}, on texts that it was not calibrated on.")


def report_problem(bundle: Bundle, record: EngineRecord, parity: ParityRecord) -> str:
    """Return why the bundle's report does not bear out what the manifest says of an engine; "" when it does."""
    try:
        # A comparison that died while it recorded leaves the old verdicts, and their report beside the new one.
        previous = bundle.path(PREVIOUS_REPORT)
        reports = [bundle.path(REPORT).read_bytes(), *([previous.read_bytes()] if previous.is_file() else [])]
    except OSError as error:
        return f"its verdict stands on {REPORT}, which cannot be read: {error.strerror}"
    by_hash = {hashlib.sha256(data).hexdigest(): data for data in reports}
    found = by_hash.get(parity.report_sha256)
    if found is not None:
        return _contradiction(found, record, parity)
    return (
        f"{REPORT} is not the one its verdict stands on: SHA-256 {_short(next(iter(by_hash)))} and not "
        f"{_short(parity.report_sha256)}"
    )


class _Checked(msgspec.Struct):
    cosine_min: float | None


class _Judged(msgspec.Struct):
    """What a report says of one engine, as far as its verdict in the manifest repeats it."""

    engine: str
    fingerprint: str
    verdict: str
    checked_at: str
    texts: int
    omitted: int
    texts_sha256: str
    policy_sha256: str
    calibration_overlap: int | None
    checks: list[_Checked]

    def said(self) -> dict[str, object]:
        """Return it by the names that the manifest has for it."""
        names = ("verdict", "checked_at", "texts_sha256", "policy_sha256", "calibration_overlap")
        smallest = min((c.cosine_min for c in self.checks if c.cosine_min is not None), default=-1.0)
        return {
            **{name: getattr(self, name) for name in names},
            "texts": self.texts - self.omitted,
            "min_cosine": smallest,
        }


class _Judgements(msgspec.Struct):
    engines: list[_Judged]


def _contradiction(report: bytes, record: EngineRecord, parity: ParityRecord) -> str:
    """Return where the manifest's verdict is not what its report says; "" when they agree."""
    try:
        judged = msgspec.json.decode(report, type=_Judgements).engines
    except msgspec.DecodeError as error:
        return f"{REPORT}, which its verdict stands on, is no report: {error}"
    own = next((j for j in judged if (j.engine, j.fingerprint) == (record.full_name, record.fingerprint)), None)
    if own is None:
        return f"{REPORT}, which its verdict stands on, does not name it"
    for name, said in own.said().items():
        recorded = getattr(parity, name)
        if said != recorded:
            return f"the manifest was edited: it says {name} {recorded}, and {REPORT} says {said}"
    return ""


def _run_parity(bundle: Bundle, policy: Policy) -> str:
    own = "" if policy.sha256 == Policy().sha256 else f" --policy {policy.file or 'FILE'}"
    return f"Run: f2rt parity {bundle.folder}{own}"


def _short(digits: str) -> str:
    return digits[:_HASH_DIGITS]
