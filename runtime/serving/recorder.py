"""Counts and logs what became of requests, on a thread of its own: nobody waits for either.

That thread is not woken for a request: it would take the interpreter from the one whose answer is just being sent. It
comes by itself, in a moment when there are requests. Reading the metrics counts what is left.
"""

from __future__ import annotations

import collections
import logging
import re
import threading
import time

from runtime.serving.logs import access_log, cut
from runtime.serving.metrics import Metrics
from runtime.serving.outcome import Outcome
from runtime.serving.tracing import Tracer

log = logging.getLogger("f2rt.recorder")

_MAX_ERROR_CHARS = 400
# What an error quotes may be a caller's text, such as a prompt given as the name of one: the caller reads it, the log
# does not have it.
_QUOTED = re.compile(r"""(?<!\w)(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`[^`]*`|['"`].*)""", re.DOTALL)
_PAUSE_S = 0.02
_AWAKE_S = 10.0  # after the latest request; then the next one has to wake the thread


class Recorder:
    """Takes outcomes from any thread."""

    def __init__(self, metrics: Metrics, *, log_requests: bool, tracer: Tracer | None = None) -> None:
        self._metrics = metrics
        self._tracer = tracer
        self._log_requests = log_requests
        self._outcomes: collections.deque[Outcome] = collections.deque()
        self._recording = threading.Lock()
        self._asleep = False
        self._closed = threading.Event()
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._work, name="f2rt-recorder", daemon=True)
        self._thread.start()

    def put(self, outcome: Outcome) -> None:
        """Have an outcome counted and logged soon."""
        self._outcomes.append(outcome)
        if self._asleep:
            self._woken.set()

    def flush(self) -> None:
        """Count and log everything put so far."""
        with self._recording:
            for _ in range(len(self._outcomes)):  # not what comes meanwhile: it could go on for ever
                self._record(self._outcomes.popleft())

    def close(self) -> None:
        """Record what is left, and end the thread."""
        self._closed.set()
        self._woken.set()
        self._thread.join()
        self.flush()
        if self._tracer is not None:
            self._tracer.close()

    def _work(self) -> None:
        latest_s = time.monotonic()
        while not self._closed.wait(_PAUSE_S):
            if self._outcomes:
                latest_s = time.monotonic()
                self.flush()
            elif time.monotonic() - latest_s > _AWAKE_S:
                self._sleep()
                latest_s = time.monotonic()

    def _sleep(self) -> None:
        self._woken.clear()
        self._asleep = True
        # What came before it was seen that this thread sleeps woke nobody.
        if not self._outcomes and not self._closed.is_set():
            self._woken.wait()
        self._asleep = False

    def _record(self, outcome: Outcome) -> None:
        answered = outcome.answered
        try:
            timings = answered.timings if answered else None
            self._metrics.request(outcome.model, outcome.protocol, outcome.status, timings)
            if answered is not None:
                self._metrics.count(outcome.model, answered.texts, answered.truncated)
            if self._tracer is not None:
                self._tracer.request(outcome)
            if self._log_requests or outcome.status == "INTERNAL":
                _log(outcome)
        except Exception:  # one that cannot be recorded must not take the others along
            log.exception("a request could not be recorded")


def _log(outcome: Outcome) -> None:
    fields: dict[str, object] = {
        "request_id": cut(outcome.request_id),
        "model": outcome.model,
        "protocol": outcome.protocol,
        "status": outcome.status,
        "items": outcome.items,
    }
    if outcome.answered is not None:
        timings = outcome.answered.timings
        fields |= {
            "tokens": outcome.answered.tokens,
            "fingerprint": outcome.answered.fingerprint,
            "tokenize_ms": timings.tokenize_ms,
            "queue_ms": timings.queue_ms,
            "infer_ms": timings.infer_ms,
            "total_ms": timings.total_ms,
        }
    if outcome.error:
        fields["error"] = _QUOTED.sub("'…'", outcome.error)[:_MAX_ERROR_CHARS]
    level = logging.ERROR if outcome.status == "INTERNAL" else logging.INFO
    access_log.log(level, "request", extra={"fields": fields})
