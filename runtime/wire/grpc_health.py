"""grpc.health.v1: Check, List and Watch.

Not the library's servicer: it sends to those who watch while it holds its lock, and gRPC's own thread wants that lock
when one of them leaves. Clients that went away just when the health changed could stop the whole server. Here nothing
is sent under a lock, and one who watches and does not read holds up nobody for long.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from grpc_health.v1 import health, health_pb2

from runtime.errors import NotFoundError
from runtime.wire.grpc_calls import Calls

_SENDERS = 4


class Health:
    """What each service's health is, and who watches it."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._watchers: dict[str, set[_Watcher]] = {}
        self._lock = threading.Lock()
        self._senders = ThreadPoolExecutor(_SENDERS, thread_name_prefix="f2rt-health")

    def handler(self, calls: Calls) -> Any:
        """Return the service's generic handler."""
        request, response = health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        methods = {
            "Check": calls.unary(self.check, request, response, public=True),
            "List": calls.unary(self.list, health_pb2.HealthListRequest, health_pb2.HealthListResponse, public=True),
            "Watch": calls.watch(self.watch, request, response),
        }
        return calls.service(health.SERVICE_NAME, methods)

    def set(self, service: str, status: int) -> None:
        """Set a service's status, and tell who watches it."""
        with self._lock:
            self._statuses[service] = status
            told = [watcher for watcher in self._watchers.get(service, ()) if watcher.begin()]
        for watcher in told:
            self._senders.submit(self._tell, watcher)

    def close(self) -> None:
        """Send nothing more; what is being sent ends with its call."""
        self._senders.shutdown(wait=False, cancel_futures=True)

    def check(self, request: Any, context: Any) -> Any:
        """Return the status of one service. Raises NotFoundError."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFoundError("there is no such service.", cure="List says which there are.")
        return health_pb2.HealthCheckResponse(status=status)

    def list(self, request: Any, context: Any) -> Any:
        """Return the status of every service."""
        found = dict(self._statuses)
        statuses = {name: health_pb2.HealthCheckResponse(status=status) for name, status in found.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    def watch(self, request: Any, context: Any, send: Callable[[Any], None]) -> None:
        """Send the status of one service, and again when it changes; `send` blocks until it is on its way."""
        watcher = _Watcher(request.service, send)
        with self._lock:
            self._watchers.setdefault(watcher.service, set()).add(watcher)
            watcher.begin()
        left = partial(self._left, watcher)
        if not context.add_callback(left):  # it ended before it began
            left()
        self._tell(watcher)

    def _tell(self, watcher: _Watcher) -> None:
        """Send what the status is now, until it is what was sent last."""
        while True:
            with self._lock:
                status = self._statuses.get(watcher.service, health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if watcher.gone or watcher.told == status:
                    watcher.busy = False
                    return
                watcher.told = status
            watcher.send(health_pb2.HealthCheckResponse(status=status))

    def _left(self, watcher: _Watcher) -> None:
        with self._lock:
            watcher.gone = True
            watching = self._watchers.get(watcher.service, set())
            watching.discard(watcher)
            if not watching:
                self._watchers.pop(watcher.service, None)


class _Watcher:
    """One who watches; `busy` while a thread sends to it."""

    def __init__(self, service: str, send: Callable[[Any], None]) -> None:
        self.service = service
        self.send = send
        self.told: int | None = None
        self.busy = self.gone = False

    def begin(self) -> bool:
        """Whether a thread is wanted that sends; if so it counts as sending."""
        wanted = not self.busy and not self.gone
        self.busy = self.busy or wanted
        return wanted
