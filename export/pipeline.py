"""Export: a checkpoint becomes a bundle, whole or not at all."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

import runtime
from calibration.statistics import Statistics
from calibration.texts import Text, calibration_texts, texts_sha256
from export.adopt import weight_bytes, write_foreign
from export.checkpoint import Checkpoint
from export.conventions import TOKENIZER
from export.encoder import OPSET, build_encoder
from export.external_data import DataLayout, write
from export.foreign import ForeignGraph
from export.int8 import QuantizationPlan
from export.precision import Precision
from export.probe import probe
from export.quantize import DEFAULT_BUDGET, check_budget, plan_int8
from export.rescale import RescalePlan, plan_rescaling
from export.weights import absmax
from runtime.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    Bundle,
    EngineRecord,
    GraphRecord,
    Manifest,
    content_fingerprint,
    engine_fingerprint,
    open_bundle,
    record_file,
    write_manifest,
)
from runtime.errors import OutputError
from runtime.files import staged_folder
from runtime.tokenizer import Instruction, TextTokenizer

# bf16 matrices have no kernel in ONNX Runtime on CPU: that graph is for builders.
_ONNXRUNTIME_PRECISIONS = (Precision.FP32, Precision.FP16, Precision.INT8)
TWIN = "graphs/int8-uint8.onnx"
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
    int8_budget: float = DEFAULT_BUDGET,
    foreign: ForeignGraph | None = None,
) -> Bundle:
    """Write a bundle to `folder`, replacing the bundle there in one step.

    The narrow precisions are shaped by the activations of `calibration`, by default the shipped calibration texts;
    `int8_budget` is the part of the matrix work that INT8 must keep. Raises InputError for a budget that is none,
    CheckpointError for weights that cannot be used, OutputError when the folder cannot be written or holds something
    that is not a bundle. With `foreign`, that graph is the bundle's only one. Until the last moment the old bundle is
    untouched.
    """
    _check_target(folder)
    check_budget(int8_budget)
    source_bytes = sum(f.stat().st_size for f in checkpoint.weights.files)
    hashing = Step("hash the source", source_bytes)
    progress(hashing, 0)
    source = checkpoint.source()
    progress(hashing, source_bytes)
    with staged_folder(folder) as staging:
        shutil.copyfile(checkpoint.folder / TOKENIZER, staging / TOKENIZER)
        tokenizer = record_file(staging, TOKENIZER)
        content = content_fingerprint(checkpoint.contract, tokenizer, source)
        if foreign is None:
            graphs = write_graphs(checkpoint, staging, precisions, progress, calibration, int8_budget)
        else:
            graphs = [adopt_graph(checkpoint, foreign, staging, progress)]
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            fingerprint=content,
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            source=source,
            contract=checkpoint.contract,
            tokenizer=tokenizer,
            graphs=graphs,
            engines=[onnxruntime_engine(content, g) for g in graphs if g.precision in _ONNXRUNTIME_PRECISIONS],
            golden=None,
            versions=versions(_VERSIONED),
            notices=[*checkpoint.notices, *(foreign.notices if foreign else ())],
        )
        write_manifest(staging, manifest)
    return open_bundle(folder)


def write_graphs(
    checkpoint: Checkpoint,
    root: Path,
    precisions: list[Precision],
    progress: Progress,
    calibration: Sequence[Text] | None,
    int8_budget: float = DEFAULT_BUDGET,
) -> list[GraphRecord]:
    """Write the graphs of all precisions under `root`; probes the fp32 graph when one of them is narrow."""
    fp32 = write_graph(checkpoint, root, Precision.FP32, progress)
    if precisions == [Precision.FP32]:
        return [fp32]
    texts = calibration_texts() if calibration is None else calibration
    measured = measure(checkpoint, root, fp32, texts, progress)
    graphs = []
    for precision in precisions:
        if precision is Precision.FP32:
            graphs.append(fp32)
        elif precision is Precision.INT8:
            graphs.append(write_int8_graphs(checkpoint, root, fp32, measured, int8_budget, progress))
        else:
            plan = rescale_plan(checkpoint, measured)
            graphs.append(replace(write_graph(checkpoint, root, precision, progress, plan), rescaling=plan.lines))
    graphs = [g if g is fp32 else replace(g, calibration_sha256=texts_sha256(texts)) for g in graphs]
    if Precision.FP32 not in precisions:
        for record in (fp32.model, fp32.data):
            (root / record.file).unlink()
    return graphs


@dataclass(frozen=True)
class Measured:
    """Calibration texts as token ids, EOS included, and what the probe measured on them."""

    sequences: list[list[int]]
    statistics: Statistics


def measure(
    checkpoint: Checkpoint, root: Path, fp32: GraphRecord, texts: Sequence[Text], progress: Progress
) -> Measured:
    """Probe the fp32 graph on `texts`. Raises InputError, EngineError, OutputError."""
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
    return Measured(sequences, statistics)


def rescale_plan(checkpoint: Checkpoint, measured: Measured) -> RescalePlan:
    """Decide what FP16 needs."""
    largest = functools.cache(lambda name: absmax(checkpoint.weights, name))
    return plan_rescaling(checkpoint.config, measured.statistics, largest)


def write_int8_graphs(
    checkpoint: Checkpoint, root: Path, fp32: GraphRecord, measured: Measured, budget: float, progress: Progress
) -> GraphRecord:
    """Write graphs/int8.onnx, its twin graphs/int8-uint8.onnx and the data of both. Raises as `plan_int8` does."""
    quantization = plan_int8(
        checkpoint.config,
        checkpoint.weights,
        measured.statistics,
        root / fp32.model.file,
        measured.sequences,
        budget=budget,
        progress=lambda label, done, total: progress(Step(label, total), done),
    )
    graph = write_graph(checkpoint, root, Precision.INT8, progress, quantization=quantization)
    return replace(graph, rescaling=quantization.rescale.lines, quantization=quantization.record)


def write_graph(
    checkpoint: Checkpoint,
    root: Path,
    precision: Precision,
    progress: Progress,
    plan: RescalePlan | None = None,
    quantization: QuantizationPlan | None = None,
) -> GraphRecord:
    """Write graphs/<precision>.onnx and its data, and for INT8 the twin, under `root`.

    Raises CheckpointError, OSError.
    """
    model_file, data_file = f"graphs/{precision}.onnx", f"graphs/{precision}.onnx.data"
    (root / "graphs").mkdir(exist_ok=True)
    layout = DataLayout(Path(data_file).name)
    build = functools.partial(
        build_encoder,
        checkpoint.config,
        layout,
        producer_version=runtime.__version__,
        precision=precision,
        plan=plan,
        quantization=quantization,
    )
    models = {model_file: build()}
    if quantization is not None:
        models[TWIN] = build(twin=True)
    step = Step(f"write the {precision} graph", layout.size_bytes)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(step, done)

    data_sha256 = write(layout, checkpoint.weights, root / data_file, advance)
    for file, model in models.items():
        ir.save(model, root / file)
    return GraphRecord(
        precision,
        record_file(root, model_file),
        record_file(root, data_file, sha256=data_sha256),
        OPSET,
        twin=record_file(root, TWIN) if quantization is not None else None,
    )


def adopt_graph(checkpoint: Checkpoint, foreign: ForeignGraph, root: Path, progress: Progress) -> GraphRecord:
    """Write a foreign graph as the bundle's under `root`. Raises InputError, OSError."""
    step = Step(f"write the given {foreign.precision} graph", weight_bytes(foreign))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(step, done)

    return write_foreign(foreign, checkpoint.config, checkpoint.contract.pad_id, root, advance)


def onnxruntime_engine(content: str, graph: GraphRecord) -> EngineRecord:
    """Return the record of the engine that needs no build: ONNX Runtime on the graph itself, for INT8 on its twin."""
    model = graph.twin or graph.model
    return EngineRecord(
        name=f"onnxruntime:{graph.precision}",
        backend="onnxruntime",
        precision=graph.precision,
        file=model.file,
        sha256=model.sha256,
        fingerprint=engine_fingerprint(content, graph, "onnxruntime", model.sha256),
        builder={"f2rt": runtime.__version__},
        flags=[f"opset {graph.opset}", *([f"graph by {graph.origin.producer}"] if graph.origin else [])],
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
