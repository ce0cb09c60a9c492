"""Which items share a batch. A batch costs rows x width, so items of similar length go together. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from runtime.errors import InputError
from runtime.settings import Limits

_WASTE = 0.04  # of a batch that padding may be in any case

Shape = Callable[[int, int], int]
"""Padded tokens that the engine computes for a batch of rows and width."""


def rectangle(rows: int, width: int) -> int:
    """Return rows x width: the shape of engines that take batches as they are."""
    return rows * width


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


def fill(
    lengths: Sequence[int], max_tokens: int, max_rows: int, break_even_tokens: float, shape: Shape = rectangle
) -> list[int]:
    """Return the most efficient batch that has the first item in it, as indices of items, shortest first.

    No batch but that of one item alone has more than `max_rows` rows or computes more than `max_tokens` padded tokens.
    With the items sorted by length: for each width from the first one's own upwards, rows are added downwards while the
    padding costs less than a batch of its own would, which is as much as `break_even_tokens` tokens. The best is the
    one with most real tokens for its cost.
    """
    # Of equal lengths the first in turn stands last, where the rows of a batch begin: a batch that takes only some of
    # them takes it.
    order = sorted(range(len(lengths)), key=lambda k: (lengths[k], -k))
    ascending = [lengths[k] for k in order]
    head = order.index(0)
    best, best_score = (head, head), ascending[head] / (break_even_tokens + shape(1, ascending[head]))
    for top in range(head, len(order)):
        width, real = ascending[top], 0
        if top + 1 < len(order) and ascending[top + 1] == width:
            continue  # the last of equal lengths takes in the others
        for bottom in range(top, -1, -1):
            count = top - bottom + 1
            padded, computed = count * width, shape(count, width)
            real += ascending[bottom]
            too_large = count > 1 and (count > max_rows or computed > max_tokens)
            if too_large or padded - real > max(break_even_tokens, _WASTE * padded):
                break
            score = real / (break_even_tokens + computed)
            if bottom <= head and score >= best_score:  # of equals the larger one
                best, best_score = (bottom, top), score
    bottom, top = best
    return sorted(order[bottom : top + 1], key=lambda k: (lengths[k], k))
