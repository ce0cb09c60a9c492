"""Timing several contestants in turns, so that a noisy machine hits all of them alike.

Within each repetition every contestant has one turn, and the order rotates from repetition to repetition. Before each
turn everything rests, so that no pool's threads still spin on the cores. One that fails is left out from then on, with
the reason.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.peers import PeerError
from bench.report import median
from runtime.batch import Batch
from runtime.golden import row_cosines

REST_S = 0.1  # ONNX Runtime's threads poll for 50 ms and more after a run, by its default

Vectors = NDArray[np.float32]


class Contestant(Protocol):
    """What takes turns: an engine of this process, or a peer in another."""

    name: str

    def vectors(self, batch: Batch) -> Vectors:
        """Run once; return float32 [rows, dim]."""
        ...

    def time_ms(self, batch: Batch) -> float:
        """Run once; return milliseconds."""
        ...


class InProcess:
    """A function of this process as a contestant."""

    def __init__(self, name: str, run: Callable[[Batch], Vectors]) -> None:
        self.name = name
        self._run = run

    def vectors(self, batch: Batch) -> Vectors:
        """Run once; return float32 [rows, dim]."""
        return self._run(batch)

    def time_ms(self, batch: Batch) -> float:
        """Run once; return milliseconds."""
        start = time.perf_counter()
        self._run(batch)
        return 1e3 * (time.perf_counter() - start)


@dataclass(frozen=True)
class Turns:
    """One batch: times in milliseconds by contestant, smallest cosine to the truth, and why others have no times."""

    times_ms: dict[str, list[float]] = field(default_factory=dict)
    min_cosine: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def median_ms(self, name: str) -> float:
        """Return the middle time of a contestant."""
        return median(self.times_ms[name])

    def speedup(self, name: str, over: str) -> float:
        """Return how many times as fast `name` is as `over`, by medians."""
        return self.median_ms(over) / self.median_ms(name)

    def speedup_of_minima(self, name: str, over: str) -> float:
        """Return the same by least times: what other work on the machine disturbs least."""
        return min(self.times_ms[over]) / min(self.times_ms[name])


def take_turns(contestants: list[Contestant], batch: Batch, truth: str, seconds: float, least: int, most: int) -> Turns:
    """Time all on one batch: `least` repetitions, more while `seconds` last, `most` at the utmost.

    Cosines are taken to the vectors of the contestant called `truth`. A PeerError leaves its peer out.
    """
    turns = Turns()
    vectors: dict[str, Vectors] = {}
    for contestant in contestants:  # the first run of each is its warm-up
        try:
            vectors[contestant.name] = contestant.vectors(batch)
        except PeerError as error:
            turns.failed[contestant.name] = str(error)
    turns.min_cosine.update({name: float(row_cosines(v, vectors[truth]).min()) for name, v in vectors.items()})
    order = [c for c in contestants if c.name in vectors]
    turns.times_ms.update({c.name: [] for c in order})
    end = time.monotonic() + seconds
    repetition = 0
    while repetition < least or (time.monotonic() < end and repetition < most):
        for contestant in list(order):
            time.sleep(REST_S)
            try:
                turns.times_ms[contestant.name].append(contestant.time_ms(batch))
            except PeerError as error:
                turns.failed[contestant.name] = str(error)
                del turns.times_ms[contestant.name], turns.min_cosine[contestant.name]
                order.remove(contestant)
        order = [*order[1:], *order[:1]]
        repetition += 1
    return turns
