"""CUDA, as far as an engine needs it: device facts, memory, one stream, graphs. The seam at the edge of the hardware.

`Cuda` is that seam: engines see nothing else of the device, so a double can stand in where there is none. The real one
is `CudaRuntime`, on CUDA Python (cuda.bindings.runtime); no torch. Addresses and handles are plain ints.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError, MissingExtraError, NotExecutableError


@dataclass(frozen=True)
class Device:
    """The GPU that engines run on. `capability` is (major, minor); `cuda` the CUDA version its driver supports.

    `driver` is the driver's own version, as far as the system says; several support one CUDA version.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int
    cuda: str
    driver: str = ""

    @property
    def sm(self) -> str:
        """The architecture as targets spell it, for example sm89."""
        return f"sm{self.capability[0]}{self.capability[1]}"

    @property
    def target(self) -> str:
        """The target of an engine made for this GPU and no other, for example sm89-nvidia-l4."""
        return f"{self.sm}-{re.sub(r'[^a-z0-9]+', '-', self.name.lower()).strip('-')}"

    @property
    def software(self) -> str:
        """What kernels that were timed or compiled here belong to: the driver, as well as it is known."""
        return self.driver or self.cuda

    def __str__(self) -> str:
        return f"{self.name}, {self.sm}"


class Cuda(Protocol):
    """What an engine asks of a device. Every method raises EngineError with the driver's words when it fails."""

    def device(self) -> Device:
        """Return the facts of device 0. Raises NotExecutableError when there is no driver or no GPU."""
        ...

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new device memory, aligned to at least 256 bytes."""
        ...

    def free(self, address: int) -> None:
        """Free device memory."""
        ...

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return new page-locked host memory, uint8 [size_bytes]: only from such memory are copies asynchronous."""
        ...

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Free page-locked memory; the array must not be touched afterwards."""
        ...

    def create_stream(self) -> int:
        """Return a new stream that does not wait for the default stream."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        ...

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        ...

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        """Enqueue a copy of page-locked memory to the device."""
        ...

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        """Enqueue a copy from the device into page-locked memory."""
        ...

    def begin_capture(self, stream: int) -> None:
        """From here on, what is enqueued is recorded instead of run."""
        ...

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as a graph that can be launched; raises EngineError when it cannot be."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Destroy a graph."""
        ...


class CudaRuntime:
    """Device 0 through CUDA Python; CUDA_VISIBLE_DEVICES chooses which GPU that is."""

    def __init__(self) -> None:
        """Load the bindings; touches no device. Raises MissingExtraError without them."""
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingExtraError(
                f"CUDA Python is not installed here ({error}).",
                cure="Install it with: pip install 'f2rt[tensorrt-rtx]' (or f2rt[tensorrt])",
            ) from error
        self._cuda: Any = runtime

    def device(self) -> Device:
        """Return the facts of device 0. Raises NotExecutableError when there is no driver or no GPU."""
        cuda = self._cuda
        error, count = cuda.cudaGetDeviceCount()
        if error == cuda.cudaError_t.cudaErrorInsufficientDriver:
            driver, needed = self._version(cuda.cudaDriverGetVersion()), self._version(cuda.cudaRuntimeGetVersion())
            found = f"the driver supports CUDA {driver}, this needs {needed}" if driver != "0.0" else "there is none"
            raise NotExecutableError(
                f"no usable NVIDIA driver: {found}.",
                cure="Install a current NVIDIA driver, or choose an onnxruntime engine.",
            )
        if error == cuda.cudaError_t.cudaErrorNoDevice or (error == cuda.cudaError_t.cudaSuccess and count == 0):
            raise NotExecutableError(
                "there is an NVIDIA driver but no GPU that this process may use.",
                cure="Check nvidia-smi and CUDA_VISIBLE_DEVICES, or choose an onnxruntime engine.",
            )
        self._check(error)
        properties = self._call(cuda.cudaGetDeviceProperties, 0)
        return Device(
            name=bytes(properties.name).split(b"\0")[0].decode(errors="replace"),
            capability=(int(properties.major), int(properties.minor)),
            memory_bytes=int(properties.totalGlobalMem),
            cuda=self._version(cuda.cudaDriverGetVersion()),
            driver=driver_version(),
        )

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new device memory."""
        error, address = self._cuda.cudaMalloc(size_bytes)
        if error == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            free, total = self._call(self._cuda.cudaMemGetInfo)
            raise EngineError(
                f"the GPU has no room for another {size_bytes / 1e9:.2f} GB: {free / 1e9:.2f} of {total / 1e9:.2f} GB "
                "are free.",
                cure="Stop what else uses the GPU, or build the engine with smaller profiles.",
            )
        self._check(error)
        return int(address)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call(self._cuda.cudaFree, address)

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return new page-locked host memory, uint8 [size_bytes]."""
        address = int(self._call(self._cuda.cudaHostAlloc, size_bytes, 0))
        memory: Any = (ctypes.c_uint8 * size_bytes).from_address(address)
        return np.frombuffer(memory, np.uint8)

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        """Free page-locked memory."""
        self._call(self._cuda.cudaFreeHost, memory.ctypes.data)

    def create_stream(self) -> int:
        """Return a new stream."""
        return int(self._call(self._cuda.cudaStreamCreateWithFlags, self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call(self._cuda.cudaStreamDestroy, stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all work on the stream is done."""
        self._call(self._cuda.cudaStreamSynchronize, stream)

    def copy_to_device(self, address: int, memory: NDArray[np.uint8], stream: int) -> None:
        """Enqueue a copy to the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._cuda.cudaMemcpyAsync, address, memory.ctypes.data, memory.nbytes, kind, stream)

    def copy_to_host(self, memory: NDArray[np.uint8], address: int, stream: int) -> None:
        """Enqueue a copy from the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._cuda.cudaMemcpyAsync, memory.ctypes.data, address, memory.nbytes, kind, stream)

    def begin_capture(self, stream: int) -> None:
        """Record what is enqueued from here on. Other threads may go on using CUDA meanwhile."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call(self._cuda.cudaStreamBeginCapture, stream, mode)

    def end_capture(self, stream: int) -> int:
        """Return what was recorded as a graph that can be launched."""
        recorded = self._call(self._cuda.cudaStreamEndCapture, stream)
        try:
            return int(self._call(self._cuda.cudaGraphInstantiate, recorded, 0))
        finally:
            self._call(self._cuda.cudaGraphDestroy, recorded)

    def launch(self, graph: int, stream: int) -> None:
        """Enqueue a graph."""
        self._call(self._cuda.cudaGraphLaunch, graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """Destroy a graph."""
        self._call(self._cuda.cudaGraphExecDestroy, graph)

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Call a CUDA function; return its one result, its results as a tuple, or None."""
        error, *results = function(*arguments)
        self._check(error)
        return results[0] if len(results) == 1 else tuple(results) or None

    def _check(self, error: Any) -> None:
        if error == self._cuda.cudaError_t.cudaSuccess:
            return
        _, text = self._cuda.cudaGetErrorString(error)
        raise EngineError(
            f"CUDA failed: {text.decode()} ({error.name}).",
            cure="Look at nvidia-smi and the system log. After an error inside a kernel the process must be restarted.",
        )

    def _version(self, result: tuple[Any, int]) -> str:
        error, number = result
        self._check(error)
        return f"{number // 1000}.{number % 1000 // 10}"


def driver_version(source: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the NVIDIA driver's version as its kernel module says it, or "" where it does not (outside Linux)."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", source.read_text())
    except OSError:
        return ""
    return found[0] if found else ""
