"""Giving freed memory back to the system, so that a server which switches engines does not grow.

glibc keeps what is freed at the end of a thread's arena up to a threshold, which rises to twice the largest block ever
freed: with engines up to 64 MiB in each arena, and `malloc_trim` gives back the end of the main arena alone. Engines
are loaded and freed on many threads, each of them in an arena of its own, of which there are eight for a core: what
lives on among what is freed then lies scattered over all of them, and each grows. Without glibc nothing here does
anything.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from runtime.cores import usable_cores

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt, from glibc's malloc.h
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
_KEPT_BYTES = 1 << 20  # at an arena's end; larger blocks are mapped by themselves, and gone when freed
# So are an engine's matrices, while it is loaded: in an arena they leave holes. Answers of this size stay in arenas,
# where the next one finds pages that are mapped.
_LOADING_BYTES = 128 << 10
_LEAST_ARENAS = 2
_GROWN_BYTES = 32 << 20

_loads = 0
_lock = threading.Lock()


def keep_little() -> None:
    """Hold what glibc adapts where it is good for a server, unless the environment sets it.

    To be called before engines are loaded and threads are started.
    """
    _set(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    _set(_M_MMAP_THRESHOLD, _KEPT_BYTES)
    _set(_M_ARENA_MAX, max(usable_cores(), _LEAST_ARENAS))


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Keep an engine's larger blocks out of the arenas while it is loaded; several may be at a time."""
    global _loads
    with _lock:
        _loads += 1
        _set(_M_MMAP_THRESHOLD, _LOADING_BYTES)
    try:
        yield
    finally:
        with _lock:
            _loads -= 1
            if not _loads:
                _set(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Collect what cycles still hold, and have glibc return the free pages of all its arenas."""
    gc.collect()
    _trim()


class Resident:
    """Gives freed memory back while the process is larger than it was: what a flood took does not stay for good."""

    def __init__(self) -> None:
        self._least = resident_bytes()

    def look(self) -> bool:
        """Give back what is free if there may be much of it; returns whether it did. Takes a moment, without the GIL.

        Compared with the least there ever was, and not with the last time: in the middle of a flood nothing is free.
        """
        grown = resident_bytes() > self._least + _GROWN_BYTES
        if grown:
            _trim()
        self._least = min(self._least, resident_bytes())
        return grown


def resident_bytes() -> int:
    """Return how much memory the process has; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _set(option: int, value: int) -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _GIVEN):
        mallopt(option, value)
