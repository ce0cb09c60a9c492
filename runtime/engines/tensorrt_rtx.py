"""What TensorRT-RTX has and TensorRT has not.

* Its plans are finished on the device: kernels are compiled when a context first needs them, and again, specialized,
  for the shapes that come. The *runtime cache* keeps them across processes.
* It captures and replays CUDA graphs itself, once the specialized kernels of a shape are there. Capturing its stream
  from outside would freeze whatever kernels happened to be ready.
* It can say whether a plan fits library and device without loading it.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from runtime.bundle import EngineRecord
from runtime.engines.cuda import Device
from runtime.engines.tensorrt_library import Library
from runtime.errors import EngineError, NotExecutableError, OutputError
from runtime.files import cache_folder, write_atomic

if TYPE_CHECKING:  # without the library installed these are Any; the tests check against the real ones
    import tensorrt
    import tensorrt_rtx

log = logging.getLogger("f2rt.engine")


class RtxLibrary(Protocol):
    """The module, as far as only this flavour has it."""

    CudaGraphStrategy: type[tensorrt_rtx.CudaGraphStrategy]
    DynamicShapesKernelSpecializationStrategy: type[tensorrt_rtx.DynamicShapesKernelSpecializationStrategy]
    EngineInvalidityDiagnostics: type[tensorrt_rtx.EngineInvalidityDiagnostics]
    EngineValidity: type[tensorrt_rtx.EngineValidity]


def check_validity(trt: Library, runtime: tensorrt.Runtime, record: EngineRecord, plan: bytes | mmap.mmap) -> None:
    """Ask the library whether a plan can run here, before it is loaded. Raises NotExecutableError, EngineError."""
    rtx = cast(RtxLibrary, trt)
    validity, found = cast("tensorrt_rtx.Runtime", runtime).get_engine_validity(plan)
    if validity != rtx.EngineValidity.INVALID:
        return
    flags = rtx.EngineInvalidityDiagnostics
    build = f"Build it again: f2rt build BUNDLE --backend {record.backend} --precision {record.precision}"
    reasons: dict[tensorrt_rtx.EngineInvalidityDiagnostics, tuple[type[EngineError], str, str]] = {
        flags.MALFORMED_ENGINE: (EngineError, "it is damaged, or no plan of this library", build),
        flags.VERSION_MISMATCH: (NotExecutableError, "another version made it", build),
        flags.UNSUPPORTED_CC: (NotExecutableError, "it was compiled for other GPUs", build),
        flags.OLD_CUDA_DRIVER: (NotExecutableError, "the NVIDIA driver is too old", "Update the driver."),
        flags.OLD_CUDA_RUNTIME: (NotExecutableError, "the CUDA runtime is too old", "Update CUDA."),
        flags.INSUFFICIENT_GPU_MEMORY: (NotExecutableError, "the GPU has too little memory", "Use a larger GPU."),
    }
    for flag, (kind, reason, cure) in reasons.items():
        if found & int(flag):
            raise kind(f"{record.backend} cannot run {record.file}: {reason}.", cure=cure)
    raise NotExecutableError(
        f"{record.backend} cannot run {record.file} here and gives no reason it has a name for ({found}).",
        cure="Check the NVIDIA driver with nvidia-smi.",
    )


class RuntimeCache:
    """The kernels compiled on this device for one engine, kept in a file of the user's cache folder.

    The library checks a cache against version, GPU and driver by itself and refuses what does not fit; the file's name
    keeps caches of different engines, GPUs and drivers apart.
    """

    def __init__(self, config: tensorrt.IRuntimeConfig, record: EngineRecord, device: Device) -> None:
        """Create the cache and fill it from its file, where there is one that fits."""
        # What the cache was made by is kept as long as the cache.
        self._config = cast("tensorrt_rtx.IRuntimeConfig", config)
        self._cache: tensorrt_rtx.IRuntimeCache = self._config.create_runtime_cache()
        self.path = cache_path(record, device)
        self._stored = b""
        try:
            self._stored = self.path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("the runtime cache %s cannot be read: %s", self.path, error.strerror)
            return
        if not self._cache.deserialize(self._stored):
            log.warning("the runtime cache %s does not fit this machine; kernels are compiled again", self.path)

    def attach(self, config: tensorrt.IRuntimeConfig) -> None:
        """Make contexts of this configuration use the cache. Raises EngineError."""
        if not cast("tensorrt_rtx.IRuntimeConfig", config).set_runtime_cache(self._cache):
            raise EngineError("TensorRT-RTX does not accept its runtime cache.", cure=f"Delete {self.path}.")

    def save(self) -> None:
        """Write what was compiled since. A cache that cannot be written costs time at the next start, no more."""
        memory = self._cache.serialize()
        if memory is None or bytes(memory) == self._stored:
            return
        try:
            write_atomic(self.path, bytes(memory))
        except OutputError as error:
            log.warning("the runtime cache was not saved: %s", error)


def configure(trt: Library, config: tensorrt.IRuntimeConfig, *, capture: bool) -> None:
    """Set what this flavour decides at run time: lazily specialized kernels, and graphs where `capture` says so.

    Lazy: a new shape is answered at once by a general kernel while its specialized one is compiled in the background.
    """
    rtx, own = cast(RtxLibrary, trt), cast("tensorrt_rtx.IRuntimeConfig", config)
    own.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.LAZY
    graphs = rtx.CudaGraphStrategy
    own.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if capture else graphs.DISABLED


def cache_path(record: EngineRecord, device: Device) -> Path:
    """Return where the kernels of an engine are kept.

    The plan's hash stands for graph, weights, profiles, flags, calibration and the library's version.
    """
    parts = [record.sha256, record.builder.get(record.backend, ""), device.target, device.software]
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return cache_folder() / "runtime" / f"{name}.cache"
