"""A second engine that sees a share of the live traffic and answers none of it: how far would its vectors be?

It gets the same token ids after the answer is out, when it has nothing else to do; what it has no time for is dropped
and counted. The drift of each text, 1 - cosine, goes into a histogram, and into the log past a threshold.
"""

from __future__ import annotations

import asyncio
import logging
import random

from runtime.bundle import Bundle
from runtime.errors import F2rtError, InputError
from runtime.golden import row_cosines
from runtime.serving.call import EmbedReply
from runtime.serving.metrics import Metrics
from runtime.serving.pipeline import Pipeline
from runtime.settings import ShadowSettings

log = logging.getLogger("f2rt.shadow")


class Shadow:
    """Compares one model's answers with another engine's."""

    def __init__(
        self, pipeline: Pipeline, tokenizer_sha256: str, model: str, settings: ShadowSettings, metrics: Metrics
    ):
        """`tokenizer_sha256` is the model's own. Raises InputError when the two engines cannot see the same ids."""
        self.pipeline = pipeline
        check_tokenizer(pipeline.embedder.bundle, tokenizer_sha256, model)
        self._model = model
        self._settings = settings
        self._drift = metrics.drift.labels(model)
        self._dropped = metrics.shadow_dropped.labels(model)
        self._chance = random.Random(0)  # which requests are looked at needs no secret
        self._busy: asyncio.Task[None] | None = None
        self._closed = False

    def fits(self, bundle: Bundle) -> bool:
        """Whether engines of a bundle give this one ids that mean the same here, and vectors of the same length."""
        own, other = self.pipeline.embedder.bundle.manifest, bundle.manifest
        return (own.tokenizer.sha256, own.contract.dim) == (other.tokenizer.sha256, other.contract.dim)

    def offer(self, reply: EmbedReply) -> None:
        """Maybe compare an answer that was just given."""
        if self._closed or self._chance.random() >= self._settings.share:
            return
        if self._busy is not None and not self._busy.done():
            self._dropped.inc()
            return
        self._busy = asyncio.create_task(self._compare(reply))

    async def close(self) -> None:
        """Drop what is being compared and free the engine. What is offered from now on is left alone."""
        self._closed = True
        if self._busy is not None:
            self._busy.cancel()
            await asyncio.gather(self._busy, return_exceptions=True)
        await self.pipeline.close()

    async def _compare(self, reply: EmbedReply) -> None:
        try:
            vectors = await self.pipeline.run(reply.items)
        except F2rtError as error:
            log.warning("the shadow engine of %s failed: %s", self._model, error)
            return
        drifts = 1 - row_cosines(reply.vectors, vectors)
        for drift in drifts:
            self._drift.observe(max(float(drift), 0.0))
        worst = int(drifts.argmax())
        if drifts[worst] > self._settings.drift:
            log.warning(
                "%s and its shadow %s differ: 1 - cosine is %.2e on a text of %d tokens (limit %.2e); %s and %s",
                self._model,
                self.pipeline.embedder.loaded.record.full_name,
                drifts[worst],
                len(reply.items[worst].ids),
                self._settings.drift,
                reply.fingerprint,
                self.pipeline.embedder.fingerprint,
            )


def check_tokenizer(bundle: Bundle, tokenizer_sha256: str, model: str) -> None:
    """Raise InputError unless a shadow's bundle has the tokenizer of the model it looks on."""
    if bundle.manifest.tokenizer.sha256 != tokenizer_sha256:
        raise InputError(
            f"the shadow engine of {bundle.folder} has another tokenizer than the model {model}.",
            cure="Compare engines of one checkpoint; for two checkpoints see f2rt diff.",
        )
