"""What a batch costs in time, in milliseconds, and what texts will have in tokens. Both are learned.

No clock here.

A batch costs a + (b + c x width) x tokens: `a` is what every batch costs (reading the weights, starting kernels), `b`
what one padded token adds, and `c` what attention adds to it, which looks at all tokens of its text. Without `c` long
texts would make a line whose `a` is too small. The ratio of `a` to a token's cost says how much padding is worth one
batch less, and how large a batch has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

_REMEMBER = 0.998  # weight of what was known before, per batch: five hundred are remembered
_FOLLOW = 0.2  # how fast the pace follows, per batch
_MOST_STEP = 3.0  # a single batch says no more of it
_FIT_EACH, _FIT_EVERY = 64, 8  # the proportions are found anew with each of the first batches, then less often
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
        self._parts = [0.0] * 3  # a, b and c at pace 1
        self._weight = 0.0
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._sums = [0.0] * 3

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
        share = self._pace / ms
        batch = (share, share * tokens, share * tokens * width)
        self._weight = _REMEMBER * self._weight + 1
        for i in range(3):
            self._sums[i] = _REMEMBER * self._sums[i] + batch[i]
            for j in range(3):
                self._moments[i][j] = _REMEMBER * self._moments[i][j] + batch[i] * batch[j]
        if self.observations <= _FIT_EACH or self.observations % _FIT_EVERY == 0:
            self._fit()
        self._apply()

    def batch_ms(self, tokens: int, width: float | None = None) -> float:
        """Return the time that a batch of `tokens` padded tokens should take; 0 before the first observation.

        `width` is that of its texts, where it is known, and else what is usual.
        """
        if width is None:
            return self.fixed_ms + self.token_ms * tokens
        fixed, token, wide = self._parts
        return self._pace * (fixed + tokens * (token + wide * width))

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
        mean = [total / self._weight for total in self._sums]
        told = [k for k in range(3) if mean[k] > 0]
        # In parts of the mean batch's time, so that the three can be compared.
        scale = [part if part > 0 else 1.0 for part in mean]
        known = [part * unit for part, unit in zip(self._parts, scale, strict=True)]
        if not any(known):
            known[1] = 1.0
        moments = [[self._moments[i][j] / (self._weight * scale[i] * scale[j]) for j in range(3)] for i in range(3)]
        while True:
            left = [[moments[i][j] + _STAY * (i == j) for j in told] for i in told]
            right = [mean[i] / scale[i] - sum(moments[i][j] * known[j] for j in range(3)) for i in told]
            found = list(known)
            for k, step in zip(told, _solved(left, right), strict=True):
                found[k] += step
            least = min(told, key=found.__getitem__)
            if found[least] >= 0 or len(told) == 1:
                break
            told.remove(least)  # no part of a cost is negative
            known[least] = 0.0
        self._parts = [max(part, 0.0) / unit for part, unit in zip(found, scale, strict=True)]

    def _apply(self) -> None:
        """Set what batches cost at the present pace, in texts of the mean width."""
        fixed, token, wide = self._parts
        self.fixed_ms = self._pace * fixed
        self.token_ms = self._pace * (token + wide * self._sums[2] / self._sums[1])


def _solved(left: list[list[float]], right: list[float]) -> list[float]:
    """Return x of left x = right, for a symmetric positive definite matrix of up to three rows; both are used up.

    In plain Python (Gaussian elimination, which needs no pivots here): every batch waits for this, and for so few
    numbers each of numpy's calls takes longer than all of the arithmetic.
    """
    size = len(right)
    for k in range(size):
        for i in range(k + 1, size):
            factor = left[i][k] / left[k][k]
            right[i] -= factor * right[k]
            for j in range(k, size):
                left[i][j] -= factor * left[k][j]
    for k in reversed(range(size)):
        right[k] = (right[k] - sum(left[k][j] * right[j] for j in range(k + 1, size))) / left[k][k]
    return right


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
