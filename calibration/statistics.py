"""What the probe measured: per tensor the largest magnitudes, percentiles, and some of its rows.

Names are those of the graph's nodes. A *row* is one token's values. Largest magnitudes are over all real tokens;
percentiles and rows come from the same few tokens of every text. Knows no model and no graph.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

PERCENTILES = (50.0, 99.0, 99.9)
_PERCENTILE_ROWS = 1024
_FORM_LIMIT = 2.0**14  # float16 holds four times as much


@dataclass(frozen=True)
class Statistics:
    """Per tensor name: the largest magnitude of each channel, and percentiles of each channel's magnitudes.

    `largest` float32 [channels]; `percentiles` float32 [len(PERCENTILES), channels]; `tokens` counts what `largest`
    saw. `rows_folder` holds the rows, one file a tensor, or is None where none were kept.
    """

    largest: dict[str, NDArray[np.float32]]
    tokens: int
    percentiles: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    rows_folder: Path | None = None

    def absmax(self, name: str) -> NDArray[np.float32]:
        """Return the largest magnitude of each channel of a tensor. Raises KeyError for one not measured."""
        return self.largest[name]

    def rows(self, name: str) -> Rows:
        """Return the rows kept of a tensor. Raises InputError when there are none, or the file is damaged."""
        path = self.rows_folder / f"{name}.npz" if self.rows_folder else None
        if path is None or not path.is_file():
            raise InputError(
                f"no rows of {name} were kept in {self.rows_folder}.", cure="Export again: they are then measured anew."
            )
        try:
            return unpack_rows(path.read_bytes())
        except InputError as error:
            raise InputError(
                f"{path}: {error.message}", cure=f"Delete {path.parent.parent} and export again."
            ) from error


@dataclass(frozen=True)
class Rows:
    """Rows of one tensor: `sampled` stand for all tokens, `peaks` are the row with the largest magnitude of each text.

    Both float32 [rows, channels].
    """

    sampled: NDArray[np.float32]
    peaks: NDArray[np.float32]


def percentiles_of(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the percentiles of each channel's magnitudes over `rows` [rows, channels], by nearest rank."""
    thinned = rows[:: -(-len(rows) // _PERCENTILE_ROWS)]
    ordered = np.sort(np.ascontiguousarray(np.abs(thinned).T), axis=1)  # several times faster than along rows
    ranks = np.ceil(np.array(PERCENTILES) / 100 * ordered.shape[1]).astype(int) - 1
    return np.ascontiguousarray(ordered[:, ranks].T)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Put the layers' statistics together; their names must differ and their tokens agree."""
    largest: dict[str, NDArray[np.float32]] = {}
    percentiles: dict[str, NDArray[np.float32]] = {}
    tokens = 0
    for part in parts:
        largest |= part.largest
        percentiles |= part.percentiles
        tokens = part.tokens
    return Statistics(largest, tokens, percentiles)


def pack(statistics: Statistics) -> bytes:
    """Return the bytes of an npz file; rows are not in it."""
    buffer = io.BytesIO()
    arrays = {f"absmax:{name}": values for name, values in statistics.largest.items()}
    arrays |= {f"percentiles:{name}": values for name, values in statistics.percentiles.items()}
    np.savez(buffer, tokens=np.array(statistics.tokens), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> Statistics:
    """Read what `pack` wrote. Raises InputError for anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            parts: dict[str, dict[str, NDArray[np.float32]]] = {"absmax": {}, "percentiles": {}}
            for key in arrays.files:
                kind, colon, name = key.partition(":")
                if colon:
                    parts[kind][name] = arrays[key]
            return Statistics(parts["absmax"], int(arrays["tokens"]), parts["percentiles"])
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"these are not activation statistics: {error}.", cure="Delete the file.") from error


def pack_rows(rows: Rows) -> bytes:
    """Return the bytes of an npz file: float16 of the values divided by one power of two, exact to 11 bits."""
    largest = max(float(np.abs(part).max(initial=0)) for part in (rows.sampled, rows.peaks))
    exponent = int(np.ceil(np.log2(largest / _FORM_LIMIT))) if largest > 0 else 0
    narrow = {k: np.ldexp(v, -exponent).astype(np.float16) for k, v in vars(rows).items()}
    buffer = io.BytesIO()
    np.savez(buffer, exponent=np.array(exponent), **narrow)
    return buffer.getvalue()


def unpack_rows(data: bytes) -> Rows:
    """Read what `pack_rows` wrote. Raises InputError for anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            exponent = int(arrays["exponent"])
            sampled, peaks = (np.ldexp(arrays[k].astype(np.float32), exponent) for k in ("sampled", "peaks"))
            return Rows(sampled, peaks)
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"these are not rows of activations: {error}.", cure="Delete the file.") from error
