"""Calls that hold something of the server while it waits for their peer: a thread until the message has come, the bytes
of an answer until it is read.

gRPC itself waits for ever for both. Here nothing is waited for longer than its time, and where too much is held the
call that has held it for longest makes room: a peer in earnest needs no more than a moment, one that is not has no
others shut out.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

_LOOK_S = 1.0
_GRACE_S = 1.0  # in which nobody has to make room: in a burst even those in earnest wait for a moment


class Patience:
    """Holders by age, each with a size, in threads or bytes."""

    def __init__(self, seconds: float, most: int, grace_s: float = _GRACE_S) -> None:
        """A call is cancelled after `seconds`, and the oldest ones where all together hold more than `most`.

        These only once they have held for `grace_s`.
        """
        self.seconds = seconds
        self._most = most
        self._grace_s = grace_s
        self._held: dict[Any, tuple[float, int]] = {}  # by context, the oldest first
        self._size = 0
        self._lock = threading.Lock()

    def hold(self, context: Any, size: int = 1) -> None:
        """Begin to wait for a call's peer; what it held before is forgotten."""
        now_s = time.monotonic()
        with self._lock:
            self._forget(context)
            self._held[context] = (now_s, size)
            self._size += size
            ended = self._make_room(now_s)
        _cancel(ended)

    def release(self, context: Any) -> None:
        """Stop waiting, whether anything was waited for or not."""
        with self._lock:
            self._forget(context)

    @contextlib.contextmanager
    def waiting(self, context: Any) -> Iterator[None]:
        """Hold one while a block runs."""
        self.hold(context)
        try:
            yield
        finally:
            self.release(context)

    def look(self, now_s: float) -> None:
        """Cancel whoever has held for too long, or has to make room."""
        with self._lock:
            ended = self._make_room(now_s)
            while self._held and self._longest_s(now_s) > self.seconds:
                ended.append(self._forget_oldest())
        _cancel(ended)

    def _make_room(self, now_s: float) -> list[Any]:
        ended = []
        while self._size > self._most and len(self._held) > 1 and self._longest_s(now_s) >= self._grace_s:
            ended.append(self._forget_oldest())
        return ended

    def _longest_s(self, now_s: float) -> float:
        return now_s - next(iter(self._held.values()))[0]

    def _forget(self, context: Any) -> None:
        _, size = self._held.pop(context, (0.0, 0))
        self._size -= size

    def _forget_oldest(self) -> Any:
        context = next(iter(self._held))
        self._forget(context)
        return context


class Watchman:
    """A thread that looks at every `Patience` once a second, until it is closed."""

    def __init__(self, *patience: Patience) -> None:
        self._patience = patience
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="f2rt-grpc-patience", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed.wait(_LOOK_S):
            for patience in self._patience:
                patience.look(time.monotonic())


def _cancel(contexts: list[Any]) -> None:
    for context in contexts:
        context.cancel()
