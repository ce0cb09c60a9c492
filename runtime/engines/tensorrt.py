"""TensorRT and TensorRT-RTX: runs a compiled plan on the GPU it was compiled for. No torch; CUDA through `Cuda`.

One run of a batch: cut it into pieces that fit the plan's profiles (`runtime.engines.buckets`), pad each piece, and for
each copy ids and mask to the device, execute, copy the vectors back, all on one stream. Every profile has an execution
context and its own preallocated device and page-locked host buffers; nothing is allocated while a batch runs.

CUDA graphs are captured on *padded* shapes, not on the exact ones: the lengths of real texts hardly ever repeat, padded
shapes do, and padding is exact. A shape that comes for the second time gets an execution context of its own (a
captured graph holds the state of the context it was captured from) and from then on is replayed. All contexts share
one block of device memory for activations: only one runs at a time.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.bundle import EngineRecord
from runtime.engines import tensorrt_rtx
from runtime.engines.buckets import Bucket, Piece, split
from runtime.engines.cuda import Cuda, CudaRuntime, Device
from runtime.engines.tensorrt_library import (
    Library,
    check_fits,
    check_magic,
    last_words,
    load_library,
    make_logger,
)
from runtime.errors import EngineError, F2rtError
from runtime.settings import EngineSettings

if TYPE_CHECKING:  # without the library installed these are Any; the tests check against the real ones
    import tensorrt as trt_types

log = logging.getLogger("f2rt.engine")

INPUT_IDS, ATTENTION_MASK, OUTPUT = "input_ids", "attention_mask", "sentence_embedding"
MOST_GRAPHS = 64  # recurring shapes with a context of their own; the one not used for longest makes room

Shape = tuple[int, int, int]  # profile, rows, tokens


@dataclass
class Counters:
    """What an engine has done, in runs of one piece each; padding in tokens."""

    runs: int = 0
    captured: int = 0
    replayed: int = 0
    evicted: int = 0
    capture_failures: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0


def obstacle(record: EngineRecord) -> F2rtError | None:
    """Return why this machine cannot run an engine, from manifest, library and device facts alone, or None."""
    try:
        check_fits(record, CudaRuntime().device(), load_library(record.backend).__version__)
    except F2rtError as error:
        return error
    return None


def open_engine(plan: Path, record: EngineRecord, settings: EngineSettings) -> TensorRTEngine:
    """Open a plan with the library of its backend on device 0. Raises what TensorRTEngine raises."""
    library = load_library(record.backend)
    return TensorRTEngine(plan, record, settings, cuda=CudaRuntime(), library=library)


class TensorRTEngine:
    """One deserialized plan with its contexts and buffers."""

    def __init__(
        self, plan: Path, record: EngineRecord, settings: EngineSettings, *, cuda: Cuda, library: Library
    ) -> None:
        """Load a plan. Whether it fits library and GPU is decided before it is read.

        Raises NotExecutableError for a plan made for another GPU or version, EngineError for one that is damaged or
        of another flavour, or when the device has too little memory.
        """
        self.name = record.name
        self.precision = record.precision
        self.fingerprint = record.fingerprint
        self.counters = Counters()
        self._cuda = cuda
        self._trt = library
        self._settings = settings
        self._is_rtx = record.backend == "tensorrt-rtx"
        self._messages: list[str] = []
        device = cuda.device()
        check_fits(record, device, library.__version__)
        # What is registered here is undone by `close`, in reverse, also when the constructor fails half-way.
        with contextlib.ExitStack() as resources:
            self._stream = cuda.create_stream()
            resources.callback(cuda.destroy_stream, self._stream)
            self._load(plan, record, device, resources)
            self._resources = resources.pop_all()
        self.buckets: Sequence[Bucket] = tuple(lane.bucket for lane in self._lanes)
        self.max_tokens: int | None = max(bucket.tokens for bucket in self.buckets)
        self._closed = False

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return float32 [rows, dim].

        Raises InputError for a row longer than every profile, EngineError when library or device fails.
        """
        if self._closed:
            raise EngineError(f"{self.name} was closed.", cure="Open the engine again.")
        lengths = batch.lengths.tolist()
        vectors = np.empty((len(lengths), self._dim), np.float32)
        for piece in split(lengths, [lane.bucket for lane in self._lanes]):
            vectors[piece.rows] = self._run_piece(batch, piece)
        return vectors

    def close(self) -> None:
        """Free graphs, contexts, plan and buffers; the engine answers no more. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self._resources.close()

    # --- loading

    def _load(self, plan: Path, record: EngineRecord, device: Device, resources: contextlib.ExitStack) -> None:
        self._engine = self._deserialize(plan, record)
        resources.callback(self._forget_engine)
        self._check_tensors(record)
        self._dim = int(self._engine.get_tensor_shape(OUTPUT)[-1])
        self._scratch_bytes = int(self._engine.device_memory_size_v2)
        self._scratch = 0
        if self._scratch_bytes:
            self._scratch = self._cuda.allocate(self._scratch_bytes)
            resources.callback(self._cuda.free, self._scratch)
        self._runtime_cache: tensorrt_rtx.RuntimeCache | None = None
        if self._is_rtx:
            self._runtime_cache = tensorrt_rtx.RuntimeCache(self._engine.create_runtime_config(), record, device)
            resources.callback(self._runtime_cache.save)
        self._lanes = []
        for index in range(self._engine.num_optimization_profiles):
            most = self._engine.get_tensor_profile_shape(INPUT_IDS, index)[2]
            lane = _Lane(self._cuda, Bucket(index, int(most[0]), int(most[1])), self._dim, resources)
            lane.context = self._context(lane, capture=False)
            resources.callback(lane.forget_context)
            self._lanes.append(lane)
        self._seen: set[Shape] = set()
        self._recurring: OrderedDict[Shape, _Recurring] = OrderedDict()
        resources.callback(self._forget_graphs)

    def _deserialize(self, plan: Path, record: EngineRecord) -> trt_types.ICudaEngine:
        self._logger = make_logger(self._trt, self._messages)
        runtime = self._trt.Runtime(self._logger)
        try:
            with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                check_magic(record, data[:8])
                if self._is_rtx:
                    tensorrt_rtx.check_validity(self._trt, runtime, record, data)
                engine = runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise EngineError(f"the plan {plan} cannot be read: {error}.", cure="Build the engine again.") from error
        if engine is None:
            raise EngineError(
                f"{record.backend} cannot load {plan}: {last_words(self._messages)}.",
                cure=f"Build it again: f2rt build BUNDLE --backend {record.backend} --precision {record.precision}",
            )
        self._runtime = runtime
        return engine

    def _check_tensors(self, record: EngineRecord) -> None:
        engine, types = self._engine, self._trt.DataType
        expected = {INPUT_IDS: types.INT64, ATTENTION_MASK: types.INT64, OUTPUT: types.FLOAT}
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: engine.get_tensor_dtype(name) for name in names}
        if found != expected:
            shown = ", ".join(f"{name} {dtype}" for name, dtype in found.items())
            raise EngineError(
                f"the plan {record.file} has the tensors {shown}; f2rt's have {', '.join(expected)} in int64, int64 "
                "and float32.",
                cure="Build the engine from a graph that f2rt exported.",
            )

    def _context(self, lane: _Lane, *, capture: bool) -> trt_types.IExecutionContext:
        """Return a new context on a lane's profile and buffers, with the shared block for its activations."""
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self._runtime_cache is not None:
            tensorrt_rtx.configure(self._trt, config, capture=capture)
            self._runtime_cache.attach(config)
        context = self._engine.create_execution_context(config)
        if context is None:
            raise self._failure("has no execution context to give")
        if self._scratch_bytes:
            context.set_device_memory(self._scratch, self._scratch_bytes)
        done = context.set_optimization_profile_async(lane.bucket.index, self._stream)
        for name, address in lane.addresses.items():
            done = done and context.set_tensor_address(name, address)
        if not done:
            raise self._failure(f"does not accept the profile {lane.bucket.rows}x{lane.bucket.tokens}")
        self._cuda.synchronize(self._stream)
        return context

    # --- running

    def _run_piece(self, batch: Batch, piece: Piece) -> NDArray[np.float32]:
        """Return a piece's vectors, in a buffer that the next run writes over."""
        lane = self._lanes[piece.bucket.index]
        shape = len(piece.rows), piece.tokens
        if self._settings.cuda_graphs:
            shape = piece.bucket.padded(*shape)
        lane.fill(batch, piece, shape)
        self.counters.runs += 1
        self.counters.real_tokens += int(batch.lengths[piece.rows].sum())
        self.counters.padded_tokens += shape[0] * shape[1]
        self._execute(lane, shape)
        self._cuda.synchronize(self._stream)
        return lane.vectors[: len(piece.rows)]

    def _execute(self, lane: _Lane, shape: tuple[int, int]) -> None:
        """Enqueue one run of the lane's buffers; replays a graph where there is one for this shape."""
        key = (lane.bucket.index, *shape)
        recurring = self._recurring.get(key)
        if recurring is None:
            if not self._settings.cuda_graphs or key not in self._seen:
                self._seen.add(key)
                self._set_shape(lane.context, shape)
                self._enqueue(lane, lane.context, shape)
                return
            recurring = self._admit(key, lane, shape)
        self._recurring.move_to_end(key)
        if recurring.graph is not None:
            self._cuda.launch(recurring.graph, self._stream)
            self.counters.replayed += 1
            return
        self._enqueue(lane, recurring.context, shape)
        # The run just enqueued was the one TensorRT wants after a change of shape, before a capture.
        if not self._is_rtx and not recurring.failed:
            self._capture(recurring, lane, shape)

    def _admit(self, key: Shape, lane: _Lane, shape: tuple[int, int]) -> _Recurring:
        """Give a shape its own context; make room first."""
        while len(self._recurring) >= MOST_GRAPHS:
            _, oldest = self._recurring.popitem(last=False)
            self._drop(oldest)
            self.counters.evicted += 1
        recurring = _Recurring(self._context(lane, capture=True))
        self._set_shape(recurring.context, shape)
        self._recurring[key] = recurring
        return recurring

    def _capture(self, recurring: _Recurring, lane: _Lane, shape: tuple[int, int]) -> None:
        """Record one run, copies included. A plan that cannot be captured goes on running without a graph."""
        self._cuda.begin_capture(self._stream)
        problem: EngineError | None = None
        try:
            self._enqueue(lane, recurring.context, shape)
        except EngineError as error:
            problem = error
        try:  # always: it is what ends the capture
            graph = self._cuda.end_capture(self._stream)
        except EngineError as error:
            problem = problem or error
        else:
            if problem is None:
                recurring.graph = graph
                self.counters.captured += 1
                return
            self._cuda.destroy_graph(graph)
        recurring.failed = True
        self.counters.capture_failures += 1
        log.warning("%s: no CUDA graph for %d x %d, it runs without: %s", self.name, *shape, problem)

    def _set_shape(self, context: trt_types.IExecutionContext, shape: tuple[int, int]) -> None:
        for name in (INPUT_IDS, ATTENTION_MASK):
            if not context.set_input_shape(name, shape):
                raise self._failure(f"does not accept the shape {shape[0]} x {shape[1]}")

    def _enqueue(self, lane: _Lane, context: trt_types.IExecutionContext, shape: tuple[int, int]) -> None:
        lane.send(self._cuda, self._stream, shape)
        if not context.execute_async_v3(self._stream):
            raise self._failure(f"failed on a batch of {shape[0]} x {shape[1]}")
        lane.receive(self._cuda, self._stream, shape)

    def _failure(self, what: str) -> EngineError:
        text = f"{self.name} {what}: {last_words(self._messages)}."
        self._messages.clear()
        return EngineError(text, cure="Try a smaller batch; report it when one text alone fails.")

    # --- letting go: the library frees an object when the last reference to it goes

    def _drop(self, recurring: _Recurring) -> None:
        if recurring.graph is not None:
            self._cuda.destroy_graph(recurring.graph)

    def _forget_graphs(self) -> None:
        while self._recurring:
            self._drop(self._recurring.popitem()[1])

    def _forget_engine(self) -> None:
        self._runtime_cache = None
        del self._engine, self._runtime


@dataclass
class _Recurring:
    """A shape that came back: its own context, and its graph once it is captured."""

    context: trt_types.IExecutionContext
    graph: int | None = None
    failed: bool = False


class _Lane:
    """A profile with its context and buffers, device and page-locked host, sized for the full bucket."""

    context: trt_types.IExecutionContext

    def __init__(self, cuda: Cuda, bucket: Bucket, dim: int, resources: contextlib.ExitStack) -> None:
        self.bucket = bucket
        tokens_bytes = 8 * bucket.rows * bucket.tokens
        sizes = {INPUT_IDS: tokens_bytes, ATTENTION_MASK: tokens_bytes, OUTPUT: 4 * bucket.rows * dim}
        self.addresses: dict[str, int] = {}
        self._host: dict[str, NDArray[np.uint8]] = {}
        for name, size_bytes in sizes.items():
            self.addresses[name] = cuda.allocate(size_bytes)
            resources.callback(cuda.free, self.addresses[name])
            self._host[name] = cuda.allocate_pinned(size_bytes)
            resources.callback(cuda.free_pinned, self._host[name])
        self.vectors = self._host[OUTPUT].view(np.float32).reshape(bucket.rows, dim)

    def fill(self, batch: Batch, piece: Piece, shape: tuple[int, int]) -> None:
        """Write a piece into the page-locked inputs, right-padded to `shape`.

        A row beyond the piece is one token long: its vector is thrown away, but it must not be a row of nothing.
        """
        rows, tokens = len(piece.rows), piece.tokens
        ids, mask = (self._view(name, shape) for name in (INPUT_IDS, ATTENTION_MASK))
        ids[:] = 0
        ids[:rows, :tokens] = batch.input_ids[piece.rows, :tokens]
        lengths = np.ones(shape[0], np.int64)
        lengths[:rows] = batch.lengths[piece.rows]
        mask[:] = np.arange(shape[1]) < lengths[:, None]

    def forget_context(self) -> None:
        """Let go of the context."""
        del self.context

    def send(self, cuda: Cuda, stream: int, shape: tuple[int, int]) -> None:
        """Enqueue the copies of the inputs."""
        for name in (INPUT_IDS, ATTENTION_MASK):
            cuda.copy_to_device(self.addresses[name], self._host[name][: 8 * shape[0] * shape[1]], stream)

    def receive(self, cuda: Cuda, stream: int, shape: tuple[int, int]) -> None:
        """Enqueue the copy of the vectors."""
        size_bytes = 4 * shape[0] * self.vectors.shape[1]
        cuda.copy_to_host(self._host[OUTPUT][:size_bytes], self.addresses[OUTPUT], stream)

    def _view(self, name: str, shape: tuple[int, int]) -> NDArray[np.int64]:
        flat = self._host[name].view(np.int64)
        return flat[: shape[0] * shape[1]].reshape(shape)
