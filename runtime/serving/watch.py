"""The golden watch: real forward passes with known answers, for as long as a model serves.

On a period one golden text, the next one each time, goes the way that requests go. A wrong vector, an engine error or
no answer in time lets all golden texts run; until they come out right the model answers nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable

import numpy as np

from runtime import golden
from runtime.errors import F2rtError, UnverifiedError
from runtime.serving.pipeline import Pipeline
from runtime.tokenizer import TokenizedText

log = logging.getLogger("f2rt.watch")


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
        self._tell = tell
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._alarm = asyncio.Event()
        self._failing = False
        pipeline.on_engine_error = lambda error: self._alarm.set()
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the watch."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def check(self, rows: list[int]) -> bool:
        """Run golden texts by number through the pipeline, tell the outcome, and return whether it is right."""
        expected, engine = self._expected, self._pipeline.embedder.loaded.engine
        items = [TokenizedText(expected.ids[row], len(expected.ids[row])) for row in rows]
        cosine, problem = -1.0, None
        try:
            vectors = await asyncio.wait_for(self._pipeline.run(items), self._timeout_s)
            part = golden.Golden(
                [expected.texts[row] for row in rows], [expected.ids[row] for row in rows], expected.embeddings[rows]
            )
            cosine = float(np.min(golden.row_cosines(vectors, part.embeddings)))
            golden.compare(engine, vectors, part)
        except TimeoutError:
            problem = f"{engine.name} gave no answer to a golden text within {self._timeout_s:g} s"
        except UnverifiedError as error:
            problem = error.message.rstrip(".")
        except F2rtError as error:
            problem = f"{engine.name} failed on a golden text: {error.message.rstrip('.')}"
        self._tell(cosine, problem)
        return problem is None

    async def _watch(self) -> None:
        texts = range(len(self._expected.ids))
        turns = itertools.cycle(texts)
        while True:
            alarmed = False
            if self._failing:
                # The alarms are its own failed checks now: to answer each at once would be to check without a pause.
                await asyncio.sleep(self._period_s)
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._alarm.wait(), self._period_s)
                    alarmed = True
            self._alarm.clear()
            if self._failing or alarmed or not await self.check([next(turns)]):
                self._failing = not await self.check(list(texts))
