"""Giving freed memory back to the system, after something large was freed."""

from __future__ import annotations

import ctypes
import gc


def give_back() -> None:
    """Collect what cycles still hold, and have glibc return the free pages of all its arenas.

    An engine's memory is freed in the arenas of the threads that took it; by itself glibc keeps it there, and a server
    that switches engines would grow. Without glibc this does nothing.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
