"""Opens an engine of a bundle, or says why not: choice, integrity, verdict and golden check in that order.

Asked for and not obtained is an error, never a fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from runtime.errors import F2rtError, InputError, MissingExtraError, NotExecutableError, UnverifiedError
from runtime.settings import EngineSettings
from runtime.tokenizer import TextTokenizer

# Fastest first. `auto` takes the first one that is in the bundle, can run here and has passed. On CPU the order is
# measured: ONNX Runtime widens every float16 matrix there, exact, and slower than fp32. On a GPU it is what the
# arithmetic suggests: `make gpu-check` measures it.
SPEED_ORDER = [
    *(f"{backend}:{precision}" for precision in ("int8", "fp16", "bf16") for backend in ("tensorrt", "tensorrt-rtx")),
    *("onnxruntime-cuda:fp16", "onnxruntime-cuda:int8", "onnxruntime-cuda:fp32"),
    *("onnxruntime:int8", "onnxruntime:fp32", "onnxruntime:fp16"),
]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that has just reproduced PyTorch's golden vectors."""

    engine: Engine
    record: EngineRecord
    tokenizer: TextTokenizer
    golden_cosine: float
    selection: str


def select(bundle: Bundle, name: str, unfit: Mapping[str, str] = {}) -> tuple[EngineRecord, str]:
    """Return the record of the engine to run and the reason it was chosen.

    A name without a target means the engine for this machine's GPU where the bundle has several. `unfit` says of
    engines, by full name, why they did not run when it was tried; `auto` passes over them. Raises NotFoundError for
    an unknown name, what `obstacle` returns for an engine that cannot run here, UnverifiedError when it, or with
    `auto` every engine, lacks a passing verdict.
    """
    if name != "auto":
        record = _named(bundle, name)
        problem = obstacle(record)
        if problem is not None:
            raise problem
        _require_pass(bundle, record)
        return record, "asked for by name"
    if not bundle.manifest.engines:
        raise InputError(f"the bundle {bundle.folder} has no engine.", cure="Export the checkpoint again.")
    rank = {engine: i for i, engine in enumerate(SPEED_ORDER)}
    candidates = sorted(bundle.manifest.engines, key=lambda e: rank.get(e.name, len(rank)))
    skipped: list[str] = []
    for record in candidates:
        reason = unfit.get(record.full_name) or _why_not(record)
        if reason is None:
            why = "fastest engine that runs here and has a passing verdict"
            return record, why + (f"; passed over {', '.join(skipped)}" if skipped else "")
        skipped.append(f"{record.full_name} ({reason})")
    raise UnverifiedError(
        f"no engine of {bundle.folder} may answer: {', '.join(skipped)}.", cure=f"Run: f2rt parity {bundle.folder}"
    )


def obstacle(record: EngineRecord) -> F2rtError | None:
    """Return why this machine cannot run an engine, as far as manifest, libraries and device tell, or None."""
    if record.backend == "onnxruntime":
        return None
    if record.backend == "onnxruntime-cuda":
        from runtime.engines.onnxruntime import cuda_obstacle

        return cuda_obstacle()
    if record.backend in ("tensorrt", "tensorrt-rtx"):
        from runtime.engines import tensorrt

        return tensorrt.obstacle(record)
    return NotExecutableError(
        f"this version of f2rt does not run {record.backend} engines.", cure="Choose another engine, or update f2rt."
    )


def _named(bundle: Bundle, name: str) -> EngineRecord:
    """Return the record called `name`; of several that differ in their target, the one for this machine."""
    same = [record for record in bundle.manifest.engines if record.name == name]
    fitting = [record for record in same if obstacle(record) is None] if len(same) > 1 else same
    return fitting[0] if fitting else bundle.engine(name)


def _why_not(record: EngineRecord) -> str | None:
    """Return in few words why `auto` must not take an engine, or None. The verdict comes first: it costs nothing."""
    problem = problem_with(record)
    if problem is not None:
        return problem
    error = obstacle(record)
    return None if error is None else error.message.rstrip(".")


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

    Raises NotExecutableError or MissingExtraError for an engine that cannot run here, EngineError when it should and
    cannot be loaded.
    """
    path = bundle.path(record.file)
    if record.backend in ("onnxruntime", "onnxruntime-cuda"):
        from runtime.engines.onnxruntime import PROVIDERS, OnnxRuntimeEngine

        return OnnxRuntimeEngine(
            path,
            name=record.name,
            precision=record.precision,
            fingerprint=record.fingerprint,
            settings=settings,
            provider=PROVIDERS[record.backend],
        )
    if record.backend in ("tensorrt", "tensorrt-rtx"):
        from runtime.engines import tensorrt

        return tensorrt.open_engine(path, record, settings)
    problem = obstacle(record)
    assert problem is not None
    raise problem


def load_engine(bundle: Bundle, name: str = "auto", settings: EngineSettings = EngineSettings()) -> LoadedEngine:
    """Choose, verify, open and prove an engine.

    Raises NotFoundError, UnverifiedError, BundleError, MissingExtraError or EngineError; whatever it returns has just
    reproduced the golden vectors.
    """
    unfit: dict[str, str] = {}
    while True:
        record, selection = select(bundle, name, unfit)
        try:
            return _load(bundle, record, selection, settings)
        except (NotExecutableError, MissingExtraError) as error:
            if name != "auto":
                raise
            unfit[record.full_name] = error.message.rstrip(".")


def _load(bundle: Bundle, record: EngineRecord, selection: str, settings: EngineSettings) -> LoadedEngine:
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
