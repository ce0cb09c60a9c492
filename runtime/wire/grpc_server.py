"""The gRPC port: f2rt.v1, KServe v2, health and reflection on one listening server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from runtime.errors import InputError
from runtime.serving.access import Keys
from runtime.serving.model import State
from runtime.serving.models import Models
from runtime.settings import ServeSettings
from runtime.wire import f2rt_v1, kserve_v2
from runtime.wire.grpc_calls import MOST_REFLECTING, MOST_WAITING, Calls
from runtime.wire.grpc_health import Health
from runtime.wire.tls import TlsFiles

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
# Threads for those who are refused, for health and for Info, while every request, every stream and everybody whose
# message has not come has one.
_SPARE = 32
_FLUSH_S = 0.2  # for the last bytes of what was answered
_IDLE_MS = 30 * 60 * 1000
_KEEPALIVE_MS = 60 * 1000


class GrpcServer:
    """One listening gRPC server on the models of a server."""

    def __init__(self, models: Models, settings: ServeSettings, keys: Keys, tls: TlsFiles | None) -> None:
        """Build the server without listening. Must be called inside the event loop that will run it."""
        self.settings = settings
        self._tls = tls
        self._models = models
        self._calls = Calls(keys, models.refused)
        self._health = Health()
        self._server = grpc.server(
            ThreadPoolExecutor(_threads(models, settings), thread_name_prefix="f2rt-grpc"),
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would share its connections unseen.
                ("grpc.so_reuseport", 0),
                # A peer that is gone without a word is found out, and one that does nothing is let go.
                ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.max_connection_idle_ms", _IDLE_MS),
                ("grpc.max_concurrent_streams", 10_000),
                ("grpc.max_allowed_incoming_connections", settings.max_connections),
                # Calls that Python has not seen yet: above its own limits gRPC answers CANCELLED, without a word.
                ("grpc.server.max_pending_requests", 20_000),
                ("grpc.server.max_pending_requests_hard_limit", 50_000),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.absolute_max_metadata_size", 32 << 10),
            ],
        )
        handlers = f2rt_v1.EmbeddingService(models, settings, keys, tls).handlers(self._calls)
        handlers += kserve_v2.InferenceService(models).handlers(self._calls)
        handlers.append(self._health.handler(self._calls))
        own = [f2rt_v1.SERVICE_NAME, f2rt_v1.ADMIN_NAME, kserve_v2.SERVICE_NAME]
        self._names = ["", f2rt_v1.SERVICE_NAME, kserve_v2.SERVICE_NAME]
        names = [*own, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if not keys.required:  # with keys everything but health is closed
            handlers.append(self._reflection_handler(names))
        self._server.add_generic_rpc_handlers(handlers)

    def _reflection_handler(self, names: list[str]) -> Any:
        servicer = reflection.ReflectionServicer(names)
        request, response = reflection_pb2.ServerReflectionRequest, reflection_pb2.ServerReflectionResponse
        method = self._calls.reflection(servicer.ServerReflectionInfo, request, response)
        return self._calls.service(reflection.SERVICE_NAME, {"ServerReflectionInfo": method})

    def start(self) -> str:
        """Listen. Returns the address with the port really taken. Raises InputError."""
        address = self.settings.grpc_address
        try:
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError as error:
            raise InputError(
                f"cannot listen on {address}: it is in use, or not an address of this machine.",
                cure="Choose another one with --grpc HOST:PORT.",
            ) from error
        self.show_health()
        self._server.start()
        return address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"

    def show_health(self) -> None:
        """Tell Check, List and Watch what the models say: all together under "", each one under its name."""
        ready = _SERVING if self._models.ready else _NOT_SERVING
        for name in self._names:
            self._health.set(name, ready)
        for model in self._models:
            self._health.set(model.name, _SERVING if model.state is State.READY else _NOT_SERVING)

    def wait_idle(self, seconds: float) -> bool:
        """Wait until every call has its response sent, or was cancelled. Returns whether it came to that."""
        return self._calls.wait_idle(seconds)

    def stop(self) -> None:
        """Stop. What is still open is over its time, or a stream that never ends by itself, such as a health Watch."""
        self._server.stop(_FLUSH_S).wait()
        self._calls.close()
        self._health.close()


def _threads(models: Models, settings: ServeSettings) -> int:
    """Return how many threads calls may need at most: they are started when they are needed.

    As many requests as a pipeline lets in, for each model and one more, since a reload leaves the old one its calls.
    """
    one = settings.scheduling.max_waiting_requests + settings.limits.max_batch_rows
    return one * (len(list(models)) + 1) + f2rt_v1.MOST_STREAMS + MOST_WAITING + MOST_REFLECTING + _SPARE
