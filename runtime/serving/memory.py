"""Giving freed memory back to the system, so that a server which switches engines does not grow.

glibc keeps what is freed at the end of a thread's arena up to a threshold, which rises to twice the largest block ever
freed: with engines up to 64 MiB in each arena, and `malloc_trim` gives back the end of the main arena alone. Engines
are loaded and freed on many threads, each of them in an arena of its own, of which there are eight for a core: what
lives on among what is freed then lies scattered over all of them, and each grows. Without glibc nothing here does
anything.
"""

from __future__ import annotations

import ctypes
import gc
import os

from runtime.cores import usable_cores

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt, from glibc's malloc.h
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
_KEPT_BYTES = 1 << 20  # at an arena's end
_MAPPED_BYTES = 128 << 10  # blocks from this size on are mapped by themselves, and gone when freed: glibc's own default
_LEAST_ARENAS = 2


def keep_little() -> None:
    """Hold what glibc adapts where it is good for a server, unless the environment sets it.

    To be called before engines are loaded and threads are started.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _GIVEN):
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_M_ARENA_MAX, max(usable_cores(), _LEAST_ARENAS))


def give_back() -> None:
    """Collect what cycles still hold, and have glibc return the free pages of all its arenas."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
