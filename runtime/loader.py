"""Opens an engine of a bundle, or says why not: choice, integrity, verdict and golden check in that order.

Asked for and not obtained is an error, never a fallback.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime import golden
from runtime.bundle import (
    Bundle,
    EngineRecord,
    GraphRecord,
    check_hash,
    content_fingerprint,
    engine_files,
    engine_fingerprint,
)
from runtime.engines import Engine
from runtime.errors import InputError, NotExecutableError, UnverifiedError
from runtime.settings import EngineSettings
from runtime.tokenizer import TextTokenizer

# Fastest first. `auto` takes the first one that is in the bundle, can run here and has passed.
# ONNX Runtime on CPU widens every float16 matrix: exact, and slower than fp32.
SPEED_ORDER = ["onnxruntime:int8", "onnxruntime:fp32", "onnxruntime:fp16"]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that has just reproduced PyTorch's golden vectors."""

    engine: Engine
    record: EngineRecord
    tokenizer: TextTokenizer
    golden_cosine: float
    selection: str


def select(bundle: Bundle, name: str) -> tuple[EngineRecord, str]:
    """Return the record of the engine to run and the reason it was chosen.

    Raises NotFoundError for an unknown name, UnverifiedError when it, or with `auto` every engine, lacks a passing
    verdict.
    """
    if name != "auto":
        record = bundle.engine(name)
        _require_pass(bundle, record)
        return record, "asked for by name"
    if not bundle.manifest.engines:
        raise InputError(f"the bundle {bundle.folder} has no engine.", cure="Export the checkpoint again.")
    rank = {engine: i for i, engine in enumerate(SPEED_ORDER)}
    candidates = sorted(bundle.manifest.engines, key=lambda e: rank.get(e.name, len(rank)))
    passed = [e for e in candidates if problem_with(e) is None]
    if not passed:
        reasons = "; ".join(f"{e.full_name}: {problem_with(e)}" for e in candidates)
        raise UnverifiedError(
            f"no engine of {bundle.folder} may answer: {reasons}.", cure=f"Run: f2rt parity {bundle.folder}"
        )
    skipped = [f"{e.full_name} ({problem_with(e)})" for e in candidates if e not in passed]
    return passed[0], "fastest engine with a passing verdict" + (
        f"; passed over {', '.join(skipped)}" if skipped else ""
    )


def problem_with(record: EngineRecord) -> str | None:
    """Return why the engine's verdict does not let it answer, or None."""
    parity = record.parity
    if parity is None:
        return "never compared with PyTorch"
    if parity.fingerprint != record.fingerprint:
        return "its verdict belongs to another engine"
    if parity.verdict != "pass":
        return f"its verdict is {parity.verdict}"
    return None


def check_fingerprint(bundle: Bundle, record: EngineRecord) -> None:
    """Recompute the engine's fingerprint from what it stands for. Raises UnverifiedError when they differ.

    A verdict is bound to a fingerprint, so parts exchanged behind it must not keep it.
    """
    manifest = bundle.manifest
    content = content_fingerprint(manifest.contract, manifest.tokenizer, manifest.source)
    expected = engine_fingerprint(content, bundle.graph(record.precision), record.backend, record.sha256)
    if (content, expected) != (manifest.fingerprint, record.fingerprint):
        raise UnverifiedError(
            f"the fingerprint of {record.name} in {bundle.folder} is {record.fingerprint}; its parts give {expected}.",
            cure="The manifest was edited or its parts exchanged. Export the checkpoint again.",
        )


def _require_pass(bundle: Bundle, record: EngineRecord) -> None:
    problem = problem_with(record)
    if problem:
        raise UnverifiedError(
            f"the engine {record.name} of {bundle.folder} may not answer: {problem}.",
            cure=f"Run: f2rt parity {bundle.folder}",
        )


def open_raw_engine(bundle: Bundle, record: EngineRecord, settings: EngineSettings) -> Engine:
    """Open an engine without asking whether it was proven: for the check itself.

    Raises NotExecutableError for a backend this version does not run, EngineError when it cannot be loaded.
    """
    if record.backend == "onnxruntime":
        from runtime.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(
            bundle.path(record.file),
            name=record.name,
            precision=record.precision,
            fingerprint=record.fingerprint,
            settings=settings,
        )
    compiled_for = f", compiled for {record.target}" if record.target else ""
    raise NotExecutableError(
        f"this version of f2rt does not run {record.backend} engines{compiled_for}.",
        cure="Choose an onnxruntime engine, or update f2rt.",
    )


def load_engine(bundle: Bundle, name: str = "auto", settings: EngineSettings = EngineSettings()) -> LoadedEngine:
    """Choose, verify, open and prove an engine.

    Raises NotFoundError, UnverifiedError, BundleError or EngineError; whatever it returns has just reproduced the
    golden vectors.
    """
    record, selection = select(bundle, name)
    graph: GraphRecord = bundle.graph(record.precision)
    for file in (bundle.manifest.tokenizer, *graph.files):
        check_hash(bundle, file)
    for file in engine_files(bundle):
        if file.file == record.file:
            check_hash(bundle, file)
    check_fingerprint(bundle, record)
    tokenizer = TextTokenizer(bundle.path(bundle.manifest.tokenizer.file), bundle.manifest.contract)
    expected = golden.load(bundle)
    golden.check_tokenizer(tokenizer, expected)
    engine = open_raw_engine(bundle, record, settings)
    try:
        cosine = golden.check_engine(engine, expected, bundle.manifest.contract.pad_id)
    except BaseException:
        engine.close()
        raise
    return LoadedEngine(engine, record, tokenizer, cosine, selection)
