"""The queue by its properties: budgets kept, nothing lost or computed in vain, nobody starved, padding paid for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engines.buckets import Bucket, computed_tokens
from runtime.errors import DeadlineError, InputError, OverloadedError
from runtime.fair_order import Ticket
from runtime.scheduler import FairQueue
from runtime.settings import PRESETS, Limits
from tests.queues import drain, known, queue

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)
COSTS = st.tuples(st.floats(0, 50), st.floats(0.001, 2))
LIMITS = st.builds(Limits, max_batch_tokens=st.integers(1, 2000), max_batch_rows=st.integers(1, 16))


@given(st.lists(LENGTHS, max_size=12), LIMITS, COSTS)
def test_each_item_is_served_once_and_no_budget_is_exceeded(
    requests: list[list[int]], limits: Limits, cost: tuple[float, float]
) -> None:
    waiting = queue(limits, known(*cost))
    tickets = [Ticket(lengths) for lengths in requests]
    for ticket in tickets:
        waiting.admit(ticket, 0)
    assert (waiting.items, waiting.tokens) == (sum(map(len, requests)), sum(map(sum, requests)))
    budget, batches = waiting.budget, drain(waiting)
    assert budget <= limits.max_batch_tokens
    for planned in batches:
        assert planned.rows
        assert len(planned.rows) <= limits.max_batch_rows
        assert len(planned.rows) == 1 or planned.padded_tokens <= budget
        assert planned.width == max(t.lengths[i] for t, i in planned.rows)
    served = sorted((tickets.index(t), i) for planned in batches for t, i in planned.rows)
    assert served == sorted((n, i) for n, lengths in enumerate(requests) for i in range(len(lengths)))
    assert (len(waiting), waiting.items, waiting.tokens) == (0, 0, 0)


@given(st.lists(LENGTHS, max_size=12), LIMITS, COSTS, st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_the_budget_counts_what_an_engine_with_profiles_computes(
    requests: list[list[int]], limits: Limits, cost: tuple[float, float], rows: list[int]
) -> None:
    """A bucket's shape is larger than rows x width: so is the batch, and it has to keep within the budget."""
    buckets = [Bucket(index, most, 64 * (index + 1)) for index, most in enumerate(rows)]

    def shape(count: int, width: int) -> int:
        return computed_tokens(buckets, count, width)

    waiting = queue(limits, known(*cost), shape)
    for lengths in requests:
        waiting.admit(Ticket(lengths), 0)
    budget = waiting.budget
    for planned in drain(waiting):
        assert len(planned.rows) == 1 or shape(len(planned.rows), planned.width) <= budget


@given(st.data(), LIMITS, COSTS)
@settings(max_examples=200)
def test_any_sequence_of_events_keeps_the_books(data: st.DataObject, limits: Limits, cost: tuple[float, float]) -> None:
    """Admission, cancellation, expiry and service in any order: what waits is what was admitted and not yet left."""
    waiting = queue(limits, known(*cost))
    left: dict[Ticket, set[int]] = {}
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["admit", "admit", "serve", "cancel", "wait"]))
        if action == "admit":
            deadline = data.draw(st.one_of(st.none(), st.floats(0, 5)))
            ticket = Ticket(data.draw(LENGTHS), None if deadline is None else now_s + deadline)
            try:
                waiting.admit(ticket, now_s)
            except DeadlineError:
                continue
            left[ticket] = set(range(len(ticket.lengths)))
        elif action == "cancel" and left:
            ticket = data.draw(st.sampled_from(sorted(left, key=lambda t: t.number)))
            waiting.cancel(ticket, now_s)
            del left[ticket]
        elif action == "serve":
            planned = waiting.next_batch(now_s)
            for ticket, index in planned.rows if planned else ():
                left[ticket].remove(index)  # a KeyError: cancelled, expired, or served before
                if not left[ticket]:
                    del left[ticket]
        elif action == "wait":
            now_s += data.draw(st.floats(0, 3))
        for ticket in waiting.expired:
            assert ticket.deadline_s is not None
            del left[ticket]
        waiting.expired.clear()
        assert len(waiting) == len(left)
        assert waiting.items == sum(map(len, left.values()))
        assert waiting.tokens == sum(t.lengths[i] for t, indices in left.items() for i in indices)


@given(LENGTHS, st.integers(1, 50), st.integers(1, 50))
def test_a_request_is_admitted_whole_or_not_at_all(lengths: list[int], items: int, tokens: int) -> None:
    waiting = queue(max_waiting_items=items, max_waiting_tokens=tokens)
    waiting.admit(Ticket([1]), 0)
    before = len(waiting), waiting.items, waiting.tokens
    if len(lengths) + 1 > items or sum(lengths) + 1 > tokens:
        with pytest.raises(OverloadedError) as caught:
            waiting.admit(Ticket(lengths), 0)
        assert caught.value.retry_after_s > 0
        assert (len(waiting), waiting.items, waiting.tokens) == before
    else:
        waiting.admit(Ticket(lengths), 0)
        assert waiting.items == 1 + len(lengths) <= items
        assert waiting.tokens == 1 + sum(lengths) <= tokens


@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 5))
def test_giants_do_not_starve_a_short_request(giants: int, tokens: int, served: int) -> None:
    """However many batches of 64 texts stand before it, a short request waits for one text of each at most."""
    waiting = queue(Limits(max_batch_rows=1), known(1.0, 0.01))
    for _ in range(giants):
        waiting.admit(Ticket([64] * 64), 0)
    for _ in range(served):
        waiting.next_batch(0)
    short = Ticket([tokens])
    waiting.admit(short, 0)
    for _ in range(giants + 1):
        planned = waiting.next_batch(0)
        assert planned is not None
        waiting.admit(Ticket([64] * 64), 0)  # and more of them keep coming
        if planned.rows[0][0] is short:
            break
    assert not short.open, "not served in its turn"


@pytest.mark.parametrize("waiting", [1, 8, 38, 95, 400])
def test_many_of_one_length_fill_a_batch(waiting: int) -> None:
    """More of them than a batch takes: it is full, and has the first ones in it."""
    line = queue(cost=known(10.0, 0.1), efficiency=0.95)
    tickets = [Ticket([20]) for _ in range(waiting)]
    for ticket in tickets:
        line.admit(ticket, 0)
    most = line.budget // 20
    assert 90 <= most <= 100
    planned = line.next_batch(0)
    assert planned is not None
    assert [ticket for ticket, _ in planned.rows] == tickets[:most]


def test_requests_of_one_size_are_served_in_order() -> None:
    waiting = queue(Limits(max_batch_rows=1), known(1, 0.1))
    tickets = [Ticket([10]) for _ in range(50)]
    for ticket in tickets:
        waiting.admit(ticket, 0)
    assert [planned.rows[0][0] for planned in drain(waiting)] == tickets


def test_a_long_request_is_not_starved_by_short_ones() -> None:
    waiting = queue(Limits(max_batch_rows=1), known(1, 0.1))
    long = Ticket([500])
    waiting.admit(long, 0)
    for _ in range(60):  # 500 tokens wait for 500 tokens of others
        waiting.admit(Ticket([10]), 0)
        waiting.next_batch(0)
    assert not long.open


def test_items_go_with_those_of_the_request_whose_turn_it_is() -> None:
    """Two requests of mixed lengths share batches: of the one behind, its longest would only make them wider."""
    waiting = queue(Limits(max_batch_rows=2), known(20, 1))
    ahead, behind = Ticket([200, 100, 50]), Ticket([300] * 4 + [198, 101, 49])
    waiting.admit(ahead, 0)
    waiting.admit(behind, 0)
    batches = [sorted(t.lengths[i] for t, i in planned.rows) for planned in drain(waiting)]
    assert batches == [[198, 200], [100, 101], [49, 50], [300, 300], [300, 300]]


def test_one_long_item_does_not_hide_those_that_go_with_the_others() -> None:
    waiting = queue(Limits(max_batch_tokens=2000), known(20, 0.1))
    waiting.admit(Ticket([100] * 5), 0)
    waiting.admit(Ticket([1500] + [100] * 50), 0)
    planned = waiting.next_batch(0)
    assert planned is not None
    assert (len(planned.rows), planned.width) == (20, 100)


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize(("cost", "depth"), [((14.0, 0.78), 40), ((0.15, 0.02), 40), ((3.0, 0.004), 400)])
def test_padding_of_mixed_lengths_is_below_a_tenth(preset: str, cost: tuple[float, float], depth: int) -> None:
    """8 to 512 tokens, with a queue: the costs are a 0.6B model on CPU, a small one, and a GPU's."""
    lengths = random.Random(1)
    waiting = FairQueue(Limits(), PRESETS[preset], known(*cost))
    real = padded = 0
    for _ in range(600):
        while len(waiting) < depth:
            waiting.admit(Ticket([lengths.randint(8, 512)]), 0, bounded=False)
        planned = waiting.next_batch(0)
        assert planned is not None
        real, padded = real + planned.tokens, padded + planned.padded_tokens
    assert 1 - real / padded < 0.10


def test_a_long_text_is_passed_by_few_short_ones_that_come_later() -> None:
    """In overload it would else take as many times its own time as requests are waiting."""
    waiting = queue(Limits(max_batch_rows=1))
    for _ in range(50):  # what is usual
        waiting.admit(Ticket([64]), 0)
        waiting.next_batch(0)
    for _ in range(3):
        waiting.admit(Ticket([64]), 0)
    long, passed = Ticket([512]), 0
    waiting.admit(long, 0)
    while long.open:
        waiting.next_batch(0)
        waiting.admit(Ticket([64]), 0)
        passed += 1
    assert passed <= 8


@given(st.lists(st.integers(1, 300), min_size=1, max_size=12), st.integers(0, 11), st.integers(1, 300))
def test_the_wait_of_a_text_is_what_is_served_before_it(others: list[int], served: int, own: int) -> None:
    waiting = queue(Limits(max_batch_rows=1), known(0.0, 1.0))
    for length in others:
        waiting.admit(Ticket([length]), 0)
    for _ in range(served):
        waiting.next_batch(0)
    own = min(own, *others)  # of one above the mean only the most is known
    ticket = Ticket([own])
    foreseen_ms = waiting.wait_ms(own)
    waiting.admit(ticket, 0)
    ahead = 0
    while ticket.open and (planned := waiting.next_batch(0)) is not None:
        ahead += planned.tokens
    assert foreseen_ms == pytest.approx(ahead - own)


def test_padding_is_bought_only_where_it_costs_less_than_a_batch() -> None:
    """A batch costs as much as 20 tokens: 100 and 81 tokens go together, 100 and 79 do not."""
    for other, batches in ((81, 1), (79, 2)):
        waiting = queue(cost=known(20.0, 1.0), efficiency=0.95)
        waiting.admit(Ticket([100]), 0)
        waiting.admit(Ticket([other]), 0)
        assert len(drain(waiting)) == batches


def test_a_batch_is_as_large_as_efficiency_needs() -> None:
    cost = known(14.0, 0.78)
    for efficiency in (0.5, 0.9, 0.95):
        waiting = queue(cost=cost, efficiency=efficiency)
        assert waiting.budget * 0.78 / cost.batch_ms(waiting.budget) == pytest.approx(efficiency, abs=0.02)


def test_deadlines_follow_the_cost() -> None:
    waiting = queue(cost=known(0.0, 10.0))
    waiting.admit(Ticket([1]), 0)
    assert waiting.next_batch(0)
    with pytest.raises(DeadlineError, match=r"would take 1000 ms, and the deadline leaves 900 ms"):
        waiting.admit(Ticket([100], deadline_s=0.9), 0)
    assert len(waiting) == 0
    late = Ticket([100], deadline_s=1.1)
    waiting.admit(late, 0)
    assert waiting.next_batch(0.2) is None, "100 tokens take until 1.2 s"
    assert waiting.expired == [late]
    assert (len(waiting), waiting.items, waiting.tokens) == (0, 0, 0)


def test_an_item_without_tokens() -> None:
    with pytest.raises(InputError, match="no tokens"):
        queue().admit(Ticket([3, 0]), 0)


def test_an_estimate_that_is_too_high_does_not_stand_for_good() -> None:
    """The machine was slow and is fast again: callers in a hurry are answered again, though none of them was let in."""
    true_ms, asked_s = 11.0, 0.05
    cost = known(0.0, 5.0)
    for _ in range(300):
        cost.observe(11, 5 * true_ms)
    waiting = queue(cost=cost)
    now_s, refused, answered = 0.0, 0, 0
    while answered < 20:
        now_s += asked_s
        assert now_s < 10, f"still {cost.batch_ms(11):.0f} ms after {refused} refusals"
        try:
            waiting.admit(Ticket([11], deadline_s=now_s + 0.03), now_s)
        except DeadlineError:
            refused += 1
            continue
        assert waiting.next_batch(now_s)
        cost.observe(11, true_ms)
        answered += 1 if cost.batch_ms(11) < 30 else 0
    assert refused > 5


def test_only_an_idle_engine_tries_what_should_be_late() -> None:
    waiting = queue(cost=known(0.0, 10.0))

    def late(now_s: float, tokens: int = 20, left_s: float = 0.15) -> Ticket:
        return Ticket([tokens], deadline_s=now_s + left_s)

    waiting.admit(Ticket([20]), 0)
    for when_s in (0.0, 0.1):  # something waits; then it runs until 0.3
        with pytest.raises(DeadlineError):
            waiting.admit(late(when_s), when_s)
        waiting.next_batch(0.1)
    with pytest.raises(DeadlineError):
        waiting.admit(late(0.9), 0.9)  # four times its own time has to pass
    with pytest.raises(DeadlineError):
        waiting.admit(late(1.2, left_s=0.019), 1.2)  # ten times as fast, it would be late still
    probe = late(1.2)
    waiting.admit(probe, 1.2)
    planned = waiting.next_batch(1.2)
    assert planned is not None
    assert planned.rows == [(probe, 0)]
    with pytest.raises(DeadlineError):
        waiting.admit(late(1.3), 1.3)
    waiting.admit(late(3.0), 3.0)
    assert waiting.next_batch(3.2) is None, "its time is over"
