"""The queue by its properties: budgets kept, nothing lost or computed in vain, nobody starved, padding paid for."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cost import CostModel, Density
from runtime.errors import DeadlineError, InputError, OverloadedError
from runtime.overload import Pressure
from runtime.scheduler import FairQueue, Planned, Ticket
from runtime.settings import PRESETS, Limits, SchedulingSettings

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)
COSTS = st.tuples(st.floats(0, 50), st.floats(0.001, 2))
LIMITS = st.builds(Limits, max_batch_tokens=st.integers(1, 2000), max_batch_rows=st.integers(1, 16))


def patient(**fields: Any) -> SchedulingSettings:
    return SchedulingSettings(**{"max_wait_ms": 1e12, "overload": 1e9, "least_batch_tokens": 1, **fields})


def known(fixed_ms: float, token_ms: float) -> CostModel:
    cost = CostModel()
    for tokens in (1, 16, 64, 256, 1024):
        cost.observe(tokens, fixed_ms + token_ms * tokens)
    return cost


def queue(limits: Limits = Limits(), cost: CostModel | None = None, **fields: Any) -> FairQueue:
    return FairQueue(limits, patient(**fields), cost)


def drain(waiting: FairQueue, now_s: float = 0.0) -> list[Planned]:
    batches = []
    while (planned := waiting.next_batch(now_s)) is not None:
        batches.append(planned)
    return batches


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
            waiting.cancel(ticket)
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
    with pytest.raises(DeadlineError, match=r"would take 1000 ms, and the deadline leaves 900 ms"):
        waiting.admit(Ticket([100], deadline_s=0.9), 0)
    assert len(waiting) == 0
    late = Ticket([100], deadline_s=1.1)
    waiting.admit(late, 0)
    assert waiting.next_batch(0.2) is None, "100 tokens take until 1.2 s"
    assert waiting.expired == [late]
    assert (len(waiting), waiting.items, waiting.tokens) == (0, 0, 0)


def test_a_request_whose_tokens_are_foreseen_is_refused_before_they_are_counted() -> None:
    waiting = queue(cost=known(0.0, 1.0), max_wait_ms=1000)
    waiting.check_door(0.0, tokens=10**6)  # nothing waits: it is as long as it is
    waiting.admit(Ticket([950]), 0.0)
    with pytest.raises(OverloadedError, match=r"the wait is 950 ms; the limit is 900 ms"):
        waiting.check_door(0.0, tokens=2000)
    waiting.check_door(0.0, tokens=100)  # a shorter one waits for its share only
    waiting.check_door(0.0)  # of which nothing is known
    waiting.check_door(0.0, tokens=100, deadline_s=0.2)
    with pytest.raises(DeadlineError, match=r"would take 100 ms, and the deadline leaves 50 ms"):
        waiting.check_door(0.0, tokens=100, deadline_s=0.05)
    waiting.admit(Ticket([2000]), 0.0)  # the door is a little earlier than the limit itself
    assert len(waiting) == 2


def test_on_a_slow_engine_large_requests_get_in_after_small_ones() -> None:
    """A burst may be eight requests long: what is refused at the door counts for how long these are."""
    waiting = FairQueue(Limits(), SchedulingSettings(overload=1e9), known(0.0, 1.0))
    for _ in range(50):
        waiting.admit(Ticket([20]), 0.0)
        waiting.next_batch(0.0)
    waiting.admit(Ticket([4000]), 0.0, bounded=False)
    for _ in range(30):
        with contextlib.suppress(OverloadedError):
            waiting.check_door(0.0, tokens=4000)
            break
    else:
        pytest.fail("none of thirty was let in")


def test_in_overload_requests_larger_than_a_batch_keep_the_engine_busy() -> None:
    """Three batches of 100 tokens would be less than one request of 1,000."""
    waiting = queue(Limits(max_batch_tokens=100), known(100.0, 1.0), standing_batches=3)
    assert waiting.standing_wait_ms == pytest.approx(600, rel=0.01)
    for _ in range(100):
        waiting.admit(Ticket([100] * 10), 0.0)
    assert waiting.standing_wait_ms == pytest.approx(3300, rel=0.01)


def test_tokens_are_foreseen_from_bytes() -> None:
    density = Density()
    assert density.tokens("", ["anything"], 100) == 0, "nothing is known yet"
    density.observe("", ["four char" * 4], 9)
    assert density.tokens("", ["x" * 400], 1000) == 100
    assert density.tokens("p" * 40, ["x" * 400] * 2, 1000) == 220, "the prompt stands before each text"
    assert density.tokens("", ["x" * 400, "x" * 40], 50) == 60, "cut to 50 tokens each"
    assert density.tokens("", ["щ" * 2000], 10**6) == 1000, "two bytes each"
    assert density.tokens("", ["x" * 40, "x" * 4] * 500, 1000) == 5500
    assert density.tokens("", [], 1000) == 0
    assert density.tokens("", ["\ud800"], 1000) == 0, "half a character is refused later"
    density.observe("", [""], 1)
    for _ in range(200):
        density.observe("", ["xx" * 50], 50)
    assert density.tokens("", ["x" * 400], 1000) == pytest.approx(200, abs=2), "it follows what comes"


def test_no_single_request_makes_up_what_others_are_foreseen_to_have() -> None:
    density = Density()
    for _ in range(20):
        density.observe("", ["x" * 400], 100)
    density.observe("p" * 200, ["a"], 51)  # a query of one letter after a long prompt
    density.observe("", ["a"], 2)
    assert density.tokens("", ["x" * 400], 1000) == pytest.approx(100, abs=2)
    density.observe("", ["\U0001f600" * 250_000], 1_000_000)  # a token for each byte
    assert density.tokens("", ["x" * 400], 1000) < 300


def test_overload_keeps_the_queue_short_and_a_burst_does_not() -> None:
    """Each request takes 10 ms; twice as many come as can be served. A burst of the same length is let in."""
    settings = SchedulingSettings(max_wait_ms=5000, burst_ms=200, standing_batches=3, efficiency=0.5)
    cost = known(0.1, 1.0)
    waiting = FairQueue(Limits(max_batch_rows=1), settings, cost)
    for _ in range(100):
        waiting.check_door(0.0)
        waiting.admit(Ticket([10]), 0.0)
    assert len(waiting) == 100, "a burst"
    refused, now_s = 0, 0.0
    for turn in range(600):
        now_s += 0.005
        try:
            waiting.check_door(now_s)
            waiting.admit(Ticket([10]), now_s)
        except OverloadedError:
            refused += 1
        if turn % 2:
            waiting.next_batch(now_s)
    assert refused > 200
    assert waiting.wait_ms(10) <= waiting.standing_wait_ms + 2 * cost.batch_ms(10)


@pytest.mark.parametrize("times", [1, 30])
def test_a_queue_that_runs_empty_in_overload_lets_in_no_second_burst(times: int) -> None:
    """Each request takes 16 ms, or 480; twice as many come, by chance, and so few may wait that at times none does."""
    settings = SchedulingSettings(max_wait_ms=1000 * times, burst_ms=200, standing_batches=1)
    line = FairQueue(Limits(), settings, known(0.5 * times, 0.01 * times))
    chance = random.Random(0)
    due_s = free_s = 0.0
    waits, empty = [], 0
    while due_s < 30 * times:
        if len(line) and free_s <= due_s:
            planned = line.next_batch(free_s)
            assert planned is not None
            free_s += 1e-3 * line.cost.batch_ms(planned.padded_tokens)
            empty += free_s > 3 * times and not len(line)
            continue
        free_s = max(free_s, due_s)
        with contextlib.suppress(OverloadedError):
            line.check_door(due_s)
            if due_s > 3 * times:  # the first burst is worked off
                waits.append(line.wait_ms(1600))
            line.admit(Ticket([chance.randint(50, 150) for _ in range(16)]), due_s)
        due_s += chance.expovariate(2 / (0.016 * times))
    assert empty > 20
    assert max(waits) < 100 * times


def overloaded() -> tuple[FairQueue, float]:
    """Return a queue in overload, and the time: each request takes 10 ms, three times as many come."""
    line = FairQueue(Limits(max_batch_rows=1), SchedulingSettings(max_wait_ms=1e9, standing_batches=1), known(0.0, 1.0))
    now_s = 0.0
    for turn in range(1000):
        now_s = turn / 300
        with contextlib.suppress(OverloadedError):
            line.check_door(now_s)
            line.admit(Ticket([10]), now_s)
        if turn % 3 == 0:
            line.next_batch(now_s)
    assert line.is_overloaded
    return line, now_s


@pytest.mark.parametrize("golden", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_after_a_pause_a_burst_is_let_in_again(golden: bool, cancelled: bool) -> None:
    """However the queue came to be empty, and though a golden check passes in between without asking at the door."""
    line, now_s = overloaded()
    if cancelled:
        for _, _, ticket in list(line._heap):
            line.cancel(ticket)
    drain(line, now_s)
    if golden:
        line.admit(Ticket([10]), now_s + 3600, bounded=False)
        drain(line, now_s + 3600)
    for _ in range(100):
        line.check_door(now_s + 3600.1)
        line.admit(Ticket([10]), now_s + 3600.1)
    line.check_door(now_s + 3600.2)


def test_a_cancelled_request_leaves_no_load_behind() -> None:
    line = FairQueue(Limits(max_batch_rows=1), SchedulingSettings(standing_batches=1), known(0.0, 1.0))
    alone = Ticket([10])
    line.check_door(0.0)
    line.admit(alone, 0.0)
    line.cancel(alone)
    for _ in range(90):
        line.check_door(3600.0)
        line.admit(Ticket([10]), 3600.0)
    for turn in range(50):
        now_s = 3600 + 0.01 * turn
        line.next_batch(now_s)
        line.check_door(now_s)
        line.admit(Ticket([10]), now_s)


def test_a_fresh_queue_knows_what_eight_requests_are() -> None:
    line = FairQueue(Limits(), SchedulingSettings(), known(0.0, 1.0))
    for _ in range(9):
        line.admit(Ticket([2000]), 0.0)
    with pytest.raises(OverloadedError, match="the limit is 16000 ms"):
        line.admit(Ticket([2000]), 0.0)


@pytest.mark.parametrize(("token_ms", "limit_ms"), [(0.1, 1000), (20, 1600)])
def test_a_slow_engine_lets_in_eight_requests_and_a_fast_one_a_second(token_ms: float, limit_ms: float) -> None:
    line = FairQueue(Limits(), SchedulingSettings(overload=1e9), known(0.0, token_ms))
    for _ in range(2000):
        with contextlib.suppress(OverloadedError):
            line.admit(Ticket([10]), 0.0)
    assert line.most_wait_ms == pytest.approx(limit_ms, rel=0.01)
    with pytest.raises(OverloadedError, match=f"the limit is {limit_ms} ms"):
        line.admit(Ticket([10]), 0.0)


@pytest.mark.parametrize("callers", [8, 64, 400])
def test_callers_that_wait_for_their_answers_are_no_overload(callers: int) -> None:
    """Each request takes 10 ms. All callers come at once and fill the queue; each answer lets one of them ask again."""
    settings = SchedulingSettings(max_wait_ms=5000, burst_ms=200, standing_batches=1, efficiency=0.5)
    waiting = FairQueue(Limits(max_batch_rows=1), settings, known(0.1, 1.0))
    now_s = 0.0
    for _ in range(callers):
        waiting.check_door(now_s)
        waiting.admit(Ticket([10]), now_s)
    for _ in range(1000):
        now_s += 0.01
        assert waiting.next_batch(now_s) is not None
        waiting.check_door(now_s)
        waiting.admit(Ticket([10]), now_s)


def test_what_is_turned_away_for_what_it_asks_is_no_overload() -> None:
    """Three of four requests pass the door and are then found to be wrong: the engine has nothing to do with them."""
    settings = SchedulingSettings(max_wait_ms=5000, burst_ms=200, standing_batches=1, efficiency=0.5)
    waiting = FairQueue(Limits(max_batch_rows=1), settings, known(0.1, 1.0))
    for turn in range(1000):
        now_s = 0.01 * turn
        waiting.check_door(now_s)
        waiting.admit(Ticket([10]), now_s)
        for _ in range(3):
            waiting.check_door(now_s)
            waiting.turned_away()
        if turn >= 15:
            assert waiting.next_batch(now_s) is not None


def test_an_item_without_tokens() -> None:
    with pytest.raises(InputError, match="no tokens"):
        queue().admit(Ticket([3, 0]), 0)


@given(st.floats(0.1, 100), st.floats(0.001, 5))
def test_the_cost_is_learned(fixed_ms: float, token_ms: float) -> None:
    cost = known(fixed_ms, token_ms)
    assert cost.batch_ms(500) == pytest.approx(fixed_ms + 500 * token_ms, rel=1e-3)
    for _ in range(300):  # the machine becomes twice as slow, and all batches are of one size
        cost.observe(100, 2 * (fixed_ms + 100 * token_ms))
    assert cost.batch_ms(100) == pytest.approx(2 * (fixed_ms + 100 * token_ms), rel=0.05)
    assert cost.fixed_ms >= 0
    assert cost.token_ms >= 0


def test_one_outlier_does_not_change_the_cost_much() -> None:
    cost = known(10.0, 1.0)
    for _ in range(50):
        cost.observe(100, 110.0)
        cost.observe(50, 60.0)
    cost.observe(100, 1e6)
    assert cost.batch_ms(100) < 150


def test_pressure_counts_the_latest_batches() -> None:
    pressure = Pressure()

    def batch(came: int, served: int) -> None:
        for _ in range(came):
            pressure.arrived()
        for _ in range(served):
            pressure.served()
        pressure.batch()

    batch(1000, 1)
    assert pressure.ratio == 1.0, "too little is known"
    for _ in range(100):
        batch(3, 1)
    assert pressure.ratio == pytest.approx(3, abs=0.1)
    for _ in range(200):
        batch(1, 1)
    assert pressure.ratio < 1.0


@pytest.mark.parametrize("callers", [100, 300, 400])
def test_callers_that_come_back_in_crowds_are_no_overload(callers: int) -> None:
    """Whoever got an answer asks again at once, all of a batch together; lengths, and so batches, differ."""
    settings = SchedulingSettings(max_wait_ms=1e9, burst_ms=200, standing_batches=1)
    line = FairQueue(Limits(), settings, known(10.0, 0.1))
    lengths = random.Random(0)
    now_s = 0.0

    def come(count: int) -> None:
        for _ in range(count):
            line.check_door(now_s)
            line.admit(Ticket([lengths.randint(4, 60)]), now_s)

    come(callers)
    for _ in range(400):
        planned = line.next_batch(now_s)
        assert planned is not None
        now_s += 1e-3 * line.cost.batch_ms(planned.padded_tokens)
        come(len(planned.rows))
