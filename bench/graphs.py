"""Our graph beside those that other tools export of the same checkpoint, after pooling was fused into them.

For each: nodes by operator, latency in ONNX Runtime on CPU (turns taken within each repetition), and what TensorRT-RTX
says of it. The others are what a user gets by default: `torch.onnx.export` on the stock model, the older exporter that
Optimum uses, and with --from-onnx a file of your own, for example Optimum's (`make optimum-check` makes one).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from bench.compiler_says import Saying, ask
from bench.latency import OURS, Run, Shape, compare, say
from bench.report import Result, median
from bench.stock_export import export_stock
from calibration.texts import calibration_texts
from export.checkpoint import Checkpoint
from export.foreign import open_foreign
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.synth import SIZES, write_checkpoint
from runtime.batch import make_batch
from runtime.bundle import Bundle
from runtime.cores import usable_cores
from runtime.errors import InputError
from runtime.loader import open_raw_engine
from runtime.settings import EngineSettings

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 16), (1, 128), (8, 64)]
MINI = "mini"
TORCH, TORCH_OLD, TORCH_HALF, OWN_HALF = "torch fp32", "torch fp32, old exporter", "torch fp16", "f2rt fp16"
TARGET = "sm89"
MIN_COSINE = 0.9999
_CALIBRATION_TEXTS = 8  # shapes the fp16 graph that is only compiled here


@dataclass(frozen=True)
class Graph:
    """One contestant: its nodes by operator, and what the compiler says of it."""

    name: str
    nodes: dict[str, int]
    saying: Saying

    @property
    def node_count(self) -> int:
        """All nodes but constants, which cost nothing when it runs."""
        return sum(count for kind, count in self.nodes.items() if kind != "Constant")


def measure(size: str, work: Path, seconds: float, given: Path | None = None) -> Result:
    """Measure `size`, the bundled checkpoint or a synthetic one; `seconds` bounds the timed part.

    `given` is a graph of the same checkpoint that is measured besides. Raises InputError for an unknown size, or what
    taking in the graph raises.
    """
    if size not in (MINI, *SIZES):
        raise InputError(f"there is no size {size!r}.", cure=f"Choose one of {MINI}, {', '.join(SIZES)}.")
    folder = ROOT / "checkpoints" / MINI
    if size != MINI:
        folder = work / f"checkpoint-{size}"
        say(f"{size}: synthesizing")
        write_checkpoint(size, folder)
    checkpoint = Checkpoint.open(locate(str(folder)))
    bundles = _bundles(checkpoint, work, given)
    shapes = _latency(checkpoint, bundles, seconds)
    graphs = []
    for name, (bundle, precision) in bundles.items():
        say(f"{name}: asking TensorRT-RTX")
        path = bundle.path(bundle.graph(precision).model.file)
        nodes = Counter(node.op_type for node in ir.load(path).graph.all_nodes())
        graphs.append(Graph(name, dict(nodes.most_common()), ask(path, TARGET)))
    return _result(size, seconds, given, graphs, shapes)


def _bundles(checkpoint: Checkpoint, work: Path, given: Path | None) -> dict[str, tuple[Bundle, Precision]]:
    """Export all contestants."""
    say(f"{OURS}: exporting")
    texts = [t for t in calibration_texts() if len(t.text) < 200][:_CALIBRATION_TEXTS]
    own = export_bundle(checkpoint, work / "own", [Precision.FP32, Precision.FP16], calibration=texts)
    sources = {TORCH: "dynamic", TORCH_OLD: "legacy", TORCH_HALF: "half"}
    bundles = {OURS: (own, Precision.FP32)}
    for name, kind in sources.items():
        say(f"{name}: exporting")
        folder = export_stock(checkpoint.folder, work / kind, kind)
        bundles[name] = _taken_in(checkpoint, folder, work / f"bundle-{kind}")
    if given is not None:
        bundles[f"given: {given.name}"] = _taken_in(checkpoint, given, work / "bundle-given")
    return bundles | {OWN_HALF: (own, Precision.FP16)}


def _taken_in(checkpoint: Checkpoint, source: Path, target: Path) -> tuple[Bundle, Precision]:
    foreign = open_foreign(source, checkpoint.config)
    return export_bundle(checkpoint, target, [foreign.precision], foreign=foreign), foreign.precision


def _latency(checkpoint: Checkpoint, bundles: dict[str, tuple[Bundle, Precision]], seconds: float) -> list[Shape]:
    """Time the fp32 graphs: float16 is no faster on a CPU without it, and says nothing about the graph."""
    engines = {
        name: open_raw_engine(b, b.engine(f"onnxruntime:{p}"), EngineSettings(threads=usable_cores()))
        for name, (b, p) in bundles.items()
        if p is Precision.FP32
    }
    contestants: dict[str, Run] = {name: engine.run for name, engine in engines.items()}
    rng = np.random.default_rng(0)
    shapes = []
    try:
        for rows, tokens in SHAPES:
            ids = rng.integers(0, checkpoint.config.vocab_size, (rows, tokens)).tolist()
            batch = make_batch(ids, checkpoint.contract.pad_id)
            shapes.append(compare(contestants, batch, seconds / len(SHAPES), truth=TORCH))
    finally:
        for engine in engines.values():
            engine.close()
    return shapes


def _result(size: str, seconds: float, given: Path | None, graphs: list[Graph], shapes: list[Shape]) -> Result:
    agree = all(cosine >= MIN_COSINE for s in shapes for cosine in s.min_cosine.values())
    rows = []
    for graph in graphs:
        cells = [_cell(shape, graph.name) for shape in shapes]
        rows.append([graph.name, str(graph.node_count), *cells, graph.saying.short])
    version = next((g.saying.version for g in graphs if g.saying.version), "?")
    return Result(
        name="graphs",
        title=f"Graphs of {size}: nodes, {usable_cores()} CPU threads, TensorRT-RTX {version} for {TARGET}",
        command=f"python -m bench graphs --size {size} --seconds {seconds:g}"
        + (" --from-onnx FOLDER" if given is not None else ""),
        columns=["graph", "nodes", *(f"{r} x {t}, median ms" for r, t in SHAPES), "TensorRT-RTX"],
        rows=rows,
        notes=[
            "nodes without constants; in brackets the time over f2rt fp32's, by medians and by minima: above 1, f2rt "
            "is faster; where other work ran meanwhile, trust the minima",
            "the others after f2rt fused pooling and normalization into them; the same random token ids, turns taken",
            "what only compiles is not executed here, and says nothing about its numbers",
            *(f"{g.name}: {_most(g.nodes)}, …" for g in graphs),
            *(f"{g.name}: TensorRT-RTX: {m}" for g in graphs for m in g.saying.messages),
            f"all fp32 graphs agree with {TORCH} (cosine at least {MIN_COSINE}): {'yes' if agree else 'NO'}",
        ],
        data={
            "size": size,
            "threads": usable_cores(),
            "agree": agree,
            "graphs": [{"name": g.name, "nodes": g.nodes, "tensorrt_rtx": asdict(g.saying)} for g in graphs],
            "shapes": [
                {
                    "rows": s.rows,
                    "tokens": s.tokens,
                    "median_ms": {n: median(t) for n, t in s.times_ms.items()},
                    "min_ms": {n: min(t) for n, t in s.times_ms.items()},
                    "ratio_to_f2rt": {n: s.ratio(n) for n in s.times_ms},
                    "ratio_of_minima": {n: s.ratio_of_minima(n) for n in s.times_ms},
                    "min_cosine": s.min_cosine,
                    "repetitions": len(s.times_ms[OURS]),
                }
                for s in shapes
            ],
        },
    )


def _cell(shape: Shape, name: str) -> str:
    times = shape.times_ms.get(name)
    if times is None:
        return ""
    return f"{median(times):.2f} ({shape.ratio(name):.2f}, {shape.ratio_of_minima(name):.2f})"


def _most(nodes: dict[str, int]) -> str:
    """Name the operators a graph has most of; constants are no work."""
    kinds = [f"{count} {kind}" for kind, count in nodes.items() if kind != "Constant"]
    return ", ".join(kinds[:8])
