"""Giving freed memory back to the system, so that a server which switches engines does not grow.

glibc keeps what is freed at the end of a thread's arena up to a threshold, which rises to twice the largest block ever
freed: with engines up to 64 MiB in each arena, and `malloc_trim` gives back the end of the main arena alone. Engines
are loaded and freed on many threads. Without glibc nothing here does anything.
"""

from __future__ import annotations

import ctypes
import gc
import os

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, from glibc's malloc.h
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_KEPT_BYTES = 1 << 20  # at an arena's end; larger blocks are mapped by themselves


def keep_little() -> None:
    """Hold the thresholds where they are good for a server, unless the environment sets them.

    To be called before engines are loaded.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _GIVEN):
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """Collect what cycles still hold, and have glibc return the free pages of all its arenas."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
