"""Graphs in float16 as a GPU computes them, for tests: see `export.float16`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from export.checkpoint import Checkpoint
from export.encoder import build_encoder
from export.external_data import DataLayout, write
from export.float16 import round_every_result
from export.precision import Precision
from runtime.engines.onnxruntime import session_options


def rounded_vectors(graph: Path, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Return a graph's vectors float32 [texts, dim], every narrow result rounded; each text alone, unpadded."""
    model = ir.load(graph)
    round_every_result(model.graph)
    options = session_options()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    proto = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    vectors = []
    for ids in sequences:
        tokens = np.array([list(ids)], np.int64)
        (found,) = session.run(None, {"input_ids": tokens, "attention_mask": np.ones_like(tokens)})
        vectors.append(found[0].astype(np.float32))
    return np.stack(vectors)


def cast_plainly(graph: Path, folder: Path) -> Path:
    """Write an fp32 graph with every float tensor and result in float16, as converters do that look at types alone."""
    model = ir.load(graph)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        if tensor.dtype == ir.DataType.FLOAT:
            with np.errstate(over="ignore"):
                value.const_value = ir.tensor(tensor.numpy().astype(np.float16), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT16)
    for node in model.graph:
        for output in node.outputs:
            output.type = None
    (output,) = model.graph.outputs
    output.type = ir.TensorType(ir.DataType.FLOAT16)
    ir.save(model, folder / "plain.onnx")
    return folder / "plain.onnx"


def cast_without_rescaling(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write f2rt's own float16 graph, wide where it must be, with the weights as they are."""
    layout = DataLayout("narrow.data")
    model = build_encoder(checkpoint.config, layout, producer_version="test", precision=Precision.FP16)
    write(layout, checkpoint.weights, folder / "narrow.data", lambda count: None)
    ir.save(model, folder / "narrow.onnx")
    return folder / "narrow.onnx"
