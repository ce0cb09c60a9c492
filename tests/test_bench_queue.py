"""The simulated queue: nothing is lost in it, and it tells the server's queue from first come, first served."""

from __future__ import annotations

import pytest

from bench.queue_sim import Engine, Fifo, Kind, Line, Scenario, Simulation
from bench.report import percentile
from runtime.scheduler import FairQueue
from runtime.settings import Limits, SchedulingSettings

ENGINE = Engine("fast", 1.0, 0.06)
OVERLOADED = Scenario("overload", ENGINE, (Kind("single", 1, 30, load=0.05), Kind("batches", 200, load=4)), 10)
CALLERS = Scenario("callers", ENGINE, (Kind("single", 1, callers=5), Kind("batches", 20, callers=2)), 5)


def line(name: str) -> Line:
    limits, settings = Limits(), SchedulingSettings()
    return FairQueue(limits, settings) if name == "ours" else Fifo(limits, settings)


@pytest.mark.parametrize("name", ["ours", "fifo"])
@pytest.mark.parametrize("scenario", [OVERLOADED, CALLERS], ids=["overload", "callers"])
def test_every_request_is_answered_refused_or_still_waits(name: str, scenario: Scenario) -> None:
    waiting = line(name)
    outcome = Simulation(scenario, waiting).run()
    groups = outcome.groups.values()
    answered = sum(len(group.ms) for group in groups)
    left = sum(group.came - group.refused for group in groups) - answered
    # One batch runs at the end, whose requests are in no queue.
    assert len(waiting) <= left <= len(waiting) + 256
    assert answered > 50
    assert outcome.padded_tokens >= outcome.tokens >= sum(group.tokens for group in groups) > 0


def test_chances_depend_on_the_seed_alone() -> None:
    first, again, other = (Simulation(OVERLOADED, line("ours"), seed).run() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_it_tells_the_two_queues_apart() -> None:
    """Single texts beside four times too many batches of 200: passed by none of these, or stuck behind them."""
    ours, fifo = (Simulation(OVERLOADED, line(name)).run().groups["single"] for name in ("ours", "fifo"))
    assert ours.refused == 0
    assert percentile(ours.ms, 99) < percentile(fifo.ms, 50) / 5
