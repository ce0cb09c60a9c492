"""Queues and costs that are known, for tests of the scheduler."""

from __future__ import annotations

from typing import Any

from runtime.batching import Shape
from runtime.cost import CostModel
from runtime.scheduler import FairQueue, Planned
from runtime.settings import Limits, SchedulingSettings


def patient(**fields: Any) -> SchedulingSettings:
    return SchedulingSettings(**{"max_wait_ms": 1e12, "overload": 1e9, "least_batch_tokens": 1, **fields})


def known(fixed_ms: float, token_ms: float) -> CostModel:
    cost = CostModel()
    for tokens in (1, 16, 64, 256, 1024):
        cost.observe(tokens, fixed_ms + token_ms * tokens)
    return cost


def padded(rows: int, width: int) -> int:
    return rows * width


def queue(limits: Limits = Limits(), cost: CostModel | None = None, shape: Shape = padded, **fields: Any) -> FairQueue:
    return FairQueue(limits, patient(**fields), cost, shape)


def drain(waiting: FairQueue, now_s: float = 0.0) -> list[Planned]:
    batches = []
    while (planned := waiting.next_batch(now_s)) is not None:
        batches.append(planned)
    return batches
