"""Who has the engine: requests are queued here, and batches run by the thread whose turn it is.

Whoever finds the engine idle takes it and runs its own batch itself, without a single hand-over, each of which costs
more than a short text's tokenization. Whatever came meanwhile is served by the engine's thread, until the queue is
empty.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NoReturn

from runtime.batching import Shape
from runtime.embedder import Embedder
from runtime.engines.buckets import computed_tokens
from runtime.errors import DeadlineError, EngineError
from runtime.fair_order import Ticket
from runtime.scheduler import FairQueue, Planned
from runtime.serving.batches import Batches, Rows, batch_of
from runtime.serving.job import Job
from runtime.serving.metrics import EngineMetrics
from runtime.settings import SchedulingSettings
from runtime.tokenizer import TokenizedText

_SURELY_IN_TIME = 3.0  # times what a batch should take


class Turns:
    """One engine's queue, and who computes. Any thread may call."""

    def __init__(
        self,
        embedder: Embedder,
        scheduling: SchedulingSettings,
        metrics: EngineMetrics,
        engine_failed: Callable[[EngineError], None],
    ) -> None:
        """Start the engine's thread. `engine_failed` is told of every failure, on the thread that it happened on."""
        self._gather_s = 1e-3 * scheduling.gather_ms
        self._batches = Batches(embedder, self._ran, self._fail)
        self._metrics = metrics
        self._engine_failed = engine_failed
        buckets = embedder.loaded.engine.buckets
        self._shape: Shape = lambda rows, width: computed_tokens(buckets, rows, width)
        self._lock = threading.Lock()  # for the queue, and who has the engine
        self._handed_over = threading.Condition(self._lock)
        self._company = threading.Condition(self._lock)
        self._new_queue = partial(FairQueue, embedder.limits, scheduling, shape=self._shape)
        self._queue = self._new_queue()
        self._taken = False
        self._called = False  # for the engine's thread
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="f2rt-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> tuple[int, int, int]:
        """Requests, items and tokens in the queue."""
        return len(self._queue), self._queue.items, self._queue.tokens

    def foreseen_wait_s(self, items: Sequence[TokenizedText]) -> float:
        """Return how long some items should wait for the batch that runs now and for what is in the queue."""
        with self._lock:
            running_s = max(self._queue.busy_until_s - time.perf_counter(), 0.0)
            return running_s + 1e-3 * self._queue.wait_ms(sum(len(item.ids) for item in items))

    def learn(self, rows: int, width: int, seconds: float) -> None:
        """Take note of what a batch cost."""
        with self._lock:
            self._queue.cost.observe(self._shape(rows, width), 1e3 * seconds, width)

    # --- the door

    def check_door(self, tokens: int, deadline_s: float | None) -> None:
        """Refuse what cannot be admitted now; raises as `FairQueue.check_door`."""
        with self._lock:
            self._queue.check_door(time.perf_counter(), tokens, deadline_s)

    def turned_away(self) -> None:
        """Take note that a request which passed the door was refused for what it asks."""
        with self._lock:
            self._queue.turned_away()

    def refuse(self, reason: str) -> NoReturn:
        """Raise OverloadedError for `reason`."""
        with self._lock:
            self._queue.refuse(reason)

    def admit(self, job: Job, *, bounded: bool = True) -> bool:
        """Queue a tokenized request; returns whether this thread now has the engine. Raises as `FairQueue.admit`."""
        now_s = job.watch.tokenized_s = time.perf_counter()
        ticket = Ticket([len(item.ids) for item in job.items], job.call.deadline_s, payload=job)
        job.left = len(ticket.lengths)
        with self._lock:
            if job.abandoned:
                return False
            self._queue.admit(ticket, now_s, bounded=bounded)
            job.ticket = ticket
            if self._taken:
                if self._queue.tokens >= self._queue.budget:
                    self._company.notify_all()
                return False
            self._taken = True
            return True

    def abandon(self, job: Job) -> None:
        """Drop what of a request is in no batch yet: nobody waits for it."""
        with self._lock:
            job.abandoned = True
            if job.ticket is not None:
                self._queue.cancel(job.ticket, time.perf_counter())

    # --- the engine, for whom `admit` gave it to

    def may_lead(self, job: Job) -> bool:
        """Whether a thread may compute that also has to answer by its deadline."""
        left_s = job.call.left_s
        tokens = sum(len(item.ids) for item in job.items) if left_s is not None else 0
        return left_s is None or 1e3 * left_s > _SURELY_IN_TIME * self._queue.cost.batch_ms(tokens)

    def lead(self, job: Job) -> None:
        """Run batches until this thread's own request is done; the rest is for the engine's thread."""
        if self._gather_s:
            with self._company:
                self._company.wait_for(lambda: self._queue.tokens >= self._queue.budget, self._gather_s)
        while not job.done:
            if not self._run_next():
                return
        with self._lock:
            self._taken = self._called = len(self._queue) > 0
            if self._called:
                self._handed_over.notify()

    def hand_over(self) -> None:
        """Have the engine's thread serve the queue, in place of this one."""
        with self._lock:
            self._called = True
            self._handed_over.notify()

    def close(self) -> None:
        """End the engine's thread once nobody calls it, and wait for that."""
        with self._lock:
            self._closed = True
            self._handed_over.notify_all()
        self._thread.join()

    def _serve(self) -> None:
        """Be the engine's thread: serve the queue whenever it is handed over."""
        while True:
            with self._lock:
                while not self._called and not self._closed:
                    self._handed_over.wait()
                if not self._called:
                    return
                self._called = False
            while self._run_next():
                pass

    def _run_next(self) -> bool:
        """Run the next batch. When there is none, the engine is given back, and the answer is False."""
        fault: Exception | None = None
        waited: list[Job] = []
        with self._lock:
            try:
                planned = self._queue.next_batch(time.perf_counter())
            except Exception as error:  # noqa: BLE001  (a fault of ours must not take the engine along with it)
                planned, fault, waited = None, error, self._begin_anew()
            # Read here: a ticket that is cancelled has no payload any more.
            expired = [ticket.payload for ticket in self._queue.expired]
            self._queue.expired = []
            jobs: Rows = [(ticket.payload, index) for ticket, index in planned.rows] if planned else []
            if planned is None:
                self._taken = False
        for job in expired:
            job.end(DeadlineError("the deadline would pass before the answer is ready.", cure="Allow more time."))
        if fault is not None:
            self._fail(waited, self._batches.unexpected(fault, f"planning for {len(waited)} requests"))
        if planned is None:
            return False
        try:
            self._batches.run(planned, jobs)
        except Exception as error:  # noqa: BLE001  (a fault of ours must not take the engine along with it)
            self._fail({job for job, _ in jobs}, self._batches.unexpected(error, batch_of(len(jobs), planned.width)))
        return True

    def _begin_anew(self) -> list[Job]:
        """Put a new queue in the place of one that failed, of which nothing is known; returns whose requests it had."""
        waited = [ticket.payload for ticket in self._queue.close()]
        self._queue = self._new_queue(cost=self._queue.cost)
        return waited

    def _ran(self, rows: int, planned: Planned, took_s: float) -> None:
        """Take note of a batch that was run as planned."""
        self.learn(rows, planned.width, took_s)
        self._metrics.batch(rows, planned.tokens, self._shape(rows, planned.width), took_s)

    def _fail(self, jobs: Iterable[Job], error: Exception) -> None:
        with self._lock:
            for job in jobs:
                if job.ticket is not None:
                    self._queue.cancel(job.ticket, time.perf_counter())
        for job in jobs:
            job.end(error)
        if isinstance(error, EngineError):
            self._engine_failed(error)
