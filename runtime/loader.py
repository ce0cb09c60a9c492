"""Opens an engine of a bundle, or says why not: choice, integrity, verdict and golden check in that order.

Asked for and not obtained is an error, never a fallback.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime import golden
from runtime.bundle import (
    ZERO_POINTS,
    Bundle,
    EngineRecord,
    GraphRecord,
    check_hash,
    content_fingerprint,
    engine_files,
    engine_fingerprint,
)
from runtime.cpu import has_fast_int8_products
from runtime.engines import Engine
from runtime.errors import F2rtError, InputError, MissingExtraError, NotExecutableError, UnverifiedError
from runtime.gate import Gate, refusal
from runtime.policy import Policy
from runtime.settings import EngineSettings
from runtime.tokenizer import TextTokenizer

# Fastest first. On CUDA the order is measured (bench/results/gpu.md): fp16 is the fastest from 128 tokens in a batch,
# int8 faster than fp32 from 512. Of the plans it is what the arithmetic suggests: `make gpu-check` measures it.
_ON_GPU = [
    *(f"{backend}:{precision}" for precision in ("int8", "fp16", "bf16") for backend in ("tensorrt", "tensorrt-rtx")),
    *("onnxruntime-cuda:fp16", "onnxruntime-cuda:int8", "onnxruntime-cuda:fp32"),
]


@dataclass(frozen=True)
class LoadedEngine:
    """An engine that has just reproduced the golden vectors `expected`, and the policy that it is held to.

    `unverified` says why it was not shown to keep the policy: "" for an engine that was. Where that is allowed the
    golden vectors may be a stand-in.
    """

    engine: Engine
    record: EngineRecord
    tokenizer: TextTokenizer
    golden_cosine: float
    selection: str
    expected: golden.Golden
    policy: Policy
    unverified: str = ""


def select(bundle: Bundle, name: str, unfit: Mapping[str, str] = {}, gate: Gate = Gate()) -> tuple[EngineRecord, str]:
    """Return the record of the engine to run and the reason it was chosen.

    A name without a target means the engine for this machine's GPU where the bundle has several. `unfit` says of
    engines, by full name, why they did not run when it was tried; `auto` passes over them. An engine without a
    verdict that stands is chosen where `gate` allows it, by `auto` when there is no other. Raises NotFoundError for
    an unknown name, what `obstacle` returns for an engine that cannot run here, UnverifiedError when the gate refuses
    it, or with `auto` every engine.
    """
    if name != "auto":
        record = _named(bundle, name)
        problem = obstacle(record)
        if problem is not None:
            raise problem
        found = refusal(bundle, record, gate.policy)
        if found is not None and not gate.allow_unverified:
            raise UnverifiedError(
                f"the engine {record.full_name} of {bundle.folder} may not answer: {found.reason}.", cure=found.cure
            )
        return record, "asked for by name"
    if not bundle.manifest.engines:
        raise InputError(f"the bundle {bundle.folder} has no engine.", cure="Export the checkpoint again.")
    rank = {engine: i for i, engine in enumerate(_fastest_first())}
    candidates = sorted(bundle.manifest.engines, key=lambda e: rank.get(e.name, len(rank)))
    skipped: dict[str, str] = {}
    refused = []
    for record in candidates:
        found = refusal(bundle, record, gate.policy)
        # The verdict comes before what the machine can do: it costs nothing.
        reason = unfit.get(record.full_name) or (found.reason if found else _cannot_run(record))
        if reason is None:
            return record, "fastest engine that runs here and has a passing verdict" + _passed_over(skipped)
        skipped[record.full_name] = reason
        if found is not None:
            refused.append((record, found))
    if gate.allow_unverified:
        # One that was shown to miss a limit comes after those of which that is not known.
        for record, _ in sorted(refused, key=lambda pair: pair[1].failed):
            if record.full_name not in unfit and obstacle(record) is None:
                del skipped[record.full_name]
                return record, "allowed though unverified: no verified engine runs here" + _passed_over(skipped)
    raise UnverifiedError(
        f"no engine of {bundle.folder} may answer: {_listed(skipped)}.",
        cure=refused[0][1].cure if refused else f"Run: f2rt parity {bundle.folder}",
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


def _fastest_first() -> list[str]:
    """Return names of engines. `auto` takes the first that is in the bundle, can run here and has passed.

    On CPU the order is measured, too: ONNX Runtime widens every float16 matrix there, exact, and slower than fp32; and
    where int8 gains no time, fp32 has PyTorch's vectors more exactly for the same.
    """
    on_cpu = ["onnxruntime:int8", "onnxruntime:fp32", "onnxruntime:fp16"]
    if not has_fast_int8_products():
        on_cpu[:2] = reversed(on_cpu[:2])
    return [*_ON_GPU, *on_cpu]


def _named(bundle: Bundle, name: str) -> EngineRecord:
    """Return the record called `name`; of several that differ in their target, the one for this machine."""
    same = [record for record in bundle.manifest.engines if record.name == name]
    fitting = [record for record in same if obstacle(record) is None] if len(same) > 1 else same
    return fitting[0] if fitting else bundle.engine(name)


def _cannot_run(record: EngineRecord) -> str | None:
    error = obstacle(record)
    return None if error is None else error.message.rstrip(".")


def _passed_over(skipped: Mapping[str, str]) -> str:
    return f"; passed over {_listed(skipped)}" if skipped else ""


def _listed(skipped: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in skipped.items())


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
            exact=ZERO_POINTS in record.flags,
        )
    if record.backend in ("tensorrt", "tensorrt-rtx"):
        from runtime.engines import tensorrt

        return tensorrt.open_engine(path, record, settings)
    problem = obstacle(record)
    assert problem is not None
    raise problem


def load_engine(
    bundle: Bundle, name: str = "auto", settings: EngineSettings = EngineSettings(), gate: Gate = Gate()
) -> LoadedEngine:
    """Choose, verify, open and prove an engine.

    Raises NotFoundError, UnverifiedError, BundleError, MissingExtraError or EngineError; whatever it returns has just
    reproduced the golden vectors. Only where `gate` allows unverified engines may these be a stand-in.
    """
    unfit: dict[str, str] = {}
    while True:
        record, selection = select(bundle, name, unfit, gate)
        try:
            return _load(bundle, record, selection, settings, gate)
        except (NotExecutableError, MissingExtraError) as error:
            if name != "auto":
                raise
            unfit[record.full_name] = error.message.rstrip(".")


def _load(bundle: Bundle, record: EngineRecord, selection: str, settings: EngineSettings, gate: Gate) -> LoadedEngine:
    graph: GraphRecord = bundle.graph(record.precision)
    for file in (bundle.manifest.tokenizer, *graph.files):
        check_hash(bundle, file)
    for file in engine_files(bundle):
        if file.file == record.file:
            check_hash(bundle, file)
    check_fingerprint(bundle, record)
    if record.backend in ("onnxruntime", "onnxruntime-cuda") and record.file not in {f.file for f in graph.files}:
        # A graph elsewhere would take the weights that lie beside it there, whose hash nobody knows.
        raise UnverifiedError(
            f"the engine {record.full_name} of {bundle.folder} runs {record.file}, which is not the {record.precision} "
            "graph of the bundle.",
            cure="The manifest was edited. Export the checkpoint again.",
        )
    pad_id = bundle.manifest.contract.pad_id
    tokenizer = TextTokenizer(bundle.path(bundle.manifest.tokenizer.file), bundle.manifest.contract)
    expected = None
    if bundle.manifest.golden is not None or not gate.allow_unverified:
        expected = golden.load(bundle)
        golden.check_tokenizer(tokenizer, expected)
    unverified = _unverified(bundle, record, gate)
    if unverified and not gate.allow_unverified:  # hashing takes a while, and a comparison may have ended meanwhile
        raise UnverifiedError(
            f"the engine {record.full_name} of {bundle.folder} may not answer: {unverified}.",
            cure=f"Run: f2rt parity {bundle.folder}",
        )
    engine = open_raw_engine(bundle, record, settings)
    try:
        expected = expected or golden.stand_in(engine, tokenizer, pad_id)
        cosine = golden.check_engine(engine, expected, pad_id, gate.policy.tolerance(record.precision))
    except UnverifiedError as error:
        engine.close()
        if unverified:
            message = f"{error.message} An engine known to be wrong never answers, allowed unverified or not."
            raise UnverifiedError(message, cure=error.cure) from error
        raise
    except BaseException:
        engine.close()
        raise
    return LoadedEngine(engine, record, tokenizer, cosine, selection, expected, gate.policy, unverified)


def _unverified(bundle: Bundle, record: EngineRecord, gate: Gate) -> str:
    """Return all that keeps an engine from being a verified one; "" for nothing."""
    found = refusal(bundle, record, gate.policy)
    reasons = [found.reason] if found else []
    if bundle.manifest.golden is None:
        reasons.append("the bundle has no golden vectors, so it is compared with its own first ones alone")
    return "; ".join(reasons)
