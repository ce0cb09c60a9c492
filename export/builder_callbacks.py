"""What a builder calls back while it compiles: where the plan goes, and who hears of the progress.

The classes are made on demand because their bases come from the library of the backend at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

from runtime.engines.tensorrt_library import Library

if TYPE_CHECKING:  # without the library installed this is Any; the tests check against the real one
    import tensorrt

Progress = Callable[[str, int, int], None]


def plan_writer(trt: Library, file: BinaryIO) -> Any:
    """Return what the builder streams a plan into; afterwards it has `digest`, `size_bytes` and `error`."""

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        """Passes the plan on to the file as it comes. Keeps what goes wrong: the library must see no exception."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.digest = hashlib.sha256()
            self.size_bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is not None:
                return 0
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.digest.update(data)
            self.size_bytes += len(data)
            return len(data)

    return Writer()


def progress_monitor(trt: Library, progress: Progress) -> tensorrt.IProgressMonitor:
    """Return what the builder reports its phases to."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        """Passes the builder's phases on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps
            progress(f"build: {phase_name}", 0, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            total = self._totals.get(phase_name, 0)
            progress(f"build: {phase_name}", total, total)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"build: {phase_name}", step + 1, self._totals.get(phase_name, 0))
            return True

    return Monitor()
