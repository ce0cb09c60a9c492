"""A whole server inside the test's process, so that a test can hold its engine in its hand and let time stand.

The event loop runs on a thread of its own; tests talk to the ports as any client does.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.batch import Batch
from runtime.embedder import Embedder
from runtime.engines import Engine
from runtime.server import Server
from runtime.serving.metrics import Metrics
from runtime.serving.model import Model, Proven
from runtime.serving.models import Models
from runtime.settings import EngineSettings, Limits, ModelSettings, SchedulingSettings, ServeSettings
from tests.serving import START_S

Result = TypeVar("Result")
BIG = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
NEVER_S = 1e6
# Batches of one row: what is served when can be read from the engine's list.
ROW_BY_ROW = Limits(max_batch_rows=1)


class HeldEngine:
    """The real engine, which waits for a permit before each batch and writes down what it was asked to run."""

    def __init__(self, engine: Engine, *, permits: int = 0) -> None:
        self.name, self.precision, self.fingerprint = engine.name, engine.precision, engine.fingerprint
        self.max_tokens, self.buckets = engine.max_tokens, engine.buckets
        self._engine = engine
        self._permits = threading.Semaphore(permits)
        self.begun: list[int] = []  # the first id of each batch
        self.rows: list[int] = []
        self.running = 0
        self.most_running = 0
        self.fault: Exception | None = None
        self.fault_for: int | None = None  # only batches with this id in them fail
        self.spoil: float | None = None
        self.turn: float = 0.0  # each vector is turned by this much: wrong, and of unit length

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        self.begun.append(int(batch.input_ids[0, 0]))
        self.rows.append(len(batch.lengths))
        try:
            assert self._permits.acquire(timeout=START_S)
            if self.fault and (self.fault_for is None or (batch.input_ids == self.fault_for).any()):
                raise self.fault
            vectors = self._engine.run(batch)
        finally:
            self.running -= 1
        if self.spoil is not None:
            vectors[-1, 3] = self.spoil
        if self.turn:
            vectors = vectors + self.turn * np.roll(vectors, 1, axis=1)
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors

    def allow(self, batches: int) -> None:
        self._permits.release(batches)

    def wait_begun(self, batches: int) -> None:
        wait_until(lambda: len(self.begun) >= batches)

    def close(self) -> None:
        self.allow(1000)


def wait_until(condition: Callable[[], object], seconds: float = START_S) -> None:
    """Return once something holds; fails after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def held(embedder: Embedder, limits: Limits | None = None, *, permits: int = 0) -> tuple[HeldEngine, Embedder]:
    engine = HeldEngine(embedder.loaded.engine, permits=permits)
    return engine, Embedder(embedder.bundle, replace(embedder.loaded, engine=engine), limits or Limits())


class InProcess:
    """A server on free ports, without warm-up. `settings` are ServeSettings' fields."""

    def __init__(self, *embedders: Embedder, http: bool = False, debug: bool = False, **settings: Any) -> None:
        fields = {"golden_period_s": NEVER_S, "limits": embedders[0].limits, **settings}
        self.settings = ServeSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0" if http else "", **fields)
        self._embedders = embedders
        self.loop = asyncio.new_event_loop()
        self.loop.set_debug(debug)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._stopped = False
        self.run(self._start())

    async def _start(self) -> None:
        metrics = Metrics()
        models = []
        for number, embedder in enumerate(self._embedders):
            spec = ModelSettings("mini" if not number else f"mini-{number}", str(embedder.bundle.folder))
            proven = Proven(embedder, embedder.loaded.expected)
            models.append(Model(spec, proven, EngineSettings(), self.settings, metrics))
        self.models = Models(models, metrics)
        self.server = Server(self.models, self.settings)
        self.grpc, self.http = await self.server.start()

    def __enter__(self) -> InProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for embedder in self._embedders:
            if isinstance(embedder.loaded.engine, HeldEngine):
                embedder.loaded.engine.allow(1000)  # a failed test must not wait for its engine
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(START_S)
        self.loop.close()

    @property
    def model(self) -> Model:
        return self.models.default

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_S)

    def stop(self) -> None:
        if not self._stopped:
            self._stopped = True
            self.run(self.server.stop())

    def stopping(self) -> Any:
        """Begin to stop; returns a future."""
        self._stopped = True
        return asyncio.run_coroutine_threadsafe(self.server.stop(), self.loop)

    def channel(self) -> grpc.Channel:
        return grpc.insecure_channel(self.grpc, options=BIG)

    def stub(self, channel: grpc.Channel) -> Any:
        return pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value, with everything answered so far; 0 when it was never counted."""
        self.models.expose()
        return self.models.metrics.registry.get_sample_value(name, labels) or 0.0


def wait_queued(server: InProcess, requests: int) -> None:
    wait_until(lambda: server.model.pipeline.waiting[0] >= requests)


def scheduling(**fields: Any) -> SchedulingSettings:
    return SchedulingSettings(**{"max_wait_ms": 1e9, "overload": 1e9, **fields})
