"""The proof: every engine of a bundle against PyTorch, row by row.

An engine is run in each way that has gone wrong somewhere: single texts, batches, another order, equal lengths (where a
missing causal mask hides), heavy padding (where a missing length hides), and cut to each trained dimension. Each row is
compared with the reference of that text. Tokenization is compared apart, so that an engine's verdict is about the
engine, and a wrong token is named as one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from calibration.texts import Text
from export.diagnosis import diagnose
from export.pipeline import versions
from export.reference import ReferenceVectors, unit
from export.report import (
    REPORT_SCHEMA_VERSION,
    Check,
    EngineReport,
    ParityReport,
    WorstText,
)
from export.samples import Progress, Sample, Vectors, compare_tokenizers, coverage_of, golden_of, make_samples
from runtime.batch import make_batch
from runtime.bundle import Bundle, Contract, EngineRecord, Verdict, timestamp
from runtime.embedder import finish
from runtime.engines import Engine
from runtime.errors import EngineError, F2rtError, InputError, MissingExtraError, NotExecutableError, OutOfMemoryError
from runtime.golden import Golden, row_cosines
from runtime.loader import open_raw_engine
from runtime.settings import EngineSettings
from runtime.tolerances import Tolerance, tolerance

BATCH_ROWS = 16
BATCHED_TEXT_TOKENS = 256  # longer texts are compared singly: in a batch they would only cost padding
EQUAL_LENGTH_TOKENS = 32
PADDED_TEXT_TOKENS = 16
PADDED_WIDTH_TOKENS = 1024
WORST_TEXTS = 5


def check_bundle(
    bundle: Bundle,
    reference: ReferenceVectors,
    texts: Sequence[Text],
    *,
    engine_names: Sequence[str] | None = None,
    progress: Progress = lambda label, done, total: None,
    settings: EngineSettings = EngineSettings(),
) -> tuple[ParityReport, Golden]:
    """Compare the engines named, or all, with the reference on `texts`.

    Returns the report and the golden vectors for the bundle. Raises NotFoundError for an unknown engine name and
    InputError for no texts.
    """
    if not texts:
        raise InputError("there are no texts to compare on.", cure="Give a file with at least one text.")
    start = time.perf_counter()
    contract = bundle.manifest.contract
    records = [bundle.engine(n) for n in engine_names] if engine_names is not None else bundle.manifest.engines
    samples, missing_prompts = make_samples(reference, contract, texts, progress)
    mismatches = compare_tokenizers(bundle, samples)
    engines = [_check_engine(bundle, record, reference, samples, progress, settings) for record in records]
    verdicts = {e.verdict for e in engines}
    verdict: Verdict = "fail" if mismatches or "fail" in verdicts else "pass" if "pass" in verdicts else "not_executed"
    if mismatches:
        engines = [_fail_for_tokenizer(e) for e in engines]
    report = ParityReport(
        schema_version=REPORT_SCHEMA_VERSION,
        verdict=verdict,
        created_at=timestamp(),
        bundle_fingerprint=bundle.manifest.fingerprint,
        source=bundle.manifest.source,
        graphs=bundle.manifest.graphs,
        coverage=coverage_of(samples, contract, missing_prompts),
        tokenizer_mismatches=mismatches,
        engines=engines,
        versions=versions(["numpy", "onnxruntime", "tokenizers"]) | reference.versions,
        duration_s=round(time.perf_counter() - start, 3),
    )
    return report, golden_of(samples)


def _fail_for_tokenizer(report: EngineReport) -> EngineReport:
    """An engine fed with wrong tokens gives wrong vectors, however exact it is."""
    if report.verdict == "not_executed":
        return report
    cause = "the runtime's tokenizer does not give transformers' token ids"
    return dataclasses.replace(report, verdict="fail", diagnosis=[cause, *report.diagnosis])


def not_executed(record: EngineRecord, error: F2rtError) -> EngineReport:
    """Return the report of an engine that cannot run here."""
    reason = f"not executed: {error}"
    return EngineReport(record.full_name, record.precision, record.fingerprint, "not_executed", None, reason=reason)


def _check_engine(
    bundle: Bundle,
    record: EngineRecord,
    reference: ReferenceVectors,
    samples: Sequence[Sample],
    progress: Progress,
    settings: EngineSettings,
) -> EngineReport:
    try:
        engine = open_raw_engine(bundle, record, settings)
    except (NotExecutableError, MissingExtraError) as error:
        return not_executed(record, error)
    except OutOfMemoryError:
        raise  # it says nothing of the engine
    except EngineError as error:  # it should run here, and does not: that is a failure
        limits = tolerance(record.precision)
        report = EngineReport(record.full_name, record.precision, record.fingerprint, "fail", limits)
        return dataclasses.replace(report, diagnosis=[f"it cannot be loaded: {error}"])
    limits = tolerance(record.precision)
    texts, longest = len(samples), engine.max_tokens
    samples = [s for s in samples if longest is None or len(s.ids) <= longest]
    if not samples:
        engine.close()
        return EngineReport(
            record.full_name,
            record.precision,
            record.fingerprint,
            "not_executed",
            None,
            reason=f"not executed: every text is longer than the {longest} tokens the engine was built for",
        )
    try:
        runs = _Runs(engine, samples, bundle.manifest.contract, reference, progress)
        checks = runs.checks(limits)
    except OutOfMemoryError:
        raise
    except EngineError as error:
        return EngineReport(
            record.full_name,
            record.precision,
            record.fingerprint,
            "fail",
            limits,
            diagnosis=[f"it does not run: {error}", *diagnose(bundle, record, reference, samples, None)],
        )
    finally:
        engine.close()
    verdict: Verdict = "pass" if all(c.verdict == "pass" for c in checks) else "fail"
    diagnosis: list[str] = []
    if verdict == "fail":
        diagnosis = diagnose(bundle, record, reference, samples, runs.single)
    return EngineReport(
        record.full_name,
        record.precision,
        record.fingerprint,
        verdict,
        limits,
        checks,
        _worst(samples, runs.single),
        diagnosis,
        omitted=texts - len(samples),
    )


class _Runs:
    """One engine, run in every way; `single` keeps its vectors for single texts, in the order of the samples."""

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        contract: Contract,
        reference: ReferenceVectors,
        progress: Progress,
    ) -> None:
        self._engine = engine
        self._samples = samples
        self._contract = contract
        self._reference = reference
        self._progress = progress
        self.single = self._batches([[s.ids] for s in samples], "single texts")

    def checks(self, limits: Tolerance) -> list[Check]:
        expected = np.stack([s.vector for s in self._samples])
        results = [compare("single", self.single, expected, limits)]
        results += self._batched(expected, limits)
        results += self._equal_length(limits)
        results += self._padded(expected, limits)
        for dim in self._contract.trained_dims[:-1]:
            cut = np.stack([unit(row[:dim]) for row in expected])
            results.append(compare(f"dim {dim}", finish(self.single, dim, True), cut, limits))
        return results

    def _batched(self, expected: Vectors, limits: Tolerance) -> list[Check]:
        order = [i for i, s in enumerate(self._samples) if len(s.ids) <= BATCHED_TEXT_TOKENS]
        shuffled = [order[i] for i in np.random.default_rng(0).permutation(len(order))]
        results = []
        for name, indices in (("batch", order), ("permuted", shuffled)):
            if not indices:
                continue
            groups = [indices[i : i + BATCH_ROWS] for i in range(0, len(indices), BATCH_ROWS)]
            vectors = self._batches([[self._samples[i].ids for i in g] for g in groups], name)
            results.append(compare(name, vectors, expected[indices], limits, single=self.single[indices]))
        return results

    def _equal_length(self, limits: Tolerance) -> list[Check]:
        """Cut texts to one length, EOS kept last: nothing is padded, so a mask that leans on padding shows."""
        eos = self._contract.eos_id
        long = [s for s in self._samples if len(s.ids) >= EQUAL_LENGTH_TOKENS][: 2 * BATCH_ROWS]
        if not long:
            return []
        rows = [[*s.ids[: EQUAL_LENGTH_TOKENS - 1], eos] for s in long]
        expected = np.stack([self._reference.embed(ids) for ids in rows])
        groups = [rows[i : i + BATCH_ROWS] for i in range(0, len(rows), BATCH_ROWS)]
        return [compare("equal length", self._batches(groups, "equal length"), expected, limits)]

    def _padded(self, expected: Vectors, limits: Tolerance) -> list[Check]:
        """Put short texts into a wide batch: nearly everything in it is padding."""
        short = [i for i, s in enumerate(self._samples) if len(s.ids) <= PADDED_TEXT_TOKENS][:BATCH_ROWS]
        if not short:
            return []
        width = min(PADDED_WIDTH_TOKENS, self._contract.max_tokens)
        batch = make_batch([self._samples[i].ids for i in short], self._contract.pad_id, width=width)
        return [compare("padded", self._engine.run(batch), expected[short], limits, single=self.single[short])]

    def _batches(self, groups: Sequence[Sequence[list[int]]], label: str) -> Vectors:
        parts = []
        for index, group in enumerate(groups):
            self._progress(f"{self._engine.name}: {label}", index, len(groups))
            parts.append(self._engine.run(make_batch(group, self._contract.pad_id)))
        self._progress(f"{self._engine.name}: {label}", len(groups), len(groups))
        return np.concatenate(parts)


def compare(name: str, found: Vectors, expected: Vectors, limits: Tolerance, *, single: Vectors | None = None) -> Check:
    """Compare rows of unit vectors [rows, dim] with the reference, each row for itself, in float64."""
    cosines = row_cosines(found, expected)
    wide = found.astype(np.float64)
    non_finite = int(np.count_nonzero(~np.isfinite(wide)))
    clean = np.nan_to_num(wide, nan=2.0, posinf=2.0, neginf=-2.0)
    max_abs_diff = float(np.abs(clean - expected).max())
    norm_error = float(np.abs(np.linalg.norm(clean, axis=1) - 1).max())
    problems = []
    if non_finite:
        problems.append(f"{non_finite} values are not finite")
    if cosines.min() < limits.min_cosine:
        problems.append(f"min cosine {cosines.min():.7f} is below {limits.min_cosine}")
    if cosines.mean() < limits.mean_cosine:
        problems.append(f"mean cosine {cosines.mean():.7f} is below {limits.mean_cosine}")
    if max_abs_diff > limits.max_abs_diff:
        problems.append(f"max |diff| {max_abs_diff:.1e} is above {limits.max_abs_diff}")
    if norm_error > limits.norm_error:
        problems.append(f"norm error {norm_error:.1e} is above {limits.norm_error}")
    return Check(
        name=name,
        rows=len(found),
        cosine_min=float(cosines.min()),
        cosine_p01=float(np.quantile(cosines, 0.01)),
        cosine_mean=float(cosines.mean()),
        max_abs_diff=max_abs_diff,
        norm_error_max=norm_error,
        non_finite=non_finite,
        verdict="fail" if problems else "pass",
        problems=problems,
        vs_single_min_cosine=None if single is None else float(row_cosines(found, single).min()),
    )


def _worst(samples: Sequence[Sample], vectors: Vectors) -> list[WorstText]:
    cosines = row_cosines(vectors, np.stack([s.vector for s in samples]))
    worst = np.argsort(cosines, kind="stable")[:WORST_TEXTS]
    return [
        WorstText(
            id=samples[i].text.id,
            language=samples[i].text.language,
            kind=samples[i].text.kind,
            tokens=len(samples[i].ids),
            cosine=float(cosines[i]),
            excerpt=" ".join(samples[i].text.text.split())[:40],
        )
        for i in worst
    ]
