"""The library behind a TensorRT backend, and whether an engine can run with it here.

Two flavours share one API: TensorRT (`tensorrt`) and TensorRT-RTX (`tensorrt-rtx`). What they do not share stands in
`runtime.engines.tensorrt_rtx`. Whether an engine fits library and GPU is decided from the manifest, before the plan
is read: a plan made for something else is named as such instead of failing somewhere inside the library.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from runtime.bundle import EngineRecord
from runtime.engines.cuda import Device
from runtime.errors import EngineError, MissingExtraError, NotExecutableError

if TYPE_CHECKING:  # without the library installed these are Any; the tests check against the real ones
    import tensorrt


class Library(Protocol):
    """The module, as far as it is used here: what both flavours have."""

    __version__: str
    ILogger: type[tensorrt.ILogger]
    IProgressMonitor: type[tensorrt.IProgressMonitor]
    IStreamWriter: type[tensorrt.IStreamWriter]
    Builder: type[tensorrt.Builder]
    BuilderFlag: type[tensorrt.BuilderFlag]
    DataType: type[tensorrt.DataType]
    ExecutionContextAllocationStrategy: type[tensorrt.ExecutionContextAllocationStrategy]
    LayerInformationFormat: type[tensorrt.LayerInformationFormat]
    LayerType: type[tensorrt.LayerType]
    NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
    OnnxParser: type[tensorrt.OnnxParser]
    ErrorCode: type[tensorrt.ErrorCode]
    ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
    Runtime: type[tensorrt.Runtime]


_TARGET = re.compile(r"(sm\d+)(?:-(.+))?")


@dataclass(frozen=True)
class Flavour:
    """One of the two libraries: its module, how it is installed, and the first bytes of its plans."""

    backend: str
    module: str
    install: str
    magic: bytes


FLAVOURS = {
    "tensorrt": Flavour(
        "tensorrt",
        "tensorrt",
        "pip install 'f2rt[tensorrt]', in a checkout '.[tensorrt]', with NVIDIA's own package index as "
        "--extra-index-url: it alone has the libraries",
        b"ftrt",
    ),
    "tensorrt-rtx": Flavour(
        "tensorrt-rtx", "tensorrt_rtx", "pip install 'f2rt[tensorrt-rtx]', in a checkout '.[tensorrt-rtx]'", b"vtrt"
    ),
}


def load_library(backend: str) -> Library:
    """Return the module of a backend. Raises MissingExtraError that says how to install it."""
    flavour = FLAVOURS[backend]
    try:
        return cast(Library, importlib.import_module(flavour.module))
    except (ImportError, OSError) as error:
        if not isinstance(error, ModuleNotFoundError):  # the module is there, its shared libraries cannot be loaded
            raise MissingExtraError(
                f"{backend} is installed here, and cannot be loaded ({error}).",
                cure=f"Free memory where there is too little to load it; else install it again: {flavour.install}",
            ) from error
        raise MissingExtraError(
            f"{backend} is not installed here ({error}).", cure=f"Install it with: {flavour.install}"
        ) from error


def check_fits(record: EngineRecord, device: Device, version: str) -> None:
    """Compare what an engine was made for with the GPU and the library's version, from the manifest alone.

    Raises EngineError for an engine of the other flavour, NotExecutableError for another version or another GPU.
    """
    rebuild = f"Build it here: f2rt build BUNDLE --backend {record.backend} --precision {record.precision}"
    made_by = [backend for backend in FLAVOURS if backend in record.builder]
    if made_by and record.backend not in made_by:
        raise EngineError(
            f"{record.full_name} was compiled by {made_by[0]}; {record.backend} does not run its plans.", cure=rebuild
        )
    compiled_by = record.builder.get(record.backend, "an unknown version")
    if compiled_by != version:
        raise NotExecutableError(
            f"{record.full_name} was compiled by {record.backend} {compiled_by}; {version} is installed here, and a "
            "plan runs only with the version that made it.",
            cure=f"Install {record.backend} {compiled_by}, or build it again. {rebuild}",
        )
    match = _TARGET.fullmatch(record.target or "")
    if match is None:
        raise NotExecutableError(f"{record.full_name} does not say which GPU it is for.", cure=rebuild)
    sm, gpu = match.groups()
    if sm != device.sm or (gpu is not None and record.target != device.target):
        made_for = record.builder.get("gpu", record.target)
        raise NotExecutableError(
            f"{record.full_name} was compiled for {made_for}; the GPU here is {device}.", cure=rebuild
        )


def check_magic(record: EngineRecord, start: bytes) -> None:
    """Compare a plan's first bytes with its flavour's. Raises EngineError when they are the other flavour's."""
    for flavour in FLAVOURS.values():
        if start.startswith(flavour.magic) and flavour.backend != record.backend:
            raise EngineError(
                f"{record.file} is a plan of {flavour.backend}, not of {record.backend}.",
                cure=f"Build it again: f2rt build BUNDLE --backend {record.backend} --precision {record.precision}",
            )


def make_logger(
    trt: Library, errors: list[str], listen: Callable[[str], None] = lambda message: None
) -> tensorrt.ILogger:
    """Return a logger that prints nothing: it collects errors for our messages, and `listen` hears everything."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """The library's log in our hands."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                errors.append(message)
            listen(message)

    return Logger()


def last_words(messages: list[str]) -> str:
    """Return what the library said, shortened: its first error is the cause, later ones follow from it."""
    return messages[0][:800] if messages else "it gave no reason"
