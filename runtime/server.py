"""The server's life: load and prove, warm up, listen, serve, switch, drain, stop. Knows no request."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import resource
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import runtime
from runtime.bundle import open_bundle
from runtime.embedder import Embedder, open_embedder
from runtime.errors import F2rtError
from runtime.gate import open_gate
from runtime.serving import logs
from runtime.serving.access import Keys
from runtime.serving.memory import Resident, keep_little
from runtime.serving.metrics import EngineMetrics, Metrics
from runtime.serving.model import Model, Proven, load, warn_if_unverified
from runtime.serving.models import Models
from runtime.serving.pipeline import Pipeline
from runtime.serving.shadow import Shadow, check_tokenizer
from runtime.serving.tracing import OtlpTracer
from runtime.settings import EngineSettings, ModelSettings, ServeSettings, ShadowSettings
from runtime.wire.grpc_server import GrpcServer
from runtime.wire.http_server import HttpServer
from runtime.wire.tls import TlsFiles

log = logging.getLogger("f2rt.server")

# Python's threads take turns at most this often. Its default of 5 ms is the time of several short texts.
_SWITCH_S = 0.0005
_LOOK_AT_MEMORY_S = 10.0


class Server:
    """All ports on all models of one process."""

    def __init__(self, models: Models, settings: ServeSettings) -> None:
        """Build without listening. Must be called inside the event loop. Raises InputError for keys or TLS files."""
        self.settings = settings
        self.models = models
        self._keys = Keys(settings.keys_file)
        self._tls = TlsFiles(settings.tls) if settings.tls else None
        self._grpc = GrpcServer(models, settings, self._keys, self._tls)
        self._http = HttpServer(models, settings, self._keys, self._tls) if settings.http_address else None
        self._tasks: set[asyncio.Task[None]] = set()
        self._keeping: asyncio.Task[None] | None = None
        models.watch(self._state_changed)

    async def start(self) -> tuple[str, str]:
        """Listen. Returns the addresses of gRPC and of HTTP, "" for none. Raises InputError."""
        grpc_address = self._grpc.start()
        http_address = await self._http.start() if self._http else ""
        self._keeping = asyncio.create_task(self._keep_small())
        return grpc_address, http_address

    def reload(self) -> None:
        """Begin to read keys, certificates and every model again. What fails is logged, and the old one stays."""
        self._background(self._reload())

    async def stop(self) -> None:
        """Report NOT_SERVING, refuse new requests, finish what was admitted within `drain_s`, and stop."""
        if self._keeping is not None:
            self._keeping.cancel()
        self.models.drain()
        # Until here ports stay open: refusals and NOT_SERVING reach their clients.
        loop, limit_s = asyncio.get_running_loop(), self.settings.drain_s
        end_s = loop.time() + limit_s
        waiting: list[Awaitable[object]] = [loop.run_in_executor(None, self._grpc.wait_idle, limit_s)]
        if self._http is not None:
            waiting.append(_within(self._http.idle(), limit_s))
        await asyncio.gather(*waiting)
        stopping: list[Awaitable[object]] = [loop.run_in_executor(None, self._grpc.stop)]
        if self._http is not None:
            stopping.append(self._http.stop(end_s - loop.time()))
        await asyncio.gather(*stopping)
        await self.models.idle()
        await self.models.close()

    async def _reload(self) -> None:
        try:
            self._keys.reload()
        except F2rtError as error:
            log.error("the keys stay as they were: %s", error)
        if self._tls is not None:
            try:
                self._tls.reload()
            except F2rtError as error:
                log.error("the certificates stay as they were: %s", error)
        for model in self.models:
            with contextlib.suppress(Exception):  # logged where it happened
                await model.reload()

    async def _keep_small(self) -> None:
        """Give back what requests took and freed, on a period."""
        resident, loop = Resident(), asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_AT_MEMORY_S)
            await loop.run_in_executor(None, resident.look)

    def _state_changed(self) -> None:
        self._grpc.show_health()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def open_models(
    proven: Sequence[tuple[ModelSettings, Proven]], engine: EngineSettings, settings: ServeSettings
) -> Models:
    """Make models of proven engines and warm them up. Raises InputError for a shadow that does not fit."""
    metrics = Metrics()
    models = [Model(spec, one, engine, settings, metrics) for spec, one in proven]
    for model in models:
        await model.warm_up()
    if settings.shadow is not None:
        shadow = settings.shadow
        loop = asyncio.get_running_loop()
        embedder = await loop.run_in_executor(None, _open_shadow, shadow, engine, settings)
        first = models[0]
        warn_if_unverified(f"the shadow of {first.name}", embedder)
        counted = EngineMetrics(metrics, f"{first.name}-shadow")
        pipeline = Pipeline(embedder, settings.scheduling, settings.truncate, counted)
        first.shadow = Shadow(pipeline, first.embedder.bundle.manifest.tokenizer.sha256, first.name, shadow, metrics)
        looking_on = f"{embedder.loaded.record.full_name} of {shadow.bundle}"
        log.info("model %s: %g %% of requests are shown to the shadow %s", first.name, 100 * shadow.share, looking_on)
    tracer = OtlpTracer(settings.otlp_endpoint, runtime.__version__) if settings.otlp_endpoint else None
    return Models(models, metrics, log_requests=settings.access_log, tracer=tracer)


async def run(
    proven: list[tuple[ModelSettings, Proven]],
    engine: EngineSettings,
    settings: ServeSettings,
    *,
    started: Callable[[str, str], None] = lambda grpc, http: None,
    reload_asked: Callable[[], bool] = lambda: False,
) -> None:
    """Serve until SIGTERM or SIGINT; SIGHUP reloads. `started` is told the addresses once the server answers.

    `reload_asked`: whether a SIGHUP came before there was anything to reload. `proven` is emptied: an engine that a
    reload replaces must be held by nobody.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    models = await open_models(proven, engine, settings)
    proven.clear()
    server = Server(models, settings)
    loop.add_signal_handler(signal.SIGHUP, server.reload)
    started(*await server.start())
    if reload_asked():
        server.reload()
    await stopping.wait()
    log.info("draining")
    await server.stop()


def _open_shadow(shadow: ShadowSettings, engine: EngineSettings, settings: ServeSettings) -> Embedder:
    gate = open_gate(settings.policy, settings.allow_unverified)
    return open_embedder(open_bundle(Path(shadow.bundle)), shadow.engine, engine, settings.limits, gate)


def prove(models: Sequence[ModelSettings], engine: EngineSettings, settings: ServeSettings) -> list[Proven]:
    """Open and prove the engine of every model.

    Raises BundleError, UnverifiedError, NotFoundError or EngineError, and InputError for the policy.
    """
    proven = []
    for spec in models:
        one = load(spec, engine, settings)
        loaded = one.embedder.loaded
        log.info("model %s: %s, %s", spec.name, loaded.record.full_name, loaded.selection)
        log.info("model %s: reproduces %s, smallest cosine %.7f", spec.name, _reproduced(one), loaded.golden_cosine)
        warn_if_unverified(spec.name, one.embedder)
        proven.append(one)
    return proven


def check(models: Sequence[ModelSettings], engine: EngineSettings, settings: ServeSettings) -> list[str]:
    """Open and prove everything, keys, TLS files and shadow included, and close it; returns a line per engine."""
    logs.configure("text")
    logging.getLogger().setLevel(logging.WARNING)
    Keys(settings.keys_file)
    if settings.tls is not None:
        TlsFiles(settings.tls)
    proven = prove(models, engine, settings)
    named = [(spec.name, one) for spec, one in zip(models, proven, strict=True)]
    if settings.shadow is not None:
        embedder = _open_shadow(settings.shadow, engine, settings)
        first = named[0]
        check_tokenizer(embedder.bundle, first[1].embedder.bundle.manifest.tokenizer.sha256, first[0])
        named.append((f"the shadow of {first[0]}", Proven(embedder, embedder.loaded.expected)))
    lines = []
    for name, one in named:
        loaded = one.embedder.loaded
        lines.append(
            f"{name}{_unverified(one)}: {loaded.record.full_name} reproduces {_reproduced(one)}, smallest cosine "
            f"{loaded.golden_cosine:.7f}, fingerprint {one.embedder.fingerprint}"
        )
        one.embedder.close()
    return lines


def serve(
    models: Sequence[ModelSettings], engine: EngineSettings, settings: ServeSettings, *, log_style: str = "text"
) -> None:
    """Load, prove and serve engines until told to stop.

    Raises BundleError, UnverifiedError, NotFoundError, EngineError or InputError before anything listens.
    """
    logs.configure(log_style)
    # By default SIGHUP ends a process. One that comes while engines load means files newer than those being read.
    early = threading.Event()
    signal.signal(signal.SIGHUP, lambda number, frame: early.set())
    sys.setswitchinterval(_SWITCH_S)
    keep_little()
    _allow_connections(settings.max_connections * (2 if settings.http_address else 1))  # each port counts its own
    proven = prove(models, engine, settings)
    closed = bool(settings.keys_file) or (settings.tls is not None and bool(settings.tls.client_ca))
    for address in (settings.grpc_address, settings.http_address):
        if address and not is_loopback(address) and not (closed and settings.tls):
            missing = " or ".join([*([] if closed else ["key"]), *([] if settings.tls else ["TLS"])])
            log.warning("%s is open to the network without %s", address, missing)

    named = list(zip(models, proven, strict=True))
    del proven
    names, fingerprint = ", ".join(m.name + _unverified(one) for m, one in named), named[0][1].embedder.fingerprint

    def started(grpc: str, http: str) -> None:
        if http:
            log.info("serving HTTP on %s", http)
        log.info("serving %s on %s, fingerprint %s", names, grpc, fingerprint)

    asyncio.run(run(named, engine, settings, started=started, reload_asked=early.is_set))
    log.info("stopped")


def _reproduced(one: Proven) -> str:
    return f"{one.expected.origin} (a stand-in)" if one.expected.stand_in else "PyTorch's golden vectors"


def _unverified(one: Proven) -> str:
    reason = one.embedder.loaded.unverified
    return f" (unverified: {reason})" if reason else ""


async def _within(waiting: Awaitable[object], seconds: float) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(waiting, seconds)


def _allow_connections(wanted: int) -> None:
    """Let the process have as many files open as connections are allowed, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted += 256  # the server's own
    need = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if need < wanted:
        log.warning("the system lets this process have %d files open; all connections allowed need %d", need, wanted)
    if soft != resource.RLIM_INFINITY and soft < need:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def is_loopback(address: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
