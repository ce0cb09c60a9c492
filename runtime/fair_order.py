"""Whose turn it is: the order of waiting requests, and nothing else. Pure planning, no clock and no I/O.

It follows self-clocked fair queueing (Golestani, 1994): every item of a request gets a finish tag, the order's virtual
time plus the tokens of the request's items up to and including this one, and the smallest tag is served next. Virtual
time is the tag last served. A short request so passes what is left of a long one and waits for a fair share only;
requests of one size are served in order; nothing starves, since virtual time moves on.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

_CANDIDATE_ITEMS = 256  # looked at for one batch at most
_CLOSED = 64  # entries that may stand in the heap although their requests were cancelled

Item = tuple["Ticket", int]
"""A request, and the index of one of its items."""


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

    def first_up_to(self, width: int) -> int:
        """Return where in `order` the items of up to `width` tokens begin."""
        return bisect.bisect_left(self.order, -width, key=lambda index: -self.lengths[index])


class FairOrder:
    """Open requests by their tags; `items` and `tokens` are those that are in no batch yet. Not thread-safe."""

    def __init__(self) -> None:
        self.items = 0
        self.tokens = 0
        self._heap: list[tuple[float, int, Ticket]] = []
        self._open: set[Ticket] = set()
        self._virtual = 0.0
        self._numbers = itertools.count()

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> list[Ticket]:
        """Take no more; returns the requests that were open, none of which is any more."""
        lost = list(self._open)
        for ticket in lost:
            ticket.open = False
        return lost

    def ahead(self, own_tokens: int) -> float:
        """Return the tokens that are served before a request of so many: those with tags before that of its last item.

        For a single text whose tag is lower than its tokens say (see `add`) this is an upper bound.
        """
        return sum(self._shares(own_tokens, 0.0))

    def standing(self, own_tokens: int) -> float:
        """Return the tokens of `ahead`, and those of everybody whom such a request would pass.

        One who is passed counts for no more than such a request: nobody is shut out by a single huge one.
        """
        return sum(self._shares(own_tokens, own_tokens))

    def _shares(self, own_tokens: int, most_passed: float) -> Iterator[float]:
        last = self._virtual + own_tokens
        for tag, _, other in self._heap:
            if other.open:
                first = other.lengths[other.order[0]]
                yield min(first, most_passed) if tag > last else first + min(other.waiting_tokens - first, last - tag)

    def add(self, ticket: Ticket, most_first: float) -> None:
        """Take in a request, whose first item counts for no more than `most_first` tokens."""
        count = len(ticket.lengths)
        ticket.order = sorted(range(count), key=lambda i: -ticket.lengths[i])
        ticket.number, ticket.waiting_tokens, ticket.open = next(self._numbers), sum(ticket.lengths), True
        self._open.add(ticket)
        self.tokens += ticket.waiting_tokens
        self.items += count
        self._push(ticket, self._virtual + min(ticket.lengths[ticket.order[0]], most_first))

    def drop(self, ticket: Ticket) -> None:
        """Forget what is left of an open request."""
        self._close(ticket)
        if len(self._heap) > 2 * len(self._open) + _CLOSED:
            self._heap = [entry for entry in self._heap if entry[2].open]
            heapq.heapify(self._heap)

    def candidates(
        self, budget: int, most_rows: int, is_late: Callable[[Ticket], bool], late: list[Ticket]
    ) -> list[Item]:
        """Take requests off until enough items are known, the one whose turn it is first; `take` puts them back.

        Requests that are late are dropped, and appended to `late`.
        """
        found: list[Item] = []
        tokens = width = 0
        while self._heap and len(found) < _CANDIDATE_ITEMS and tokens < 4 * budget:
            _, _, ticket = heapq.heappop(self._heap)
            if not ticket.open:
                continue
            if is_late(ticket):
                self._close(ticket)
                late.append(ticket)
                continue
            width = width or ticket.lengths[ticket.order[0]]
            # Of those whose turn it is not yet, the items that go with the first one's, and one that is longer. Others
            # would only make the batch wider.
            first = min(ticket.first_up_to(width), len(ticket.order) - 1) if found else 0
            # No more of one request than a batch takes: whoever comes after it has a chance to be in this round.
            most = min(most_rows, max(1, budget // ticket.lengths[ticket.order[first]]))
            for index in ticket.order[max(first - 1, 0) : first + most]:
                found.append((ticket, index))
                tokens += ticket.lengths[index]
        return found

    def take(self, candidates: Sequence[Item], chosen: Sequence[Item]) -> int:
        """Count the chosen of all candidates as served. Returns how many requests have nothing left."""
        self._virtual = max(self._virtual, candidates[0][0].tag)
        taken: dict[Ticket, list[int]] = {ticket: [] for ticket, _ in candidates}
        for ticket, index in chosen:
            taken[ticket].append(index)
        done = sum(self._take(ticket, indices) for ticket, indices in taken.items())
        self._begin_anew()
        return done

    def _take(self, ticket: Ticket, indices: list[int]) -> bool:
        """Put a ticket that is off the heap back where its next item stands; returns whether it has none."""
        if not indices:
            heapq.heappush(self._heap, (ticket.tag, ticket.number, ticket))
            return False
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
            return False
        ticket.open = False
        self._open.remove(ticket)
        return True

    def _push(self, ticket: Ticket, tag: float) -> None:
        ticket.tag = tag
        heapq.heappush(self._heap, (ticket.tag, ticket.number, ticket))

    def _close(self, ticket: Ticket) -> None:
        """Count a request as gone; its place in the heap is skipped when it comes up."""
        ticket.open = False
        self._open.remove(ticket)
        self.items -= len(ticket.order)
        self.tokens -= ticket.waiting_tokens
        self._begin_anew()

    def _begin_anew(self) -> None:
        if not self._open:
            self._heap.clear()
            self._virtual = 0.0
