"""TensorRT's timing cache: how long each kernel took on this GPU, so that a second build need not measure again.

A cache belongs to one GPU, driver and library version; its file is named by the hash of these and of everything else
that decides which kernels are timed. TensorRT-RTX times nothing while it builds.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import OutputError
from runtime.files import cache_folder, write_atomic

if TYPE_CHECKING:  # without the library installed this is Any; the tests check against the real one
    import tensorrt

log = logging.getLogger("f2rt.build")


class TimingCache:
    """The timings of one build's key, in a file of the user's cache folder."""

    def __init__(self, config: tensorrt.IBuilderConfig, key: Sequence[str]) -> None:
        """Give a build what an earlier one measured under the same key; `state` says what came of it."""
        self.path = timing_cache_path(key)
        stored = self.path.read_bytes() if self.path.is_file() else b""
        self._stored = stored
        # A cache of another device would be refused here, and is not taken for this one's.
        if stored and config.set_timing_cache(config.create_timing_cache(stored), False):
            self.state = "timings of an earlier build reused"
            return
        config.set_timing_cache(config.create_timing_cache(b""), False)
        self.state = "kernels timed"

    def save(self, config: tensorrt.IBuilderConfig) -> None:
        """Keep what was measured. A cache that cannot be written costs time at the next build, no more."""
        cache = config.get_timing_cache()
        memory = None if cache is None else cache.serialize()
        if memory is None or bytes(memory) == self._stored:
            return
        try:
            write_atomic(self.path, bytes(memory))
        except OutputError as error:
            log.warning("the timing cache was not saved: %s", error)


def timing_cache_path(key: Sequence[str]) -> Path:
    """Return the file of a key."""
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:32]
    return cache_folder() / "timing" / f"{name}.cache"
