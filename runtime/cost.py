"""What a batch costs in time, in milliseconds, and what texts will have in tokens. Both are learned.

No clock here.

A batch costs a + (b + c x width) x tokens: `a` is what every batch costs (reading the weights, starting kernels), `b`
what one padded token adds, and `c` what attention adds to it, which looks at all tokens of its text. Without `c` long
texts would make a line whose `a` is too small. The ratio of `a` to a token's cost says how much padding is worth one
batch less, and how large a batch has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_REMEMBER = 0.998  # weight of what was known before, per batch: five hundred are remembered
_FOLLOW = 0.2  # how fast the pace follows, per batch
_MOST_STEP = 3.0  # a single batch says no more of it
_FIRST = 12  # batches that tell the proportions before the pace is told from them
_LEAST_MS = 1e-6
_ENDLESS = 1e9  # tokens, where one more costs nothing that can be told
_STAY = 0.05**2  # spreads below 5 % of the mean tell nothing: what is known then stays
_REMEMBERED = 0.95  # of bytes and tokens, per request
_MOST_BYTES = 4096  # that one request counts for
_LOOKED_AT = 512  # characters of a text


class CostModel:
    """Weighted least squares over the latest batches, older ones counting less and less. Not thread-safe.

    Errors are relative: what disturbs a batch makes it longer by a part of its time, so that small batches tell as much
    as large ones, and more of `a`. How fast the machine is at the moment is followed apart from the proportions of the
    three, which are remembered for long; what batches that are much the same cannot tell apart stays as it was.
    """

    def __init__(self) -> None:
        self.observations = 0
        self.fixed_ms = 0.0
        self.token_ms = 0.0  # in texts of the mean width
        self._pace = 1.0
        self._parts = np.zeros(3)  # a, b and c at pace 1
        self._weight = 0.0
        self._moments = np.zeros((3, 3))
        self._sums = np.zeros(3)

    def observe(self, tokens: int, ms: float, width: int = 0) -> None:
        """Learn that a batch of `tokens` padded tokens, its texts `width` wide, took `ms`."""
        self.observations += 1
        foreseen_ms = self.batch_ms(tokens, width)
        # A batch that took ten times as long as foreseen says something of the machine's other work, not of batches.
        if self.observations > 10 and foreseen_ms > 0:
            ms = min(ms, 10 * foreseen_ms)
        ms = max(ms, _LEAST_MS)
        if self.observations > _FIRST and foreseen_ms > 0:
            self._pace *= min(max(ms / foreseen_ms, 1 / _MOST_STEP), _MOST_STEP) ** _FOLLOW
        batch = np.array([1.0, tokens, float(tokens) * width]) * self._pace / ms
        self._weight = _REMEMBER * self._weight + 1
        self._moments = _REMEMBER * self._moments + np.outer(batch, batch)
        self._sums = _REMEMBER * self._sums + batch
        self._fit()

    def batch_ms(self, tokens: int, width: float | None = None) -> float:
        """Return the time that a batch of `tokens` padded tokens should take; 0 before the first observation.

        `width` is that of its texts, where it is known, and else what is usual.
        """
        if width is None:
            return self.fixed_ms + self.token_ms * tokens
        fixed, token, wide = self._parts.tolist()
        return float(self._pace * (fixed + tokens * (token + wide * width)))

    @property
    def break_even_tokens(self) -> float:
        """How many padded tokens cost as much as one more batch: a / b; 0 while nothing is known."""
        if self.fixed_ms <= 0:
            return 0.0
        return min(self.fixed_ms / self.token_ms, _ENDLESS) if self.token_ms > 0 else _ENDLESS

    def efficient_tokens(self, efficiency: float) -> int:
        """Return the size of the smallest batch with `efficiency` of the throughput of an endless one.

        A batch of n tokens reaches n b / (a + n b) of it, so n = a / b x e / (1 - e).
        """
        return int(self.break_even_tokens * efficiency / (1 - efficiency))

    def _fit(self) -> None:
        """Find the parts whose sum, for each batch, is closest to its time."""
        mean = self._sums / self._weight
        told = [k for k in range(3) if mean[k] > 0]
        # In parts of the mean batch's time, so that the three can be compared.
        scale = np.where(mean > 0, mean, 1.0)
        moments = self._moments / self._weight / np.outer(scale, scale)
        known = self._parts * scale
        if not known.any():
            known[1] = 1.0
        while True:
            away = mean / scale - moments @ known
            found = known.copy()
            found[told] += np.linalg.solve(moments[np.ix_(told, told)] + _STAY * np.eye(len(told)), away[told])
            least = min(told, key=lambda k: float(found[k]))
            if found[least] >= 0 or len(told) == 1:
                break
            told.remove(least)  # no part of a cost is negative
            known[least] = 0.0
        self._parts = np.maximum(found, 0.0) / scale
        fixed, token, wide = (self._pace * self._parts).tolist()
        self.fixed_ms, self.token_ms = fixed, token + wide * float(mean[2] / mean[1])


class Density:
    """How many tokens texts will have, foreseen from their bytes in UTF-8, so that a refusal costs no tokenization.

    Tokens per byte differ between scripts far less than tokens per character. A ratio of sums, older requests counting
    less and less: a text of one byte, which has an end token as well, says little. Not thread-safe: an update that is
    lost to another thread's is of no account.
    """

    def __init__(self) -> None:
        self._sums = (0.0, 0.0)  # bytes and tokens

    @property
    def tokens_per_byte(self) -> float:
        """0 before the first observation."""
        size, tokens = self._sums
        return tokens / size if size else 0.0

    def observe(self, prompt: str, texts: Sequence[str], tokens: int) -> None:
        """Learn that texts, with a prompt before each of them, have so many tokens together."""
        size = sum(map(_bytes, texts)) + len(texts) * _bytes(prompt)
        if size:
            weight = min(_MOST_BYTES / size, 1.0)  # one request does not speak for all
            known, counted = self._sums
            self._sums = (_REMEMBERED * known + weight * size, _REMEMBERED * counted + weight * tokens)

    def tokens(self, prompt: str, texts: Sequence[str], most: int) -> int:
        """Return what texts with a prompt before each, cut to `most` tokens, should have together; 0 when unknown."""
        ratio, before = self.tokens_per_byte, _bytes(prompt)
        return int(sum(min((before + _bytes(text)) * ratio, most) for text in texts))


def _bytes(text: str) -> int:
    """Return a text's size in UTF-8, about: of a long one that is not ASCII, from its beginning."""
    if text.isascii():
        return len(text)
    beginning = text[:_LOOKED_AT]
    return len(text) * len(beginning.encode("utf-8", "surrogatepass")) // len(beginning)
