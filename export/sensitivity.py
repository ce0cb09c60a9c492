"""Which groups of matrix products INT8 hurts most, measured: one group at a time is rounded inside its fp32 layer.

Runs the fp32 graph layer by layer over a few short calibration texts, like the probe: once as it is, and once for
each group with that group's input and weights on their INT8 grids. What comes out of the layer then differs by the
group's *impact*: the squared length of the difference over that of the residual stream, averaged over tokens. Errors of
different groups are nearly independent, so impacts add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.config import EncoderConfig
from export.int8 import Grid, ReadMatrix, round_rows
from export.probe import Streams, explain_library_errors, layer_part, open_part
from runtime.errors import EngineError

Progress = Callable[[str, int, int], None]

TEXT_TOKENS = 256
TOTAL_TOKENS = 4096
# A group is worth its exclusion when it makes this many times its share of the work in error.
WORTH = 1.5
# A row of the residual stream counts at least as if it had this part of the usual squared length: what is done to a
# row of zeros would otherwise be divided by nothing. Small, so that only such rows are touched, and of the median,
# since the first tokens of large models are a thousand times longer than all others.
_LEAST_PART = 1e-6
_NOTHING = 1e-30


def choose_texts(sequences: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Return short texts spread over the set, at most TOTAL_TOKENS tokens together, and at least one text."""
    short = [s for s in sequences if len(s) <= TEXT_TOKENS] or [min(sequences, key=len)]
    step = max(1, -(-sum(map(len, short)) // TOTAL_TOKENS))
    return short[::step]


def impacts(
    graph: Path,
    config: EncoderConfig,
    grids: Sequence[Grid],
    sequences: Sequence[Sequence[int]],
    read: ReadMatrix,
    progress: Progress = lambda label, done, total: None,
) -> dict[str, float]:
    """Return the impact of each grid's group, by the name of its input.

    `graph` is the fp32 graph, `read(name)` gives a weight, float32 [out, in]. Raises EngineError when it does not run,
    or when what comes out is not finite.
    """
    found: dict[str, float] = {}
    ids = [np.array([s], np.int64) for s in sequences]
    streams = _run(graph, layer_part(graph, [], ["embed_tokens"]), "", ids, [])
    for index in range(config.layers):
        start = "embed_tokens.out" if index == 0 else f"layers.{index - 1}.mlp.residual.out"
        end = f"layers.{index}.mlp.residual"
        progress("INT8: sensitivity", index, config.layers)
        following = _run(graph, layer_part(graph, [start], [end]), start, ids, streams)
        for grid in grids:
            if not grid.group.input.startswith(f"layers.{index}."):
                continue
            part = layer_part(graph, [start], [end])
            round_group(part, grid, read)
            rounded = _run(graph, part, start, ids, streams)
            found[grid.group.input] = _finite(_impact(following, rounded), grid.group.input)
        streams = following
    progress("INT8: sensitivity", config.layers, config.layers)
    return found


def exclusions(impact: dict[str, float], work: dict[str, float], budget: float) -> list[str]:
    """Return the groups to leave out of INT8, the most harmful per multiplication first.

    `budget` is the part of all work that has to stay INT8. Left out is what makes WORTH times as much error as work;
    groups that do not fit into what the budget leaves are passed over.
    """
    total_impact, total_work = sum(impact.values()), sum(work.values())
    room = (1 - budget) * total_work
    chosen = []
    for name in sorted(impact, key=lambda n: impact[n] / work[n], reverse=True):
        if impact[name] == 0 or impact[name] * total_work < WORTH * work[name] * total_impact:
            break
        if work[name] <= room:
            room -= work[name]
            chosen.append(name)
    return chosen


def round_group(part: ir.Graph, grid: Grid, read: ReadMatrix) -> None:
    """Put the group's input and weights of a part of the fp32 graph on their INT8 grids, smoothed and smoothed back."""
    assert grid.scale is not None
    number = _Constants(part, grid.group.input)
    inverse, factors = number("inverse", 1 / grid.factors), number("factors", grid.factors)
    scale, zero = number("scale", np.float32(grid.scale)), number("zero", np.int8(0))
    rounded: dict[str, ir.Value] = {}
    for node in [n for n in part if n.name in grid.group.matrices]:
        x = node.inputs[0]
        assert x is not None
        if str(x.name) not in rounded:
            tape = ir.tape.Tape()
            smooth = tape.op("Mul", [x, inverse])
            grid_point = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [smooth, scale, zero]), scale])
            rounded[str(x.name)] = tape.op("Mul", [grid_point, factors])
            part.insert_before(node, tape.nodes)
        matrix = round_rows(read(f"{node.name}.weight"), grid.factors) / grid.factors
        old = node.inputs[1]
        node.replace_input_with(0, rounded[str(x.name)])
        node.replace_input_with(1, number(str(node.name), np.ascontiguousarray(matrix.T)))
        if old is not None:
            part.initializers.pop(str(old.name), None)


class _Constants:
    """Initializers of one part, named after a group."""

    def __init__(self, part: ir.Graph, prefix: str) -> None:
        self._part = part
        self._prefix = prefix

    def __call__(self, name: str, array: NDArray[np.generic] | np.generic) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=f"{self._prefix}.int8.{name}")
        value = ir.Value(
            name=tensor.name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._part.register_initializer(value)
        return value


def _run(graph: Path, part: ir.Graph, start: str, ids: Sequence[NDArray[np.int64]], streams: Streams) -> Streams:
    ends = ", ".join(str(value.name) for value in part.outputs)
    with explain_library_errors(f"opening the graph's part up to {ends} for INT8's sensitivity"):
        session = open_part(graph, part)
    wanted = {value.name for value in session.get_inputs()}
    outputs: Streams = []
    for row, text in enumerate(ids):
        feeds: dict[str, NDArray[np.generic]] = {"input_ids": text, "attention_mask": np.ones_like(text)}
        if start:
            feeds[start] = streams[row]
        with explain_library_errors(f"in INT8's sensitivity on {ends}, text {row} of {text.shape[1]} tokens"):
            outputs.append(session.run(None, {k: v for k, v in feeds.items() if k in wanted})[0])
    return outputs


def _impact(true: Streams, found: Streams) -> float:
    rows = np.concatenate([t[0] for t in true]).astype(np.float64)
    difference = np.concatenate([f[0] for f in found]) - rows
    lengths = (rows * rows).sum(axis=1)
    least = max(_LEAST_PART * float(np.median(lengths)), _NOTHING)
    return float(((difference * difference).sum(axis=1) / np.maximum(lengths, least)).mean())


def _finite(impact: float, name: str) -> float:
    """Return an impact, which is compared and kept: one that is not finite would leave out nothing, or everything."""
    if not math.isfinite(impact):
        raise EngineError(
            f"rounding {name} to INT8 changes its layer's output by {impact}: that is no finite number.",
            cure="Look for values that are not finite in the checkpoint; without any, report it.",
        )
    return impact
