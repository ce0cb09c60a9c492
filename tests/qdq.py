"""Explicit Q/DQ in TensorRT's style, put into a float16 graph: for tests of what builders take, not for use.

One scale for all activations, so the vectors mean nothing; the form is that of a real INT8 graph:

    x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- int8 constant [in, out]
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes
from numpy.typing import NDArray

ACTIVATION_SCALE = 0.05


class Form(Enum):
    """Where activations are quantized; the result of DequantizeLinear is float16 in all."""

    FLOAT16 = "all float16"
    FLOAT32_NORMS = "float32 from the norms, float16 elsewhere"
    FLOAT32_ATTENTION = "float32 from norms and attention"


def quantize(source: Path, target: Path, form: Form, *, skip: str = "-", weights_only: str = "-") -> int:
    """Write the graph with every MatMul quantized; returns how many are.

    Those with `skip` in their name stay as they are, those with `weights_only` get int8 matrices alone.
    """
    model = ir.load(source)
    graph = model.graph
    activations: dict[str, ir.Value] = {}
    count = 0
    for node in list(graph):
        if node.op_type != "MatMul" or skip in str(node.name):
            continue
        x, matrix = node.inputs
        assert x is not None
        assert matrix is not None
        assert matrix.const_value is not None
        numbers = matrix.const_value.numpy()
        node.replace_input_with(1, _matrix(graph, node, numbers))
        if weights_only in str(node.name):
            continue
        if x.name not in activations:
            activations[str(x.name)] = _activation(graph, node, x, form)
        node.replace_input_with(0, activations[str(x.name)])
        count += 1
    passes.RemoveUnusedNodesPass()(model)
    used = {value.name for node in graph for value in node.inputs if value is not None}
    for name in set(graph.initializers) - used:
        del graph.initializers[name]
    ir.save(model, target, external_data=f"{target.name}.data")
    return count


def _activation(graph: ir.Graph, node: ir.Node, x: ir.Value, form: Form) -> ir.Value:
    cast = x.producer()
    is_norm = cast is not None and cast.op_type == "Cast" and "layernorm" in str(cast.name)
    is_attention = cast is not None and cast.op_type == "Cast" and not is_norm
    wide = (is_norm and form is not Form.FLOAT16) or (is_attention and form is Form.FLOAT32_ATTENTION)
    if wide:
        assert cast is not None
        assert cast.inputs[0] is not None
        x = cast.inputs[0]
    scale = _constant(graph, f"{node.name}.q_scale", np.array(ACTIVATION_SCALE, np.float32 if wide else np.float16))
    zero = _constant(graph, f"{node.name}.zero", np.array(0, np.int8))
    narrow = _constant(graph, f"{node.name}.dq_scale", np.array(ACTIVATION_SCALE, np.float16))
    quantized = _node(graph, node, "QuantizeLinear", f"{node.name}.q", [x, scale, zero])
    return _node(graph, node, "DequantizeLinear", f"{node.name}.dq", [quantized, narrow, zero])


def _matrix(graph: ir.Graph, node: ir.Node, matrix: NDArray[np.float16]) -> ir.Value:
    wide = matrix.astype(np.float32)
    scales = np.maximum(np.abs(wide).max(axis=0) / 127, 2.0**-14).astype(np.float16)
    numbers = np.clip(np.rint(wide / scales.astype(np.float32)), -127, 127).astype(np.int8)
    parts = [
        _constant(graph, f"{node.name}.int8", numbers),
        _constant(graph, f"{node.name}.scales", scales),
        _constant(graph, f"{node.name}.zeros", np.zeros(scales.shape, np.int8)),
    ]
    return _node(graph, node, "DequantizeLinear", f"{node.name}.weight", parts, axis=1)


def _node(
    graph: ir.Graph, before: ir.Node, kind: str, name: str, inputs: list[ir.Value], **attributes: int
) -> ir.Value:
    node = ir.node(kind, inputs, attributes=attributes, name=name)
    node.outputs[0].name = f"{name}.out"
    graph.insert_before(before, node)
    return node.outputs[0]


def _constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
