"""The one type that crosses from tokenization into an engine.

A batch is right-padded: row i holds `lengths[i]` token ids, then the pad id. Causal attention never looks right, so
what stands in the padding cannot change a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError


@dataclass(frozen=True)
class Batch:
    """Token ids int64 [rows, width] and lengths int64 [rows], 1 <= lengths[i] <= width."""

    input_ids: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @property
    def attention_mask(self) -> NDArray[np.int64]:
        """1 where a token stands, 0 where padding does; int64 [rows, width]."""
        width = self.input_ids.shape[1]
        return (np.arange(width) < self.lengths[:, None]).astype(np.int64)

    @property
    def padded_tokens(self) -> int:
        """Return rows x width: what the batch costs."""
        return int(self.input_ids.size)


def make_batch(sequences: Sequence[Sequence[int]], pad_id: int, *, width: int | None = None) -> Batch:
    """Right-pad `sequences` to `width`, or to the longest.

    Raises InputError for no rows, an empty row, or a row longer than `width`.
    """
    if not sequences:
        raise InputError("a batch needs at least one row.", cure="Give at least one text.")
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    longest = int(lengths.max())
    if int(lengths.min()) < 1:
        row = int(lengths.argmin())
        raise InputError(f"row {row} has no tokens.", cure="Every row needs at least the EOS token.")
    if width is not None and longest > width:
        raise InputError(f"a row has {longest} tokens; the batch is {width} wide.", cure="Give a larger width.")
    input_ids = np.full((len(sequences), width or longest), pad_id, np.int64)
    for row, sequence in enumerate(sequences):
        input_ids[row, : len(sequence)] = sequence
    return Batch(input_ids, lengths)
