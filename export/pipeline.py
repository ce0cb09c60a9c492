"""Export: a checkpoint becomes a bundle, whole or not at all."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import runtime
from calibration.texts import Text, calibration_texts
from export.cache import cached_sha256
from export.changes import (
    Decision,
    carry,
    decide,
    find_old,
    graph_inputs,
    is_same,
    manifest_after,
    outliving_files,
)
from export.checkpoint import Checkpoint
from export.conventions import TOKENIZER
from export.foreign import ForeignGraph
from export.graphs import Progress, Step, adopt_graph, write_graphs
from export.lock import Wait, bundle_lock
from export.precision import Precision
from export.quantize import DEFAULT_BUDGET, check_budget
from runtime.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    ZERO_POINTS,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    Source,
    content_fingerprint,
    engine_fingerprint,
    open_bundle,
    timestamp,
    write_manifest,
)
from runtime.errors import CheckpointError, OutputError, explain_memory_errors
from runtime.files import copy_file, staged_folder
from runtime.packages import installed_version

# bf16 matrices have no kernel in ONNX Runtime on CPU: that graph is for builders.
_ONNXRUNTIME_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
_VERSIONED = ["ml-dtypes", "numpy", "onnx-ir", "onnxruntime", "safetensors", "tokenizers"]


def export_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    precisions: list[Precision],
    progress: Progress = lambda step, done: None,
    *,
    calibration: Sequence[Text] | None = None,
    int8_budget: float = DEFAULT_BUDGET,
    foreign: ForeignGraph | None = None,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    wait: Wait = Wait(),
) -> Bundle:
    """Make the bundle at `folder` one of this checkpoint with these precisions, and no others, in one step.

    Graphs whose inputs have not changed are kept, and with them engines, golden vectors and verdicts; `force` keeps
    nothing. When nothing changed at all, the folder is not touched. `tell` is told what became of each graph. The
    narrow precisions are shaped by the activations of `calibration`, by default the shipped calibration texts.

    `int8_budget` is the part of the matrix work that INT8 must keep. With `foreign`, that graph is the bundle's only
    one and is always written. Raises InputError for a budget that is none, CheckpointError for weights that cannot be
    used, OutputError when the folder cannot be written or holds something that is not a bundle. Until the last moment
    the old bundle is untouched.
    """
    _check_target(folder)
    check_budget(int8_budget)
    precisions = sorted(set(precisions), key=list(Precision).index)
    request = _Request(precisions, calibration, int8_budget, foreign, force)
    cure = "Free memory, or give fewer or shorter --calibration texts: their states and one layer's weights must fit."
    with bundle_lock(folder, "f2rt export", wait), explain_memory_errors(f"export to {folder}", cure):
        return _export(checkpoint, folder, request, progress, tell, wait)


@dataclass(frozen=True)
class _Request:
    """What was asked for besides the checkpoint."""

    precisions: list[Precision]
    calibration: Sequence[Text] | None
    int8_budget: float
    foreign: ForeignGraph | None
    force: bool


def _export(
    checkpoint: Checkpoint,
    folder: Path,
    request: _Request,
    progress: Progress,
    tell: Callable[[str], None],
    wait: Wait,
) -> Bundle:
    _check_target(folder)
    precisions, calibration, foreign = request.precisions, request.calibration, request.foreign
    old, otherwise = find_old(folder, force=request.force)
    texts = calibration_texts() if calibration is None and precisions != [Precision.FP32] else calibration or []
    advance = _advance(progress, _bytes_to_hash(checkpoint, old))
    source = checkpoint.source(lambda path: cached_sha256(path, advance))
    if foreign is None:
        inputs = {p: graph_inputs(checkpoint, source, p, texts, request.int8_budget) for p in precisions}
        decisions = [decide(old, p, inputs[p], otherwise, advance) for p in precisions]
    else:
        decisions = [Decision(foreign.precision, {}, None, "it was given with --from-onnx")]
    notices = [*checkpoint.notices, *(foreign.notices if foreign else ())]
    kept = [d.kept for d in decisions if d.kept]
    if old is not None and len(kept) == len(decisions):
        manifest = _manifest(checkpoint, source, kept, old, lambda line: None, notices)
        if is_same(old, manifest):
            _tell_all(folder, decisions, kept, tell)
            return open_bundle(folder)
    with staged_folder(folder) as staging:
        copy_file(checkpoint.folder / TOKENIZER, staging / TOKENIZER, CheckpointError)
        if old is not None:
            carry(old, {f.file for g in kept for f in g.all_files}, staging)
        if foreign is None:
            already = {g.precision: g for g in kept}
            budget = request.int8_budget
            graphs = write_graphs(checkpoint, staging, precisions, progress, texts, already, budget, tell, wait)
        else:
            graphs = [adopt_graph(checkpoint, foreign, staging, progress)]
        graphs = [replace(g, inputs=d.inputs) for g, d in zip(graphs, decisions, strict=True)]
        manifest = _manifest(checkpoint, source, graphs, old, tell, notices)
        if old is not None:
            carry(old, outliving_files(manifest, old), staging)
        write_manifest(staging, manifest)
    _tell_all(folder, decisions, graphs, tell)
    return open_bundle(folder)


def _manifest(
    checkpoint: Checkpoint,
    source: Source,
    graphs: list[GraphRecord],
    old: Bundle | None,
    tell: Callable[[str], None],
    notices: list[str],
) -> Manifest:
    """Return the manifest of these graphs, with the engines and golden vectors of `old` that still hold."""
    tokenizer = next(f for f in source.files if f.file == TOKENIZER)
    content = content_fingerprint(checkpoint.contract, tokenizer, source)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=content,
        created_at=timestamp(),
        source=source,
        contract=checkpoint.contract,
        tokenizer=tokenizer,
        graphs=graphs,
        engines=[],
        golden=None,
        versions=versions(_VERSIONED),
        notices=notices,
    )
    engines = [onnxruntime_engine(content, g) for g in graphs if g.precision in _ONNXRUNTIME_PRECISIONS]
    return manifest_after(old, replace(manifest, engines=engines), tell)


def _tell_all(folder: Path, decisions: list[Decision], graphs: list[GraphRecord], tell: Callable[[str], None]) -> None:
    for decision, graph in zip(decisions, graphs, strict=True):
        size = "" if decision.kept else f" ({graph.data.size_bytes / 1e6:.1f} MB of weights)"
        tell(f"{'kept' if decision.kept else 'wrote'} {folder / graph.model.file}{size}: {decision.reason}")


def _bytes_to_hash(checkpoint: Checkpoint, old: Bundle | None) -> int:
    source = sum(f.stat().st_size for f in checkpoint.weights.files)
    return source + sum(f.size_bytes for g in (old.manifest.graphs if old else []) for f in g.files)


def _advance(progress: Progress, total: int) -> Callable[[int], None]:
    """Return a counter of bytes hashed; the source's small files push it past the total by less than shows."""
    step, done = Step("hash source and bundle", total), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(step, min(done, total))

    return advance


def onnxruntime_engine(content: str, graph: GraphRecord) -> EngineRecord:
    """Return the record of the engine that needs no build: ONNX Runtime on the graph itself, for INT8 on its twin."""
    model = graph.twin or graph.model
    flags = [f"opset {graph.opset}", *([f"graph by {graph.origin.producer}"] if graph.origin else [])]
    return EngineRecord(
        name=f"onnxruntime:{graph.precision}",
        backend="onnxruntime",
        precision=graph.precision,
        file=model.file,
        sha256=model.sha256,
        fingerprint=engine_fingerprint(content, graph, "onnxruntime", model.sha256),
        builder={"f2rt": runtime.__version__},
        flags=[*flags, *([ZERO_POINTS] if graph.twin else [])],
        calibration_sha256=graph.calibration_sha256,
        made_at=timestamp(),
    )


def versions(packages: list[str]) -> dict[str, str]:
    """Return the versions of f2rt, Python and the packages named."""
    found = {name: installed_version(name) for name in packages}
    return {"f2rt": runtime.__version__, "python": platform.python_version(), **found}


def _check_target(folder: Path) -> None:
    """Refuse to replace anything that is not a bundle: the target folder is exchanged as a whole."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"{folder} is not a folder.", cure="Choose another --out.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise OutputError(
            f"{folder} holds files but no {MANIFEST}; it is not a bundle and is not replaced.",
            cure="Choose an empty or new folder for --out.",
        )
