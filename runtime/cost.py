"""What a batch costs in time: a + b x tokens, in milliseconds; and what texts will have in tokens. Both are learned.

No clock here.

`a` is what every batch costs (reading the weights, starting kernels), `b` what one padded token adds. Their ratio says
how much padding is worth one batch less, and how large a batch has to be.
"""

from __future__ import annotations

from collections.abc import Sequence

_FORGET = 0.98  # weight of what was known before, per observation: about fifty batches are remembered
_LEAST_SPREAD = 0.05  # of the token counts, relative: below it the slope cannot be told from the intercept
_REMEMBERED = 0.95  # of bytes and tokens, per request
_MOST_BYTES = 4096  # that one request counts for
_LOOKED_AT = 512  # characters of a text


class CostModel:
    """Least squares over the latest batches, older ones counting less and less. Not thread-safe."""

    def __init__(self) -> None:
        self.observations = 0
        self.fixed_ms = 0.0
        self.token_ms = 0.0
        self._weight = self._tokens = self._ms = self._tokens_squared = self._tokens_ms = 0.0

    def observe(self, tokens: int, ms: float) -> None:
        """Learn that a batch of `tokens` padded tokens took `ms`."""
        self.observations += 1
        # A batch that took ten times as long as foreseen says something of the machine's other work, not of batches.
        if self.observations > 10:
            ms = min(ms, 10 * self.batch_ms(tokens))
        for name, value in (
            ("_weight", 1.0),
            ("_tokens", float(tokens)),
            ("_ms", ms),
            ("_tokens_squared", float(tokens) * tokens),
            ("_tokens_ms", tokens * ms),
        ):
            setattr(self, name, _FORGET * getattr(self, name) + value)
        self._fit()

    def batch_ms(self, tokens: int) -> float:
        """Return the time that a batch of `tokens` padded tokens should take; 0 before the first observation."""
        return self.fixed_ms + self.token_ms * tokens

    @property
    def break_even_tokens(self) -> float:
        """How many padded tokens cost as much as one more batch: a / b."""
        return self.fixed_ms / self.token_ms if self.token_ms > 0 else 0.0

    def efficient_tokens(self, efficiency: float) -> int:
        """Return the size of the smallest batch with `efficiency` of the throughput of an endless one.

        A batch of n tokens reaches n b / (a + n b) of it, so n = a / b x e / (1 - e).
        """
        return int(self.break_even_tokens * efficiency / (1 - efficiency))

    def _fit(self) -> None:
        mean_tokens, mean_ms = self._tokens / self._weight, self._ms / self._weight
        variance = self._tokens_squared / self._weight - mean_tokens**2
        if variance <= (_LEAST_SPREAD * mean_tokens) ** 2:
            # All batches are of one size: keep what is known of the ratio, and follow the speed.
            known = self.batch_ms(1) > 0 and self.fixed_ms + self.token_ms * mean_tokens
            factor = mean_ms / known if known else 0.0
            self.fixed_ms, self.token_ms = self.fixed_ms * factor, self.token_ms * factor
            if not known:
                self.token_ms = mean_ms / mean_tokens
            return
        slope = (self._tokens_ms / self._weight - mean_tokens * mean_ms) / variance
        slope = min(max(slope, 0.0), mean_ms / mean_tokens)  # neither part of a cost is negative
        self.token_ms = slope
        self.fixed_ms = max(mean_ms - slope * mean_tokens, 0.0)


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
