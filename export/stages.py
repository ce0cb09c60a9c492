"""Every step from PyTorch to an engine's graph, one after the other: which step and which layer the error enters at.

    PyTorch -> fp32 graph -> weights rescaled (FP16) or smoothed (INT8), still float32 -> narrow graph

Run on CPU on the golden texts, every narrow result rounded as a GPU does (`export.float16`): what overflows in float16
shows here, before a GPU has seen the graph. An engine's own verdict comes from running the engine on all texts; a stage
explains it, and says what to expect of engines that cannot run here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from export.checkpoint import Checkpoint
from export.layers import States, graph_states, layer_names, shifted_states
from export.plans import read_plan
from export.precision import Precision
from export.reference import ReferenceVectors, unit
from export.report.data import LayerError, Stage
from export.samples import Progress
from runtime.bundle import Bundle, GraphRecord
from runtime.errors import F2rtError
from runtime.golden import Golden, row_cosines
from runtime.policy import Policy
from runtime.tolerances import Tolerance

FOREIGN = "not f2rt's own graph: its layers have no names"
NO_PLAN = "the bundle does not keep what its weights were multiplied with: export again"
TWIN_FORM = ", uint8 form"
NOTHING_SHIFTED = "nothing had to be rescaled: its weights are those of the fp32 graph"


def follow(
    bundle: Bundle, reference: ReferenceVectors, golden: Golden, policy: Policy, progress: Progress
) -> list[Stage]:
    """Run every stage of a bundle on the golden texts. What cannot be run here says why."""
    checkpoint = Checkpoint.open(reference.location)
    config = checkpoint.config
    expected: list[States] = []
    steps = [step for graph in bundle.manifest.graphs for step in _steps(bundle, graph, checkpoint)]
    stages = []
    for done, (name, precision, states) in enumerate(steps):
        progress("stages", done, len(steps))
        if isinstance(states, str):
            shifted = states == NOTHING_SHIFTED
            stages.append(Stage(name, precision, "pass" if shifted else "not_executed", reason=states))
            continue
        if not expected:
            expected = [np.stack([reference.layer_states(ids) for ids in golden.ids])]
        try:
            found = states(golden.ids)
        except F2rtError as error:
            stages.append(Stage(name, precision, "not_executed", reason=f"not executed: {error.message}"))
            continue
        # A step that only multiplies must come out as the fp32 graph does.
        limits = policy.tolerance(precision if name.endswith("graph") or "form" in name else Precision.FP32)
        stages.append(stage(name, precision, found, expected[0], layer_names(config.layers), limits))
    progress("stages", len(steps), len(steps))
    return stages


_States = Callable[[Sequence[Sequence[int]]], States]


def _steps(bundle: Bundle, graph: GraphRecord, checkpoint: Checkpoint) -> list[tuple[str, str, _States | str]]:
    """Return name, precision and the way to run each stage of one graph, or why it is not run."""
    precision, config = graph.precision, checkpoint.config
    if graph.origin is not None:
        return [(f"{precision} graph", precision, FOREIGN)]

    def run(path: Path) -> _States:
        return lambda ids: graph_states(path, config.layers, ids)

    steps: list[tuple[str, str, _States | str]] = []
    if precision != Precision.FP32:
        plan = read_plan(bundle, graph)
        verb = "smoothed" if graph.quantization else "rescaled"
        how: _States | str
        if plan is None:
            how = NO_PLAN
        elif not plan.shifts:
            how = NOTHING_SHIFTED
        else:
            known = plan
            how = lambda ids: shifted_states(config, checkpoint.weights, known, ids)  # noqa: E731
        steps.append((f"{verb} for {precision}, in float32", precision, how))
    steps.append((f"{precision} graph", precision, run(bundle.path(graph.model.file))))
    if graph.twin is not None:
        steps.append((f"{precision} graph{TWIN_FORM}", precision, run(bundle.path(graph.twin.file))))
    return steps


def stage(
    name: str, precision: str, found: States, expected: States, layers: Sequence[str], limits: Tolerance
) -> Stage:
    """Compare the pooled token's states [texts, layers + 1, dim] with PyTorch's, layer by layer.

    The cosine is that of the vectors the last states give.
    """
    wide, true = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        relative = np.linalg.norm(wide - true, axis=2) / np.maximum(np.linalg.norm(true, axis=2), 1e-30)
    relative = np.where(np.isfinite(relative), relative, np.inf)
    errors = [
        LayerError(layer, _rounded(_rms(column)), _rounded(column.max()))
        for layer, column in zip(layers, relative.T, strict=True)
    ]
    finite = np.isfinite(wide[:, -1]).all(axis=1) & (np.abs(wide[:, -1]).max(axis=1) > 0)
    vectors = [unit(row) if ok else row for row, ok in zip(found[:, -1], finite, strict=True)]
    cosines = row_cosines(np.stack(vectors), np.stack([unit(row) for row in expected[:, -1]]))
    kept = cosines.min() >= limits.min_cosine and cosines.mean() >= limits.mean_cosine
    return Stage(
        name,
        precision,
        "pass" if kept else "fail",
        texts=len(found),
        cosine_min=float(cosines.min()),
        cosine_mean=float(cosines.mean()),
        layers=errors,
        guilty=guilty(errors),
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _rms(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
    return float(np.sqrt(np.mean(values**2))) if np.isfinite(values).all() else float("inf")


def guilty(errors: Sequence[LayerError]) -> str:
    """Name the layer where the error grows most, by how much, and its part of all growth."""
    values = [0.0, *(e.size for e in errors)]
    broken = next((e.layer for e in errors if e.rms is None), None)
    if broken is not None:
        return f"{broken}: the first with values that are not finite"
    growth = [max(after - before, 0.0) for before, after in itertools.pairwise(values)]
    total = sum(growth)
    if total == 0:
        return ""
    worst = int(np.argmax(growth))
    return (
        f"{errors[worst].layer}: the error grows from {values[worst]:.1e} to {values[worst + 1]:.1e} there, "
        f"{growth[worst] / total:.0%} of all growth"
    )
