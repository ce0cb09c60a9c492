"""Makes a foreign graph the bundle's: last-token pooling and normalization fused in, one contract outside.

Before: ids, perhaps a mask, positions and a past, to hidden states. After: `input_ids` and `attention_mask` int64
[batch, sequence], right-padded, to `sentence_embedding` float32 [batch, dim], unit length. Positions and an empty past
are made inside. The encoder's own nodes and weights stay as they are; weights are streamed, never held.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes import common

from export.config import EncoderConfig
from export.encoder import OUTPUT
from export.external_data import ALIGNMENT_BYTES
from export.foreign import ATTENTION_MASK, INPUT_IDS, OWN_GRAPH, POSITION_IDS, ForeignGraph
from runtime.batch import Batch, make_batch
from runtime.bundle import GraphRecord, Origin, record_file
from runtime.cores import usable_cores
from runtime.errors import InputError
from runtime.golden import row_cosines

_KEPT_INSIDE_BYTES = 1024  # smaller tensors stay in the model file
_CHUNK_BYTES = 4 << 20
_PREFIX = "f2rt."
_SAME = 0.99  # what rounding leaves between two ways of running one text; a pad that is seen leaves far less
_TRIAL_LENGTHS = (5, 9, 1)  # tokens; one, too, since some exports take it for a special case

Advance = Callable[[int], None]


def write_foreign(
    foreign: ForeignGraph, config: EncoderConfig, pad_id: int, root: Path, advance: Advance
) -> GraphRecord:
    """Fuse the graph, write graphs/<precision>.onnx and its data under `root`, and run it once.

    `advance` is told the bytes of weights done. The foreign graph is used up. Raises InputError when the result is no
    valid model or does not keep the contract, OSError when it cannot be written.
    """
    producer, precision = foreign.producer, foreign.precision
    generated = [n for n in (str(v.name) for v in foreign.model.graph.inputs) if n not in (INPUT_IDS, ATTENTION_MASK)]
    files = [record_file(foreign.path.parent, p.relative_to(foreign.path.parent).as_posix()) for p in _files(foreign)]
    origin = Origin(str(foreign.source), producer, files, str(foreign.hidden.name), list(foreign.dropped), generated)
    fuse(foreign, config)
    model_file, data_file = f"graphs/{precision}.onnx", f"graphs/{precision}.onnx.data"
    (root / "graphs").mkdir(exist_ok=True)
    data_sha256 = _write_data(foreign, root / data_file, advance)
    ir.save(foreign.model, root / model_file)
    _check(foreign.path, root / model_file, config, pad_id)
    return GraphRecord(
        precision,
        record_file(root, model_file),
        record_file(root, data_file, sha256=data_sha256),
        foreign.model.opset_imports[""],
        origin=origin,
    )


def weight_bytes(foreign: ForeignGraph) -> int:
    """Return about how many bytes of weights there are to write."""
    values = foreign.model.graph.initializers.values()
    return sum(v.const_value.nbytes for v in values if v.const_value is not None)


def _files(foreign: ForeignGraph) -> list[Path]:
    return [foreign.path, *foreign.data]


def fuse(foreign: ForeignGraph, config: EncoderConfig) -> None:
    """Change the foreign model in place: inputs and output as in the bundle's contract. Reads no weight."""
    graph, hidden = foreign.model.graph, foreign.hidden
    graph.name = graph.name or "encoder"  # a graph has to have one
    _rename_outputs(graph)
    _Fusion(graph, config).run(hidden, foreign.past)
    common.RemoveUnusedNodesPass()(foreign.model)
    common.RemoveUnusedOpsetsPass()(foreign.model)
    # Stack traces and notes of the machine that exported it.
    common.ClearMetadataAndDocStringPass()(foreign.model)


def _rename_outputs(graph: ir.Graph) -> None:
    """Free the names of the contract: an output that is dropped may be called like ours and still be used inside."""
    taken = {OUTPUT, ATTENTION_MASK} - {str(v.name) for v in graph.inputs}
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in taken:
                value.name = f"{_PREFIX}foreign.{value.name}"


class _Fusion:
    """Nodes under construction: those before the encoder and those after it."""

    def __init__(self, graph: ir.Graph, config: EncoderConfig) -> None:
        self.graph = graph
        self.config = config
        self.nodes: list[ir.Node] = []

    def run(self, hidden: ir.Value, past: tuple[ir.Value, ...]) -> None:
        inputs = {str(v.name): v for v in self.graph.inputs}
        first = next(iter(self.graph))
        ids = self._input(inputs, INPUT_IDS)
        mask = self._input(inputs, ATTENTION_MASK)
        shape = self.op("Shape", "shape", ids)
        if POSITION_IDS in inputs:
            self._positions(inputs[POSITION_IDS], shape)
        for value in past:
            self._no_past(value, shape)
        self.graph.inputs.clear()
        self.graph.inputs.extend([ids, mask])
        self.graph.insert_before(first, self.nodes)
        self.nodes = []
        output = self._pooled(hidden, mask)
        self.graph.extend(self.nodes)
        self.graph.outputs.clear()
        self.graph.outputs.append(output)

    def op(self, kind: str, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append one node; name and output carry our prefix, which no other tool uses."""
        node = ir.Node("", kind, list(inputs), ir.convenience.convert_attributes(attributes), name=_PREFIX + name)
        node.outputs[0].name = f"{_PREFIX}{name}.out"
        self.nodes.append(node)
        return node.outputs[0]

    def ints(self, name: str, values: list[int] | int) -> ir.Value:
        """A small int64 constant."""
        full = _PREFIX + name
        if full not in self.graph.initializers:
            array = np.array(values, np.int64)
            kind = ir.TensorType(ir.DataType.INT64)
            value = ir.Value(name=full, shape=ir.Shape(array.shape), type=kind, const_value=ir.tensor(array, name=full))
            self.graph.register_initializer(value)
        return self.graph.initializers[full]

    def _input(self, inputs: dict[str, ir.Value], name: str) -> ir.Value:
        """Return the contract's input; one of another type stays behind a cast, an absent one is new and unused."""
        contract = ir.Value(name=name, shape=ir.Shape(["batch", "sequence"]), type=ir.TensorType(ir.DataType.INT64))
        old = inputs.get(name)
        if old is not None:
            self._replace(old, contract, name)
        return contract

    def _replace(self, old: ir.Value, new: ir.Value, name: str) -> None:
        """Let `new`, int64 or of the same type, take the place of the input `old`."""
        assert old.dtype is not None
        if old.dtype not in (new.dtype, ir.DataType.INT64):
            new = self.op("Cast", f"{name}.cast", new, to=old.dtype)
        old.name = f"{_PREFIX}replaced.{name}"
        ir.convenience.replace_all_uses_with(old, new)

    def _positions(self, old: ir.Value, shape: ir.Value) -> None:
        """Count from 0 in every row: with right padding these are the positions of all real tokens."""
        width = self.op("Gather", "width", shape, self.ints("one", 1))
        positions = self.op("Range", "positions", self.ints("zero", 0), width, self.ints("one", 1))
        if old.shape is not None and old.shape[0] == 1:
            rows = self.op("Unsqueeze", "position_ids", positions, self.ints("axis.0", [0]))
        else:
            rows = self.op("Expand", "position_ids", positions, shape)
        self._replace(old, rows, POSITION_IDS)

    def _no_past(self, old: ir.Value, shape: ir.Value) -> None:
        """Give keys or values of no earlier token: [batch, kv heads, 0, head dim]."""
        c, name = self.config, str(old.name)
        batch = self.op("Gather", f"{name}.batch", shape, self.ints("first", [0]))
        rest = self.ints("no_tokens", [c.kv_heads, 0, c.head_dim])
        sizes = self.op("Concat", f"{name}.sizes", batch, rest, axis=0)
        assert old.dtype is not None
        nothing = ir.tensor(np.zeros(1, old.dtype.numpy()), name="")
        empty = self.op("ConstantOfShape", f"{name}.empty", sizes, value=nothing)
        empty.type, empty.shape = old.type, old.shape
        self._replace(old, empty, name)

    def _pooled(self, hidden: ir.Value, mask: ir.Value) -> ir.Value:
        """Take the row of the last real token, at length - 1, and divide it by its Euclidean length."""
        length = self.op("ReduceSum", "length", mask, self.ints("axis.1", [1]), keepdims=1)
        last = self.op("Sub", "last_index", length, self.ints("one", 1))  # [batch, 1]
        pooled = self.op("GatherND", "pool", hidden, last, batch_dims=1)
        if hidden.dtype != ir.DataType.FLOAT:
            pooled = self.op("Cast", "widen", pooled, to=ir.DataType.FLOAT)
        output = self.op("LpNormalization", "normalize", pooled, axis=-1, p=2)
        output.name = OUTPUT
        output.shape = ir.Shape(["batch", self.config.hidden_size])
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return output


def _write_data(foreign: ForeignGraph, path: Path, advance: Advance) -> str:
    """Stream all large tensors to one file and point the model at it; returns the file's SHA-256."""
    digest, end = hashlib.sha256(), 0
    with path.open("wb") as file:
        for name, value in foreign.model.graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes < _KEPT_INSIDE_BYTES and not isinstance(tensor, ir.ExternalTensor):
                continue
            offset = -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            for chunk in itertools.chain([bytes(offset - end)], _chunks(foreign.path.parent, tensor)):
                file.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
            end = offset + tensor.nbytes
            value.const_value = ir.ExternalTensor(
                path.name, offset, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
            )
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _chunks(folder: Path, tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    """Yield a tensor's bytes; what lies in a file is read a few megabytes at a time."""
    if not isinstance(tensor, ir.ExternalTensor):
        data = memoryview(tensor.tobytes())
        for start in range(0, len(data), _CHUNK_BYTES):
            yield data[start : start + _CHUNK_BYTES]
        return
    left = tensor.nbytes
    with (folder / str(tensor.location)).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise InputError(f"{file.name} ended while it was read.", cure="Export again when nobody writes it.")
            left -= len(chunk)
            yield chunk


def _check(source: Path, graph: Path, config: EncoderConfig, pad_id: int) -> None:
    """Refuse a graph that is no valid model, or that fails or errs on what the contract promises."""
    try:
        onnx.checker.check_model(str(graph))
    except Exception as error:  # the checker's errors share no base class
        raise InputError(
            f"{source} does not make a valid ONNX model: {_first_line(error)}.", cure="Export it again."
        ) from error
    session = _session(source, graph)
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in _TRIAL_LENGTHS]
    single = np.concatenate([_run(session, source, make_batch([ids], pad_id)) for ids in rows])
    together = _run(session, source, make_batch(rows, pad_id))
    if single.shape != (len(rows), config.hidden_size):
        raise InputError(
            f"{source} gives {single.shape[-1]} dimensions; the checkpoint's hidden_size is {config.hidden_size}.",
            cure="Give the checkpoint that this graph was exported from.",
        )
    if not np.isfinite(single).all():
        return  # overflow and damage are for parity to name
    cosines = row_cosines(together, single)
    worst = int(cosines.argmin())
    if cosines[worst] < _SAME:
        raise InputError(
            f"{source} gives another vector (cosine {cosines[worst]:.3f}) for the same {len(rows[worst])} tokens when "
            "pads follow them in a batch. It is not causal, or it was made for padding on the left; f2rt pads on the "
            "right.",
            cure=f"Export it with right padding and a causal mask. {OWN_GRAPH}",
        )


def _session(source: Path, graph: Path) -> onnxruntime.InferenceSession:
    """Open the graph as it stands: without optimizing or repacking, its weights stay mapped and need no memory."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's exceptions share no base class
        raise InputError(
            f"ONNX Runtime cannot load {source} with pooling added: {_first_line(error)}.",
            cure="Export it again, or free some memory if that is what it lacks.",
        ) from error


def _run(session: onnxruntime.InferenceSession, source: Path, batch: Batch) -> NDArray[np.float32]:
    rows, tokens = batch.input_ids.shape
    try:
        feeds = {INPUT_IDS: batch.input_ids, ATTENTION_MASK: batch.attention_mask}
        (vectors,) = session.run([OUTPUT], feeds)
    except Exception as error:
        raise InputError(
            f"{source} fails on {rows} x {tokens} tokens: {_first_line(error)}. Where its declared shapes are dynamic, "
            "a size was fixed inside when it was exported.",
            cure="Export it with dynamic axes for batch and sequence; optimum-cli does so by default.",
        ) from error
    found: NDArray[np.float32] = vectors
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
