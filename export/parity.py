"""The proof: every engine of a bundle against PyTorch, row by row, and its verdict by the limits of a policy.

Tokenization is compared apart, so that an engine's verdict is about the engine, and a wrong token is named as one.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.texts import Text
from export import tasks
from export.activations import activations
from export.diagnosis import diagnose
from export.gate import thresholds
from export.overlap import calibration_overlap
from export.parts import parts, spread
from export.pipeline import versions
from export.reference import ReferenceVectors
from export.report.data import (
    REPORT_SCHEMA_VERSION,
    EngineReport,
    ParityReport,
    Stage,
    TokenMismatch,
    WorstText,
    policy_record,
)
from export.report.words import broken_graphs
from export.runs import OpenWithThreads, Runs
from export.samples import Progress, Sample, Vectors, compare_tokenizers, coverage_of, golden_of, make_samples
from export.stages import follow
from runtime.bundle import Bundle, EngineRecord, Verdict, timestamp
from runtime.errors import EngineError, F2rtError, InputError, MissingExtraError, NotExecutableError, OutOfMemoryError
from runtime.golden import Golden, row_cosines
from runtime.loader import open_raw_engine
from runtime.policy import Policy
from runtime.settings import EngineSettings

WORST_TEXTS = 20


def check_bundle(
    bundle: Bundle,
    reference: ReferenceVectors,
    texts: Sequence[Text],
    *,
    engine_names: Sequence[str] | None = None,
    progress: Progress = lambda label, done, total: None,
    settings: EngineSettings = EngineSettings(),
    policy: Policy = Policy(),
    with_stages: bool = True,
) -> tuple[ParityReport, Golden]:
    """Compare the engines named, or all, with the reference on `texts`, and judge them by `policy`.

    Returns the report and the golden vectors for the bundle. `with_stages` follows the error through the graphs as
    well. Raises NotFoundError for an unknown engine name and
    InputError for no texts.
    """
    if not texts:
        raise InputError("there are no texts to compare on.", cure="Give a file with at least one text.")
    start = time.perf_counter()
    contract = bundle.manifest.contract
    records = [bundle.engine(n) for n in engine_names] if engine_names is not None else bundle.manifest.engines
    samples, missing_prompts = make_samples(reference, contract, texts, progress)
    mismatches = compare_tokenizers(bundle, samples)
    comparison = _Comparison(bundle, reference, samples, mismatches, policy, settings, progress)
    engines = [comparison.engine(record) for record in records]
    golden = golden_of(samples)
    stages = follow(bundle, reference, golden, policy, progress) if with_stages else []
    report = ParityReport(
        schema_version=REPORT_SCHEMA_VERSION,
        verdict=overall(engines, mismatches, stages),
        created_at=timestamp(),
        bundle_fingerprint=bundle.manifest.fingerprint,
        source=bundle.manifest.source,
        graphs=bundle.manifest.graphs,
        coverage=coverage_of(samples, contract, missing_prompts),
        tokenizer_mismatches=mismatches,
        engines=engines,
        versions=versions(["numpy", "onnxruntime", "tokenizers"]) | reference.versions,
        duration_s=round(time.perf_counter() - start, 3),
        policy=policy_record(policy),
        stages=stages,
        activations=activations(bundle),
    )
    return report, golden


def overall(engines: Sequence[EngineReport], mismatches: Sequence[TokenMismatch], stages: Sequence[Stage]) -> Verdict:
    """Return the verdict of these engines together: one that fails is enough, one that ran is needed.

    So is a graph of theirs that would fail on a GPU, although an engine on CPU may not.
    """
    verdicts = {e.verdict for e in engines}
    if mismatches or "fail" in verdicts or broken_graphs(stages, (e.precision for e in engines)):
        return "fail"
    return "pass" if "pass" in verdicts else "not_executed"


def not_executed(record: EngineRecord, reason: F2rtError | str) -> EngineReport:
    """Return the report of an engine that cannot run here."""
    return dataclasses.replace(_blank(record, "not_executed"), reason=f"not executed: {reason}")


def _blank(record: EngineRecord, verdict: Verdict) -> EngineReport:
    made = dataclasses.replace(record, parity=None)
    return EngineReport(record.full_name, record.precision, record.fingerprint, verdict, None, made=made)


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """What all engines of one run are compared with."""

    bundle: Bundle
    reference: ReferenceVectors
    samples: Sequence[Sample]
    mismatches: Sequence[TokenMismatch]
    policy: Policy
    settings: EngineSettings
    progress: Progress

    def engine(self, record: EngineRecord) -> EngineReport:
        """Open, run and judge one engine. Raises OutOfMemoryError, which says nothing of the engine."""
        try:
            engine = open_raw_engine(self.bundle, record, self.settings)
        except (NotExecutableError, MissingExtraError) as error:
            return not_executed(record, error)
        except OutOfMemoryError:
            raise
        except EngineError as error:  # it should run here, and does not: that is a failure
            return self._failed(record, [f"it cannot be loaded: {error}"])
        longest = engine.max_tokens
        samples = [s for s in self.samples if longest is None or len(s.ids) <= longest]
        if not samples:
            engine.close()
            return not_executed(record, f"every text is longer than the {longest} tokens the engine was built for")
        contract, limits = self.bundle.manifest.contract, self.policy.tolerance(record.precision)
        try:
            runs = Runs(engine, samples, contract, self.reference, self.progress)
            checks = runs.checks(limits, self._reopener(record))
            latency = runs.latency()
        except OutOfMemoryError:
            raise
        except EngineError as error:
            causes = diagnose(self.bundle, record, self.reference, samples, None)
            return self._failed(record, [f"it does not run: {error}", *causes])
        finally:
            engine.close()
        texts, expected = [s.text for s in samples], np.stack([s.vector for s in samples])
        cosines = row_cosines(runs.single, expected)
        agreement = tasks.measure(texts, np.nan_to_num(runs.single), expected)
        overlap = calibration_overlap(self.bundle, record, [s.text for s in self.samples])
        judged = thresholds(
            checks,
            agreement,
            limits,
            tokenizer_mismatches=len(self.mismatches),
            calibrated=record.calibration_sha256 is not None,
            calibration_overlap=overlap,
        )
        kept = all(t.verdict == "pass" for t in judged) and all(c.verdict == "pass" for c in checks)
        diagnosis = [] if kept else self._diagnosis(record, samples, runs.single)
        return dataclasses.replace(
            _blank(record, "pass" if kept else "fail"),
            tolerance=limits,
            checks=checks,
            worst=_worst(self.bundle, record, samples, cosines, self.policy.file),
            diagnosis=diagnosis,
            omitted=len(self.samples) - len(samples),
            thresholds=judged,
            tasks=agreement,
            parts=parts(samples, cosines),
            spread=spread(cosines),
            latency=latency,
            calibration_overlap=overlap,
        )

    def _failed(self, record: EngineRecord, causes: list[str]) -> EngineReport:
        limits = self.policy.tolerance(record.precision)
        return dataclasses.replace(_blank(record, "fail"), tolerance=limits, diagnosis=causes)

    def _diagnosis(self, record: EngineRecord, samples: Sequence[Sample], vectors: Vectors) -> list[str]:
        # An engine fed with wrong tokens gives wrong vectors, however exact it is.
        cause = ["the runtime's tokenizer does not give transformers' token ids"] if self.mismatches else []
        return cause + diagnose(self.bundle, record, self.reference, samples, vectors)

    def _reopener(self, record: EngineRecord) -> OpenWithThreads | None:
        if record.backend != "onnxruntime":
            return None
        return lambda threads: open_raw_engine(self.bundle, record, dataclasses.replace(self.settings, threads=threads))


def _worst(
    bundle: Bundle, record: EngineRecord, samples: Sequence[Sample], cosines: NDArray[np.float64], policy_file: str
) -> list[WorstText]:
    worst = np.argsort(cosines, kind="stable")[:WORST_TEXTS]
    again = ["f2rt", "parity", str(bundle.folder), "--engine", record.full_name]
    again += ["--policy", policy_file] if policy_file else []
    return [
        WorstText(
            id=samples[i].text.id,
            language=samples[i].text.language,
            kind=samples[i].text.kind,
            tokens=len(samples[i].ids),
            cosine=float(cosines[i]),
            excerpt=" ".join(samples[i].text.text.split())[:40],
            command=shlex.join([*again, "--only", samples[i].text.id]),
        )
        for i in worst
    ]
