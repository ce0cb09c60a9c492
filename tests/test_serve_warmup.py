"""Every shape runs before the first request: none pays for it, and what batches cost is known."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.batch import Batch
from runtime.bundle import Bundle
from runtime.embedder import Embedder, open_embedder
from runtime.engines.buckets import Bucket
from runtime.server import open_models
from runtime.serving.model import Proven
from runtime.settings import EngineSettings, ModelSettings, ServeSettings
from tests.serving_in_process import NEVER_S


class Recording:
    """The real engine, which says that it was compiled for `buckets`, and writes down the shapes that it runs."""

    def __init__(self, embedder: Embedder, buckets: list[Bucket]) -> None:
        engine = embedder.loaded.engine
        self.name, self.precision, self.fingerprint = engine.name, engine.precision, engine.fingerprint
        self.max_tokens = engine.max_tokens
        self.buckets: Sequence[Bucket] = buckets
        self._engine = engine
        self.ran: list[tuple[int, ...]] = []

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.ran.append(batch.input_ids.shape)
        return self._engine.run(batch)

    def close(self) -> None:
        self._engine.close()


@pytest.mark.parametrize(
    "buckets", [[], [Bucket(0, 1, 32), Bucket(1, 8, 64), Bucket(2, 1, 1024)]], ids=["none", "three"]
)
def test_before_a_model_can_answer_every_bucket_has_run_twice(bundle: Bundle, buckets: list[Bucket]) -> None:
    embedder = open_embedder(bundle)
    engine = Recording(embedder, buckets)
    own = Embedder(bundle, replace(embedder.loaded, engine=engine))
    spec, settings = ModelSettings("mini", str(bundle.folder)), ServeSettings(golden_period_s=NEVER_S)

    async def opened() -> float:
        models = await open_models([(spec, Proven(own, own.loaded.expected))], EngineSettings(), settings)
        ran = list(engine.ran)
        wanted = [(b.rows, b.tokens) for b in buckets] or [(1, 16), (4, 16), (1, 64), (4, 64), (1, 256), (4, 256)]
        assert [ran.count(shape) for shape in wanted] == [2] * len(wanted)
        known_ms = models.default.pipeline._turns._queue.cost.batch_ms(256)
        await models.close()
        return known_ms

    assert asyncio.run(opened()) > 0, "and what batches cost is known"
