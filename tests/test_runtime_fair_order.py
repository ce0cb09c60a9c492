"""The order of requests beside an engine that is imagined: it computes all at once, each as fast as the others."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from runtime.fair_order import FairOrder, Ticket

REQUESTS = st.lists(st.lists(st.integers(1, 200), min_size=1, max_size=6), min_size=1, max_size=11)


def serve(order: FairOrder) -> Ticket:
    """Serve one item of the request whose turn it is."""
    candidates = order.candidates(1, 1, lambda ticket: False, [])
    order.take(candidates, candidates[:1])
    return candidates[0][0]


@given(REQUESTS, st.lists(st.integers(0, 5), min_size=11, max_size=11))
def test_no_request_is_later_than_if_all_were_computed_at_once(requests: list[list[int]], served: list[int]) -> None:
    """By more than one item, which is what is not interrupted. Between two requests some items are served."""
    order = FairOrder()
    left: dict[Ticket, float] = {}  # to do for the imagined engine
    imagined: dict[Ticket, float] = {}  # tokens done in all when it was done with a request
    real: dict[Ticket, float] = {}
    done = 0.0

    def step() -> None:
        nonlocal done
        before = order.tokens
        ticket = serve(order)
        tokens = float(before - order.tokens)
        if not ticket.open:
            real[ticket] = done + tokens
        while tokens > 1e-9 and left:
            share = min(min(left.values()), tokens / len(left))
            done += share * len(left)
            tokens -= share * len(left)
            for other in list(left):
                left[other] -= share
                if left[other] < 1e-6:
                    imagined[other] = done
                    del left[other]

    for lengths, count in zip(requests, served, strict=False):
        ticket = Ticket(lengths)
        order.add(ticket, math.inf)
        left[ticket] = float(sum(lengths))
        for _ in range(min(count, order.items)):
            step()
    while order.items:
        step()
    longest = max(map(max, requests))
    assert real.keys() == imagined.keys()
    assert all(real[ticket] <= imagined[ticket] + longest + 1e-3 for ticket in real)


@given(st.lists(st.tuples(st.sampled_from(["add", "serve", "drop"]), st.integers(1, 300)), max_size=60))
def test_what_is_dropped_leaves_nothing_behind(steps: list[tuple[str, int]]) -> None:
    order = FairOrder()
    waiting: list[Ticket] = []
    for what, number in steps:
        if what == "add":
            waiting.append(Ticket([number] * (1 + number % 3)))
            order.add(waiting[-1], number)
        elif what == "serve" and len(order):
            serve(order)
        elif what == "drop" and waiting:
            order.drop(waiting[number % len(waiting)])
        waiting = [ticket for ticket in waiting if ticket.open]
        assert len(order) == len(waiting)
        assert order.tokens == sum(ticket.waiting_tokens for ticket in waiting)
        assert order._gone <= {number for _, number in order._sharing}
    for ticket in waiting:
        order.drop(ticket)
    assert (order.items, order.tokens, order._sharing, order._gone) == (0, 0, [], set())


def test_a_dropped_request_has_no_share_of_the_engine() -> None:
    """Who comes later is ordered as if it had never been there."""
    orders = []
    for extra in (0, 5):
        order = FairOrder()
        order.add(Ticket([10] * 20), math.inf)
        dropped = [Ticket([300]) for _ in range(extra)]
        for ticket in dropped:
            order.add(ticket, math.inf)
        for ticket in dropped:
            order.drop(ticket)
        for _ in range(15):
            serve(order)
        late = Ticket([60])
        order.add(late, math.inf)
        orders.append((late.tag, serve(order) is late))
    assert orders == [(210.0, False)] * 2


def test_what_a_tag_does_not_count_moves_no_time() -> None:
    order = FairOrder()
    order.add(Ticket([500]), 50)
    order.add(Ticket([100]), math.inf)
    serve(order)
    late = Ticket([10])
    order.add(late, math.inf)
    assert late.tag == 25 + 10, "50 of 500 tokens, shared by two"
