"""The bundle: the contract between export and runtime, and the only code that knows its layout.

A bundle is a folder:

    manifest.json                 everything below, with hashes; written last, read first
    tokenizer.json                the checkpoint's, byte for byte
    graphs/<precision>.onnx       inputs `input_ids`, `attention_mask` int64 [batch, sequence], right-padded;
    graphs/<precision>.onnx.data  output `sentence_embedding` float32 [batch, dim], unit length
    graphs/int8-uint8.onnx        the INT8 graph once more, for ONNX Runtime on CPU
    graphs/<precision>.plan.npz   what each weight of a narrow graph was multiplied with
    calibration-<hash>.json       digests of the calibration texts, and what was measured on them
    golden.npz                    token ids and PyTorch float32 vectors of the golden texts
    parity/report.json            the comparison with PyTorch; report.html, report.md and junit.xml are made from it

The manifest names every file; one that replaced another has `.1` before its suffix every other time.

It deliberately knows nothing of how these files are made or executed.
"""

from __future__ import annotations

import datetime
import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec

from runtime.errors import BundleError, NotFoundError
from runtime.files import explain_read_errors, sha256_file, write_atomic

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
GOLDEN = "golden.npz"
REPORT = "parity/report.json"
ZERO_POINTS = "zero points of weights"  # a flag of ONNX Runtime engines, see `runtime.engines.onnxruntime`
# While a new report is being recorded, the one that the manifest's verdicts still stand on.
PREVIOUS_REPORT = "parity/report.previous.json"

Verdict = Literal["pass", "fail", "not_executed"]


@dataclass(frozen=True)
class FileRecord:
    """A file of the source or the bundle: path relative to its root, SHA-256 of its bytes, size in bytes."""

    file: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from. `id` is the folder or hub id as the user gave it."""

    id: str
    revision: str | None
    license: str | None
    files: list[FileRecord]


@dataclass(frozen=True)
class Contract:
    """What decides a vector besides the weights. `prompts` maps a name to the exact text put before the input."""

    architecture: str
    dim: int
    trained_dims: list[int]
    max_tokens: int
    pooling: Literal["last_token"]
    eos_id: int
    pad_id: int
    vocab_size: int
    prompts: dict[str, str]
    default_prompt_name: str | None
    normalize: Literal[True] = True


@dataclass(frozen=True)
class Rescaling:
    """What was multiplied by powers of two, in how many channels, by 2^largest_exponent at most, and why."""

    tensor: str
    channels: int
    largest_exponent: int
    reason: str


@dataclass(frozen=True)
class QuantizedInput:
    """An input of matrix products that is rounded to INT8: with which `scale`, and how it was chosen.

    `alpha` is SmoothQuant's (None: not smoothed), `method` how the range was found. `error` is the products' relative
    squared error on calibration text, `impact` what it does to its layer's output.
    """

    tensor: str
    alpha: float | None
    method: str
    scale: float
    error: float
    impact: float


@dataclass(frozen=True)
class Exclusion:
    """An input that is not rounded because of its `impact`: its matrices alone are INT8, the products are not.

    `work_share` is its part of the matrix work.
    """

    tensor: str
    impact: float
    work_share: float


@dataclass(frozen=True)
class Quantization:
    """How an INT8 graph was made. `int8_share` is the part of the matrix work in INT8, `budget` its lower bound."""

    budget: float
    int8_share: float
    inputs: list[QuantizedInput]
    excluded: list[Exclusion]


@dataclass(frozen=True)
class Origin:
    """Where a graph came from that is not f2rt's own: who wrote the files found at `id`, as the user gave it.

    `files` are the given ones, before pooling and normalization were added. `hidden_states` is the output that was
    pooled, `dropped_outputs` were left out, `generated_inputs` are made inside.
    """

    id: str
    producer: str
    files: list[FileRecord]
    hidden_states: str
    dropped_outputs: list[str]
    generated_inputs: list[str]


@dataclass(frozen=True)
class GraphRecord:
    """One ONNX graph and its external data. `calibration_sha256` names the texts whose activations shaped it.

    An INT8 graph has a `twin` on the same data: `model` rounds activations to int8, as TensorRT takes it, `twin` to
    uint8 with zero point 128, the same grid in the form that ONNX Runtime on x86 has fast kernels for.
    `origin` is None for a graph that f2rt wrote from the checkpoint.
    `inputs` names everything that decided the graph's bytes, each with its hash or value: an export keeps a graph whose
    inputs are still the same.
    `calibration` is what the calibration texts' digests and activations are kept in, `plan` what each weight was
    multiplied with; neither takes part in answering.
    """

    precision: str
    model: FileRecord
    data: FileRecord
    opset: int
    rescaling: list[Rescaling] = field(default_factory=list)
    calibration_sha256: str | None = None
    quantization: Quantization | None = None
    twin: FileRecord | None = None
    origin: Origin | None = None
    calibration: FileRecord | None = None
    plan: FileRecord | None = None
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[FileRecord]:
        """Return the records of the files that make its vectors."""
        return [self.model, self.data, *([self.twin] if self.twin else [])]

    @property
    def all_files(self) -> list[FileRecord]:
        """Return the records of `files` and of those that say how they came about."""
        return [*self.files, *(f for f in (self.calibration, self.plan) if f is not None)]

    @property
    def compiled_files(self) -> list[FileRecord]:
        """Return the records of what a compiler reads: the twin is ONNX Runtime's alone."""
        return [self.model, self.data]

    @property
    def key(self) -> str:
        """64 hex digits over the bytes of `compiled_files`: what an engine made from it depends on."""
        return hashlib.sha256(" ".join(f.sha256 for f in self.compiled_files).encode()).hexdigest()


@dataclass(frozen=True)
class ParityRecord:
    """The verdict of a comparison with PyTorch, bound to the engine's fingerprint, the texts' and the policy's hash.

    `calibration_overlap` counts the texts of the comparison that also shaped the engine's ranges (None: it is not known
    what it was calibrated on). A verdict written before there were policies has no `policy_sha256`.
    """

    verdict: Verdict
    fingerprint: str
    texts_sha256: str
    texts: int
    min_cosine: float
    mean_cosine: float
    max_abs_diff: float
    report_sha256: str
    checked_at: str
    policy_sha256: str = ""
    calibration_overlap: int | None = None


@dataclass(frozen=True)
class EngineRecord:
    """One engine: who runs which file at which precision, when it was made (ISO 8601, UTC), whether it was proven."""

    name: str
    backend: str
    precision: str
    file: str
    sha256: str
    fingerprint: str
    builder: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    profiles: list[str] = field(default_factory=list)
    target: str | None = None
    calibration_sha256: str | None = None
    graph_sha256: str | None = None
    parity: ParityRecord | None = None
    made_at: str = ""

    @property
    def full_name(self) -> str:
        """The name with the target GPU, unique within a bundle."""
        return f"{self.name}@{self.target}" if self.target else self.name


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    schema_version: int
    fingerprint: str
    created_at: str
    source: Source
    contract: Contract
    tokenizer: FileRecord
    graphs: list[GraphRecord]
    engines: list[EngineRecord]
    golden: FileRecord | None
    versions: dict[str, str]
    notices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its validated manifest."""

    folder: Path
    manifest: Manifest

    def path(self, file: str) -> Path:
        """Return the absolute path of a file named in the manifest."""
        return self.folder / file

    def engine(self, name: str) -> EngineRecord:
        """Return the record of the engine `name`, or `name@target` where there are several.

        Raises NotFoundError naming those there are.
        """
        for record in self.manifest.engines:
            if name in (record.name, record.full_name):
                return record
        names = ", ".join(record.full_name for record in self.manifest.engines) or "none"
        raise NotFoundError(
            f"the bundle {self.folder} has no engine {name!r}; it has: {names}.",
            cure="Choose one of these or auto.",
        )

    def graph(self, precision: str) -> GraphRecord:
        """Return the graph of a precision; raises NotFoundError naming those there are."""
        for record in self.manifest.graphs:
            if record.precision == precision:
                return record
        names = ", ".join(record.precision for record in self.manifest.graphs)
        own = " and without --from-onnx" if any(record.origin for record in self.manifest.graphs) else ""
        raise NotFoundError(
            f"the bundle {self.folder} has no {precision} graph; it has: {names}.",
            cure=f"Export it again with --precision {precision}{own}.",
        )


def timestamp() -> str:
    """Return the time as manifests and reports write it: ISO 8601, UTC, whole seconds. Their order is that of text."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def fingerprint(manifest_parts: list[str]) -> str:
    """Return 32 hex digits over everything that decides a vector, given in a fixed order.

    Parts are length-prefixed, so that no two lists give the same bytes.
    """
    digest = hashlib.sha256()
    for part in manifest_parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def content_fingerprint(contract: Contract, tokenizer: FileRecord, source: Source) -> str:
    """Return the fingerprint of what all engines of a bundle share: weights, tokenizer and contract."""
    weights = [f"{f.file}:{f.sha256}" for f in source.files if f.file.endswith(".safetensors")]
    return fingerprint(["content", tokenizer.sha256, msgspec.json.encode(contract).decode(), *sorted(weights)])


def engine_fingerprint(content: str, graph: GraphRecord, backend: str, sha256: str) -> str:
    """Return the fingerprint of one engine: the bundle's content, the graph with its data, the backend and file."""
    return fingerprint(["engine", content, graph.precision, graph.model.sha256, graph.data.sha256, backend, sha256])


def record_file(root: Path, file: str, *, sha256: str | None = None) -> FileRecord:
    """Describe `root/file`; pass `sha256` where it was already computed while writing."""
    path = root / file
    return FileRecord(file, sha256 or sha256_file(path), path.stat().st_size)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json atomically: it is the commit point of every change to a bundle.

    Raises OutputError, and BundleError for a manifest that could not be read again: a number that is not finite becomes
    null in JSON. Nothing is written then, so it takes the place of no good one.
    """
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    try:
        msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(
            f"{folder / MANIFEST} was not written, since it could not be read again: {error}. Nothing was changed.",
            cure="Report it, with the checkpoint and the command.",
        ) from error
    write_atomic(folder / MANIFEST, data)


def open_bundle(folder: Path, *, golden_too: bool = True) -> Bundle:
    """Open a bundle and check that its manifest is readable and its files are there with the recorded sizes.

    `golden_too` is not set by what makes the golden vectors anew. Raises BundleError naming the file, what was found
    and what was expected.
    """
    bundle = Bundle(folder, read_manifest(folder))
    for record in bundle_files(bundle.manifest):
        if golden_too or record != bundle.manifest.golden:
            _check_size(bundle, record)
    return bundle


def read_manifest(folder: Path) -> Manifest:
    """Read a bundle's manifest and look at no other file. Raises BundleError."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        what = "is not there" if not folder.exists() else f"has no {MANIFEST}: it is not a bundle"
        raise BundleError(
            f"the folder {folder} {what}.", cure=f"Make it with: f2rt export MODEL --out {folder}"
        ) from error
    except OSError as error:
        raise BundleError(
            f"cannot read {path}: {error.strerror}.", cure="Check the path and its permissions."
        ) from error
    return _parse(path, data)


def _parse(path: Path, data: bytes) -> Manifest:
    remake = "Export the checkpoint again."
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            raise BundleError(
                f"{path} has schema version {version}; this f2rt reads version {SCHEMA_VERSION}.",
                cure="Update f2rt." if newer else remake,
            )
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path} is damaged: {error}.", cure=remake) from error


class _Version(msgspec.Struct):
    schema_version: int


def bundle_files(manifest: Manifest) -> list[FileRecord]:
    """Return the records of all files but the engines' own."""
    golden = [manifest.golden] if manifest.golden else []
    of_graphs = {f.file: f for g in manifest.graphs for f in g.all_files}
    return [manifest.tokenizer, *of_graphs.values(), *golden]


def engine_files(bundle: Bundle) -> list[FileRecord]:
    """Return the records of the engines' own files. Raises BundleError for one that is missing."""
    records = []
    for engine in bundle.manifest.engines:
        path = bundle.path(engine.file)
        if not path.is_file():
            raise BundleError(f"{path} is missing from the bundle.", cure="Build the engine again.")
        records.append(FileRecord(engine.file, engine.sha256, path.stat().st_size))
    return records


def _check_size(bundle: Bundle, record: FileRecord) -> None:
    path = bundle.path(record.file)
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle.", cure=_remake(bundle, record))
    size_bytes = path.stat().st_size
    if size_bytes != record.size_bytes:
        raise BundleError(
            f"{path} has {size_bytes} bytes; the manifest records {record.size_bytes}.",
            cure=f"The file was cut or replaced. {_remake(bundle, record)}",
        )


def _remake(bundle: Bundle, record: FileRecord) -> str:
    made_by_parity = record == bundle.manifest.golden
    return f"Run: f2rt parity {bundle.folder}" if made_by_parity else "Export the checkpoint again."


def check_hash(bundle: Bundle, record: FileRecord) -> None:
    """Read the whole file and compare its SHA-256 with the manifest. Raises BundleError."""
    with explain_read_errors(bundle.path(record.file), BundleError):
        found = sha256_file(bundle.path(record.file))
    if found != record.sha256:
        raise BundleError(
            f"{bundle.path(record.file)} has SHA-256 {found[:16]}…; the manifest records {record.sha256[:16]}….",
            cure=f"The file was changed after the bundle was made. {_remake(bundle, record)}",
        )


def with_parity(manifest: Manifest, verdicts: dict[str, ParityRecord], golden: FileRecord | None) -> Manifest:
    """Return the manifest with these golden vectors and verdicts by fingerprint; other engines keep theirs."""
    engines = [replace(e, parity=verdicts.get(e.fingerprint, e.parity)) for e in manifest.engines]
    return replace(manifest, engines=engines, golden=golden)
