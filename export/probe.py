"""The probe: runs texts through the fp32 graph layer by layer and measures every tensor that FP16 or INT8 must hold.

It executes the very graph that parity proves against PyTorch, cut between layers, so it needs the memory of one layer
and of the texts' residual streams, never of the model. Each text runs alone, unpadded: there are no pads to exclude.
What a layer found is kept in a cache under the hash of weights and texts; an interrupted probe resumes, and of two that
measure the same the second waits and reads what the first one found.

Of each matrix product's input some rows are kept as well, for choosing INT8 scales on: of every text the last token,
the row with the largest magnitude, and a few others.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from calibration.statistics import Rows, Statistics, merge, pack, pack_rows, percentiles_of, unpack
from export.cache import explain_cache_errors
from export.config import EncoderConfig
from export.encoder import IR_VERSION
from export.lock import Wait, bundle_lock
from runtime.engines.onnxruntime import session_options
from runtime.errors import EngineError, F2rtError, InputError
from runtime.files import atomic_file, cache_folder, explain_write_errors, write_atomic

Progress = Callable[[str, int, int], None]
Streams = list[NDArray[np.float32]]

_LAYER_TENSORS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.q_norm.rotary",
    "self_attn.k_norm.rotary",
    "self_attn",
    "self_attn.o_proj",
    "self_attn.residual",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.gated",
    "mlp.down_proj",
    "mlp.residual",
)
# The inputs of matrix products, of which rows are kept.
INPUTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp.gated")
# What the last layer computes for the pooled token only.
_POOLED = frozenset(_LAYER_TENSORS) - {
    *("input_layernorm", "self_attn.k_proj", "self_attn.v_proj", "self_attn.k_norm.rotary"),
}
POSITIONS = "probe.positions"
_STATISTICS = "statistics.npz"
_SAMPLED_TOKENS = 3  # of each text: the last one and two others
_KEPT_PEAKS = 64
_KEPT_VALUES = 4 << 20  # of one tensor: 8 MB on disk


def probe(
    graph: Path,
    graph_sha256: str,
    config: EncoderConfig,
    sequences: Sequence[Sequence[int]],
    *,
    cache: Path | None = None,
    progress: Progress = lambda label, done, total: None,
    wait: Wait = Wait(),
) -> Statistics:
    """Measure the fp32 graph on token id sequences (EOS included).

    `graph_sha256` names graph and weights in the cache. Raises InputError for no sequences, EngineError when the graph
    does not run or a value is not finite, OutputError when the cache cannot be written, or when another process that
    measures the same takes longer than `wait` allows.
    """
    if not sequences:
        raise InputError("there are no calibration texts.", cure="Give at least one.")
    folder = (cache or cache_folder()) / "probe" / _key(graph_sha256, sequences)
    known = _finished(folder, config)
    if known is None:
        with explain_cache_errors(), explain_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)  # here, where it can be said that it is the cache
        with bundle_lock(folder, "f2rt export", wait, "measuring activations for"):
            # Whoever held the lock before may have done it.
            known = _finished(folder, config) or _measure(graph, config, sequences, folder, progress)
    return replace(known, rows_folder=folder / "rows")


def _finished(folder: Path, config: EncoderConfig) -> Statistics | None:
    """Return what a probe found that ran to its end, or None."""
    whole = all(_has_rows(folder, layer) for layer in range(config.layers))
    return _read(folder / _STATISTICS) if whole else None


def _measure(
    graph: Path, config: EncoderConfig, sequences: Sequence[Sequence[int]], folder: Path, progress: Progress
) -> Statistics:
    """Run the probe, going on from what an interrupted one left in `folder`. Its lock is held."""
    finished = folder / _STATISTICS
    with explain_cache_errors(), explain_write_errors(folder):
        finished.unlink(missing_ok=True)
        try:
            known = _Probe(graph, config, sequences, folder, progress).statistics()
        except _DamagedError:
            shutil.rmtree(folder)
            known = _Probe(graph, config, sequences, folder, progress).statistics()
        write_atomic(finished, pack(known))
    shutil.rmtree(folder / "layers", ignore_errors=True)
    return known


def _has_rows(folder: Path, layer: int) -> bool:
    """Return whether the rows of a layer are there to their end."""
    return all(zipfile.is_zipfile(folder / "rows" / f"layers.{layer}.{name}.npz") for name in INPUTS)


class _DamagedError(Exception):
    """What an interrupted probe left cannot be read."""


def _read(path: Path) -> Statistics | None:
    """Return what was kept, or None when it is not there or damaged: then it is measured again."""
    try:
        return unpack(path.read_bytes())
    except (OSError, InputError):
        return None


def _key(graph_sha256: str, sequences: Sequence[Sequence[int]]) -> str:
    digest = hashlib.sha256(b"probe 2 " + graph_sha256.encode())
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return digest.hexdigest()[:32]


class _Probe:
    """One pass over all layers. `layers/` in the cache holds each layer's statistics and the last residual streams."""

    def __init__(
        self,
        graph: Path,
        config: EncoderConfig,
        sequences: Sequence[Sequence[int]],
        folder: Path,
        progress: Progress,
    ) -> None:
        self._graph = graph
        self._config = config
        self._sequences = [np.array([ids], np.int64) for ids in sequences]
        self._offsets = np.cumsum([0, *map(len, sequences)])
        self._layers = folder / "layers"
        self._rows = folder / "rows"
        self._progress = progress
        self._positions = [_sampled_positions(row, len(ids)) for row, ids in enumerate(sequences)]

    def statistics(self) -> Statistics:
        parts: list[Statistics] = []
        streams: Streams | None = None
        for index in range(-1, self._config.layers):
            path = self._layers / f"{index}.npz"
            following = self._layers / f"{index + 1}.npz"
            last = index == self._config.layers - 1  # nothing goes on from it, so it keeps no streams
            if path.is_file() and (last or following.is_file() or self._streams_file(index).is_file()):
                known = _read(path)
                if known is None or (index >= 0 and not _has_rows(self._layers.parent, index)):
                    raise _DamagedError
                parts.append(known)
                streams = None
                continue
            if index >= 0 and streams is None:
                streams = self._read_streams(index - 1)
            part, streams = self._embed() if index < 0 else self._layer(index, streams or [])
            # The streams first: a statistics file without them would skip a layer that cannot be continued from.
            self._write_streams(index, streams)
            write_atomic(path, pack(part))
            self._streams_file(index - 1).unlink(missing_ok=True)
            parts.append(part)
        return merge(parts)

    def _embed(self) -> tuple[Statistics, Streams]:
        return self._run("embed_tokens", [], ["embed_tokens"], "embed_tokens", [])

    def _layer(self, index: int, streams: Streams) -> tuple[Statistics, Streams]:
        start = "embed_tokens.out" if index == 0 else f"layers.{index - 1}.mlp.residual.out"
        names = [f"layers.{index}.{name}" for name in _LAYER_TENSORS]
        return self._run(f"layer {index}", [start], names, f"layers.{index}.mlp.residual", streams)

    def _run(
        self, label: str, starts: list[str], names: list[str], end: str, streams: Streams
    ) -> tuple[Statistics, Streams]:
        """Run one piece of the graph over all texts; measure `names`, keep rows, return the output of `end`."""
        with explain_library_errors(f"opening {label} for the probe"):
            session = _session(self._graph, starts, names, end)
        wanted = {value.name for value in session.get_inputs()}
        largest: dict[str, NDArray[np.float32]] = {}
        rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
        outputs: Streams = []
        for row, ids in enumerate(self._sequences):
            self._progress(f"probe: {label}", row, len(self._sequences))
            feeds: dict[str, NDArray[np.generic]] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
            feeds[POSITIONS] = self._positions[row]
            for name in starts:
                feeds[name] = streams[row]
            with explain_library_errors(f"in the probe on {label}, text {row} of {ids.shape[1]} tokens"):
                stream, *measured = session.run(None, {k: v for k, v in feeds.items() if k in wanted})
            outputs.append(stream)
            for name, values, taken in zip(names, measured[::2], measured[1::2], strict=True):
                largest[name] = np.maximum(largest[name], values) if name in largest else values
                rows[name].append(taken[0])
        self._progress(f"probe: {label}", len(self._sequences), len(self._sequences))
        bad = next((name for name, values in largest.items() if not np.isfinite(values).all()), None)
        if bad:
            raise EngineError(f"{bad} is not finite in float32.", cure="The checkpoint is damaged: download it again.")
        percentiles = {name: self._keep_rows(name, parts) for name, parts in rows.items()}
        return Statistics(largest, int(self._offsets[-1]), percentiles), outputs

    def _keep_rows(self, name: str, parts: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Write the rows of an input of matrix products; return the percentiles of any tensor.

        Each part holds the sampled rows of one text and, last, its peak.
        """
        layer, _, tensor = name.removeprefix("layers.").partition(".")
        pooled = layer == str(self._config.layers - 1) and tensor in _POOLED
        sampled = np.concatenate([part[:1] if pooled else part[:-1] for part in parts])
        if tensor in INPUTS:
            peaks = np.stack([part[-1] for part in parts])
            highest = np.argsort(-np.abs(peaks).max(axis=1), kind="stable")[:_KEPT_PEAKS]
            step = -(-sampled.size // _KEPT_VALUES)
            write_atomic(self._rows / f"{name}.npz", pack_rows(Rows(sampled[::step], peaks[highest])))
        return percentiles_of(sampled)

    def _streams_file(self, index: int) -> Path:
        return self._layers / f"{index}.streams.npy"

    def _write_streams(self, index: int, streams: Streams) -> None:
        """Keep the residual streams of all texts, one below the other: float32 [tokens, hidden]."""
        if index == self._config.layers - 1:
            return
        with atomic_file(self._streams_file(index)) as file:
            np.save(file, np.concatenate([s[0] for s in streams]))

    def _read_streams(self, index: int) -> Streams:
        try:
            rows = np.load(self._streams_file(index), mmap_mode="r")
        except (OSError, ValueError) as error:
            raise _DamagedError from error
        return [rows[a:b][None] for a, b in zip(self._offsets[:-1], self._offsets[1:], strict=True)]


def _sampled_positions(text: int, tokens: int) -> NDArray[np.int64]:
    """Return the positions whose rows are kept: the last token, and others chosen by the text's number alone."""
    others = np.random.default_rng(text).integers(0, tokens, _SAMPLED_TOKENS - 1)
    return np.unique(np.array([tokens - 1, *others], np.int64))


def _session(graph: Path, starts: list[str], names: list[str], end: str) -> onnxruntime.InferenceSession:
    """Open the part of the graph from `starts` to `end`, with two measurements of each of `names`.

    They are the largest magnitude per channel [channels], and [1, rows, channels]: the rows at the input POSITIONS
    and, last, the row with the largest magnitude.
    """
    part = layer_part(graph, starts, [end, *names])
    values = {str(v.name): v for v in part.outputs}
    positions = ir.Value(name=POSITIONS, shape=ir.Shape(["sampled"]), type=ir.TensorType(ir.DataType.INT64))
    tape = ir.tape.Tape()
    measured = []
    constants = {
        name: tape.initializer(ir.tensor(np.array(value, np.int64), name=f"probe.{name}"))
        for name, value in {"tokens": [0, 1], "one": [1], "last": [-1], "flat": [-1]}.items()
    }
    for name in names:
        x = values[f"{name}.out"]
        absolute = tape.op("Abs", [x])
        largest = tape.op("ReduceMax", [absolute, constants["tokens"]], {"keepdims": 0})
        of_rows = tape.op("ReduceMax", [absolute, constants["last"]], {"keepdims": 0})
        peak = tape.op("Reshape", [tape.op("ArgMax", [of_rows], {"axis": 1}), constants["flat"]])
        # Where only the pooled token is computed there is one row, whatever the position.
        end_row = tape.op("Sub", [tape.op("Shape", [x], {"start": 1, "end": 2}), constants["one"]])
        rows = tape.op("Concat", [tape.op("Min", [positions, end_row]), peak], {"axis": 0})
        taken = tape.op("Gather", [x, rows], {"axis": 1})
        largest.name, taken.name = f"{name}.largest", f"{name}.rows"
        measured += [largest, taken]
    part.inputs.append(positions)
    part.extend(tape.nodes)
    for value in tape.initializers:
        part.register_initializer(value)
    stream = values[f"{end}.out"]
    part.outputs.clear()
    part.outputs.extend([stream, *measured])
    return open_part(graph, part)


@contextlib.contextmanager
def explain_library_errors(where: str) -> Iterator[None]:
    """Turn whatever ONNX Runtime raises into an EngineError that says where: its exceptions share no base class."""
    try:
        yield
    except (F2rtError, MemoryError):
        raise
    except Exception as error:
        raise EngineError(
            f"ONNX Runtime failed {where}: {error}",
            cure="Report it, unless memory ran out: then give fewer or shorter calibration texts.",
        ) from error


def layer_part(graph: Path | ir.Model, starts: list[str], ends: list[str]) -> ir.Graph:
    """Cut the part of the graph out that leads from the values `starts` and the graph's inputs to the nodes `ends`."""
    model = ir.load(graph) if isinstance(graph, Path) else graph
    inputs = [*starts, "input_ids", "attention_mask"]
    tensors = list(dict.fromkeys(f"{name}.out" for name in ends))
    part = ir.convenience.extract(model.graph, _needed(model.graph, inputs, tensors), tensors)
    for value in part.inputs:
        if value.type is None:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    return part


def open_part(graph: Path, part: ir.Graph) -> onnxruntime.InferenceSession:
    """Open a part of `graph`, whose weights lie beside it, in ONNX Runtime."""
    for value in part.outputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    options = session_options(exact=any(v.dtype == ir.DataType.UINT8 for v in part.initializers.values()))
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    proto = ir.to_proto(ir.Model(part, ir_version=IR_VERSION)).SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


def _needed(graph: ir.Graph, inputs: list[str], outputs: list[str]) -> list[str]:
    """Return those of `inputs` that `outputs` depend on."""
    values = {str(v.name): v for node in graph for v in node.outputs}
    stop = set(inputs)
    found: set[str] = set()
    seen: set[str] = set()
    open_values = [values[name] for name in outputs]
    while open_values:
        value = open_values.pop()
        producer = value.producer()
        for source in producer.inputs if producer else []:
            name = str(source.name) if source is not None else ""
            if name in stop:
                found.add(name)
            elif source is not None and name not in seen:
                seen.add(name)
                open_values.append(source)
    return [name for name in inputs if name in found]
