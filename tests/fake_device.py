"""Doubles at the edge of the missing hardware: `FakeCuda` for the GPU, `FakeTensorRT` for the library that drives it.

They are strict where the real ones crash or give garbage: work runs only when its stream is synchronized, memory has
bounds and may be freed once, a shape must have run before it is captured, and a graph dies with its context. What an
engine computes is given to the double as a function of (ids, mask).
"""

from __future__ import annotations

import collections
import enum
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.engines.cuda import Device
from runtime.errors import EngineError

L4 = Device("NVIDIA L4", (8, 9), 24 << 30, "13.0", "580.82.07")
H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, "13.0")

Model = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]
Profiles = list[tuple[int, int]]


class FakeCuda:
    """A GPU in host memory: `runtime.engines.cuda.Cuda` with every mistake an error."""

    def __init__(self, device: Device = L4, *, memory_bytes: int = 1 << 40) -> None:
        self._device = device
        self._free_bytes = memory_bytes
        self._next = 256
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.pinned: list[NDArray[np.uint8]] = []
        self.streams: dict[int, list[Callable[[], None]]] = {}
        self.graphs: dict[int, list[Callable[[], None]]] = {}
        self.recording: list[Callable[[], None]] | None = None
        self.calls: collections.Counter[str] = collections.Counter()
        self.fail_end_capture = False

    @property
    def live(self) -> dict[str, int]:
        """What was made and not yet given back."""
        return {
            "memory": len(self.memory),
            "pinned": len(self.pinned),
            "streams": len(self.streams),
            "graphs": len(self.graphs),
        }

    def device(self) -> Device:
        return self._device

    def allocate(self, size_bytes: int) -> int:
        self.calls["allocate"] += 1
        if size_bytes > self._free_bytes:
            raise EngineError(f"the GPU has no room for another {size_bytes} bytes.")
        self._free_bytes -= size_bytes
        address, self._next = self._next, self._next + (size_bytes + 511) // 256 * 256
        self.memory[address] = np.full(size_bytes, 0xA5, np.uint8)  # garbage, as on a device
        return address

    def free(self, address: int) -> None:
        self._free_bytes += self.memory.pop(address).size

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        self.calls["allocate_pinned"] += 1
        self.pinned.append(np.full(size_bytes, 0xA5, np.uint8))
        return self.pinned[-1]

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        index = next(i for i, known in enumerate(self.pinned) if known is memory)
        del self.pinned[index]

    def create_stream(self) -> int:
        self._next += 256
        self.streams[self._next] = []
        return self._next

    def destroy_stream(self, stream: int) -> None:
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        assert self.recording is None, "a stream that is captured cannot be waited for"
        work, self.streams[stream] = self.streams[stream], []
        for step in work:
            step()

    def enqueue(self, stream: int, step: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(step)
        else:
            self.streams[stream].append(step)

    def view(self, address: int, size_bytes: int) -> NDArray[np.uint8]:
        """Return device memory; IndexError outside of what was allocated."""
        memory = self.memory[address]
        if size_bytes > memory.size:
            raise IndexError(f"{size_bytes} bytes of {memory.size}")
        return memory[:size_bytes]

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        self._check_pinned(memory)

        def step() -> None:
            self.view(address, memory.nbytes)[:] = memory

        self.enqueue(stream, step)

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        self._check_pinned(memory)

        def step() -> None:
            memory[:] = self.view(address, memory.nbytes)

        self.enqueue(stream, step)

    def begin_capture(self, stream: int) -> None:
        self.calls["begin_capture"] += 1
        self.recording = []

    def end_capture(self, stream: int) -> int:
        recorded, self.recording = self.recording, None
        assert recorded is not None
        if self.fail_end_capture:
            raise EngineError("CUDA failed: operation not permitted when stream is capturing.")
        self._next += 256
        self.graphs[self._next] = recorded
        return self._next

    def launch(self, graph: int, stream: int) -> None:
        self.calls["launch"] += 1
        self.streams[stream].extend(self.graphs[graph])

    def destroy_graph(self, graph: int) -> None:
        del self.graphs[graph]

    def _check_pinned(self, memory: NDArray[np.uint8]) -> None:
        assert any(np.shares_memory(memory, known) for known in self.pinned), "not page-locked, or freed"


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8


class Strategy(enum.Enum):
    STATIC = 0
    USER_MANAGED = 2


class Graphs(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Specialization(enum.Enum):
    LAZY = 0
    EAGER = 1


class Validity(enum.Enum):
    VALID = 0
    INVALID = 2


class Diagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32


class Severity(enum.IntEnum):
    ERROR = 1
    INFO = 3


class Logger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


def write_plan(path: Path, backend: str, profiles: Profiles, dim: int, **extra: Any) -> None:
    """Write what `FakeTensorRT` takes for a plan."""
    magic = {"tensorrt": b"ftrt", "tensorrt-rtx": b"vtrt"}[backend]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(magic + json.dumps({"profiles": profiles, "dim": dim, **extra}).encode())


class FakeTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`, as far as the engine uses it."""

    ILogger = Logger
    DataType = DataType
    ExecutionContextAllocationStrategy = Strategy
    CudaGraphStrategy = Graphs
    DynamicShapesKernelSpecializationStrategy = Specialization
    EngineValidity = Validity
    EngineInvalidityDiagnostics = Diagnostics

    def __init__(self, cuda: FakeCuda, model: Model, *, version: str = "11.4.0.106") -> None:
        self.__version__ = version
        self.cuda = cuda
        self.model = model
        self.invalid = 0
        self.uncapturable = False
        self.deserialized = 0
        self.contexts: weakref.WeakSet[FakeContext] = weakref.WeakSet()
        self.engines: weakref.WeakSet[FakeEngine] = weakref.WeakSet()
        self.shapes: list[tuple[int, int]] = []
        """The shape of every execution, in order."""

    def Runtime(self, logger: Logger) -> FakeRuntime:  # noqa: N802
        return FakeRuntime(self, logger)


class FakeRuntime:
    def __init__(self, library: FakeTensorRT, logger: Logger) -> None:
        self._library = library
        self._logger = logger

    def get_engine_validity(self, buffer: Any) -> tuple[Validity, int]:
        return (Validity.INVALID, self._library.invalid) if self._library.invalid else (Validity.VALID, 0)

    def deserialize_cuda_engine(self, serialized_engine: Any) -> FakeEngine | None:
        self._library.deserialized += 1
        try:
            plan = json.loads(bytes(serialized_engine)[4:])
        except ValueError:
            self._logger.log(Severity.ERROR, "the archive is broken")
            return None
        return FakeEngine(self._library, self._logger, plan)


class FakeEngine:
    def __init__(self, library: FakeTensorRT, logger: Logger, plan: dict[str, Any]) -> None:
        self.library = library
        self.logger = logger
        self.profiles: Profiles = [tuple(p) for p in plan["profiles"]]
        self._types = {
            "input_ids": DataType[plan.get("ids", "INT64")],
            "attention_mask": DataType.INT64,
            "sentence_embedding": DataType.FLOAT,
        }
        self.dim = plan["dim"]
        self.device_memory_size_v2 = plan.get("scratch", 4096)
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = len(self._types)
        library.engines.add(self)

    def get_tensor_name(self, index: int) -> str:
        return list(self._types)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self._types[name]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1, self.dim if name == "sentence_embedding" else -1]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        most = list(self.profiles[profile_index])
        return [[1, 1], most, most]

    def create_runtime_config(self) -> FakeConfig:
        return FakeConfig()

    def create_execution_context(self, runtime_config: FakeConfig) -> FakeContext:
        assert runtime_config.strategy is Strategy.USER_MANAGED
        return FakeContext(self, runtime_config)


class FakeConfig:
    def __init__(self) -> None:
        self.strategy = Strategy.STATIC
        self.cuda_graph_strategy = Graphs.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.EAGER
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeRuntimeCache:
    """The shapes for which kernels were compiled; a blob begins with `rtx`."""

    def __init__(self) -> None:
        self.kernels: set[tuple[int, int]] = set()

    def serialize(self) -> bytes:
        return b"rtx" + json.dumps(sorted(self.kernels)).encode()

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"rtx"):
            return False
        self.kernels = {tuple(shape) for shape in json.loads(blob[3:])}
        return True


class FakeContext:
    def __init__(self, engine: FakeEngine, config: FakeConfig) -> None:
        self._engine = engine
        self.config = config
        self._profile: int | None = None
        self._addresses: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._flushed: tuple[int, int] | None = None
        self._scratch: tuple[int, int] | None = None
        engine.library.contexts.add(self)

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._scratch = memory, size

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return 0 <= profile_index < len(self._engine.profiles)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        assert self._profile is not None
        rows, tokens = self._engine.profiles[self._profile]
        if not (1 <= shape[0] <= rows and 1 <= shape[1] <= tokens):
            return self._fail(f"{name}: {shape} is outside of profile {self._profile}")
        if self._shapes.get(name) != shape:
            self._flushed = None
        self._shapes[name] = shape
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self._engine.library.cuda
        if len(self._addresses) != 3 or len(set(self._shapes.values())) != 1 or len(self._shapes) != 2:
            return self._fail("shapes or addresses are missing")
        needed = self._engine.device_memory_size_v2
        if needed and (self._scratch is None or self._scratch[1] < needed):
            return self._fail("no device memory for activations")
        shape = self._shapes["input_ids"]
        if cuda.recording is not None and self._engine.library.uncapturable:
            return self._fail("this plan waits for the device while it runs")
        if cuda.recording is not None and self._flushed != shape:
            return self._fail("a shape must run once before it is captured")
        self._flushed = shape
        context = weakref.ref(self)

        def step() -> None:
            alive = context()
            assert alive is not None, "the graph's context was freed"
            assert alive._flushed == shape, "the context's shape changed after the capture"
            alive._compute(shape)

        cuda.enqueue(stream_handle, step)
        return True

    def _compute(self, shape: tuple[int, int]) -> None:
        library = self._engine.library
        if self._scratch is not None:
            library.cuda.view(*self._scratch)[:] = 0xEE
        size_bytes = 8 * shape[0] * shape[1]
        ids, mask = (
            library.cuda.view(self._addresses[name], size_bytes).view(np.int64).reshape(shape)
            for name in ("input_ids", "attention_mask")
        )
        assert mask.min() >= 0
        assert (mask.sum(axis=1) >= 1).all(), "a row of nothing"
        vectors = np.ascontiguousarray(library.model(ids.copy(), mask.copy()), np.float32)
        library.cuda.view(self._addresses["sentence_embedding"], vectors.nbytes)[:] = vectors.view(np.uint8).ravel()
        library.shapes.append(shape)
        if self.config.cache is not None:
            self.config.cache.kernels.add(shape)

    def _fail(self, message: str) -> bool:
        self._engine.logger.log(Severity.ERROR, message)
        return False


def public_names(double: type) -> set[str]:
    """Return the names a double offers, methods and what its constructor sets."""
    return {name for name in vars(double) if not name.startswith("_")}


DOUBLED = {
    "Runtime": FakeRuntime,
    "ICudaEngine": FakeEngine,
    "IExecutionContext": FakeContext,
    "IRuntimeConfig": FakeConfig,
    "IRuntimeCache": FakeRuntimeCache,
}
ENUMS = SimpleNamespace(
    DataType=DataType,
    ExecutionContextAllocationStrategy=Strategy,
    CudaGraphStrategy=Graphs,
    DynamicShapesKernelSpecializationStrategy=Specialization,
    EngineValidity=Validity,
    EngineInvalidityDiagnostics=Diagnostics,
)
