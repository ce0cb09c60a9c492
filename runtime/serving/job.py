"""One request on its way through a pipeline: what it asked for, what it has so far, and its end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from runtime.fair_order import Ticket
from runtime.serving.call import EmbedCall, Stopwatch
from runtime.tokenizer import TokenizedText


class Job:
    """One request on its way. Ends once, with vectors or an error; `ended` is then called, on that thread."""

    def __init__(self, call: EmbedCall, ended: Callable[[], None], items: list[TokenizedText] | None = None) -> None:
        self.call = call
        self.items = items or []
        self.watch = Stopwatch()
        self.vectors: NDArray[np.float32] | None = None
        self.left = 0  # items without a vector
        self.ticket: Ticket | None = None
        self.error: BaseException | None = None
        self.abandoned = False
        self.done = False
        self._ended = ended
        self._open = [True]

    def end(self, error: BaseException | None = None) -> None:
        """Say that the vectors are complete, or what went wrong. A second end is none."""
        try:
            self._open.pop()  # one thread alone gets it
        except IndexError:
            return
        self.error, self.done = error, True
        self._ended()
