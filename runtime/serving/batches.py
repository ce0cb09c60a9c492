"""One batch at a time: run it, find out whose fault a failure is, and hand out the rows.

Copies of a vector here: none for a request that has a batch to itself in its own order, one otherwise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.batch import make_batch
from runtime.embedder import Embedder, not_finite
from runtime.errors import EngineError, F2rtError
from runtime.scheduler import Planned
from runtime.serving.job import Job

log = logging.getLogger("f2rt.pipeline")

Rows = Sequence[tuple[Job, int]]


def batch_of(rows: int, width: int) -> str:
    """Return what a batch is called in messages."""
    return f"a batch of {rows} x {width}"


class Batches:
    """Runs one embedder's batches. Whoever calls has the engine to itself."""

    def __init__(
        self,
        embedder: Embedder,
        ran: Callable[[int, Planned, float], None],
        fail: Callable[[Iterable[Job], Exception], None],
    ) -> None:
        """`ran` is told the rows and seconds of a batch that ran as planned, `fail` whose requests failed, and why."""
        self._embedder = embedder
        self._ran = ran
        self._fail = fail

    def run(self, planned: Planned, jobs: Rows) -> None:
        """Run a batch and hand out what came of it; where it fails, each request's part by itself."""
        try:
            vectors, took_s = self._infer(jobs)
        except F2rtError as error:
            self._run_apart(planned, jobs, error)
            return
        self._ran(len(jobs), planned, took_s)
        self._deliver(jobs, vectors, took_s)

    def _infer(self, jobs: Rows) -> tuple[NDArray[np.float32], float]:
        """Run some rows as one batch; returns their vectors and the seconds it took. Raises EngineError."""
        rows = [job.items[index].ids for job, index in jobs]
        try:
            batch = make_batch(rows, self._embedder.contract.pad_id)
            began_s = time.perf_counter()
            return self._embedder.run(batch), time.perf_counter() - began_s
        except F2rtError:
            raise
        except Exception as error:
            raise self.unexpected(error, batch_of(len(rows), max(map(len, rows)))) from error

    def unexpected(self, error: Exception, what: str) -> EngineError:
        """Return what callers are told of an exception that nobody foresaw; the log has all of it."""
        log.error("%s failed unexpectedly", what, exc_info=error)
        return EngineError(
            f"{self._embedder.loaded.engine.name} failed on {what}: {type(error).__name__}.",
            cure="The server's log has the details.",
        )

    def _run_apart(self, planned: Planned, jobs: Rows, error: F2rtError) -> None:
        """Run each request's part of a failed batch by itself: only one that cannot be run fails."""
        parts: dict[Job, list[tuple[Job, int]]] = {}
        for job, index in jobs:
            parts.setdefault(job, []).append((job, index))
        if len(parts) == 1:
            self._fail(parts, error)
            return
        log.warning("a batch of %d x %d failed, its requests run alone: %s", len(jobs), planned.width, error)
        for job, part in parts.items():
            if job.done:  # cancelled, or over its deadline, since the batch began
                continue
            try:
                self._deliver(part, *self._infer(part))
            except F2rtError as own:
                self._fail([job], own)

    def _deliver(self, jobs: Rows, vectors: NDArray[np.float32], took_s: float) -> None:
        """Give each request its rows, and end those that have all of them."""
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            for row in np.flatnonzero(~finite).tolist():
                job, index = jobs[row]
                self._fail([job], not_finite(self._embedder.loaded.engine.name, index, len(job.items[index].ids)))
        rows_of: dict[Job, tuple[list[int], list[int]]] = {}
        for row, (job, index) in enumerate(jobs):
            here, there = rows_of.setdefault(job, ([], []))
            here.append(row)
            there.append(index)
        for job, (here, there) in rows_of.items():
            job.watch.infer_s += took_s
            job.left -= len(here)
            if len(rows_of) == 1 and there == list(range(len(job.items))):
                job.vectors = vectors
            else:
                if job.vectors is None:
                    job.vectors = np.empty((len(job.items), vectors.shape[1]), np.float32)
                job.vectors[there] = vectors[here]
            if not job.left:
                job.end()
