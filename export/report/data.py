"""The content of report.json: what a comparison with PyTorch found. Knows no engine and computes nothing.

Field names carry units. Cosines are taken per row, in float64, against the PyTorch float32 reference. The published
JSON schema of these classes is `export/report/schema.json`; a change that an older reader could misread raises
`REPORT_SCHEMA_VERSION`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

import msgspec

from runtime.bundle import EngineRecord, GraphRecord, Source, Verdict
from runtime.policy import Policy
from runtime.tolerances import Tolerance

REPORT_SCHEMA_VERSION = 3
# What is made from report.json and lies beside it.
DERIVED = ("report.html", "report.md", "junit.xml")


@dataclass(frozen=True)
class WorstText:
    """One of the texts an engine did worst on. `command` compares that text alone again."""

    id: str
    language: str
    kind: str
    tokens: int
    cosine: float
    excerpt: str
    command: str = ""


@dataclass(frozen=True)
class Check:
    """One way of running the texts, row by row against the reference.

    `cosine_p01` is the first percentile. `vs_single_min_cosine` compares with the same engine's own vectors for single
    texts, where that makes sense. `problems` holds one sentence per limit that was broken.
    """

    name: str
    rows: int
    cosine_min: float
    cosine_p01: float
    cosine_mean: float
    max_abs_diff: float
    norm_error_max: float
    non_finite: int
    verdict: Verdict
    problems: list[str]
    vs_single_min_cosine: float | None = None


@dataclass(frozen=True)
class Threshold:
    """One limit of the policy and what was found: `value` must be `sense` `limit`. None: it could not be taken.

    `where` names the check, labelled set or text that gave the value.
    """

    name: str
    value: float | None
    sense: Literal[">=", "<="]
    limit: float
    verdict: Verdict
    where: str = ""


@dataclass(frozen=True)
class Retrieval:
    """Scores on one labelled set, PyTorch's beside the engine's: nDCG@10 and R@1, mean over queries, 0 to 1."""

    name: str
    queries: int
    documents: int
    ndcg10: float
    recall1: float
    reference_ndcg10: float
    reference_recall1: float


@dataclass(frozen=True)
class Tasks:
    """Whether users would notice: neighbours, order of similarities, retrieval.

    `top10_overlap` and `top100_overlap` are the mean share of a text's nearest neighbours that are PyTorch's too;
    `spearman` is the rank correlation of all pairwise similarities with PyTorch's.
    """

    texts: int
    top10_overlap: float
    top100_overlap: float
    spearman: float
    retrieval: list[Retrieval]


@dataclass(frozen=True)
class Part:
    """The cosines of the texts that share `name` in the grouping `by`: family, script, length, kind or prompt."""

    by: str
    name: str
    rows: int
    cosine_min: float
    cosine_mean: float


@dataclass(frozen=True)
class Spread:
    """How 1 - cosine of single texts is spread: `counts[i]` rows lie from 10^(low + i step) up to the next.

    What is smaller than the first bound counts in the first.
    """

    low: float
    step: float
    counts: list[int]


@dataclass(frozen=True)
class Latency:
    """Median time of a batch of `rows` x `tokens` during the comparison: indicative, `bench/` is what measures."""

    rows: int
    tokens: int
    runs: int
    p50_ms: float


@dataclass(frozen=True)
class LayerError:
    """How far the pooled token's state after `layer` is from PyTorch's, relative to its length, over the stage's texts.

    `rms` and `worst` are of |x - y| / |y|; None where a value is not finite, which JSON cannot say.
    """

    layer: str
    rms: float | None
    worst: float | None

    @property
    def size(self) -> float:
        """`rms`, infinity for None."""
        return inf if self.rms is None else self.rms


@dataclass(frozen=True)
class Stage:
    """One step from PyTorch to an engine's graph, run on CPU on a few texts. `reason` says why it was not executed.

    `guilty` names the layer where most of the error enters, and how much.
    """

    name: str
    precision: str
    verdict: Verdict
    texts: int = 0
    cosine_min: float | None = None
    cosine_mean: float | None = None
    layers: list[LayerError] = field(default_factory=list)
    guilty: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Activation:
    """What the probe measured of one tensor on calibration text, and what was done about it.

    `absmax` is the largest magnitude of all channels, `median_absmax` that of the median channel: far apart, a few
    channels are outliers.
    """

    tensor: str
    absmax: float
    median_absmax: float
    treatment: str = ""


@dataclass(frozen=True)
class TokenMismatch:
    """A text for which the runtime's tokenizer and transformers' give different ids."""

    id: str
    position: int
    found_tokens: int
    expected_tokens: int
    explanation: str


@dataclass(frozen=True)
class EngineReport:
    """All that was found of one engine. `diagnosis` names the likely cause of a failure.

    `checked_at`, `texts`, `texts_sha256`, `policy_sha256` and `versions` say when, on what, by which limits and with
    what it was compared; `made` is the engine's own record. `kept` says why an earlier result was taken over; it is
    empty for one of this run. `omitted` counts the texts that are longer than the engine was built for: it refuses
    them.
    """

    engine: str
    precision: str
    fingerprint: str
    verdict: Verdict
    tolerance: Tolerance | None
    checks: list[Check] = field(default_factory=list)
    worst: list[WorstText] = field(default_factory=list)
    diagnosis: list[str] = field(default_factory=list)
    reason: str = ""
    omitted: int = 0
    checked_at: str = ""
    texts: int = 0
    texts_sha256: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    kept: str = ""
    thresholds: list[Threshold] = field(default_factory=list)
    tasks: Tasks | None = None
    parts: list[Part] = field(default_factory=list)
    spread: Spread | None = None
    latency: list[Latency] = field(default_factory=list)
    made: EngineRecord | None = None
    policy_sha256: str = ""
    calibration_overlap: int | None = None


@dataclass(frozen=True)
class Coverage:
    """What the texts cover. Token counts include prompt and EOS. `duplicates` repeat an earlier text and its prompt."""

    texts: int
    texts_sha256: str
    languages: int
    scripts: int
    programming_languages: int
    by_kind: dict[str, int]
    tokens_total: int
    tokens_longest: int
    max_tokens: int
    truncated: int
    prompts_missing: list[str]
    by_script: dict[str, int] = field(default_factory=dict)
    by_family: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    duplicates: int = 0


@dataclass(frozen=True)
class PolicyRecord:
    """The policy of the last run: its name, its hash, and the limits of every precision."""

    name: str
    sha256: str
    limits: dict[str, Tolerance]


@dataclass(frozen=True)
class ParityReport:
    """The content of report.json. `verdict` is that of the engines asked for in the last run, `engines` holds all.

    `graphs` says how each graph was made: what was rescaled, smoothed and left out, and why. `stages` follows the error
    from PyTorch through the graphs, layer by layer. `partial` says what kind of short look it was that gives no
    verdict; it is empty for one that does.
    """

    schema_version: int
    verdict: Verdict
    created_at: str
    bundle_fingerprint: str
    source: Source
    graphs: list[GraphRecord]
    coverage: Coverage
    tokenizer_mismatches: list[TokenMismatch]
    engines: list[EngineReport]
    versions: dict[str, str]
    duration_s: float
    policy: PolicyRecord
    stages: list[Stage] = field(default_factory=list)
    activations: list[Activation] = field(default_factory=list)
    partial: str = ""


def policy_record(policy: Policy) -> PolicyRecord:
    """Return what the report says of a policy."""
    return PolicyRecord(policy.name, policy.sha256, dict(policy.limits))


def to_json(report: ParityReport) -> bytes:
    """Return report.json's bytes: UTF-8, indented, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of report.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"f2rt parity report, version {REPORT_SCHEMA_VERSION}",
        **msgspec.json.schema(ParityReport),
    }
