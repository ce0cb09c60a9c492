"""One engine and its queue: tokenize, wait for a turn, run, hand out. Knows no protocol.

`answer` blocks the thread that calls it, `embed` is a coroutine; both lead through the same queue. Whoever finds the
engine idle takes it and runs its own batch itself: at low load a request is tokenized and computed on the thread that
received it, without a single hand-over, each of which costs more than a short text's tokenization. Whatever came
meanwhile is served by the engine's thread, until the queue is empty. While it computes, the threads of other requests
tokenize, so that the next batch waits ready when the engine is free.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.batching import Shape
from runtime.embedder import Embedder
from runtime.engines.buckets import computed_tokens
from runtime.errors import AbandonedError, DeadlineError, EngineError, F2rtError, UnavailableError
from runtime.scheduler import FairQueue, Planned, Ticket
from runtime.serving.batches import Batches, Rows
from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.job import Job
from runtime.serving.metrics import EngineMetrics
from runtime.serving.tokenizing import Tokenizing
from runtime.settings import SchedulingSettings
from runtime.tokenizer import Instruction, TokenizedText, Truncate

_WORKERS = 2  # threads that tokenize for coroutines, and one more for long texts, which short ones do not wait for
_SURELY_IN_TIME = 3.0  # times what a batch should take
_AT_THE_DEADLINE_S = 0.05  # a caller's clock started earlier than ours

Result = TypeVar("Result")
_Inbox = queue.SimpleQueue[Callable[[], None] | None]


def _left_s(call: EmbedCall) -> float | None:
    """Return the time until a call's deadline, 0 when it has passed; None without one."""
    return None if call.deadline_s is None else max(call.deadline_s - time.perf_counter(), 0.0)


def _late() -> DeadlineError:
    return DeadlineError("the deadline passed before the answer was ready.", cure="Allow more time.")


class Pipeline:
    """Answers calls with one embedder. Its coroutines belong to the event loop it was made in."""

    def __init__(
        self, embedder: Embedder, scheduling: SchedulingSettings, truncate: Truncate, metrics: EngineMetrics
    ) -> None:
        """Start the threads. Must be called inside the event loop."""
        self.embedder = embedder
        self.on_engine_error: Callable[[EngineError], None] = lambda error: None  # called in the event loop
        self._scheduling = scheduling
        self._tokenizing = Tokenizing(embedder, truncate)
        self._batches = Batches(embedder, self._ran, self._fail)
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        buckets = embedder.loaded.engine.buckets
        self._shape: Shape = lambda rows, width: computed_tokens(buckets, rows, width)
        # One lock for the queue, who has the engine, and how many calls are open.
        self._lock = threading.Lock()
        self._handed_over = threading.Condition(self._lock)
        self._company = threading.Condition(self._lock)
        self._queue = FairQueue(embedder.limits, scheduling, shape=self._shape)
        self._most_open = scheduling.max_waiting_requests + embedder.limits.max_batch_rows
        self._taken = False
        self._called = False  # for the engine's thread
        self._open = 0
        self._idle: list[asyncio.Event] = []
        self._closed = False
        self._inbox: _Inbox = queue.SimpleQueue()
        self._long_inbox: _Inbox = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=[inbox], name=f"f2rt-worker-{i}", daemon=True)
            for i, inbox in enumerate([*[self._inbox] * _WORKERS, self._long_inbox])
        ]
        self._threads.append(threading.Thread(target=self._serve, name="f2rt-engine", daemon=True))
        for thread in self._threads:
            thread.start()

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

    # --- for threads

    def enter(self) -> None:
        """Announce a call: the pipeline is not closed before as many `leave`. Raises UnavailableError once it is."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the engine was closed.", cure="Ask again.")
            self._open += 1

    def leave(self) -> None:
        """Say that an announced call is over."""
        with self._lock:
            self._open -= 1
            if not self._open:
                for event in self._idle:
                    self._call_soon(event.set)
                self._idle.clear()

    def answer(self, call: EmbedCall, begun: Callable[[Job], None] = lambda job: None) -> EmbedReply:
        """Answer one call on this thread, by its deadline if it has one; `begun` is given what `abandon` takes.

        Raises InputError, NotFoundError, OverloadedError, DeadlineError or EngineError; AbandonedError when it was
        abandoned.
        """
        self._check(call)
        ended = threading.Lock()  # a lock that another thread opens: the cheapest way to wait
        ended.acquire()
        job = Job(call, ended.release)
        begun(job)
        while not job.done and not self._tokenize(job):
            if _left_s(call) == 0:
                self._too_late(job)
        if self._admit(job):
            if self._may_lead(job):
                self._lead(job)
            else:
                self._hand_over()
        left_s = _left_s(call)
        if not ended.acquire(timeout=-1 if left_s is None else min(left_s, threading.TIMEOUT_MAX)):
            self._too_late(job)
            ended.acquire()  # whoever ended it may not have said how yet
        if _left_s(call) == 0 and job.error is None:
            raise _late()
        return self._reply(job)

    def tokenize(
        self, texts: Sequence[str], instruction: Instruction, truncate: Truncate | None
    ) -> list[TokenizedText]:
        """Tokenize texts as a request's are, a part at a time, and no more.

        Raises InputError, NotFoundError, OverloadedError.
        """
        with self._lock:
            self._check_open()
        return self._tokenizing.tokenize(texts, instruction, truncate)

    def abandon(self, job: Job) -> None:
        """Drop what of a request is not computed yet: nobody waits for it.

        It ends as cancelled, or as too late: a caller who gives up at the deadline is heard of a moment before it.
        """
        with self._lock:
            job.abandoned = True
            if job.ticket is not None:
                self._queue.cancel(job.ticket, time.perf_counter())
        left_s = _left_s(job.call)
        late = left_s is not None and left_s < _AT_THE_DEADLINE_S
        job.end(_late() if late else AbandonedError("the caller went away before the answer was ready."))

    # --- for coroutines

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Answer one call, as `answer` does; cancelled, it drops what is not computed yet."""
        self._check(call)
        job = await self._finished(lambda ended: Job(call, ended), self._put_in_line)
        return self._reply(job)

    async def run(self, items: list[TokenizedText]) -> NDArray[np.float32]:
        """Return unit vectors float32 [items, dim] of tokenized texts, whatever else waits to be tokenized or run."""

        def admit(job: Job) -> None:
            if self._admit(job, bounded=False):
                self._hand_over()

        job = await self._finished(lambda ended: Job(EmbedCall(), ended, items), lambda job: self._guarded(job, admit))
        if job.error is not None:
            raise job.error
        assert job.vectors is not None
        return job.vectors

    async def in_thread(self, work: Callable[[], Result]) -> Result:
        """Run something that would hold up the event loop on a worker."""
        future: asyncio.Future[Result] = self._loop.create_future()

        def run() -> None:
            try:
                result = work()
            except Exception as error:  # noqa: BLE001  (whoever waits for it gets it)
                failure = error
                self._call_soon(lambda: None if future.done() else future.set_exception(failure))
            else:
                self._call_soon(lambda: None if future.done() else future.set_result(result))

        self._inbox.put(run)
        return await future

    async def idle(self) -> None:
        """Return once every announced call is over."""
        event = asyncio.Event()
        with self._lock:
            if not self._open:
                return
            self._idle.append(event)
        await event.wait()

    async def close(self) -> None:
        """Take no more calls, stop the threads once the work they have is done, and free the engine."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._handed_over.notify_all()
        for inbox in (*[self._inbox] * _WORKERS, self._long_inbox):
            inbox.put(None)

        def join() -> None:
            for thread in self._threads:
                thread.join()
            self.embedder.close()

        await self._loop.run_in_executor(None, join)

    async def _finished(self, make: Callable[[Callable[[], None]], Job], begin: Callable[[Job], None]) -> Job:
        """Return a request that has ended; `begin` is called in the event loop."""
        event = asyncio.Event()
        job = make(lambda: self._call_soon(event.set))
        begin(job)
        try:
            async with asyncio.timeout(_left_s(job.call)):
                await event.wait()
        except TimeoutError:
            self._too_late(job)
            await event.wait()  # whoever ended it may not have said how yet
        except asyncio.CancelledError:
            self.abandon(job)
            raise
        return job

    # --- the way of a request

    def _check(self, call: EmbedCall) -> None:
        """Refuse what needs no tokenizer to be refused."""
        call.check(self.embedder.limits.max_items)
        self.embedder.check_dimensions(call.dimensions)
        # With an empty queue nothing is refused, and nothing needs to be foreseen. Token ids are counted when they are
        # unpacked, which costs no more than counting them here.
        tokens = self._tokenizing.foresee(call) if len(self._queue) else 0
        with self._lock:
            self._check_open()
            self._queue.check_door(time.perf_counter(), tokens, call.deadline_s)

    def _check_open(self) -> None:
        """Refuse one too many of those that wait, run, or are tokenized or refused just now: each has a thread."""
        if self._open > self._most_open:
            self._queue.refuse(f"{self._open - 1} requests are at work; the limit is {self._most_open}")

    def _too_late(self, job: Job) -> None:
        """End a request whose deadline has passed, whatever the engine is busy with, and drop what waits of it."""
        job.end(_late())
        self.abandon(job)

    def _reply(self, job: Job) -> EmbedReply:
        if job.error is not None:
            raise job.error
        assert job.vectors is not None
        embedder = self.embedder
        return EmbedReply(
            job.vectors, job.items, embedder.fingerprint, embedder.contract.trained_dims, job.watch.read()
        )

    def _tokenize(self, job: Job) -> bool:
        """Tokenize the next part of a request; returns whether that was all."""
        try:
            return self._tokenizing.take_part(job)
        except F2rtError:
            with self._lock:
                self._queue.turned_away()
            raise

    def _put_in_line(self, job: Job) -> None:
        """Have the next part of a request tokenized by a worker."""
        inbox = self._long_inbox if self._tokenizing.is_long(job.call) else self._inbox
        inbox.put(lambda: self._guarded(job, self._tokenize_in_turns))

    def _tokenize_in_turns(self, job: Job) -> None:
        """Tokenize a part of a request, and go to the end of the line for the rest; then queue it."""
        if not self._tokenize(job):
            self._put_in_line(job)
        elif self._admit(job):
            self._lead(job)

    def _guarded(self, job: Job, work: Callable[[Job], None]) -> None:
        """Go on with a request, unless it has ended: nobody waits for it then."""
        if job.done:
            return
        try:
            work(job)
        except Exception as error:  # noqa: BLE001  (whoever waits for it gets it)
            job.end(error)

    def _admit(self, job: Job, *, bounded: bool = True) -> bool:
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

    def _may_lead(self, job: Job) -> bool:
        """Whether a thread may compute that also has to answer by its deadline."""
        left_s = _left_s(job.call)
        tokens = sum(len(item.ids) for item in job.items) if left_s is not None else 0
        return left_s is None or 1e3 * left_s > _SURELY_IN_TIME * self._queue.cost.batch_ms(tokens)

    def _hand_over(self) -> None:
        """Have the engine's thread serve the queue, in place of this one."""
        with self._lock:
            self._called = True
            self._handed_over.notify()

    def _lead(self, job: Job) -> None:
        """Run batches until this thread's own request is done; the rest is for the engine's thread."""
        gather_s = 1e-3 * self._scheduling.gather_ms
        if gather_s:
            with self._company:
                self._company.wait_for(lambda: self._queue.tokens >= self._queue.budget, gather_s)
        while not job.done:
            if not self._run_next():
                return
        with self._lock:
            self._taken = self._called = len(self._queue) > 0
            if self._called:
                self._handed_over.notify()

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
        with self._lock:
            planned = self._queue.next_batch(time.perf_counter())
            # Read here: a ticket that is cancelled has no payload any more.
            expired = [ticket.payload for ticket in self._queue.expired]
            self._queue.expired = []
            jobs: Rows = [(ticket.payload, index) for ticket, index in planned.rows] if planned else []
            if planned is None:
                self._taken = False
        for job in expired:
            job.end(DeadlineError("the deadline would pass before the answer is ready.", cure="Allow more time."))
        if planned is None:
            return False
        try:
            self._batches.run(planned, jobs)
        except Exception as error:  # noqa: BLE001  (a fault of ours must not take the engine along with it)
            self._fail({job for job, _ in jobs}, self._batches.unexpected(error, planned.width, len(jobs)))
        return True

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
            failure = error
            self._call_soon(lambda: self.on_engine_error(failure))

    def _work(self, inbox: _Inbox) -> None:
        while (work := inbox.get()) is not None:
            work()

    def _call_soon(self, callback: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody waits any more
            if not self._loop.is_closed():
                raise
