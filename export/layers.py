"""The state of the pooled token after every layer, as a graph computes it: where its error enters.

Goes through a graph's own nodes, cut between layers as the probe does, so it needs the memory of one layer. Each text
runs alone, unpadded. Narrow types are rounded as on a GPU, see `export.float16`: what overflows there does so here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import runtime
from export.config import EncoderConfig
from export.encoder import build_encoder
from export.external_data import DataLayout, read_entry
from export.float16 import round_every_result
from export.probe import layer_part, open_part
from export.rescale import RescalePlan
from export.weights import Weights
from runtime.errors import EngineError, OutOfMemoryError, first_line, is_out_of_memory

States = NDArray[np.float32]
Fill = Callable[[ir.Graph], None]
_FINAL = "norm"


def layer_names(layers: int) -> list[str]:
    """Return the names of the states: the embedding, each layer but the last, and the last with the final norm."""
    return ["embedding", *(f"layer {i}" for i in range(layers - 1)), f"layer {layers - 1} and norm"]


def graph_states(graph: Path, layers: int, sequences: Sequence[Sequence[int]]) -> States:
    """Return the pooled token's states from a graph of f2rt's, float32 [texts, layers + 1, dim].

    Raises EngineError when ONNX Runtime cannot run it, OutOfMemoryError.
    """
    try:
        model = ir.load(graph)
    except Exception as error:  # protobuf's errors share no base class with anything
        raise EngineError(f"{graph} cannot be read: {first_line(error)}", cure="Export it again.") from error
    return _states(model, graph, layers, sequences, lambda part: None)


def shifted_states(
    config: EncoderConfig, weights: Weights, plan: RescalePlan, sequences: Sequence[Sequence[int]]
) -> States:
    """Return the states of the fp32 graph whose weights were multiplied as `plan` says, nothing rounded.

    The same shape and errors as `graph_states`; CheckpointError for weights that cannot be read. The weights of one
    layer at a time are multiplied in memory; nothing is written.
    """
    layout = DataLayout("computed")
    model = build_encoder(config, layout, producer_version=runtime.__version__, plan=plan)
    entries = {entry.name: entry for entry in layout.entries}

    def fill(part: ir.Graph) -> None:
        for name, value in part.initializers.items():
            if name in entries:
                value.const_value = ir.tensor(read_entry(entries[name], weights), name=name)

    return _states(model, Path(), config.layers, sequences, fill)


def _states(model: ir.Model, graph: Path, layers: int, sequences: Sequence[Sequence[int]], fill: Fill) -> States:
    # What a layer starts from is called by what made it, and in narrow graphs that differs for the first.
    norms = {str(node.name): node for node in model.graph if node.op_type == "RMSNormalization"}
    starts = [str(_source(norms[f"layers.{i}.input_layernorm"]).name) for i in range(layers)]
    ends = [name.removesuffix(".out") for name in starts] + [_FINAL]
    streams: list[NDArray[np.float32]] = []
    taken = []
    for index, end in enumerate(ends):
        start = starts[index - 1] if index else None
        part = layer_part(model, [start] if start else [], [end])
        fill(part)
        try:
            round_every_result(part)
            session = open_part(graph, part)
            wanted = {value.name for value in session.get_inputs()}
            following = []
            for row, ids in enumerate(sequences):
                tokens = np.array([list(ids)], np.int64)
                feeds: dict[str, NDArray[np.generic]] = {
                    "input_ids": tokens,
                    "attention_mask": np.ones_like(tokens),
                    **({start: streams[row]} if start else {}),
                }
                (stream,) = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
                following.append(stream)
        except Exception as error:  # the library's exceptions share no base class
            kind = OutOfMemoryError if is_out_of_memory(error) else EngineError
            raise kind(f"{first_line(error)}", cure="") from error
        streams = following
        taken.append(np.stack([stream[0, -1] for stream in streams]))
    return np.stack(taken, axis=1)


def _source(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
