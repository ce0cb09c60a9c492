"""Writes a bundle's graphs: fp32, what the probe measures on it, and the narrow graphs shaped by that."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

import runtime
from calibration.statistics import Statistics
from calibration.texts import Text, texts_sha256
from export.adopt import weight_bytes, write_foreign
from export.calibrated import Calibration, measured_tensors, text_digest, write_calibration
from export.checkpoint import Checkpoint
from export.conventions import TOKENIZER
from export.encoder import OPSET, build_encoder
from export.external_data import DataLayout, write
from export.foreign import ForeignGraph
from export.int8 import QuantizationPlan
from export.lock import Wait
from export.own_texts import missing_prompts
from export.plans import write_plan
from export.precision import Precision
from export.probe import probe
from export.quantize import plan_int8
from export.rescale import RescalePlan, plan_rescaling
from export.weights import absmax
from runtime.bundle import GraphRecord, record_file
from runtime.tokenizer import Instruction, TextTokenizer

# Of the bundled checkpoint's INT8 vectors of 1,010 texts 128 calibration texts leave one at a cosine of 0.974, and 512
# none below 0.999.
_FEW_TEXTS = 256

TWIN = "graphs/int8-uint8.onnx"


@dataclass(frozen=True)
class Step:
    """What `export_bundle` is doing, for a progress display: `total` bytes or texts."""

    label: str
    total: int


Progress = Callable[[Step, int], None]


def write_graphs(
    checkpoint: Checkpoint,
    root: Path,
    precisions: list[Precision],
    progress: Progress,
    texts: Sequence[Text],
    kept: Mapping[str, GraphRecord],
    int8_budget: float,
    tell: Callable[[str], None] = lambda line: None,
    wait: Wait = Wait(),
) -> list[GraphRecord]:
    """Return the graphs of all precisions: those of `kept`, whose files are under `root`, and the others written there.

    Probes the fp32 graph when one of those to be written is narrow, and tells what it calibrated on.
    """
    if not set(precisions) - {Precision.FP32} - set(kept):
        return [kept.get(p) or write_graph(checkpoint, root, p, progress) for p in precisions]
    fp32 = kept.get(Precision.FP32) or write_graph(checkpoint, root, Precision.FP32, progress)
    measured = measure(checkpoint, root, fp32, texts, progress, wait)
    tell(f"calibration: {measured.summary(checkpoint.contract.max_tokens)}")
    for prompt, count in missing_prompts(texts, checkpoint.contract.prompts).items():
        tell(f"notice: the checkpoint has no prompt {prompt!r}: {count} calibration texts were taken without one")
    if Precision.FP16 in precisions and len(texts) < _FEW_TEXTS:
        tell(
            f"notice: FP16 ranges from {len(texts)} texts leave out what those do not show, and others may overflow; "
            f"give {_FEW_TEXTS} or more, of all the kinds that will be embedded, and see what parity says of the graph"
        )
    if Precision.INT8 in precisions and len(texts) < _FEW_TEXTS:
        tell(
            f"notice: INT8 ranges from {len(texts)} texts leave out what those do not show, and single texts can come "
            f"out far off; give {_FEW_TEXTS} or more, of all the kinds that will be embedded"
        )
    hash_of_texts = texts_sha256(texts)
    calibration = write_calibration(
        root,
        Calibration(
            hash_of_texts,
            measured.statistics.tokens,
            [text_digest(text) for text in texts],
            measured_tensors(measured.statistics),
        ),
    )
    graphs = []
    for precision in precisions:
        if precision is Precision.FP32 or precision in kept:
            graphs.append(kept.get(precision, fp32))
            continue
        if precision is Precision.INT8:
            graph = write_int8_graphs(checkpoint, root, fp32, measured, int8_budget, progress)
        else:
            plan = rescale_plan(checkpoint, measured)
            graph = write_graph(checkpoint, root, precision, progress, plan)
            graph = replace(graph, rescaling=plan.lines, plan=write_plan(root, precision, plan))
        graphs.append(replace(graph, calibration_sha256=hash_of_texts, calibration=calibration))
    if Precision.FP32 not in precisions:
        for record in fp32.files:
            (root / record.file).unlink()
    return graphs


@dataclass(frozen=True)
class Measured:
    """Calibration texts as token ids, EOS included, and what the probe measured; how many texts had to be cut."""

    sequences: list[list[int]]
    statistics: Statistics
    truncated: int = 0

    def summary(self, max_tokens: int) -> str:
        """Say what was measured on, in one line."""
        cut = f"; {self.truncated} longer than {max_tokens} tokens and cut there" if self.truncated else ""
        return f"{len(self.sequences)} texts, {sum(map(len, self.sequences))} tokens{cut}"


def measure(
    checkpoint: Checkpoint,
    root: Path,
    fp32: GraphRecord,
    texts: Sequence[Text],
    progress: Progress,
    wait: Wait = Wait(),
) -> Measured:
    """Probe the fp32 graph on `texts`. Raises InputError, EngineError, OutputError."""
    contract = checkpoint.contract
    tokenizer = TextTokenizer(root / TOKENIZER, contract)
    rendered = [contract.prompts.get(text.prompt or "", "") + text.text for text in texts]
    items = tokenizer.encode(rendered, Instruction(prompt=""))
    sequences = [item.ids for item in items]
    statistics = probe(
        root / fp32.model.file,
        fp32.model.sha256 + fp32.data.sha256,
        checkpoint.config,
        sequences,
        progress=lambda label, done, total: progress(Step(label, total), done),
        wait=wait,
    )
    return Measured(sequences, statistics, sum(item.truncated for item in items))


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
    return replace(
        graph,
        rescaling=quantization.rescale.lines,
        quantization=quantization.record,
        plan=write_plan(root, Precision.INT8, quantization.rescale),
    )


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
