"""The golden watch: real forward passes with known answers, for as long as a model serves.

On a period one golden text, the next one each time, goes the way that requests go. A wrong vector, an engine error or
no answer in time lets all golden texts run; until they come out right the model answers nothing else. What errors
set off has its pauses: no caller can keep the engine busy with golden texts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from runtime import golden
from runtime.errors import F2rtError, UnverifiedError
from runtime.serving.pipeline import Pipeline
from runtime.tokenizer import TokenizedText

log = logging.getLogger("f2rt.watch")

# The least time from the end of a check to the next one that an engine error starts. A caller who has found a request
# that makes the engine fail may send it as fast as it likes: without this it would have the engine run golden texts and
# little else.
_ALARM_PAUSE_S = 1.0


class GoldenWatch:
    """Checks one pipeline again and again. `tell` hears of every check: the smallest cosine, and what is wrong."""

    def __init__(
        self,
        pipeline: Pipeline,
        expected: golden.Golden,
        tell: Callable[[float, str | None], None],
        *,
        period_s: float,
        timeout_s: float,
    ) -> None:
        self._pipeline = pipeline
        self._expected = expected
        loaded = pipeline.embedder.loaded
        self._limits = loaded.policy.tolerance(loaded.record.precision)
        self._tell = tell
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._alarm = asyncio.Event()
        self._alarms_from_s = 0.0  # in the event loop's time
        self._failing = False
        pipeline.on_engine_error = lambda error: self._alarm.set()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the watch."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            log.error("the golden watch had ended", exc_info=error)

    async def check(self, rows: list[int]) -> bool:
        """Run golden texts by number through the pipeline, tell the outcome, and return whether it is right."""
        expected, engine = self._expected, self._pipeline.embedder.loaded.engine
        items = [TokenizedText(expected.ids[row], len(expected.ids[row])) for row in rows]
        cosine, problem = -1.0, None
        try:
            # Not `wait_for`: in Python 3.11 it loses a cancellation that comes with the result, and `stop` never ends.
            # What runs and waits before it is somebody else's time: one long text on a slow engine is no failure.
            async with asyncio.timeout(self._timeout_s + self._pipeline.foreseen_wait_s(items)):
                vectors = await self._pipeline.run(items)
            part = replace(
                expected,
                texts=[expected.texts[row] for row in rows],
                ids=[expected.ids[row] for row in rows],
                embeddings=expected.embeddings[rows],
            )
            cosine = float(np.min(golden.row_cosines(vectors, part.embeddings)))
            golden.compare(engine, vectors, part, self._limits)
        except TimeoutError:
            problem = f"{engine.name} gave no answer to a golden text within {self._timeout_s:g} s"
        except UnverifiedError as error:
            problem = error.message.rstrip(".")
        except F2rtError as error:
            problem = f"{engine.name} failed on a golden text: {error.message.rstrip('.')}"
        except Exception as error:  # whatever it is, the watch goes on, or readiness would never change again
            log.exception("a golden text failed unexpectedly")
            problem = f"{engine.name} failed on a golden text: {type(error).__name__}, see the server's log"
        self._tell(cosine, problem)
        return problem is None

    async def _watch(self) -> None:
        texts = range(len(self._expected.ids))
        turns = itertools.cycle(texts)
        loop = asyncio.get_running_loop()
        while True:
            alarmed = False
            if self._failing:
                # The alarms are its own failed checks now: to answer each at once would be to check without a pause.
                await asyncio.sleep(self._period_s)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._period_s):
                        await self._alarm.wait()
                    alarmed = True
            if alarmed:
                await asyncio.sleep(max(self._alarms_from_s - loop.time(), 0.0))
            self._alarm.clear()
            if self._failing or alarmed or not await self.check([next(turns)]):
                begun_s = loop.time()
                self._failing = not await self.check(list(texts))
                # A slow engine checks for longer than a second: then it gets as much time for its requests.
                self._alarms_from_s = loop.time() + max(_ALARM_PAUSE_S, loop.time() - begun_s)
