"""Export: a checkpoint becomes a bundle, whole or not at all."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

import runtime
from calibration.texts import Text, calibration_texts, texts_sha256
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
from export.encoder import OPSET, build_encoder
from export.external_data import DataLayout, write
from export.lock import Wait, bundle_lock
from export.precision import Precision
from export.probe import probe
from export.rescale import RescalePlan, plan_rescaling
from export.weights import absmax
from runtime.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    Source,
    content_fingerprint,
    engine_fingerprint,
    open_bundle,
    record_file,
    write_manifest,
)
from runtime.errors import CheckpointError, OutputError
from runtime.files import copy_file, staged_folder
from runtime.tokenizer import Instruction, TextTokenizer

# bf16 matrices have no kernel in ONNX Runtime on CPU: that graph is for builders.
_ONNXRUNTIME_PRECISIONS = (Precision.FP32, Precision.FP16)
_VERSIONED = ["ml-dtypes", "numpy", "onnx-ir", "onnxruntime", "safetensors", "tokenizers"]


@dataclass(frozen=True)
class Step:
    """What `export_bundle` is doing, for a progress display: `total` bytes or texts."""

    label: str
    total: int


Progress = Callable[[Step, int], None]


def export_bundle(
    checkpoint: Checkpoint,
    folder: Path,
    precisions: list[Precision],
    progress: Progress = lambda step, done: None,
    *,
    calibration: Sequence[Text] | None = None,
    force: bool = False,
    tell: Callable[[str], None] = lambda line: None,
    wait: Wait = Wait(),
) -> Bundle:
    """Make the bundle at `folder` one of this checkpoint with these precisions, and no others, in one step.

    Graphs whose inputs have not changed are kept, and with them engines, golden vectors and verdicts; `force` keeps
    nothing. When nothing changed at all, the folder is not touched. `tell` is told what became of each graph. The
    narrow precisions are shaped by the activations of `calibration`, by default the shipped calibration texts.

    Raises CheckpointError for weights that cannot be used, OutputError when the folder cannot be written or holds
    something that is not a bundle. Until the last moment the old bundle is untouched.
    """
    _check_target(folder)
    with bundle_lock(folder, "f2rt export", wait):
        precisions = sorted(set(precisions), key=list(Precision).index)
        return _export(checkpoint, folder, precisions, progress, calibration, force, tell)


def _export(
    checkpoint: Checkpoint,
    folder: Path,
    precisions: list[Precision],
    progress: Progress,
    calibration: Sequence[Text] | None,
    force: bool,
    tell: Callable[[str], None],
) -> Bundle:
    _check_target(folder)
    old, otherwise = find_old(folder, force=force)
    texts = calibration_texts() if calibration is None and precisions != [Precision.FP32] else calibration or []
    advance = _advance(progress, _bytes_to_hash(checkpoint, old))
    source = checkpoint.source(lambda path: cached_sha256(path, advance))
    decisions = [decide(old, p, graph_inputs(checkpoint, source, p, texts), otherwise, advance) for p in precisions]
    kept = [d.kept for d in decisions if d.kept]
    if old is not None and len(kept) == len(decisions):
        manifest = _manifest(checkpoint, source, kept, old, lambda line: None)
        if is_same(old, manifest):
            _tell_all(folder, decisions, kept, tell)
            return open_bundle(folder)
    with staged_folder(folder) as staging:
        copy_file(checkpoint.folder / TOKENIZER, staging / TOKENIZER, CheckpointError)
        if old is not None:
            carry(old, [f.file for g in kept for f in g.files], staging)
        graphs = write_graphs(checkpoint, staging, precisions, progress, texts, {g.precision: g for g in kept})
        graphs = [replace(g, inputs=d.inputs) for g, d in zip(graphs, decisions, strict=True)]
        manifest = _manifest(checkpoint, source, graphs, old, tell)
        if old is not None:
            carry(old, outliving_files(manifest, old), staging)
        write_manifest(staging, manifest)
    _tell_all(folder, decisions, graphs, tell)
    return open_bundle(folder)


def _manifest(
    checkpoint: Checkpoint, source: Source, graphs: list[GraphRecord], old: Bundle | None, tell: Callable[[str], None]
) -> Manifest:
    """Return the manifest of these graphs, with the engines and golden vectors of `old` that still hold."""
    tokenizer = next(f for f in source.files if f.file == TOKENIZER)
    content = content_fingerprint(checkpoint.contract, tokenizer, source)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        fingerprint=content,
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=source,
        contract=checkpoint.contract,
        tokenizer=tokenizer,
        graphs=graphs,
        engines=[],
        golden=None,
        versions=versions(_VERSIONED),
        notices=checkpoint.notices,
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


def write_graphs(
    checkpoint: Checkpoint,
    root: Path,
    precisions: list[Precision],
    progress: Progress,
    texts: Sequence[Text],
    kept: Mapping[str, GraphRecord],
) -> list[GraphRecord]:
    """Return the graphs of all precisions: those of `kept`, whose files are under `root`, and the others written there.

    Probes the fp32 graph when one of those to be written is narrow.
    """
    if not set(precisions) - {Precision.FP32} - set(kept):
        return [kept.get(p) or write_graph(checkpoint, root, p, progress) for p in precisions]
    fp32 = kept.get(Precision.FP32) or write_graph(checkpoint, root, Precision.FP32, progress)
    plan = rescale_plan(checkpoint, root, fp32, texts, progress)
    graphs = []
    for precision in precisions:
        if precision is Precision.FP32 or precision in kept:
            graphs.append(kept.get(precision, fp32))
            continue
        graph = write_graph(checkpoint, root, precision, progress, plan)
        graphs.append(replace(graph, rescaling=plan.lines, calibration_sha256=texts_sha256(texts)))
    if Precision.FP32 not in precisions:
        for record in fp32.files:
            (root / record.file).unlink()
    return graphs


def rescale_plan(
    checkpoint: Checkpoint, root: Path, fp32: GraphRecord, texts: Sequence[Text], progress: Progress
) -> RescalePlan:
    """Probe the fp32 graph on `texts` and decide what FP16 needs. Raises InputError, EngineError, OutputError."""
    contract = checkpoint.contract
    tokenizer = TextTokenizer(root / TOKENIZER, contract)
    rendered = [contract.prompts.get(text.prompt or "", "") + text.text for text in texts]
    sequences = [item.ids for item in tokenizer.encode(rendered, Instruction(prompt=""))]
    statistics = probe(
        root / fp32.model.file,
        fp32.model.sha256 + fp32.data.sha256,
        checkpoint.config,
        sequences,
        progress=lambda label, done, total: progress(Step(label, total), done),
    )
    return plan_rescaling(checkpoint.config, statistics, functools.cache(lambda n: absmax(checkpoint.weights, n)))


def write_graph(
    checkpoint: Checkpoint, root: Path, precision: Precision, progress: Progress, plan: RescalePlan | None = None
) -> GraphRecord:
    """Write graphs/<precision>.onnx and its data under `root`. Raises CheckpointError, OSError."""
    model_file, data_file = f"graphs/{precision}.onnx", f"graphs/{precision}.onnx.data"
    (root / "graphs").mkdir(exist_ok=True)
    layout = DataLayout(Path(data_file).name)
    model = build_encoder(
        checkpoint.config, layout, producer_version=runtime.__version__, precision=precision, plan=plan
    )
    step = Step(f"write the {precision} graph", layout.size_bytes)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(step, done)

    data_sha256 = write(layout, checkpoint.weights, root / data_file, advance)
    ir.save(model, root / model_file)
    return GraphRecord(
        precision, record_file(root, model_file), record_file(root, data_file, sha256=data_sha256), OPSET
    )


def onnxruntime_engine(content: str, graph: GraphRecord) -> EngineRecord:
    """Return the record of the engine that needs no build: ONNX Runtime on the graph itself."""
    return EngineRecord(
        name=f"onnxruntime:{graph.precision}",
        backend="onnxruntime",
        precision=graph.precision,
        file=graph.model.file,
        sha256=graph.model.sha256,
        fingerprint=engine_fingerprint(content, graph, "onnxruntime", graph.model.sha256),
        builder={"f2rt": runtime.__version__},
        flags=[f"opset {graph.opset}"],
        calibration_sha256=graph.calibration_sha256,
    )


def versions(packages: list[str]) -> dict[str, str]:
    """Return the versions of f2rt, Python and the packages named."""
    found = {name: importlib.metadata.version(name) for name in packages}
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
