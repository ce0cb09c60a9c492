"""Compiles a bundle's graph to an engine with TensorRT or TensorRT-RTX: one module, the import chosen by backend.

Both flavours are strongly typed: precision comes from the graph alone, and there is no flag that could be forgotten or
ignored. Whether the precision really arrived is read back from the parsed network before it is compiled. Building for a
named GPU needs no GPU; running the result does, so an engine leaves here as *not executed*.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.precision import Precision
from export.profiles import Profile
from runtime.errors import EngineError, InputError, MissingExtraError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PRECISIONS = (Precision.FP16, Precision.BF16)
_INSTALL = {
    "tensorrt": "pip install 'f2rt[tensorrt]'; its libraries come from NVIDIA's own package index",
    "tensorrt-rtx": "pip install 'f2rt[tensorrt-rtx]'",
}
_TARGET = re.compile(r"sm(\d+)")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Built:
    """A compiled engine's bytes, who made it, and for which GPU ("current" or for example "sm89")."""

    data: bytes
    builder: dict[str, str]
    flags: list[str]
    target: str


def build_engine(
    graph: Path,
    backend: str,
    precision: Precision,
    profiles: tuple[Profile, ...],
    *,
    target: str | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Built:
    """Compile `graph`. `target` is smNN, or None for the GPU of this machine.

    Raises InputError for an unknown backend, target or a precision it cannot compile, MissingExtraError without the
    library, EngineError with the library's own words when parsing or compiling fails.
    """
    if backend not in MODULES:
        raise InputError(f"there is no builder {backend!r}.", cure=f"Choose one of: {', '.join(MODULES)}.")
    if precision not in PRECISIONS:
        raise InputError(
            f"{backend} does not build {precision}: it has no kernel for attention in float32.",
            cure=f"Choose one of: {', '.join(PRECISIONS)}.",
        )
    return _Build(_library(backend), backend, precision, progress).run(graph, profiles, target)


def library_version(backend: str) -> str:
    """Return the version of a backend's library. Raises MissingExtraError."""
    return str(_library(backend).__version__)


def _library(backend: str) -> Any:
    try:
        return importlib.import_module(MODULES[backend])
    except ImportError as error:
        raise MissingExtraError(
            f"{backend} is not installed here ({error}).", cure=f"Install it with: {_INSTALL[backend]}"
        ) from error


class _Build:
    """One compilation. `trt` is the flavour's module; both have the names used here."""

    def __init__(self, trt: Any, backend: str, precision: Precision, progress: Progress) -> None:
        self._trt = trt
        self._backend = backend
        self._precision = precision
        self._progress = progress
        self._messages: list[str] = []
        self._logger = _logger(trt, self._messages)

    def run(self, graph: Path, profiles: tuple[Profile, ...], target: str | None) -> Built:
        trt = self._trt
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parse(network, graph)
        self._check_types(network)
        config = builder.create_builder_config()
        config.progress_monitor = _monitor(trt, self._progress)
        flags = ["strongly typed"]
        if len(profiles) == 1:  # the builder refuses the flag with several
            config.set_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
            flags.append("distributive independence: no result depends on the rest of its batch")
        if target is not None:
            config.num_compute_capabilities = 1
            if not config.set_compute_capability(self._capability(target), 0):
                raise EngineError(f"{self._backend} does not accept {target}: {self._last()}", cure="Choose another.")
        for profile in profiles:
            config.add_optimization_profile(self._profile(builder, network, profile))
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError(
                f"{self._backend} could not compile {graph.name} for {target or 'this GPU'}: {self._last()}",
                cure="Look at the message; with too little memory, build with fewer or smaller profiles.",
            )
        return Built(
            data=bytes(plan),
            builder={self._backend: str(trt.__version__)},
            flags=flags,
            target=target or "current",
        )

    def _parse(self, network: Any, graph: Path) -> None:
        parser = self._trt.OnnxParser(network, self._logger)
        if parser.parse_from_file(str(graph)):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [f"node {e.node_name()} ({e.node_operator()}): {e.desc()}" for e in errors]
        raise EngineError(
            f"{self._backend} cannot read {graph.name}: {'; '.join(lines) or self._last()}",
            cure="Export the checkpoint again with this f2rt; report the node if it stays.",
        )

    def _check_types(self, network: Any) -> None:
        """Refuse a network whose matrix products are not all of the graph's precision: it would run, and slowly."""
        trt = self._trt
        expected = {Precision.FP16: trt.DataType.HALF, Precision.BF16: trt.DataType.BF16}[self._precision]
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        products = [x for x in layers if x.type == trt.LayerType.MATRIX_MULTIPLY]
        wrong = [x for x in products if x.get_output(0).dtype != expected]
        if not products or wrong:
            first = f"{wrong[0].name} is {wrong[0].get_output(0).dtype}" if wrong else "it has no matrix product"
            raise EngineError(
                f"{len(wrong)} of {len(products)} matrix products of the graph are not {self._precision}: {first}.",
                cure=f"The graph is not a {self._precision} graph: export the checkpoint again.",
            )

    def _profile(self, builder: Any, network: Any, profile: Profile) -> Any:
        """From one text of one token up to the bucket, tuned for the full bucket."""
        shapes = builder.create_optimization_profile()
        most = (profile.rows, profile.tokens)
        for index in range(network.num_inputs):
            shapes.set_shape(network.get_input(index).name, (1, 1), most, most)
        return shapes

    def _capability(self, target: str) -> Any:
        """Return the library's name for smNN. Raises InputError naming those there are."""
        capability = self._trt.ComputeCapability
        known = sorted(name.lower() for name in dir(capability) if re.fullmatch(r"SM\d+", name))
        if not _TARGET.fullmatch(target) or target not in known:
            raise InputError(
                f"{self._backend} {self._trt.__version__} does not build for {target!r}.",
                cure=f"It builds for: {', '.join(known)}.",
            )
        return getattr(capability, target.upper())

    def _last(self) -> str:
        return self._messages[-1] if self._messages else "it gave no reason"


def _logger(trt: Any, messages: list[str]) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for our own message; the rest is noise to a user."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                messages.append(message)

    return Logger()


def _monitor(trt: Any, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Passes the builder's phases on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            progress(f"build: {phase_name}", 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            total = self._totals.get(phase_name, 0)
            progress(f"build: {phase_name}", total, total)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"build: {phase_name}", step + 1, self._totals.get(phase_name, 0))
            return True

    return Monitor()
