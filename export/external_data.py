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
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.weights import Weights, to_float32
from runtime.errors import CheckpointError

# Raise it when the same layout and weights give other bytes than before: graphs are then written again.
DATA_FORMAT = 1
ALIGNMENT_BYTES = 4096  # a memory page, so that a runtime can map each tensor
_CHUNK_VALUES = 1 << 20
_AHEAD = 4  # chunks of a few megabytes
_BLOCK = 256  # rows and columns of a transposition block; both sides then fit the cache


@dataclass(frozen=True)
class Shift:
    """What a tensor of the checkpoint is multiplied with, per row and per column.

    Exponents of two (`rows`, `columns`, int64) are exact; `row_factors` and `column_factors` are any float32 numbers.
    A matrix [out, in] takes both; a vector takes rows alone.
    """

    rows: NDArray[np.int64] | None = None
    columns: NDArray[np.int64] | None = None
    row_factors: NDArray[np.float32] | None = None
    column_factors: NDArray[np.float32] | None = None

    def apply(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Multiply a whole tensor, [out, in] or a vector, float32."""
        return _multiplied(values, (self.rows, self.row_factors), (self.columns, self.column_factors))


NO_SHIFT = Shift()


@dataclass(frozen=True)
class Entry:
    """One tensor in the file: `shape` of `dtype` at `offset`, from `source` (transposed or not) or from `values`.

    `scales`, for INT8, divide the columns of a transposed matrix before it is rounded: float32 [shape[1]].
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    source: str | None
    transposed: bool
    values: NDArray[np.float32] | None
    dtype: ir.DataType = ir.DataType.FLOAT
    shift: Shift = NO_SHIFT
    scales: NDArray[np.float32] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return int(self.dtype.itemsize) * int(np.prod(self.shape))


@dataclass
class DataLayout:
    """The plan of one external data file called `location`. Graphs built on one layout share its tensors by name."""

    location: str
    entries: list[Entry] = field(default_factory=list)
    end: int = 0
    _placed: dict[str, Entry] = field(default_factory=dict)

    def weight(
        self,
        source: str,
        shape: tuple[int, ...],
        *,
        transposed: bool = False,
        dtype: ir.DataType = ir.DataType.FLOAT,
        shift: Shift = NO_SHIFT,
        scales: NDArray[np.float32] | None = None,
    ) -> ir.Value:
        """Place a tensor of the checkpoint; `shape` is the stored one, a transposed matrix becomes [in, out]."""
        name, placed = (f"{source}.transposed", (shape[1], shape[0])) if transposed else (source, shape)
        return self._place(Entry(name, placed, self._next_offset(), source, transposed, None, dtype, shift, scales))

    def constant(self, name: str, values: NDArray[np.float32], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Place a computed tensor, float32 or rounded to `dtype`."""
        return self._place(Entry(name, values.shape, self._next_offset(), None, False, values, dtype))

    @property
    def size_bytes(self) -> int:
        """Length of the whole file."""
        return self.end

    def _next_offset(self) -> int:
        return -(-self.end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES

    def _place(self, entry: Entry) -> ir.Value:
        if entry.name in self._placed:
            entry = self._placed[entry.name]
        else:
            self._placed[entry.name] = entry
            self.entries.append(entry)
            self.end = entry.offset + entry.size_bytes
        shape = ir.Shape(entry.shape)
        tensor = ir.ExternalTensor(
            self.location, entry.offset, entry.size_bytes, entry.dtype, shape=shape, name=entry.name
        )
        return ir.Value(name=entry.name, shape=shape, type=ir.TensorType(entry.dtype), const_value=tensor)


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


def read_entry(entry: Entry, weights: Weights) -> NDArray[np.generic]:
    """Return one tensor as `write` would write it, in memory. Raises CheckpointError for one that cannot be used."""
    chunks = [chunk.reshape(-1).copy() for chunk in _chunks(entry, weights)]
    return np.concatenate(chunks).reshape(entry.shape)


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


def _chunks(entry: Entry, weights: Weights) -> Iterator[NDArray[np.generic]]:
    """Yield the entry's values in file order, C-contiguous, in its dtype."""
    if entry.values is not None:
        yield _narrow(entry, np.ascontiguousarray(entry.values, np.float32))
        return
    assert entry.source is not None
    shift = entry.shift
    if entry.transposed:
        matrix = weights.read(entry.source)
        for start in range(0, entry.shape[0], _BLOCK):
            stop = min(start + _BLOCK, entry.shape[0])
            rows = _transposed_rows(matrix, start, stop)
            columns = _part(shift.columns, start, stop), _part(shift.column_factors, start, stop)
            yield _narrow(entry, _multiplied(rows, columns, (shift.rows, shift.row_factors)))
        return
    row_values = int(np.prod(entry.shape[1:]))
    # A slice of a mapped file costs an open; several chunks share one.
    first = 0
    for piece in weights.rows(entry.source, max(1, 32 * _CHUNK_VALUES // row_values)):
        step = max(1, _CHUNK_VALUES // row_values)
        for start in range(0, len(piece), step):
            rows = to_float32(piece[start : start + step])
            here = first + start, first + start + len(rows)
            parts = _part(shift.rows, *here), _part(shift.row_factors, *here)
            yield _narrow(entry, _multiplied(rows, parts, (shift.columns, shift.column_factors)))
        first += len(piece)


_Side = tuple[NDArray[np.int64] | None, NDArray[np.float32] | None]
_Numbers = TypeVar("_Numbers", NDArray[np.int64], NDArray[np.float32])


def _part(numbers: _Numbers | None, start: int, stop: int) -> _Numbers | None:
    return None if numbers is None else numbers[start:stop]


def _multiplied(values: NDArray[np.float32], rows: _Side, columns: _Side) -> NDArray[np.float32]:
    """Multiply by factors, then by powers of two: the latter is exact, as long as nothing leaves float32's range."""
    for numbers, shape in ((rows, (-1, *[1] * (values.ndim - 1))), (columns, (1, -1))):
        exponents, factors = numbers
        if factors is not None:
            values = values * factors.reshape(shape)
        if exponents is not None:
            values = np.ldexp(values, exponents.reshape(shape).astype(np.int32))
    return values


def _transposed_rows(matrix: NDArray[np.generic], start: int, stop: int) -> NDArray[np.float32]:
    """Return rows start..stop of the transposed matrix, float32; block by block, five times faster than in one go."""
    rows = np.empty((stop - start, matrix.shape[0]), matrix.dtype)
    for column in range(0, matrix.shape[0], _BLOCK):
        rows[:, column : column + _BLOCK] = matrix[column : column + _BLOCK, start:stop].T
    return to_float32(rows)


def _narrow(entry: Entry, chunk: NDArray[np.float32]) -> NDArray[np.generic]:
    """Round to the entry's dtype. Raises CheckpointError for values that are not finite, before or after."""
    if not np.isfinite(chunk).all():
        bad = int(np.count_nonzero(~np.isfinite(chunk)))
        raise CheckpointError(
            f"the weight {entry.source} holds {bad} {'value' if bad == 1 else 'values'} not finite (NaN or infinity).",
            cure="The checkpoint is damaged: download it again.",
        )
    if entry.dtype == ir.DataType.FLOAT:
        return np.ascontiguousarray(chunk)
    if entry.scales is not None:  # the scales were chosen so that nothing is cut off
        integers: NDArray[np.int8] = np.clip(np.rint(chunk / entry.scales), -127, 127).astype(np.int8)
        return integers
    with np.errstate(over="ignore"):
        narrow = chunk.astype(entry.dtype.numpy())
    if entry.dtype == ir.DataType.FLOAT16 and not np.isfinite(narrow).all():
        raise CheckpointError(
            f"the weight {entry.source} reaches {np.abs(chunk).max():.3g}; float16 ends at 65504.",
            cure="Export it with calibration texts, so that it is rescaled, or as bf16.",
        )
    return np.ascontiguousarray(narrow)
