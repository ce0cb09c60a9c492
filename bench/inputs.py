"""What INT8 measurements are fed with: calibration texts, and a cache that goes when the measurement does."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from calibration.texts import Text, calibration_texts
from runtime.errors import InputError

_SHORT_CHARS = 200
_CACHE = "F2RT_CACHE"

T = TypeVar("T")


def spread(items: Sequence[T], count: int | None) -> list[T]:
    """Return `count` of the items at even distances, or all where there are no more. Raises InputError below 1."""
    if count is not None and count < 1:
        raise InputError(f"the number of texts is {count}; it must be at least 1.", cure="Give 1 or more.")
    if count is None or count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def short_texts(count: int) -> list[Text]:
    """Return `count` short calibration texts: enough to make INT8 of random weights, and soon done."""
    return spread([t for t in calibration_texts() if len(t.text) < _SHORT_CHARS], count)


@contextlib.contextmanager
def private_cache(work: Path) -> Iterator[None]:
    """Keep what an export remembers in `work`: statistics of checkpoints that will never be seen again."""
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(work / "cache")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before
