"""What the probe measured: the largest magnitude of every tensor that matters, per channel, over all real tokens.

Names are those of the graph's nodes. Knows no model and no graph.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError


@dataclass(frozen=True)
class Statistics:
    """Per tensor name the largest magnitude of each channel, float32 [channels], and over how many tokens."""

    largest: dict[str, NDArray[np.float32]]
    tokens: int

    def absmax(self, name: str) -> NDArray[np.float32]:
        """Return the largest magnitude of each channel of a tensor. Raises KeyError for one not measured."""
        return self.largest[name]


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Put the layers' statistics together; their names must differ and their tokens agree."""
    largest: dict[str, NDArray[np.float32]] = {}
    tokens = 0
    for part in parts:
        largest |= part.largest
        tokens = part.tokens
    return Statistics(largest, tokens)


def pack(statistics: Statistics) -> bytes:
    """Return the bytes of an npz file."""
    buffer = io.BytesIO()
    arrays = {f"absmax:{name}": values for name, values in statistics.largest.items()}
    np.savez(buffer, tokens=np.array(statistics.tokens), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> Statistics:
    """Read what `pack` wrote. Raises InputError for anything else."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            largest = {k.removeprefix("absmax:"): arrays[k] for k in arrays.files if k.startswith("absmax:")}
            return Statistics(largest, int(arrays["tokens"]))
    except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"these are not activation statistics: {error}.", cure="Delete the file.") from error
