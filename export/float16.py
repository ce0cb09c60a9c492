"""Narrow arithmetic as a GPU does it, on a CPU: each node computes in float32, and its result is rounded at once.

ONNX Runtime has no float16 products on CPU. It widens what it has no kernel for and leaves out the roundings between
two such nodes, so that a value beyond 65504 passes in float32 and nobody learns of it: a graph that gives NaN on a GPU
gives good vectors on a CPU. Here the roundings are nodes of their own, which it keeps: beyond the range a value becomes
infinite, as on the device. bfloat16, which ONNX Runtime cannot compute on CPU at all, runs the same way.

What a compiler fuses, it may keep wider than the graph says. Inside one node all is float32 here, as are the sums of
products in TensorRT; attention's probabilities, which its narrow kernel rounds, are not rounded.
"""

from __future__ import annotations

import onnx_ir as ir

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# These move values and compute none.
_MOVERS = frozenset(
    ("Concat", "Expand", "Gather", "GatherND", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
)
_INDICES = {"Shape": ir.DataType.INT64, "Size": ir.DataType.INT64, "NonZero": ir.DataType.INT64}


def round_every_result(graph: ir.Graph) -> None:
    """Rewrite a graph in place: narrow nodes compute in float32, and a Cast rounds what they give.

    Types are followed from initializers, typed inputs and casts, by rules that hold for the operators f2rt writes.
    Names of values stay.
    """
    types: dict[ir.Value, ir.DataType | None] = {value: value.dtype for value in graph.initializers.values()}
    types |= {value: value.dtype for value in graph.inputs}
    widened: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        found = _result_type(node, types)
        types |= dict.fromkeys(node.outputs, found)
        narrow_inputs = [i for i, v in enumerate(node.inputs) if v is not None and types.get(v) in NARROW]
        if node.op_type == "Cast" or node.op_type in _MOVERS or not (narrow_inputs or found in NARROW):
            continue
        for index in narrow_inputs:
            value = node.inputs[index]
            assert value is not None
            if value not in widened:
                widened[value] = _cast(graph, node, value, ir.DataType.FLOAT, f"{value.name}.widened")
            node.replace_input_with(index, widened[value])
        if found in NARROW:
            _round(graph, node, found, types)


def _result_type(node: ir.Node, types: dict[ir.Value, ir.DataType | None]) -> ir.DataType | None:
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    if node.op_type in _INDICES:
        return _INDICES[node.op_type]
    # The type of what is dequantized is its scale's, that of what is quantized its zero point's.
    place = {"DequantizeLinear": 1, "QuantizeLinear": 2, "Where": 1}.get(node.op_type, 0)
    source = node.inputs[place] if place < len(node.inputs) else None
    return types.get(source) if source is not None else None


def _round(graph: ir.Graph, node: ir.Node, to: ir.DataType, types: dict[ir.Value, ir.DataType | None]) -> None:
    """Let the node give `NAME.unrounded`, and a Cast after it what it gave before, under the same name."""
    (old,) = node.outputs
    name = old.name
    uses = list(old.uses())
    rounding = ir.node("Cast", [old], {"to": to}, name=f"{node.name}.round")
    (rounded,) = rounding.outputs
    graph.insert_after(node, rounding)
    for user, index in uses:
        user.replace_input_with(index, rounded)
    for place, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[place] = rounded
    old.name, rounded.name = f"{name}.unrounded", name
    old.type, rounded.type = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(to)
    types[old], types[rounded] = ir.DataType.FLOAT, to


def _cast(graph: ir.Graph, before: ir.Node, value: ir.Value, to: ir.DataType, name: str) -> ir.Value:
    node = ir.node("Cast", [value], {"to": to}, name=name)
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(to)
    graph.insert_before(before, node)
    return node.outputs[0]
