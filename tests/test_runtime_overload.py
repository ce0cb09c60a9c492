"""Overload, told from a burst: the queue is kept short, and who waits for an answer is no overload."""

from __future__ import annotations

import contextlib
import random

import pytest

from runtime.errors import DeadlineError, OverloadedError
from runtime.fair_order import Ticket
from runtime.overload import Pressure
from runtime.scheduler import FairQueue
from runtime.settings import Limits, SchedulingSettings
from tests.queues import drain, known, queue


def test_a_request_whose_tokens_are_foreseen_is_refused_before_they_are_counted() -> None:
    waiting = queue(cost=known(0.0, 1.0), max_wait_ms=1000)
    waiting.check_door(0.0, tokens=10**6)  # nothing waits: it is as long as it is
    waiting.admit(Ticket([50] * 19), 0.0)
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
    """Three batches of 100 tokens would be less than one request of 1,000; half a second more may wait."""
    waiting = queue(Limits(max_batch_tokens=100), known(100.0, 1.0), standing_batches=3)
    assert waiting.standing_wait_ms == pytest.approx(600, rel=0.01)
    for _ in range(100):
        waiting.admit(Ticket([100] * 10), 0.0)
    assert waiting.standing_wait_ms == pytest.approx(1100 + 500, rel=0.01)


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


def flood(small: int, large: int, small_load: float, large_load: float) -> dict[int, tuple[float, float]]:
    """Send texts of two lengths, each at a multiple of what the engine can do. Ten simulated seconds.

    Returns for each length the share of its requests that was let in, and its share of the engine's time.
    """
    line = FairQueue(Limits(), SchedulingSettings(), known(0.1, 0.05))
    chance = random.Random(0)
    rates = {small: small_load / (5e-5 * small), large: large_load / (5e-5 * large)}
    due = {tokens: chance.expovariate(rate) for tokens, rate in rates.items()}
    came, admitted, served = ({small: 0, large: 0} for _ in range(3))
    free_s = 0.0
    while min(due.values()) < 10:
        tokens = min(due, key=due.__getitem__)
        if len(line) and free_s <= due[tokens]:
            planned = line.next_batch(free_s)
            assert planned is not None
            free_s += 1e-3 * line.cost.batch_ms(planned.padded_tokens)
            for ticket, index in planned.rows:
                served[ticket.lengths[index]] += ticket.lengths[index]
            continue
        now_s = due[tokens]
        due[tokens] += chance.expovariate(rates[tokens])
        free_s = max(free_s, now_s)
        came[tokens] += 1
        with contextlib.suppress(OverloadedError):
            line.check_door(now_s, tokens)
            line.admit(Ticket([tokens]), now_s)
            admitted[tokens] += 1
    return {tokens: (admitted[tokens] / came[tokens], 5e-5 * served[tokens] / free_s) for tokens in came}


@pytest.mark.parametrize("giant", [640, 2000, 8000])
def test_in_overload_by_giants_single_texts_are_let_in(giant: int) -> None:
    """Ten times as many giants come as can be served, and beside them a hundredth of that in single texts."""
    shares = flood(8, giant, small_load=0.01, large_load=10)
    assert shares[8][0] > 0.98
    assert shares[giant][0] < 0.2
    assert shares[giant][1] > 0.9


def test_in_overload_by_small_and_large_each_gets_a_good_part_of_the_engine() -> None:
    """The small alone could fill the engine twice; without a limit to their share the large get nothing."""
    shares = flood(8, 32_000, small_load=2, large_load=20)
    assert shares[8][1] > 0.3
    assert shares[32_000][1] > 0.1


@pytest.mark.parametrize("golden", [False, True])
@pytest.mark.parametrize("cancelled", [False, True])
def test_after_a_pause_a_burst_is_let_in_again(golden: bool, cancelled: bool) -> None:
    """However the queue came to be empty, and though a golden check passes in between without asking at the door."""
    line, now_s = overloaded()
    if cancelled:
        for _, _, ticket in list(line._order._heap):
            line.cancel(ticket, now_s)
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
    line.cancel(alone, 0.0)
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


@pytest.mark.parametrize("how", ["hopeless deadline", "cancelled at once"])
def test_what_no_engine_could_serve_in_time_is_no_overload(how: str) -> None:
    """Callers who ask one after the other are let in, however many others give up before the engine could answer."""
    line = FairQueue(Limits(max_batch_rows=1), SchedulingSettings(), known(0.0, 1.0))
    line.admit(Ticket([100]), 0.0, bounded=False)
    for step in range(1, 2000):
        now_s = 0.1 * step  # each takes as long as until the next one
        for _ in range(5):
            if how == "hopeless deadline":
                with contextlib.suppress(DeadlineError):
                    line.check_door(now_s, 100, now_s + 0.001)
                    line.admit(Ticket([100], now_s + 0.001), now_s)
            else:
                line.check_door(now_s, 100)
                ticket = Ticket([100])
                line.admit(ticket, now_s)
                line.cancel(ticket, now_s + 0.001)
        line.check_door(now_s, 100)
        line.admit(Ticket([100]), now_s)
        assert line.next_batch(now_s)
        assert not line.is_overloaded


def test_callers_who_lose_patience_behind_others_are_told_as_overload() -> None:
    """Their deadlines would leave time enough, but for what waits before them."""
    line = FairQueue(Limits(max_batch_rows=1), SchedulingSettings(max_wait_ms=1e6), known(0.0, 1.0))
    for step in range(1, 400):
        now_s = 0.1 * step
        for _ in range(5):
            with contextlib.suppress(DeadlineError, OverloadedError):
                line.check_door(now_s, 100, now_s + 0.5)
                line.admit(Ticket([100], now_s + 0.5), now_s)
        line.next_batch(now_s)
    assert line.is_overloaded


def test_cancelled_requests_leave_nothing_in_the_heap() -> None:
    line = FairQueue(Limits(), SchedulingSettings(max_waiting_requests=10**6, overload=1e9), known(0.0, 1.0))
    stays = Ticket([10], payload="kept")
    line.admit(stays, 0.0, bounded=False)
    for _ in range(5000):
        ticket = Ticket([10], payload="large")
        line.admit(ticket, 0.0, bounded=False)
        line.cancel(ticket, 0.0)
        assert ticket.payload is None
        assert len(line._order._heap) <= 100
    planned = line.next_batch(0.0)
    assert planned is not None
    assert [ticket.payload for ticket, _ in planned.rows] == ["kept"]
    assert line.next_batch(0.0) is None


SLOW = (12, 14, 17, 20, 23, 27, 28, 34, 54, 62, 75, 77, 79, 83, 107, 110, 119, 148, 174, 194, 219, 255, 306, 399, 413)


def slow_line() -> FairQueue:
    """Return the queue of an engine that takes most of a second for a text, as a large model on a CPU does."""
    return FairQueue(Limits(), SchedulingSettings(), known(85.0, 6.0))


def test_in_overload_long_texts_are_not_passed_for_ever() -> None:
    """Two minutes in which ten times as many come as can be served: short and long ones are let in about alike."""
    line, chance = slow_line(), random.Random(0)
    lengths = chance.sample(SLOW, len(SLOW))
    due_s = free_s = 0.0
    times, admitted, turn = [], [], 0
    while due_s < 120:
        if len(line) and free_s <= due_s:
            planned = line.next_batch(free_s)
            assert planned is not None
            free_s += 1e-3 * line.cost.batch_ms(planned.padded_tokens) * chance.uniform(0.8, 1.25)
            times += [free_s - ticket.payload for ticket, _ in planned.rows]
            continue
        free_s = max(free_s, due_s)
        length = lengths[turn % len(lengths)]
        with contextlib.suppress(OverloadedError):
            line.check_door(due_s, round(length * chance.uniform(0.8, 1.2)))
            line.admit(Ticket([length], payload=due_s), due_s)
            admitted.append(length)
        due_s, turn = due_s + 0.08, turn + 1
    assert sum(admitted) / len(admitted) > 0.7 * sum(SLOW) / len(SLOW)
    assert max(times) < 25


@pytest.mark.parametrize("seed", range(8))
def test_eight_callers_of_a_slow_engine_are_not_refused(seed: int) -> None:
    """Each waits for its answer and asks again; their texts differ in length."""
    line, chance = slow_line(), random.Random(seed)
    now_s = 0.0
    for _ in range(8):
        line.check_door(now_s)
        line.admit(Ticket([chance.choice(SLOW)]), now_s)
    for _ in range(100):
        planned = line.next_batch(now_s)
        assert planned is not None
        now_s += 1e-3 * line.cost.batch_ms(planned.padded_tokens)
        for _ in planned.rows:
            length = chance.choice(SLOW)
            line.check_door(now_s, length)
            line.admit(Ticket([length]), now_s)
