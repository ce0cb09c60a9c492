"""Which items share a batch: pure planning, no clock and no I/O.

The cost of a batch is rows x width, so items of similar length go together. Within one call for now; the queue across
requests plans with the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.errors import InputError
from runtime.settings import Limits


def plan(lengths: Sequence[int], limits: Limits) -> list[list[int]]:
    """Split items into batches; returns lists of item indices, each item exactly once.

    No batch has more than `max_batch_rows` rows, or rows x longest > `max_batch_tokens`; an item longer than
    that budget travels alone. Raises InputError for a length below 1.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    # Descending: the first item of a batch is its width, so the cost of adding one more is known.
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] < 1:
            raise InputError(f"item {index} has {lengths[index]} tokens.", cure="Every item needs at least one token.")
        if current:
            rows = len(current) + 1
            too_many = rows > limits.max_batch_rows or rows * lengths[current[0]] > limits.max_batch_tokens
            if too_many:
                batches.append(current)
                current = []
        current.append(index)
    if current:
        batches.append(current)
    return batches
