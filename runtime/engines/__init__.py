"""Engines: a batch of token ids in, unit vectors out.

One file per inference library; nothing else in the runtime imports one. An engine knows no text and no prompt, and it
does not decide whether it may answer: `runtime.golden` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.engines.buckets import Bucket


class Engine(Protocol):
    """What an embedder needs of an engine. `run` may be called from one thread at a time.

    `max_tokens` is the longest text it was built for; None: whatever the model takes. `buckets` are the shapes it was
    built for; none: it takes every shape as it is.
    """

    name: str
    precision: str
    fingerprint: str
    max_tokens: int | None
    buckets: Sequence[Bucket]

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return the unit vectors of a batch, float32 [rows, dim].

        Raises EngineError, and InputError for a row longer than `max_tokens`.
        """
        ...

    def close(self) -> None:
        """Free the engine's memory; it answers no more."""
        ...
