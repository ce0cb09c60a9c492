"""Who may wait for an engine, and what it computes next: pure planning, no clock, no I/O. Times are in seconds.

Whose turn it is follows `runtime.fair_order`. A request's first item counts for no more than a request of the mean
size: a single long text would else be passed by every short one that comes while others wait, as if the engine could
compute it in turns with them. In overload it took as many times its own time as requests were waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

from runtime.batching import Shape, fill, rectangle
from runtime.cost import CostModel
from runtime.errors import DeadlineError, InputError, OverloadedError
from runtime.fair_order import FairOrder, Ticket
from runtime.overload import Overload
from runtime.settings import Limits, SchedulingSettings

_LEARN = 0.1  # how fast the mean size of a request follows
_BURST_MS, _BURST_REQUESTS = 1000.0, 8  # may wait, where no limit is set
_FEWER_TIMES = 3.0  # as long, while fewer requests wait than that: some are larger than the mean
_STANDING_MS = 500.0  # of the wait in overload, beyond one batch: the engine is not idle until the next ones come
# In overload requests are refused alike. One that is this small beside those that take the engine's time adds little to
# what these wait for, and is let in as long as such requests take no more than this share of the engine.
_SMALL, _SMALL_SHARE = 1 / 20, 0.5
_LEARN_BATCHES = 16  # over how many batches' tokens the size of those is taken
_AT_THE_DOOR = 0.9  # of what may wait: a request whose tokens are only foreseen is refused a little earlier
# An idle engine takes a request that should miss its deadline now and then, or an estimate that is too high would stand
# for good: what is refused teaches nothing. Not more often than this, for a small part of its time only, and only what
# an engine that became so many times as fast would answer in time.
_PROBE_S, _PROBE_TIMES, _PROBE_FASTER = 0.2, 4.0, 10.0


@dataclass(frozen=True)
class Planned:
    """A batch: tickets with the indices of their items, row by row, and its width in tokens."""

    rows: list[tuple[Ticket, int]]
    width: int

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(ticket.lengths[index] for ticket, index in self.rows)

    @property
    def padded_tokens(self) -> int:
        """Return rows x width."""
        return len(self.rows) * self.width


class FairQueue:
    """Requests that wait for one engine. Bounded; not thread-safe.

    A request is admitted or refused whole. `expired` collects tickets that ran out of time while they waited, for the
    owner to tell.
    """

    def __init__(
        self,
        limits: Limits,
        settings: SchedulingSettings,
        cost: CostModel | None = None,
        shape: Shape = rectangle,
    ) -> None:
        self.cost = cost or CostModel()
        self.expired: list[Ticket] = []
        self._limits = limits
        self._settings = settings
        self._shape = shape
        self._order = FairOrder()
        self._overload = Overload(settings.burst_ms, settings.overload)
        self._mean_tokens = 0.0  # of a request
        self._token_mean = 0.0  # of the request that a token is of: what takes the engine's time
        self._passed_tokens = 0.0  # of small requests let in past the others, as yet without their share of the engine
        self.busy_until_s = -math.inf  # when the latest batch should end

    def __len__(self) -> int:
        return len(self._order)

    @property
    def items(self) -> int:
        """Items that are in no batch yet."""
        return self._order.items

    @property
    def tokens(self) -> int:
        """Tokens that are in no batch yet."""
        return self._order.tokens

    def check_door(self, now_s: float, tokens: int = 0, deadline_s: float | None = None) -> None:
        """Raise OverloadedError or DeadlineError when this request cannot be admitted now.

        Cheap: it is asked before tokenization. `tokens` is what it is foreseen to have, 0 where nothing is known.

        A burst may wait up to `most_wait_ms`. Where more is asked for than can be done, a queue of that length would
        add latency and not one answer: it is then kept at a few batches.
        """
        settings = self._settings
        self._overload.came(now_s, self._pause_ms)
        self._check_requests()
        for waiting, limit, what in (
            (self.items, settings.max_waiting_items, "texts"),
            (self.tokens, settings.max_waiting_tokens, "tokens"),
        ):
            if waiting >= limit:
                self.refuse(f"{waiting} {what} are waiting; the limit is {limit}")
        if self.is_overloaded:
            # Whoever would be passed counts, too: a long text waits for longer with each short one that is let in.
            wait_ms = self._time_ms(self._order.standing(int(self._mean_tokens)))
            standing_ms = self.standing_wait_ms
            if wait_ms > standing_ms and not self._lets_pass(tokens):
                self.refuse(
                    f"{self._overload.ratio:.1f} times as many requests come as can be answered, and the wait is "
                    f"{wait_ms:.0f} ms; in overload the limit is {standing_ms:.0f} ms"
                )
        if tokens and len(self):
            try:
                self._check_wait(self.wait_ms(tokens), _AT_THE_DOOR * self.most_wait_ms, 0.0, deadline_s, now_s)
            except OverloadedError:
                self._learn_size(tokens)  # as it would be, had it been counted
                raise
            except DeadlineError:
                self._discount(self.cost.batch_ms(tokens), deadline_s, now_s)
                raise

    def _lets_pass(self, tokens: int) -> bool:
        """Whether a small request is let in, in overload, past what is refused alike; takes note of it if so.

        Large ones could else starve it, at the door and not in the queue. Beyond their share of the engine the small
        are refused like all others: they could else starve the large.
        """
        if not 0 < tokens <= _SMALL * self._token_mean or self._passed_tokens > max(self.budget, self._token_mean):
            return False
        self._passed_tokens += tokens
        return True

    def _check_wait(
        self, wait_ms: float, most_ms: float, own_ms: float, deadline_s: float | None, now_s: float
    ) -> None:
        if wait_ms > most_ms:
            self.refuse(f"the wait is {wait_ms:.0f} ms; the limit is {most_ms:.0f} ms")
        needed_ms = wait_ms + own_ms
        if deadline_s is not None and needed_ms > (left_ms := 1e3 * (deadline_s - now_s)):
            raise DeadlineError(
                f"the answer would take {needed_ms:.0f} ms, and the deadline leaves {max(left_ms, 0):.0f} ms.",
                cure="Allow more time, send fewer texts, or ask another replica.",
            )

    def _discount(self, own_ms: float, until_s: float | None, now_s: float) -> None:
        """Take note of a request that was gone at `until_s`, sooner than it takes: no engine could have served it.

        Of one that had the time, and is not served for what waits before it, overload is told.
        """
        if until_s is not None and own_ms > 1e3 * (until_s - now_s):
            self._overload.done_with()

    def _check_requests(self) -> None:
        limit = self._settings.max_waiting_requests
        if len(self) >= limit:
            self.refuse(f"{len(self)} requests are waiting; the limit is {limit}")

    def turned_away(self) -> None:
        """Take note that a request which passed the door was refused for what it asks, so that nobody serves it."""
        self._overload.done_with()

    @property
    def is_overloaded(self) -> bool:
        """Whether more is asked for than can be done, and not in a burst only."""
        return self._overload.is_overloaded

    @property
    def standing_wait_ms(self) -> float:
        """The wait that is let in overload: a few efficient batches, or requests, where these are larger.

        Less than a request would leave the engine idle from when one is done until the next one comes. On a slow engine
        one batch and a moment are enough for that.
        """
        batch_ms = self.cost.batch_ms(max(self.budget, round(self._mean_tokens)))
        return batch_ms + min((self._settings.standing_batches - 1) * batch_ms, _STANDING_MS)

    @property
    def most_wait_ms(self) -> float:
        """The wait that is let in a burst: in time, or for an engine that is slow, in requests."""
        if given := self._settings.max_wait_ms:
            return given
        return max(_BURST_MS, self._requests_ms) * (_FEWER_TIMES if len(self) < _BURST_REQUESTS else 1.0)

    @property
    def _requests_ms(self) -> float:
        """Return what a burst of requests takes: on a slow engine time is counted in these."""
        return _BURST_REQUESTS * self.cost.batch_ms(round(self._mean_tokens))

    @property
    def _pause_ms(self) -> float:
        return max(self._settings.burst_ms, self._requests_ms)

    @property
    def budget(self) -> int:
        """Padded tokens of a batch: no more than it takes to be efficient, so that nobody waits behind a longer one."""
        least, most = self._settings.least_batch_tokens, self._limits.max_batch_tokens
        return min(max(self.cost.efficient_tokens(self._settings.efficiency), least), most)

    def wait_ms(self, own_tokens: int) -> float:
        """Return how long a request of so many tokens would wait for others."""
        return self._time_ms(self._order.ahead(own_tokens))

    def _time_ms(self, tokens: float) -> float:
        """Return how long so many tokens take in batches."""
        return self.cost.fixed_ms * -(-tokens // self.budget) + self.cost.token_ms * tokens

    def admit(self, ticket: Ticket, now_s: float, *, bounded: bool = True) -> None:
        """Take in a request; one that is not `bounded` however much waits.

        Raises OverloadedError, DeadlineError, or InputError for an item without tokens.
        """
        if min(ticket.lengths) < 1:
            raise InputError("an item has no tokens.", cure="Every item needs at least one token.")
        count, tokens = len(ticket.lengths), sum(ticket.lengths)
        if bounded:
            self._check_room(ticket, count, tokens, now_s)
        ticket.admitted_s, ticket.own_ms = now_s, self.cost.batch_ms(tokens)
        self._overload.admitted(now_s, self._pause_ms)
        self._order.add(ticket, self._mean_tokens)

    def _check_room(self, ticket: Ticket, count: int, tokens: int, now_s: float) -> None:
        self._learn_size(tokens)
        settings = self._settings
        self._check_requests()
        # What is too large for the queue, and not for the server, gets it when it is empty.
        for waiting, own, limit, what in (
            (self.tokens, tokens, settings.max_waiting_tokens, "tokens"),
            (self.items, count, settings.max_waiting_items, "texts"),
        ):
            if len(self) and waiting + own > limit:
                self.refuse(f"{waiting} {what} are waiting and this request has {own}; the limit is {limit}")
        own_ms = self.cost.batch_ms(tokens, sum(length * length for length in ticket.lengths) / tokens)
        try:
            self._check_wait(self.wait_ms(tokens), self.most_wait_ms, own_ms, ticket.deadline_s, now_s)
        except DeadlineError:
            if not self._may_probe(ticket, own_ms, now_s):
                self._discount(own_ms, ticket.deadline_s, now_s)
                raise
            ticket.probe = True

    def _may_probe(self, ticket: Ticket, own_ms: float, now_s: float) -> bool:
        """Whether the engine has been idle for long enough to try a request that should take `own_ms`."""
        idle_s = now_s - self.busy_until_s
        if len(self) or ticket.deadline_s is None or idle_s < max(_PROBE_S, _PROBE_TIMES * 1e-3 * own_ms):
            return False
        return _PROBE_FASTER * (ticket.deadline_s - now_s) > 1e-3 * own_ms

    def _learn_size(self, tokens: int) -> None:
        self._mean_tokens = self._mean_tokens or tokens
        self._mean_tokens += _LEARN * (tokens - self._mean_tokens)
        self._token_mean += tokens / (tokens + _LEARN_BATCHES * self.budget) * (tokens - self._token_mean)

    def cancel(self, ticket: Ticket, now_s: float) -> None:
        """Drop what of a request is in no batch yet, and its payload. Unknown and finished ones are none."""
        if not ticket.open:
            return
        self._discount(ticket.own_ms, now_s, ticket.admitted_s)
        self._order.drop(ticket)
        ticket.payload = None
        self._rest(self._overload.latest_s)

    def close(self) -> list[Ticket]:
        """Take no more; returns the requests that were waiting, and those that expired."""
        return self.expired + self._order.close()

    def next_batch(self, now_s: float) -> Planned | None:
        """Take the next batch out of the queue; None when nothing waits. What expired is dropped first."""

        def is_late(ticket: Ticket) -> bool:
            return ticket.deadline_s is not None and now_s + 1e-3 * self._least_ms(ticket) > ticket.deadline_s

        candidates = self._order.candidates(self.budget, self._limits.max_batch_rows, is_late, self.expired)
        self._rest(now_s)
        if not candidates:
            return None
        lengths = [ticket.lengths[index] for ticket, index in candidates]
        together = fill(lengths, self.budget, self._limits.max_batch_rows, self.cost.break_even_tokens, self._shape)
        chosen = [candidates[k] for k in together]
        planned = Planned(chosen, max(ticket.lengths[index] for ticket, index in chosen))
        computed = self._shape(len(planned.rows), planned.width)
        takes_s = 1e-3 * self.cost.batch_ms(computed, planned.width)
        # From here on the chosen are known to nobody but the caller: what may fail comes before.
        for _ in range(self._order.take(candidates, chosen)):
            self._overload.done_with()
        self._overload.batch()
        self._passed_tokens = max(0.0, self._passed_tokens - _SMALL_SHARE * planned.tokens)
        self.busy_until_s = now_s + takes_s
        self._rest(self.busy_until_s)  # while the batch runs nothing can be served: a pause begins after it
        return planned

    def _least_ms(self, ticket: Ticket) -> float:
        """Return the time that what is left of a request takes when it has the engine to itself."""
        return self.cost.batch_ms(ticket.waiting_tokens) if self.cost.observations and not ticket.probe else 0.0

    def _rest(self, now_s: float) -> None:
        """Take note where nothing waits."""
        if not len(self):
            self._passed_tokens = 0.0
            self._overload.empty(now_s)

    def refuse(self, reason: str) -> NoReturn:
        """Raise OverloadedError for `reason`, with the time after which to come back."""
        retry_s = max(self.wait_ms(self.tokens) / 2e3, 0.05)
        raise OverloadedError(f"{reason}.", cure=f"Try again in {retry_s:.2g} s.", retry_after_s=retry_s)
