"""What a batch costs in time, learned while serving: a + b x tokens, in milliseconds; and how much is asked for.

No clock here.

`a` is what every batch costs (reading the weights, starting kernels), `b` what one padded token adds. Their ratio says
how much padding is worth one batch less, and how large a batch has to be.
"""

from __future__ import annotations

from collections import deque

_FORGET = 0.98  # weight of what was known before, per observation: about fifty batches are remembered
_EVENTS = 128  # arrivals and answers that the pressure is taken over
_LEAST_EVENTS = 64  # before it says anything
_LEAST_SPREAD = 0.05  # of the token counts, relative: below it the slope cannot be told from the intercept


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


class Pressure:
    """How many requests come for each one that is served, refused ones included, over the latest events of both kinds.

    Counted by events and not by time, it means the same for a fast engine and a slow one. Not thread-safe.
    """

    def __init__(self) -> None:
        self._events: deque[bool] = deque(maxlen=_EVENTS)
        self._arrived = 0

    def arrived(self) -> None:
        """Count a request that came."""
        self._add(True)

    def served(self) -> None:
        """Count a request that was served."""
        self._add(False)

    @property
    def ratio(self) -> float:
        """Requests that came for each one served; 1 while too little is known."""
        if len(self._events) < _LEAST_EVENTS:
            return 1.0
        return self._arrived / max(len(self._events) - self._arrived, 1)

    def _add(self, arrival: bool) -> None:
        if len(self._events) == _EVENTS:
            self._arrived -= self._events[0]
        self._events.append(arrival)
        self._arrived += arrival
