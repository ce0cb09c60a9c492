"""Compiles a bundle's graph to a plan with TensorRT or TensorRT-RTX: one module, the library chosen by backend.

Both flavours are strongly typed: precision comes from the graph alone, and there is no flag that could be forgotten or
ignored. Whether it really arrived is read back twice (`export.engine_types`): from the parsed network before it is
compiled, and from the compiled layers afterwards. Where the flavours differ:

* TensorRT-RTX compiles for named GPUs without one; TensorRT only for the GPU it runs on.
* TensorRT times its kernels and keeps a timing cache; TensorRT-RTX has none, its kernels are chosen at run time.

Running the result needs the GPU it is for, so an engine leaves here as *not executed*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from export.builder_callbacks import Progress, plan_writer, progress_monitor
from export.engine_types import LayerLog, check_network, describe_layers, inspect_plan
from export.profiles import Profile
from export.timing_cache import TimingCache
from runtime.engines.cuda import CudaRuntime, Device
from runtime.engines.tensorrt_library import FLAVOURS, Library, last_words, load_library, make_logger
from runtime.errors import EngineError, InputError, NotExecutableError
from runtime.files import atomic_file

if TYPE_CHECKING:  # without the library installed these are Any; the tests check against the real ones
    import tensorrt
    import tensorrt_rtx

PRECISIONS = ("fp16", "bf16", "int8")
# Raise it when the same graph, library and profiles give another plan than before, or when more is asked of a plan: an
# engine made by other rules is built again.
BUILD_RULES = 1
RULES_NAME = "build rules"  # in an engine's record
ONNXRUNTIME_CUDA = "onnxruntime-cuda"  # compiles nothing: see `export.build`
_MOST_NODES = 20  # named in one message
# The parser's own text for an operator it lacks is the condition that failed: "false".
_WORDS = {
    "UNSUPPORTED_NODE": "there is no such operator, or not in this form",
    "UNSUPPORTED_NODE_ATTR": "an attribute is not supported",
    "UNSUPPORTED_NODE_INPUT": "an input is not supported",
    "UNSUPPORTED_NODE_DATATYPE": "its data type is not supported",
    "UNSUPPORTED_NODE_DYNAMIC": "a dynamic shape is not supported here",
    "UNSUPPORTED_NODE_SHAPE": "its shape is not supported",
    "INVALID_NODE": "the node is not valid",
}


class RtxLibrary(Protocol):
    """The module, as far as only TensorRT-RTX has it."""

    ComputeCapability: type[tensorrt_rtx.ComputeCapability]


@dataclass(frozen=True)
class Target:
    """The GPUs a plan is for, as the manifest names them: smNN, or with `device` that very GPU."""

    name: str
    device: Device | None = None

    @property
    def facts(self) -> dict[str, str]:
        """What to record about a GPU that was at hand."""
        if self.device is None:
            return {}
        known = {"gpu": self.device.name, "cuda driver": self.device.cuda, "driver": self.device.driver}
        return {name: value for name, value in known.items() if value}


@dataclass(frozen=True)
class Built:
    """A compiled plan's hash and size, who made it, and what is known of it."""

    sha256: str
    size_bytes: int
    builder: dict[str, str]
    flags: list[str] = field(default_factory=list)


def library_version(backend: str) -> str:
    """Return the version of a backend's library. Raises MissingExtraError."""
    return load_library(backend).__version__


def resolve_target(backend: str, target: str | None) -> Target:
    """Return what to compile for; without a target, the GPU of this machine.

    Raises InputError for a target that the backend does not compile for, or when there is neither target nor GPU;
    MissingExtraError without the library.
    """
    trt = load_library(backend)
    known = _capabilities(trt)
    if target is not None:
        if not known:
            raise InputError(
                f"{backend} compiles for the GPU it runs on and takes no target; {target!r} was given.",
                cure="Leave --target out and build on the machine that will run it, or use tensorrt-rtx.",
            )
        if target not in known:
            raise InputError(
                f"{backend} {trt.__version__} does not build for {target!r}.",
                cure=f"It builds for: {', '.join(known)}.",
            )
        return Target(target)
    try:
        device = CudaRuntime().device()
    except NotExecutableError as error:
        cure = f"Name the GPUs to compile for: --target {','.join(known)}." if known else "Build on a machine with one."
        raise InputError(f"no target was given and there is no GPU here: {error.message}", cure=cure) from error
    if known and device.sm not in known:
        raise InputError(
            f"{backend} {trt.__version__} does not build for the GPU here ({device}).",
            cure=f"It builds for: {', '.join(known)}.",
        )
    return Target(device.target, device)


def build_engine(
    graph: Path,
    plan: Path,
    backend: str,
    precision: str,
    profiles: Sequence[Profile],
    target: Target,
    *,
    cache_key: Sequence[str] = (),
    progress: Progress = lambda label, done, total: None,
) -> Built:
    """Compile `graph` into the file `plan`, whole and checked or not at all.

    `cache_key` names everything besides GPU and driver that the choice of kernels depends on. Raises InputError for an
    unknown backend or a precision it cannot compile, MissingExtraError without the library, EngineError with the
    library's own words when parsing or compiling fails, OutputError when the plan cannot be written.
    """
    check_backend(backend, precision)
    if not profiles:
        raise InputError("no profile was given.", cure="Give at least one, for example 1x64.")
    build = _Build(load_library(backend), backend, precision, progress)
    return build.run(graph, plan, profiles, target, cache_key)


def check_backend(backend: str, precision: str) -> None:
    """Raise InputError unless `backend` compiles graphs of `precision`."""
    if backend not in FLAVOURS:
        raise InputError(
            f"there is no builder {backend!r}.", cure=f"Choose one of: {', '.join((*FLAVOURS, ONNXRUNTIME_CUDA))}."
        )
    if precision not in PRECISIONS:
        raise InputError(
            f"{backend} does not build {precision}: it has no kernel for attention in float32.",
            cure=f"Choose one of: {', '.join(PRECISIONS)}.",
        )


def _capabilities(trt: Library) -> list[str]:
    """Return the targets a library compiles for without having them, in order; TensorRT has none."""
    capability = getattr(trt, "ComputeCapability", None)
    names = [name for name in dir(capability) if re.fullmatch(r"SM\d+", name)]
    return sorted((name.lower() for name in names), key=lambda name: int(name[2:]))


class _Build:
    """One compilation. `trt` is the flavour's module; both have the names used here."""

    def __init__(self, trt: Library, backend: str, precision: str, progress: Progress) -> None:
        self._trt = trt
        self._backend = backend
        self._precision = precision
        self._progress = progress
        self._messages: list[str] = []
        self._layers = LayerLog()
        self._logger = make_logger(trt, self._messages, self._layers.add)

    def run(
        self, graph: Path, plan: Path, profiles: Sequence[Profile], target: Target, cache_key: Sequence[str]
    ) -> Built:
        trt = self._trt
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parse(network, graph)
        promise = check_network(trt, network, self._precision, graph)
        flags = ["strongly typed", promise.flag]
        config = builder.create_builder_config()
        config.progress_monitor = progress_monitor(trt, self._progress)
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the layers' types can be read back
        if len(profiles) == 1:  # the builder refuses the flag with several
            config.set_flag(trt.BuilderFlag.DISTRIBUTIVE_INDEPENDENCE)
            flags.append("distributive independence: no result depends on the rest of its batch")
        if self._backend == "tensorrt-rtx":
            self._set_capability(config, target)
        for profile in profiles:
            config.add_optimization_profile(self._profile(builder, network, profile))
        timing = None
        if self._backend == "tensorrt" and target.device is not None:
            key = [
                *cache_key,
                trt.__version__,
                target.device.target,
                target.device.software,
                *map(str, profiles),
                *flags,
            ]
            timing = TimingCache(config, key)
            flags.append(timing.state)
        sha256, size_bytes = self._compile(builder, network, config, graph, plan, target)
        try:
            if timing is not None:
                timing.save(config)
            flags += self._read_back(plan, target, promise.int8, len(profiles))
        except BaseException:
            # No manifest will ever name it, and it can be as large as the graph.
            plan.unlink(missing_ok=True)
            raise
        versions = {self._backend: str(trt.__version__), RULES_NAME: str(BUILD_RULES), **target.facts}
        return Built(sha256, size_bytes, versions, [flag for flag in flags if flag])

    def _read_back(self, plan: Path, target: Target, int8: Mapping[str, int], profiles: int) -> list[str]:
        """Check what was compiled, and return lines for the manifest."""
        layers = self._layers.layers()
        if not layers and self._backend == "tensorrt-rtx":  # every version that f2rt was made with lists them
            raise EngineError(
                f"tensorrt-rtx {self._trt.__version__} does not list the layers of {plan.name} in a form that is "
                "known: what it computes in cannot be checked.",
                cure="Report it with the library's version; an earlier version may still list them.",
            )
        flags = [describe_layers(layers, self._precision, int8, profiles)]
        if target.device is not None:
            flags.append(inspect_plan(self._trt, self._logger, plan, self._precision, int8, profiles))
        return flags

    def _parse(self, network: tensorrt.INetworkDefinition, graph: Path) -> None:
        """Read the graph. Names every node that is not taken, not only the first."""
        parser = self._trt.OnnxParser(network, self._logger)
        if parser.parse_from_file(str(graph)):
            return
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        lines = [_spell(error) for error in errors[:_MOST_NODES]]
        if len(errors) > _MOST_NODES:
            lines.append(f"and {len(errors) - _MOST_NODES} more")
        if not any(error.node_name() or error.node_operator() for error in errors):
            # The log's first line is nearer to the cause than the parser's summary of it.
            raise EngineError(
                f"{self._backend} cannot read {graph.name}: {last_words(self._messages)} {'; '.join(lines)}.",
                cure="The file or its data is missing or damaged, or memory has run out: export the checkpoint again.",
            )
        raise EngineError(
            f"{self._backend} cannot read {graph.name}: {'; '.join(lines)}.",
            cure="It takes every graph that this f2rt exports: export the checkpoint again. A graph from elsewhere has "
            "to do without these nodes.",
        )

    def _profile(
        self, builder: tensorrt.Builder, network: tensorrt.INetworkDefinition, profile: Profile
    ) -> tensorrt.IOptimizationProfile:
        """From one text of one token up to the bucket, tuned for the full bucket."""
        shapes = builder.create_optimization_profile()
        most = (profile.rows, profile.tokens)
        for index in range(network.num_inputs):
            shapes.set_shape(network.get_input(index).name, (1, 1), most, most)
        return shapes

    def _set_capability(self, config: tensorrt.IBuilderConfig, target: Target) -> None:
        """Compile for one architecture, or for the very GPU at hand; by default it would be for several."""
        own = cast("tensorrt_rtx.IBuilderConfig", config)
        capabilities = cast(RtxLibrary, self._trt).ComputeCapability
        own.num_compute_capabilities = 1
        wanted = capabilities.CURRENT if target.device is not None else getattr(capabilities, target.name.upper())
        if not own.set_compute_capability(wanted, 0):
            raise EngineError(
                f"{self._backend} does not accept {target.name}: {last_words(self._messages)}",
                cure="Choose another target.",
            )

    def _compile(
        self,
        builder: tensorrt.Builder,
        network: tensorrt.INetworkDefinition,
        config: tensorrt.IBuilderConfig,
        graph: Path,
        plan: Path,
        target: Target,
    ) -> tuple[str, int]:
        """Compile straight into the file: the plan is never whole in memory a second time."""
        with atomic_file(plan) as file:
            writer = plan_writer(self._trt, file)
            try:
                done = builder.build_serialized_network_to_stream(network, config, writer)
            except MemoryError as error:
                raise self._out_of_memory(graph, target) from error
            if writer.error is not None:
                raise writer.error
            if not done:
                text = " ".join(self._messages)
                if re.search(r"out of memory|OutOfMemory|bad_alloc|[Aa]llocation failed", text):
                    raise self._out_of_memory(graph, target)
                raise EngineError(
                    f"{self._backend} could not compile {graph.name} for {target.name}: {last_words(self._messages)}",
                    cure="Try shorter or fewer profiles: attention has no kernel beyond some length."
                    if "Attention" in text
                    else "Look at the message; with too little memory, build with fewer or smaller profiles.",
                )
            return writer.digest.hexdigest(), writer.size_bytes

    def _out_of_memory(self, graph: Path, target: Target) -> EngineError:
        return EngineError(
            f"{self._backend} ran out of memory while compiling {graph.name} for {target.name}: "
            f"{last_words(self._messages)}. Nothing was changed.",
            cure="It needs 1.7 to 2.6 times the size of the graph's weights: free some memory, or build with fewer "
            "profiles.",
        )


def _spell(error: tensorrt.ParserError) -> str:
    """Return one parser error in a sentence: the node, its operator, and what is wrong with it."""
    words = _WORDS.get(error.code().name, "")
    text = error.desc()
    told = "" if text in ("false", "0") else " ".join(text.split())[:300]
    what = ": ".join(part for part in (words, told) if part)
    if not error.node_name() and not error.node_operator():
        return what
    return f"node {error.node_name()} ({error.node_operator()}): {what}"
