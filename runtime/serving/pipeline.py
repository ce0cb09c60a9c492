"""One engine and its requests: tokenize, wait for a turn, run, hand out. Knows no protocol.

`answer` blocks the thread that calls it, `embed` is a coroutine; both lead through the same queue. At low load a
request is tokenized and computed on the thread that received it (see `turns`). While the engine computes, the threads
of other requests tokenize, so that the next batch waits ready when the engine is free.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.embedder import Embedder
from runtime.errors import AbandonedError, DeadlineError, EngineError, F2rtError, UnavailableError
from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.job import Job
from runtime.serving.metrics import EngineMetrics
from runtime.serving.tokenizing import Tokenizing
from runtime.serving.turns import Turns
from runtime.settings import SchedulingSettings
from runtime.tokenizer import Instruction, TokenizedText, Truncate

_WORKERS = 2  # threads that tokenize for coroutines, and one more for long texts, which short ones do not wait for
_AT_THE_DEADLINE_S = 0.05  # a caller's clock started earlier than ours

Result = TypeVar("Result")
_Inbox = queue.SimpleQueue[Callable[[], None] | None]


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
        self._tokenizing = Tokenizing(embedder, truncate)
        self._loop = asyncio.get_running_loop()
        self._turns = Turns(embedder, scheduling, metrics, self._engine_failed)
        self._lock = threading.Lock()  # for how many calls are open
        self._most_open = scheduling.max_waiting_requests + embedder.limits.max_batch_rows
        self._open = 0
        self._idle: list[asyncio.Event] = []
        self._closed = False
        self._inbox: _Inbox = queue.SimpleQueue()
        self._long_inbox: _Inbox = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, args=[inbox], name=f"f2rt-worker-{i}", daemon=True)
            for i, inbox in enumerate([*[self._inbox] * _WORKERS, self._long_inbox])
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> tuple[int, int, int]:
        """Requests, items and tokens in the queue."""
        return self._turns.waiting

    def foreseen_wait_s(self, items: Sequence[TokenizedText]) -> float:
        """Return how long some items should wait for the batch that runs now and for what is in the queue."""
        return self._turns.foreseen_wait_s(items)

    def learn(self, rows: int, width: int, seconds: float) -> None:
        """Take note of what a batch cost."""
        self._turns.learn(rows, width, seconds)

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
            if call.left_s == 0:
                self._too_late(job)
        if self._turns.admit(job):
            if self._turns.may_lead(job):
                self._turns.lead(job)
            else:
                self._turns.hand_over()
        left_s = call.left_s
        if not ended.acquire(timeout=-1 if left_s is None else min(left_s, threading.TIMEOUT_MAX)):
            self._too_late(job)
            ended.acquire()  # whoever ended it may not have said how yet
        if call.left_s == 0 and job.error is None:
            raise _late()
        return self._reply(job)

    def tokenize(
        self, texts: Sequence[str], instruction: Instruction, truncate: Truncate | None
    ) -> list[TokenizedText]:
        """Tokenize texts as a request's are, a part at a time, and no more.

        Raises InputError, NotFoundError, OverloadedError.
        """
        self._check_open()
        return self._tokenizing.tokenize(texts, instruction, truncate)

    def abandon(self, job: Job) -> None:
        """Drop what of a request is not computed yet: nobody waits for it.

        It ends as cancelled, or as too late: a caller who gives up at the deadline is heard of a moment before it.
        """
        self._turns.abandon(job)
        left_s = job.call.left_s
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
            if self._turns.admit(job, bounded=False):
                self._turns.hand_over()

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
        for inbox in (*[self._inbox] * _WORKERS, self._long_inbox):
            inbox.put(None)

        def join() -> None:
            for thread in self._threads:
                thread.join()
            self._turns.close()  # after the workers, which may leave it something to serve
            self.embedder.close()

        await self._loop.run_in_executor(None, join)

    async def _finished(self, make: Callable[[Callable[[], None]], Job], begin: Callable[[Job], None]) -> Job:
        """Return a request that has ended; `begin` is called in the event loop."""
        event = asyncio.Event()
        job = make(lambda: self._call_soon(event.set))
        begin(job)
        try:
            async with asyncio.timeout(job.call.left_s):
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
        # With an empty queue nothing is refused, and nothing needs to be foreseen.
        tokens = self._tokenizing.foresee(call) if self._turns.waiting[0] else 0
        self._check_open()
        self._turns.check_door(tokens, call.deadline_s)

    def _check_open(self) -> None:
        """Refuse one too many of those that wait, run, or are tokenized or refused just now: each has a thread."""
        if self._open > self._most_open:
            self._turns.refuse(f"{self._open - 1} requests are at work; the limit is {self._most_open}")

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
            self._turns.turned_away()
            raise

    def _put_in_line(self, job: Job) -> None:
        """Have the next part of a request tokenized by a worker."""
        inbox = self._long_inbox if self._tokenizing.is_long(job.call) else self._inbox
        inbox.put(lambda: self._guarded(job, self._tokenize_in_turns))

    def _tokenize_in_turns(self, job: Job) -> None:
        """Tokenize a part of a request, and go to the end of the line for the rest; then queue it."""
        if not self._tokenize(job):
            self._put_in_line(job)
        elif self._turns.admit(job):
            self._turns.lead(job)

    def _guarded(self, job: Job, work: Callable[[Job], None]) -> None:
        """Go on with a request, unless it has ended: nobody waits for it then."""
        if job.done:
            return
        try:
            work(job)
        except Exception as error:  # noqa: BLE001  (whoever waits for it gets it)
            job.end(error)

    def _engine_failed(self, error: EngineError) -> None:
        self._call_soon(lambda: self.on_engine_error(error))

    def _work(self, inbox: _Inbox) -> None:
        while (work := inbox.get()) is not None:
            work()
            del work  # it holds a request, which waiting for the next one must not

    def _call_soon(self, callback: Callable[[], Any]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody waits any more
            if not self._loop.is_closed():
                raise
