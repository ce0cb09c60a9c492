"""When an engine gives back the memory that a batch larger than those of now needed."""

from __future__ import annotations

import time
from collections.abc import Callable

_PERIOD_S = 30.0
_EXCESS = 2.0  # an arena doubles as it grows: for less it would only grow again
# A batch needs memory for its tokens and, for attention, for tokens x width. At about this width the two weigh alike.
_WIDTH = 1024


class WorkingMemory:
    """The largest batch whose memory is held, beside the batches of late. Has no lock: one batch runs at a time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Nothing is held yet; `clock_s` gives seconds."""
        self._clock_s = clock_s
        self._began_s = clock_s()
        self._before = self._now = self._held = 0  # sizes: of the period before, of this one, and what is held
        self._once_more = False

    def is_excessive(self, rows: int, width: int) -> bool:
        """Hear of a batch of `rows` x `width` tokens that is about to run; return whether to give memory back after it.

        It is for the first batch of a period of 30 s if neither that nor the period before needed half of what is held,
        and once more a period later: vectors that nobody has fetched yet lie in that memory and keep a part of it.
        """
        size = rows * width * (width + _WIDTH)
        self._held = max(self._held, size)
        ended = int((self._clock_s() - self._began_s) / _PERIOD_S)
        if ended:
            self._began_s += ended * _PERIOD_S
            self._before, self._now = self._now if ended == 1 else 0, 0
        self._now = max(self._now, size)
        if not ended:
            return False
        if self._held <= _EXCESS * max(self._before, self._now):
            once_more, self._once_more = self._once_more, False
            return once_more
        self._held, self._once_more = 0, True
        return True
