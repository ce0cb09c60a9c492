"""What the engine alone does with texts: the upper bound of a server on the same machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from runtime.embedder import Embedder
from runtime.scheduler import plan
from runtime.settings import Limits
from runtime.tokenizer import Instruction, Truncate

_BUDGETS = (256, 512, 1024, 2048, 4096)  # tokens of a batch, with padding
_LEAST_TEXTS, _LEAST_REQUESTS = 32, 2


class RawEngine:
    """An engine in this process on tokenized texts, sorted by length, in batches of the best of five sizes.

    `texts` are as many of those given as one pass gets through in a fifth of `seconds`, a multiple of `per_request`:
    what is compared with the engine gets the same ones, since a text's cost goes with its length. Always whole passes.
    """

    def __init__(self, embedder: Embedder, texts: Sequence[str], seconds: float, per_request: int = 1) -> None:
        """Choose the texts and the size of a batch; takes `seconds` or longer. Raises ValueError for too few texts."""
        self._embedder = embedder
        start = time.perf_counter()
        embedder.embed(texts[:8])
        fitting = int(8 * seconds / len(_BUDGETS) / (time.perf_counter() - start))
        wanted = min(max(fitting, _LEAST_TEXTS, _LEAST_REQUESTS * per_request), len(texts))
        self.texts = list(texts[: wanted - wanted % per_request])
        if not self.texts:
            raise ValueError(f"{len(texts)} texts are no request of {per_request}")
        self._items = embedder.tokenize(self.texts, Instruction(prompt=""), Truncate.END)
        self.budget = max(_BUDGETS, key=lambda budget: self._rate(budget, seconds / len(_BUDGETS)))

    def texts_per_s(self, seconds: float) -> float:
        """Return texts per second over whole passes that take `seconds` or longer."""
        return self._rate(self.budget, seconds)

    def _rate(self, budget: int, seconds: float) -> float:
        lengths = [len(item.ids) for item in self._items]
        batches = plan(lengths, Limits(max_batch_tokens=budget, max_batch_rows=len(lengths)))
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not passes:
            for batch in batches:
                self._embedder.infer_rows(self._items, batch)
            passes += 1
        return passes * len(self._items) / (time.perf_counter() - start)
