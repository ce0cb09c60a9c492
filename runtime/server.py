"""The server's life: load and prove, listen, serve, drain, stop. Knows no request."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.bundle import open_bundle
from runtime.embedder import Embedder, open_embedder
from runtime.errors import InputError, status_of
from runtime.service import SERVICE_NAME, EmbeddingService
from runtime.settings import EngineSettings, ServeSettings

log = logging.getLogger("f2rt.server")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_FLUSH_S = 0.2  # for the last bytes of what was answered


class GrpcServer:
    """One listening gRPC server on one embedder."""

    def __init__(self, embedder: Embedder, settings: ServeSettings) -> None:
        """Build the server without listening. Must be called inside the event loop that will run it."""
        self.settings = settings
        self.service = EmbeddingService(embedder, settings)
        self._health = _Health()
        self._server = grpc.aio.server(
            interceptors=[_ReadableRequests()],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                # Two servers on one port would share its connections unseen.
                ("grpc.so_reuseport", 0),
            ],
        )
        pb_grpc.add_EmbeddingServiceServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = ["", SERVICE_NAME]
        reflection.enable_server_reflection([SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self) -> str:
        """Listen and report SERVING. Returns the address with the port really taken. Raises InputError."""
        address = self.settings.grpc_address
        try:
            port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise InputError(
                f"cannot listen on {address}: it is in use, or not an address of this machine.",
                cure="Choose another one with --grpc HOST:PORT.",
            ) from error
        await self._server.start()
        for name in self._names:
            await self._health.set(name, _SERVING)
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    async def stop(self) -> None:
        """Report NOT_SERVING, refuse new requests, finish what was admitted within `drain_s`, and stop."""
        self.service.draining = True
        for name in self._names:
            await self._health.set(name, _NOT_SERVING)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.service.idle(), self.settings.drain_s)
        # What is still open now is over its time, or a stream that never ends by itself, such as a health Watch. Until
        # here the port stays open: refusals and NOT_SERVING reach their clients. Never stop twice: grpc.aio crashes.
        await self._server.stop(_FLUSH_S)
        await asyncio.get_running_loop().run_in_executor(None, self.service.close)


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 with List, which the library's asyncio servicer does not have."""

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Return the status of every service."""
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in self._server_status.items()}
        return health_pb2.HealthListResponse(statuses=statuses)


class _ReadableRequests(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Answers bytes that are no request with INVALID_ARGUMENT; the library's own answer is UNKNOWN."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Return the method's handler with this check before it."""
        handler = await continuation(details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                return error

        async def answer(request: Any, context: Any) -> Any:
            if isinstance(request, DecodeError):
                error = InputError(f"{request}.", cure="Send the message of the .proto; strings are valid UTF-8.")
                await context.abort(grpc.StatusCode[status_of(error).grpc], str(error))
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, parse, handler.response_serializer)


async def run(
    embedder: Embedder, settings: ServeSettings, *, started: Callable[[str], None] = lambda address: None
) -> None:
    """Serve until SIGTERM or SIGINT; `started` is told the address once the server answers."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    server = GrpcServer(embedder, settings)
    started(await server.start())
    await stopping.wait()
    log.info("draining")
    await server.stop()


def serve(folder: Path, engine: str, engine_settings: EngineSettings, settings: ServeSettings) -> None:
    """Load, prove and serve an engine of a bundle until told to stop.

    Raises BundleError, UnverifiedError, NotFoundError, EngineError or InputError before anything listens.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    bundle = open_bundle(folder)
    embedder = open_embedder(bundle, engine, engine_settings, settings.limits)
    loaded = embedder.loaded
    log.info("engine %s: %s", loaded.record.name, loaded.selection)
    log.info("golden texts reproduced, smallest cosine %.7f", loaded.golden_cosine)
    if not _is_loopback(settings.grpc_address):
        log.warning("%s is open to the network without key or TLS", settings.grpc_address)

    def started(address: str) -> None:
        log.info("serving %s on %s, fingerprint %s", folder, address, embedder.fingerprint)

    try:
        asyncio.run(run(embedder, settings, started=started))
    finally:
        embedder.close()
    log.info("stopped")


def _is_loopback(address: str) -> bool:
    if address.startswith("unix:"):
        return True
    host = address.rpartition(":")[0].strip("[]")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"
