"""Whose turn it is, and who may wait: pure planning, no clock and no I/O. Times are given, in seconds.

Whose turn it is follows self-clocked fair queueing (Golestani, 1994): every item of a request gets a finish tag, the
queue's virtual time plus the tokens of the request's items up to and including this one, and the smallest tag is served
next. Virtual time is the tag last served. A short request so passes what is left of a long one and waits for a fair
share only; requests of one size are served in order; nothing starves, since virtual time moves on.

A request's first item counts for no more than a request of the mean size. A single long text would else be passed by
every short one that comes while others wait, as if the engine could compute it in turns with them: in overload it took
as many times its own time as requests were waiting.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from runtime.batching import Shape, fill, rectangle
from runtime.cost import CostModel
from runtime.errors import DeadlineError, InputError, OverloadedError
from runtime.overload import Overload
from runtime.settings import Limits, SchedulingSettings

_CANDIDATE_ITEMS = 256  # looked at for one batch at most
_CLOSED = 64  # entries that may stand in the heap although their requests were cancelled
_LEARN = 0.1  # how fast the mean size of a request follows
_BURST_MS, _BURST_REQUESTS = 1000.0, 8  # may wait, where no limit is set
# In overload requests are refused alike. One that is this small beside those that take the engine's time adds little to
# what these wait for, and is let in as long as such requests take no more than this share of the engine.
_SMALL, _SMALL_SHARE = 1 / 20, 0.5
_LEARN_BATCHES = 16  # over how many batches' tokens the size of those is taken
_AT_THE_DOOR = 0.9  # of what may wait: a request whose tokens are only foreseen is refused a little earlier
# An idle engine takes a request that should miss its deadline now and then, or an estimate that is too high would stand
# for good: what is refused teaches nothing. Not more often than this, for a small part of its time only, and only what
# an engine that became so many times as fast would answer in time.
_PROBE_S, _PROBE_TIMES, _PROBE_FASTER = 0.2, 4.0, 10.0


@dataclass(eq=False)
class Ticket:
    """One request in the queue: the lengths of its items, in tokens, and the time after which it is worth nothing."""

    lengths: Sequence[int]
    deadline_s: float | None = None
    payload: Any = field(default=None, repr=False)  # what it is for: not looked at here
    # The queue's own. `order`: item indices, longest first, so that neighbours have similar lengths.
    order: list[int] = field(default_factory=list, repr=False)
    tag: float = 0.0
    number: int = 0
    waiting_tokens: int = 0  # of the items that are in no batch yet
    open: bool = False
    admitted_s: float = 0.0
    own_ms: float = 0.0  # what it should take when it has the engine to itself
    probe: bool = False  # let in although it should miss its deadline, to learn whether it does


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
        self.tokens = 0
        self.items = 0
        self._limits = limits
        self._settings = settings
        self._shape = shape
        self._heap: list[tuple[float, int, Ticket]] = []
        self._tickets = 0
        self._virtual = 0.0
        self._numbers = itertools.count()
        self._overload = Overload(settings.burst_ms, settings.overload)
        self._mean_tokens = 0.0  # of a request
        self._token_mean = 0.0  # of the request that a token is of: what takes the engine's time
        self._passed_tokens = 0.0  # of small requests let in past the others, as yet without their share of the engine
        self.busy_until_s = -math.inf  # when the latest batch should end

    def __len__(self) -> int:
        return self._tickets

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
            wait_ms, standing_ms = self.wait_ms(int(self._mean_tokens)), self.standing_wait_ms
            if wait_ms > standing_ms and not self._lets_pass(tokens):
                self.refuse(
                    f"{self._overload.ratio:.1f} times as many requests come as can be answered, and the wait is "
                    f"{wait_ms:.0f} ms; in overload the limit is {standing_ms:.0f} ms"
                )
        if tokens and self._tickets:
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
        if self._tickets >= limit:
            self.refuse(f"{self._tickets} requests are waiting; the limit is {limit}")

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

        Less than a request would leave the engine idle from when one is done until the next one comes.
        """
        return self._settings.standing_batches * self.cost.batch_ms(max(self.budget, round(self._mean_tokens)))

    @property
    def most_wait_ms(self) -> float:
        """The wait that is let in a burst: in time, or for an engine that is slow, in requests."""
        given = self._settings.max_wait_ms
        return given or max(_BURST_MS, self._requests_ms)

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
        """Return how long a request of so many tokens would wait for others.

        Ahead of it are the items whose tags come before that of its last one. For a single text above the mean size
        this is an upper bound: its tag is lower than its tokens say.
        """
        last, ahead = self._virtual + own_tokens, 0.0
        for tag, _, other in self._heap:
            if other.open and tag <= last:
                first = other.lengths[other.order[0]]
                ahead += first + min(other.waiting_tokens - first, last - tag)
        return self.cost.fixed_ms * -(-ahead // self.budget) + self.cost.token_ms * ahead

    def admit(self, ticket: Ticket, now_s: float, *, bounded: bool = True) -> None:
        """Take in a request; one that is not `bounded` however much waits.

        Raises OverloadedError, DeadlineError, or InputError for an item without tokens.
        """
        if min(ticket.lengths) < 1:
            raise InputError("an item has no tokens.", cure="Every item needs at least one token.")
        count, tokens = len(ticket.lengths), sum(ticket.lengths)
        if bounded:
            self._check_room(ticket, count, tokens, now_s)
        ticket.order = sorted(range(count), key=lambda i: -ticket.lengths[i])
        ticket.number, ticket.waiting_tokens, ticket.open = next(self._numbers), tokens, True
        ticket.admitted_s, ticket.own_ms = now_s, self.cost.batch_ms(tokens)
        self._overload.admitted(now_s, self._pause_ms)
        self._tickets += 1
        self.tokens += tokens
        self.items += count
        self._push(ticket, self._virtual + min(ticket.lengths[ticket.order[0]], self._mean_tokens))

    def _check_room(self, ticket: Ticket, count: int, tokens: int, now_s: float) -> None:
        self._learn_size(tokens)
        settings = self._settings
        self._check_requests()
        # What is too large for the queue, and not for the server, gets it when it is empty.
        for waiting, own, limit, what in (
            (self.tokens, tokens, settings.max_waiting_tokens, "tokens"),
            (self.items, count, settings.max_waiting_items, "texts"),
        ):
            if self._tickets and waiting + own > limit:
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
        if self._tickets or ticket.deadline_s is None or idle_s < max(_PROBE_S, _PROBE_TIMES * 1e-3 * own_ms):
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
        self._close(ticket)
        ticket.payload = None
        self._rest(self._overload.latest_s)
        if len(self._heap) > 2 * self._tickets + _CLOSED:
            self._heap = [entry for entry in self._heap if entry[2].open]
            heapq.heapify(self._heap)

    def next_batch(self, now_s: float) -> Planned | None:
        """Take the next batch out of the queue; None when nothing waits. What expired is dropped first."""
        candidates = self._candidates(now_s)
        if not candidates:
            return None
        lengths = [ticket.lengths[index] for ticket, index in candidates]
        together = fill(lengths, self.budget, self._limits.max_batch_rows, self.cost.break_even_tokens, self._shape)
        chosen = [candidates[k] for k in together]
        self._virtual = max(self._virtual, candidates[0][0].tag)
        taken: dict[Ticket, list[int]] = {ticket: [] for ticket, _ in candidates}
        for ticket, index in chosen:
            taken[ticket].append(index)
        for ticket, indices in taken.items():
            self._take(ticket, indices)
        self._overload.batch()
        planned = Planned(chosen, max(ticket.lengths[index] for ticket, index in chosen))
        self._passed_tokens = max(0.0, self._passed_tokens - _SMALL_SHARE * planned.tokens)
        computed = self._shape(len(planned.rows), planned.width)
        self.busy_until_s = now_s + 1e-3 * self.cost.batch_ms(computed, planned.width)
        self._rest(self.busy_until_s)  # while the batch runs nothing can be served: a pause begins after it
        return planned

    def _candidates(self, now_s: float) -> list[tuple[Ticket, int]]:
        """Take tickets off the heap until enough items are known, the one whose turn it is first."""
        found: list[tuple[Ticket, int]] = []
        tokens, budget, rows = 0, self.budget, self._limits.max_batch_rows
        while self._heap and len(found) < _CANDIDATE_ITEMS and tokens < 4 * budget:
            _, _, ticket = heapq.heappop(self._heap)
            if not ticket.open:
                continue
            if ticket.deadline_s is not None and now_s + 1e-3 * self._least_ms(ticket) > ticket.deadline_s:
                self._close(ticket)
                self.expired.append(ticket)
                continue
            # No more of one request than a batch takes: whoever comes after it has a chance to be in this round.
            width = ticket.lengths[ticket.order[0]]
            most = min(rows, max(1, budget // width))
            for index in ticket.order[:most]:
                found.append((ticket, index))
                tokens += ticket.lengths[index]
        self._rest(now_s)
        return found

    def _least_ms(self, ticket: Ticket) -> float:
        """Return the time that what is left of a request takes when it has the engine to itself."""
        return self.cost.batch_ms(ticket.waiting_tokens) if self.cost.observations and not ticket.probe else 0.0

    def _take(self, ticket: Ticket, indices: list[int]) -> None:
        """Count items of a ticket that was off the heap as served, and put it back where its next item stands."""
        if not indices:
            heapq.heappush(self._heap, (ticket.tag, ticket.number, ticket))
            return
        first = ticket.lengths[ticket.order[0]]
        served = sum(ticket.lengths[i] for i in indices)
        gone = set(indices)
        ticket.order = [i for i in ticket.order if i not in gone] if len(ticket.lengths) > 1 else []
        ticket.waiting_tokens -= served
        self.tokens -= served
        self.items -= len(indices)
        if ticket.order:
            # The tag was that of its first item; what was served besides counts as well.
            self._push(ticket, ticket.tag + served - first + ticket.lengths[ticket.order[0]])
        else:
            ticket.open = False
            self._tickets -= 1
            self._overload.done_with()

    def _push(self, ticket: Ticket, tag: float) -> None:
        ticket.tag = tag
        heapq.heappush(self._heap, (ticket.tag, ticket.number, ticket))

    def _close(self, ticket: Ticket) -> None:
        """Forget what is left of a request; its place in the heap is skipped when it comes up."""
        ticket.open = False
        self._tickets -= 1
        self.items -= len(ticket.order)
        self.tokens -= ticket.waiting_tokens

    def _rest(self, now_s: float) -> None:
        """Begin anew where nothing waits."""
        if not self._tickets:
            self._heap.clear()
            self._virtual = self._passed_tokens = 0.0
            self._overload.empty(now_s)

    def refuse(self, reason: str) -> NoReturn:
        """Raise OverloadedError for `reason`, with the time after which to come back."""
        retry_s = max(self.wait_ms(self.tokens) / 2e3, 0.05)
        raise OverloadedError(f"{reason}.", cure=f"Try again in {retry_s:.2g} s.", retry_after_s=retry_s)
