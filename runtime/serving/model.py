"""A model by name: the pipeline that answers for it now, its health, and the switch to another engine.

Whatever answers has reproduced PyTorch's golden vectors: at start, on a period, soon after an engine error, and before
a switch. Where a bundle has none, an engine that is allowed unverified has reproduced its own first ones. A request
stays with the pipeline that took it, so no answer mixes two engines; after a switch the old one finishes what it has
and is closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from runtime import golden
from runtime.bundle import open_bundle
from runtime.embedder import Embedder, open_embedder
from runtime.errors import AbandonedError, F2rtError, UnavailableError
from runtime.gate import open_gate
from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.job import Job
from runtime.serving.memory import give_back, loading
from runtime.serving.metrics import EngineMetrics, Gauges, Metrics
from runtime.serving.pipeline import Pipeline
from runtime.serving.shadow import Shadow
from runtime.serving.warmup import warm_up
from runtime.serving.watch import GoldenWatch
from runtime.settings import EngineSettings, ModelSettings, ServeSettings

log = logging.getLogger("f2rt.model")


class State(StrEnum):
    """Whether a model answers."""

    READY = "ready"
    FAILING = "failing"  # its vectors are wrong, or its engine does not answer
    DRAINING = "draining"


@dataclass(frozen=True)
class Reloaded:
    """A switch that was made: the fingerprints before and after, and the new engine's name."""

    model: str
    old_fingerprint: str
    new_fingerprint: str
    engine: str


@dataclass(frozen=True)
class Proven:
    """An engine that has just reproduced the golden vectors, and these."""

    embedder: Embedder
    expected: golden.Golden


def load(model: ModelSettings, engine: EngineSettings, settings: ServeSettings) -> Proven:
    """Read the policy, open a bundle and prove one of its engines under it. Takes seconds.

    Raises InputError for the policy, and what `open_bundle` and `load_engine` raise.
    """
    gate = open_gate(settings.policy, settings.allow_unverified)
    with loading():
        embedder = open_embedder(open_bundle(Path(model.bundle)), model.engine, engine, settings.limits, gate)
    return Proven(embedder, embedder.loaded.expected)


def warn_if_unverified(name: str, embedder: Embedder) -> None:
    """Log that an engine without a verdict that stands is about to answer for `name`, and what it lacks."""
    loaded = embedder.loaded
    if loaded.unverified:
        log.warning("%s is answered by an unverified engine, %s: %s", name, loaded.record.full_name, loaded.unverified)


class Model:
    """One name that answers calls."""

    def __init__(
        self, spec: ModelSettings, proven: Proven, engine: EngineSettings, settings: ServeSettings, metrics: Metrics
    ) -> None:
        """Start to answer. Must be called inside the event loop, with an engine that was warmed up or will be."""
        self.spec = spec
        self.state = State.READY
        self.problem = ""
        self.golden_cosine = proven.embedder.loaded.golden_cosine
        self.on_state: Callable[[], None] = lambda: None
        self._engine_settings = engine
        self._settings = settings
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._switching = threading.Lock()
        self._reloading = asyncio.Lock()
        self._retired: set[asyncio.Task[None]] = set()
        self.shadow: Shadow | None = None
        self.pipeline = self._pipeline(proven.embedder)
        self._watch = self._watch_over(self.pipeline, proven.expected)
        metrics.ready.labels(spec.name).set(1)
        metrics.golden.labels(spec.name).set(self.golden_cosine)

    @property
    def name(self) -> str:
        """The name that requests ask for."""
        return self.spec.name

    @property
    def embedder(self) -> Embedder:
        """The embedder that answers now."""
        return self.pipeline.embedder

    @property
    def gauges(self) -> Gauges:
        """Return present values for the metrics."""
        loaded = self.embedder.loaded
        engine = {
            "fingerprint": loaded.engine.fingerprint,
            "engine": loaded.record.full_name,
            "precision": loaded.record.precision,
        }
        return Gauges(self.name, self.pipeline.waiting, engine, unverified=bool(loaded.unverified))

    def answer(self, call: EmbedCall, begun: Callable[[Job, Pipeline], None]) -> EmbedReply:
        """Answer one call on this thread; `begun` hears of what can be abandoned.

        Raises as `Pipeline.answer`, and UnavailableError while the model must not answer.
        """
        with self.entered() as pipeline:
            reply = pipeline.answer(call, lambda job: begun(job, pipeline))
        shadow = self.shadow
        if shadow is not None:
            self._loop.call_soon_threadsafe(shadow.offer, reply)
        return reply

    async def embed(self, call: EmbedCall) -> EmbedReply:
        """Answer one call. Raises as `answer`."""
        with self.entered() as pipeline:
            reply = await pipeline.embed(call)
        if self.shadow is not None:
            self.shadow.offer(reply)
        return reply

    @contextlib.contextmanager
    def entered(self) -> Iterator[Pipeline]:
        """Give the pipeline of now, which stays open until it is left. Raises as `check_answers`."""
        self.check_answers()
        with self._switching:
            pipeline = self.pipeline
            pipeline.enter()
        try:
            yield pipeline
        finally:
            pipeline.leave()

    def check_answers(self) -> None:
        """Raise UnavailableError unless the model is ready."""
        if self.state is State.DRAINING:
            raise UnavailableError("the server is shutting down.", cure="Ask another replica.")
        if self.state is State.FAILING:
            raise UnavailableError(
                f"the model {self.name} does not answer: {self.problem}.", cure="Ask another replica."
            )

    async def warm_up(self) -> None:
        """Run every shape that matters, so that the first request pays for none."""
        await asyncio.get_running_loop().run_in_executor(None, warm_up, self.pipeline)

    async def reload(self, engine: str | None = None, *, wanted: Callable[[], bool] = lambda: True) -> Reloaded:
        """Load the bundle again beside what answers, prove and warm it, and switch; a second one waits for the first.

        `engine` names another engine of the bundle. Raises what `load` raises; the old engine then answers on.
        One that is not `wanted` any more when its turn comes raises AbandonedError; what has begun is finished.
        """
        async with self._reloading:
            if not wanted():
                raise AbandonedError("the caller went away before the reload began.")
            old, loop = self.pipeline, asyncio.get_running_loop()
            spec = self.spec if engine is None else self.spec.with_engine(engine)
            try:
                proven = await loop.run_in_executor(None, load, spec, self._engine_settings, self._settings)
                fresh = self._pipeline(proven.embedder)
                try:
                    await loop.run_in_executor(None, warm_up, fresh)
                except BaseException:
                    await fresh.close()
                    raise
            except Exception as error:
                self._metrics.reloads.labels(self.name, "failed").inc()
                unforeseen = None if isinstance(error, F2rtError) else error
                fingerprint = old.embedder.fingerprint
                log.error("reload of %s failed, %s answers on: %s", self.name, fingerprint, error, exc_info=unforeseen)
                raise
            await self._watch.stop()
            with self._switching:
                self.spec, self.pipeline = spec, fresh
            self._watch = self._watch_over(fresh, proven.expected)
            self._tell(proven.embedder.loaded.golden_cosine, None)
            retiring = asyncio.create_task(_retire(old))
            self._retired.add(retiring)
            retiring.add_done_callback(self._retired.discard)
            self._metrics.reloads.labels(self.name, "switched").inc()
            done = Reloaded(
                self.name, old.embedder.fingerprint, fresh.embedder.fingerprint, proven.embedder.loaded.record.full_name
            )
            log.info(
                "%s switched from %s to %s (%s)", self.name, done.old_fingerprint, done.new_fingerprint, done.engine
            )
            warn_if_unverified(self.name, fresh.embedder)
            await self._part_from_a_stranger()
            return done

    async def _part_from_a_stranger(self) -> None:
        """Drop a shadow that would read other words in the ids of the engine that now answers."""
        shadow = self.shadow
        if shadow is not None and not shadow.fits(self.embedder.bundle):
            log.warning("%s has another tokenizer than its shadow now: the shadow is off", self.name)
            self.shadow = None
            await shadow.close()

    async def idle(self) -> None:
        """Return once every call has been answered, by the engine of now and by those before it."""
        await self.pipeline.idle()
        while self._retired:
            await asyncio.wait(self._retired)

    def drain(self) -> None:
        """Answer no new calls."""
        self.state = State.DRAINING
        self._metrics.ready.labels(self.name).set(0)
        self.on_state()

    async def close(self) -> None:
        """Free everything."""
        await self._watch.stop()
        if self.shadow is not None:
            await self.shadow.close()
        await self.pipeline.close()

    def _pipeline(self, embedder: Embedder) -> Pipeline:
        settings = self._settings
        return Pipeline(embedder, settings.scheduling, settings.truncate, EngineMetrics(self._metrics, self.name))

    def _watch_over(self, pipeline: Pipeline, expected: golden.Golden) -> GoldenWatch:
        settings = self._settings
        return GoldenWatch(
            pipeline, expected, self._tell, period_s=settings.golden_period_s, timeout_s=settings.golden_timeout_s
        )

    def _tell(self, cosine: float, problem: str | None) -> None:
        self.golden_cosine = cosine
        self._metrics.golden.labels(self.name).set(cosine)
        if problem is not None:
            self._metrics.golden_failures.labels(self.name).inc()
        if self.state is State.DRAINING:
            return
        before, self.state = self.state, State.READY if problem is None else State.FAILING
        self.problem = problem or ""
        if self.state is before:
            return
        self._metrics.ready.labels(self.name).set(int(problem is None))
        if problem is None:
            log.warning("%s gives the golden vectors again and answers", self.name)
        else:
            log.error("%s stops answering: %s", self.name, problem)
        self.on_state()


async def _retire(pipeline: Pipeline) -> None:
    await pipeline.idle()
    await pipeline.close()
    del pipeline
    await asyncio.get_running_loop().run_in_executor(None, give_back)
