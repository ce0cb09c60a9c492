"""What the engine alone does with texts: the upper bound of a server on the same machine."""

from __future__ import annotations

import time
from collections.abc import Sequence

from bench.load import Request
from runtime.batching import plan
from runtime.embedder import Embedder
from runtime.settings import Limits
from runtime.tokenizer import Instruction, Truncate

_BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)  # tokens of a batch, with padding
_LEAST_TEXTS, _LEAST_REQUESTS = 32, 2


class RawEngine:
    """An engine in this process on tokenized texts, sorted by length, in batches of the best of seven sizes.

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
        self._lengths = [len(item.ids) for item in self._items]
        self.requests = [
            Request(self.texts[i : i + per_request], sum(self._lengths[i : i + per_request]))
            for i in range(0, wanted - wanted % per_request, per_request)
        ]
        self.budget = max(_BUDGETS, key=lambda budget: self._rate(budget, seconds / len(_BUDGETS)))

    def tokens_per_s(self, seconds: float) -> float:
        """Return tokens per second, without padding, over whole passes that take `seconds` or longer."""
        return self._rate(self.budget, seconds)

    def _rate(self, budget: int, seconds: float) -> float:
        batches = plan(self._lengths, Limits(max_batch_tokens=budget, max_batch_rows=len(self._lengths)))
        start, passes = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or not passes:
            for batch in batches:
                self._embedder.infer_rows(self._items, batch)
            passes += 1
        return passes * sum(self._lengths) / (time.perf_counter() - start)
