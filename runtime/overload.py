"""Whether more is asked for than can be done, told from a burst. Pure: times are given, in seconds.

A burst may wait; in overload a queue of that length would add latency and not one answer. The queue tells what happens
to it, and asks `is_overloaded`.
"""

from __future__ import annotations

import itertools
from collections import deque

# What the pressure is taken over: so many arrivals and answers, and batches; and what there must be of both to tell.
_EVENTS, _BATCHES = 128, 16
_LEAST_EVENTS, _LEAST_BATCHES = 64, 4
_MOST_BATCHES = 1024


class Overload:
    """Watches one queue, which may be busy for `burst_ms` and have `most` requests come for each one that is served.

    A pause, in milliseconds, is how long nothing has to be waiting before the next ones are a burst again. Not
    thread-safe.
    """

    def __init__(self, burst_ms: float, most: float) -> None:
        self.latest_s = 0.0  # when a request came last
        self._burst_ms = burst_ms
        self._most = most
        self._busy_since_s: float | None = None
        self._lasting = False  # whether it has been busy for longer than a burst
        self._relapse = False  # whether it was overloaded, and more still come than are served
        self._paused_s: float | None = None  # since when nothing has been waiting, in overload
        self._pressure = Pressure()

    @property
    def ratio(self) -> float:
        """How many requests come for each one that is served."""
        return self._pressure.ratio

    @property
    def is_overloaded(self) -> bool:
        """Whether requests have been waiting for `burst_ms` without a pause, and since then more came than were served.

        Both are needed: callers that each wait for their answer fill a queue once, however many they are, and then ask
        for no more than is done.
        """
        return self._lasting and self._pressure.ratio > self._most

    def came(self, now_s: float, pause_ms: float) -> None:
        """Note that a request came, whatever becomes of it."""
        self._notice_pause(now_s, pause_ms)
        since_s = self._busy_since_s
        lasting = since_s is not None and 1e3 * (now_s - since_s) > self._burst_ms
        if lasting and not self._lasting:
            self._pressure = Pressure()  # what filled the queue at first was a burst
        self._lasting = lasting
        if lasting:
            self._pressure.arrived()

    def admitted(self, now_s: float, pause_ms: float) -> None:
        """Note that a request waits from now on."""
        self._notice_pause(now_s, pause_ms)
        if self._busy_since_s is None:
            self._busy_since_s = now_s
        self._paused_s = None

    def done_with(self) -> None:
        """Note that a request was served, or needs not to be."""
        if self._lasting:
            self._pressure.served()

    def batch(self) -> None:
        """Note that a batch was taken, and what it serves was noted."""
        if self._lasting:
            self._pressure.batch()
            self._relapse = self.is_overloaded or (self._relapse and self._pressure.ratio > 1)

    def empty(self, now_s: float) -> None:
        """Note that nothing waits.

        In overload the queue is short and runs empty now and then: each time taken for the end of it would let in a
        whole burst again. Only a pause as long as a burst ends it, or that no more come than are served.
        """
        if not self._relapse:
            self._forget()
        elif self._paused_s is None:
            self._paused_s = now_s

    def _notice_pause(self, now_s: float, pause_ms: float) -> None:
        self.latest_s = now_s
        if self._paused_s is not None and 1e3 * (now_s - self._paused_s) > pause_ms:
            self._forget()

    def _forget(self) -> None:
        self._busy_since_s = self._paused_s = None
        self._lasting = self._relapse = False


class Pressure:
    """How many requests come for each one that is served, refused ones included, over the latest batches.

    Counted by events and not by time, it means the same for a fast engine and a slow one. It is read off whenever a
    batch is taken: callers that wait for their answers, however many, come back while the next batch runs, so that
    between two batches as many come as were served, but for how much one batch differs from another. As much as the
    largest batch served is therefore no pressure. Not thread-safe.
    """

    def __init__(self) -> None:
        self.ratio = 1.0
        self._arrived = self._served = 0
        self._marks = deque([(0, 0)], maxlen=_MOST_BATCHES)  # both counts, as each batch was taken

    def arrived(self) -> None:
        """Count a request that came."""
        self._arrived += 1

    def served(self) -> None:
        """Count a request that was served."""
        self._served += 1

    def batch(self) -> None:
        """Note that a batch was taken, and what it serves was counted; updates `ratio`, 1 while too little is known."""
        marks = self._marks
        marks.append((self._arrived, self._served))
        while len(marks) > _BATCHES and sum(marks[-1]) - sum(marks[1]) >= _EVENTS:
            marks.popleft()
        came, served = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
        if len(marks) <= _LEAST_BATCHES or came + served < _LEAST_EVENTS:
            return
        largest = max(after - before for (_, before), (_, after) in itertools.pairwise(marks))
        self.ratio = max(came - largest, 0) / max(served, 1)
