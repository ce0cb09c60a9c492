"""External data of a graph: planned without weights, then streamed once from the checkpoint into one file.

A graph is built on a `DataLayout`: every weight gets its place in the file at once and its bytes later, so building
never needs the model. `write` then walks the checkpoint tensor by tensor; what is resident at any moment is one
matrix in its own dtype and a few megabytes of float32.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.weights import Weights, to_float32
from runtime.errors import CheckpointError

ALIGNMENT_BYTES = 4096  # a memory page, so that a runtime can map each tensor
_CHUNK_VALUES = 1 << 20
_AHEAD = 4  # chunks of a few megabytes
_BLOCK = 256  # rows and columns of a transposition block; both sides then fit the cache


@dataclass(frozen=True)
class Entry:
    """One tensor in the file: float32 of `shape` at `offset`, from `source` (transposed or not) or from `values`."""

    name: str
    shape: tuple[int, ...]
    offset: int
    source: str | None
    transposed: bool
    values: NDArray[np.float32] | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return 4 * int(np.prod(self.shape))


@dataclass
class DataLayout:
    """The plan of one external data file called `location`."""

    location: str
    entries: list[Entry] = field(default_factory=list)
    end: int = 0

    def weight(self, source: str, shape: tuple[int, ...], *, transposed: bool = False) -> ir.Value:
        """Place a tensor of the checkpoint; `shape` is the stored one, a transposed matrix becomes [in, out]."""
        if transposed:
            return self._place(f"{source}.transposed", (shape[1], shape[0]), source, True, None)
        return self._place(source, shape, source, False, None)

    def constant(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """Place a computed float32 tensor."""
        return self._place(name, values.shape, None, False, values)

    @property
    def size_bytes(self) -> int:
        """Length of the whole file."""
        return self.end

    def _place(
        self,
        name: str,
        shape: tuple[int, ...],
        source: str | None,
        transposed: bool,
        values: NDArray[np.float32] | None,
    ) -> ir.Value:
        offset = -(-self.end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        entry = Entry(name, shape, offset, source, transposed, values)
        self.entries.append(entry)
        self.end = offset + entry.size_bytes
        tensor = ir.ExternalTensor(
            self.location, offset, entry.size_bytes, ir.DataType.FLOAT, shape=ir.Shape(shape), name=name
        )
        return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)


def write(layout: DataLayout, weights: Weights, path: Path, progress: Callable[[int], None]) -> str:
    """Stream all tensors to `path`, in order; returns the file's SHA-256, computed on the way.

    One thread converts, one writes and one hashes; at most `_AHEAD` chunks wait. `progress` is told the number of
    bytes done. Raises CheckpointError for a value that is not finite, OSError when the file cannot be written.
    """
    digest = hashlib.sha256()
    waiting: deque[tuple[int, Future[int], Future[None]]] = deque()
    with path.open("wb") as file, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as hasher:
        for data in _bytes(layout, weights):
            waiting.append((len(data), writer.submit(file.write, data), hasher.submit(digest.update, data)))
            if len(waiting) > _AHEAD:
                _finish(waiting.popleft(), progress)
        for oldest in waiting:
            _finish(oldest, progress)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _finish(oldest: tuple[int, Future[int], Future[None]], progress: Callable[[int], None]) -> None:
    count, written, hashed = oldest
    written.result()
    hashed.result()
    progress(count)


def _bytes(layout: DataLayout, weights: Weights) -> Iterator[memoryview]:
    """Yield the file's bytes: padding and chunks."""
    position = 0
    for entry in layout.entries:
        yield memoryview(bytes(entry.offset - position))
        for chunk in _chunks(entry, weights):
            yield chunk.reshape(-1).view(np.uint8).data
        position = entry.offset + entry.size_bytes


def _chunks(entry: Entry, weights: Weights) -> Iterator[NDArray[np.float32]]:
    """Yield the entry's values in file order, C-contiguous float32."""
    if entry.values is not None:
        yield np.ascontiguousarray(entry.values, np.float32)
        return
    assert entry.source is not None
    if entry.transposed:
        matrix = weights.read(entry.source)
        for start in range(0, entry.shape[0], _BLOCK):
            yield _finite(entry, _transposed_rows(matrix, start, min(start + _BLOCK, entry.shape[0])))
        return
    row_values = int(np.prod(entry.shape[1:]))
    # A slice of a mapped file costs an open; several chunks share one.
    for piece in weights.rows(entry.source, max(1, 32 * _CHUNK_VALUES // row_values)):
        flat = piece.reshape(-1)
        for start in range(0, flat.size, _CHUNK_VALUES):
            yield _finite(entry, to_float32(flat[start : start + _CHUNK_VALUES]))


def _transposed_rows(matrix: NDArray[np.generic], start: int, stop: int) -> NDArray[np.float32]:
    """Return rows start..stop of the transposed matrix, float32; block by block, five times faster than in one go."""
    rows = np.empty((stop - start, matrix.shape[0]), matrix.dtype)
    for column in range(0, matrix.shape[0], _BLOCK):
        rows[:, column : column + _BLOCK] = matrix[column : column + _BLOCK, start:stop].T
    return to_float32(rows)


def _finite(entry: Entry, chunk: NDArray[np.float32]) -> NDArray[np.float32]:
    if not np.isfinite(chunk).all():
        bad = int(np.count_nonzero(~np.isfinite(chunk)))
        raise CheckpointError(
            f"the weight {entry.source} holds {bad} values that are not finite (NaN or infinity).",
            cure="The checkpoint is damaged: download it again.",
        )
    return np.ascontiguousarray(chunk)
