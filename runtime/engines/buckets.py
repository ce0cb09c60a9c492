"""Which optimization profile a batch runs in, and at which shape: pure planning, no device.

A profile (a *bucket*) takes up to `rows` texts of up to `tokens` tokens. Padding is exact: with causal attention and
the last token gathered by length, neither a longer row nor one more row changes a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import InputError

LEAST_TOKENS = 16


@dataclass(frozen=True)
class Bucket:
    """Optimization profile number `index` of an engine: up to `rows` texts of up to `tokens` tokens."""

    index: int
    rows: int
    tokens: int

    def padded(self, rows: int, tokens: int) -> tuple[int, int]:
        """Return the shape that a piece of `rows` x `tokens` is padded to.

        Each side is rounded up to 2^k or 1.5 x 2^k, so it grows by at most half, and there are few shapes: each then
        comes back often enough that a CUDA graph, or a kernel specialized for it, pays off.
        """
        return _step(rows, 1, self.rows), _step(tokens, LEAST_TOKENS, self.tokens)


@dataclass(frozen=True)
class Piece:
    """Some rows of a batch, by index, the longest of `tokens` tokens, run together in `bucket`."""

    rows: list[int]
    tokens: int
    bucket: Bucket


def split(lengths: Sequence[int], buckets: Sequence[Bucket]) -> list[Piece]:
    """Cut a batch into pieces that fit; each row is in exactly one.

    A batch that fits goes whole, in its own order, into the smallest bucket (rows x tokens) that takes it. Otherwise
    the longest rows go first: what only a narrow bucket takes must not drag short rows into it. Raises InputError for
    a row longer than every bucket.
    """
    longest_bucket = max(bucket.tokens for bucket in buckets)
    for row, length in enumerate(lengths):
        if length > longest_bucket:
            raise InputError(
                f"row {row} has {length} tokens; the engine was built for at most {longest_bucket}.",
                cure=f"Truncate to {longest_bucket} tokens, or build the engine with a longer profile, for example "
                f"--profile 1x{length}.",
            )
    rest = list(range(len(lengths)))
    pieces = []
    while rest:
        whole = _smallest(buckets, len(rest), max(lengths[row] for row in rest))
        if whole is None:
            rest.sort(key=lambda row: (-lengths[row], row))
            most_rows = max(b.rows for b in buckets if b.tokens >= lengths[rest[0]])
            taken, rest = rest[:most_rows], rest[most_rows:]
        else:
            taken, rest = rest, []
        longest = max(lengths[row] for row in taken)
        bucket = whole or _smallest(buckets, len(taken), longest)
        assert bucket is not None  # the one that gave `most_rows` fits
        pieces.append(Piece(taken, longest, bucket))
    return pieces


def computed_tokens(buckets: Sequence[Bucket], rows: int, tokens: int) -> int:
    """Return the padded tokens that an engine computes for a batch of `rows` x `tokens`; without buckets, just these.

    An estimate for planning: a batch that no bucket takes whole counts as it stands.
    """
    bucket = _smallest(buckets, rows, tokens) if buckets else None
    if bucket is None:
        return rows * tokens
    padded_rows, padded_tokens = bucket.padded(rows, tokens)
    return padded_rows * padded_tokens


def _smallest(buckets: Sequence[Bucket], rows: int, tokens: int) -> Bucket | None:
    """Return the smallest bucket that takes `rows` x `tokens`, or None."""
    fitting = [b for b in buckets if b.rows >= rows and b.tokens >= tokens]
    return min(fitting, key=lambda b: (b.rows * b.tokens, b.index), default=None)


def _step(number: int, least: int, limit: int) -> int:
    """Return the smallest 2^k or 1.5 x 2^k that is at least `number` and `least`, but no more than `limit`."""
    wanted = max(number, least)
    power = 1 << (wanted - 1).bit_length()
    middle = power // 4 * 3
    return min(middle if wanted <= middle else power, limit)
