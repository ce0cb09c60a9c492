"""Counts and logs what became of requests, on a thread of its own: nobody waits for either.

Texts are not in it. Reading the metrics waits for what is still to be counted.
"""

from __future__ import annotations

import logging
import queue
import threading
from dataclasses import dataclass

from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.logs import access_log, cut
from runtime.serving.metrics import Metrics
from runtime.serving.tracing import Tracer

_MAX_ERROR_CHARS = 400


@dataclass(frozen=True)
class Outcome:
    """What became of one request; `model` is "" when there is none of the name that was asked for."""

    model: str
    protocol: str
    status: str
    call: EmbedCall
    reply: EmbedReply | None
    error: str


class Recorder:
    """Takes outcomes from any thread."""

    def __init__(self, metrics: Metrics, *, log_requests: bool, tracer: Tracer | None = None) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._log_requests = log_requests
        self._outcomes: queue.SimpleQueue[Outcome | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._record, name="f2rt-recorder", daemon=True)
        self._thread.start()

    def put(self, outcome: Outcome) -> None:
        """Have an outcome counted and logged soon."""
        self._outcomes.put(outcome)

    def flush(self) -> None:
        """Wait until everything put so far is counted."""
        done = threading.Event()
        self._outcomes.put(done)
        done.wait()

    def close(self) -> None:
        """Record what is left, and end the thread."""
        self._outcomes.put(None)
        self._thread.join()
        if self._tracer is not None:
            self._tracer.close()

    def _record(self) -> None:
        while (outcome := self._outcomes.get()) is not None:
            if isinstance(outcome, threading.Event):
                outcome.set()
                continue
            reply = outcome.reply
            self._metrics.request(outcome.model, outcome.protocol, outcome.status, reply.timings if reply else None)
            if reply is not None:
                self._metrics.count(outcome.model, reply.items)
            if self._tracer is not None:
                self._tracer.request(outcome.model, outcome.protocol, outcome.status, outcome.call, reply)
            if self._log_requests or outcome.status == "INTERNAL":
                _log(outcome)


def _log(outcome: Outcome) -> None:
    fields: dict[str, object] = {
        "request_id": cut(outcome.call.request_id),
        "model": outcome.model,
        "protocol": outcome.protocol,
        "status": outcome.status,
        "items": outcome.call.items,
    }
    if outcome.reply is not None:
        timings = outcome.reply.timings
        fields |= {
            "tokens": sum(len(item.ids) for item in outcome.reply.items),
            "fingerprint": outcome.reply.fingerprint,
            "tokenize_ms": timings.tokenize_ms,
            "queue_ms": timings.queue_ms,
            "infer_ms": timings.infer_ms,
            "total_ms": timings.total_ms,
        }
    if outcome.error:
        fields["error"] = outcome.error[:_MAX_ERROR_CHARS]
    level = logging.ERROR if outcome.status == "INTERNAL" else logging.INFO
    access_log.log(level, "request", extra={"fields": fields})
