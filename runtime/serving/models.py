"""The models of one server, by name; the first one answers who asks for none."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from runtime.errors import F2rtError, NotFoundError, status_of
from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.job import Job
from runtime.serving.metrics import Metrics
from runtime.serving.model import Model, State
from runtime.serving.outcome import Outcome
from runtime.serving.pipeline import Pipeline
from runtime.serving.recorder import Recorder
from runtime.serving.tracing import Tracer


@dataclass
class _Record:
    """What became of a call, as far as it is known."""

    model: Model | None = None
    reply: EmbedReply | None = None


class Models:
    """All models of a server. `default` is the first."""

    def __init__(
        self, models: Iterable[Model], metrics: Metrics, *, log_requests: bool = True, tracer: Tracer | None = None
    ) -> None:
        self._recorder = Recorder(metrics, log_requests=log_requests, tracer=tracer)
        self._models = {model.name: model for model in models}
        self.default = next(iter(self._models.values()))
        self.metrics = metrics
        metrics.watch(lambda: [model.gauges for model in self])

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def get(self, name: str) -> Model:
        """Return the model called `name`, or the default for "". Raises NotFoundError."""
        if not name:
            return self.default
        if name not in self._models:
            raise NotFoundError(
                f"there is no model {name[:100]!r}; this server has: {', '.join(self._models)}.",
                cure="Ask for one of these, or leave the model out.",
            )
        return self._models[name]

    def answer(self, call: EmbedCall, protocol: str, begun: Callable[[Job, Pipeline], None]) -> EmbedReply:
        """Answer one call on this thread, count it and log it. Raises as `Model.answer`."""
        with self._recorded(call, protocol) as record:
            record.model = self.get(call.model)
            record.reply = record.model.answer(call, begun)
            return record.reply

    async def embed(self, call: EmbedCall, protocol: str) -> EmbedReply:
        """Answer one call, count it and log it. Raises as `Model.embed`."""
        with self._recorded(call, protocol) as record:
            record.model = self.get(call.model)
            record.reply = await record.model.embed(call)
            return record.reply

    @contextlib.contextmanager
    def _recorded(self, call: EmbedCall, protocol: str) -> Iterator[_Record]:
        record = _Record()
        status, error = "CANCELLED", ""
        try:
            yield record
            status = "OK"
        except F2rtError as failure:
            status, error = status_of(failure).grpc, failure.message
            failure.counted = True
            raise
        except Exception:
            status = "INTERNAL"
            raise
        finally:
            model = record.model.name if record.model else ""  # never what a caller made up: labels stay few
            self._recorder.put(Outcome.of(model, protocol, status, call, record.reply, error))

    def refused(self, error: F2rtError, protocol: str, request_id: str = "", traceparent: str = "") -> None:
        """Count and log a request that was refused before any model was asked; one that was counted is left alone."""
        if not error.counted:
            error.counted = True
            call = EmbedCall(request_id=request_id, traceparent=traceparent)
            self._recorder.put(Outcome.of("", protocol, status_of(error).grpc, call, error=error.message))

    def expose(self) -> bytes:
        """Return the metrics in Prometheus' text format, with every request answered so far."""
        self._recorder.flush()
        return self.metrics.expose()

    def watch(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever a model's state has changed."""
        for model in self:
            model.on_state = callback

    @property
    def ready(self) -> bool:
        """Whether every model answers."""
        return all(model.state is State.READY for model in self)

    @property
    def draining(self) -> bool:
        """Whether the server is shutting down."""
        return any(model.state is State.DRAINING for model in self)

    def drain(self) -> None:
        """Answer no new calls."""
        for model in self:
            model.drain()

    async def idle(self) -> None:
        """Return once every call has been answered or dropped."""
        await asyncio.gather(*(model.idle() for model in self))

    async def close(self) -> None:
        """Free all engines."""
        await asyncio.gather(*(model.close() for model in self))
        await asyncio.get_running_loop().run_in_executor(None, self._recorder.close)


def request_id(given: str) -> str:
    """Return the caller's id of a request, or a new one."""
    return given or os.urandom(8).hex()
