"""What is simulated of the server's queue, and the table of it."""

from __future__ import annotations

from typing import Any

from bench.queue_sim import LONGEST, SHORTEST, Engine, Fifo, Kind, Outcome, Scenario, Simulation
from bench.report import Result, percentile
from runtime.scheduler import FairQueue
from runtime.settings import Limits, SchedulingSettings

FAST, SLOW = Engine("fast", 1.0, 0.06), Engine("slow", 85.0, 6.0)  # the bundled checkpoint's and 0.6B's, on two cores

SCENARIOS = (
    *(Scenario(f"single texts, {x:g}x", FAST, (Kind("single", 1, load=x),), 60) for x in (0.8, 2, 10)),
    *(Scenario(f"requests of 16, {x:g}x", FAST, (Kind("16 texts", 16, load=x),), 60) for x in (0.8, 2, 10)),
    *(
        Scenario(f"single beside 200, {x:g}x", FAST, (Kind("single", 1, 30, 0.05), Kind("200 texts", 200, load=x)), 120)
        for x in (0.75, 10)
    ),
    *(Scenario(f"single texts, {x:g}x", SLOW, (Kind("single", 1, load=x),), 240) for x in (0.8, 2, 10)),
    Scenario("8 callers", SLOW, (Kind("single", 1, callers=8),), 240),
    Scenario("12 callers", SLOW, (Kind("single", 1, callers=12),), 240),
    Scenario("7 callers and one of 8", SLOW, (Kind("single", 1, callers=7), Kind("8 texts", 8, callers=1)), 240),
    Scenario("12 callers and one of 64", FAST, (Kind("single", 1, callers=12), Kind("64 texts", 64, callers=1)), 60),
    Scenario(
        "3 callers of 10, one of 200",
        FAST,
        (Kind("10 texts", 10, 100, callers=3), Kind("200 texts", 200, 100, callers=1)),
        60,
    ),
)


def measure(seed: int = 0) -> Result:
    """Simulate every scenario with the server's queue and with `Fifo`, each with the same chances."""
    rows, data = [], []
    for scenario in SCENARIOS:
        ours = Simulation(scenario, FairQueue(Limits(), SchedulingSettings()), seed).run()
        fifo = Simulation(scenario, Fifo(Limits(), SchedulingSettings()), seed).run()
        for kind in scenario.kinds:
            case = _case(scenario, kind, ours)
            beside = _case(scenario, kind, fifo)
            rows.append([f"{scenario.engine.name}: {scenario.name}", kind.name, *_cells(case, beside)])
            data.append({"scenario": scenario.name, "engine": scenario.engine.name, **case, "fifo": beside})
    return Result(
        name="queue",
        title="The server's queue in simulated time, beside first come, first served",
        command=f"python -m bench queue --seed {seed}",
        columns=[
            *("engine: what comes", "requests", "per s", "refused", "of capacity", "p50 ms", "p99 ms"),
            *("a batch", "padding", "FIFO: refused", "of capacity", "p50 ms", "p99 ms"),
        ],
        rows=rows,
        notes=[
            *(f"{e.name}: a batch costs {e.fixed_ms:g} ms and {e.token_ms:g} ms a padded token" for e in (FAST, SLOW)),
            "FIFO: the same batches of what came first; 512 requests may wait",
            f"lengths are mixed, {SHORTEST} to {LONGEST} tokens, but where single texts beside 200 have 30, and 10 and "
            "200 texts have 100 each; 2x: twice what the engine can do comes, at random; callers ask again at once, "
            "after a refusal as soon as they are told to",
            "of capacity: tokens answered, of what the engine does in batches of the size that efficiency asks for; "
            "a batch: its tokens without padding, in the mean",
            "everything is simulated: no engine, no network; only the queue is the server's own",
        ],
        data={"seed": seed, "cases": data},
    )


def _case(scenario: Scenario, kind: Kind, outcome: Outcome) -> dict[str, Any]:
    group, seconds = outcome.groups[kind.name], scenario.seconds
    return {
        "requests": kind.name,
        "per_s": group.came / seconds,
        "refused": group.refused / group.came,
        "of_capacity": group.tokens / seconds / scenario.engine.tokens_per_s,
        "p50_ms": percentile(group.ms, 50) if group.ms else None,
        "p99_ms": percentile(group.ms, 99) if group.ms else None,
        "batch_tokens": outcome.tokens / outcome.batches,
        "padding": 1 - outcome.tokens / outcome.padded_tokens,
    }


def _cells(case: dict[str, Any], fifo: dict[str, Any]) -> list[str]:
    def times(of: dict[str, Any]) -> list[str]:
        return ["none answered" if of[name] is None else f"{of[name]:,.0f}" for name in ("p50_ms", "p99_ms")]

    def shares(of: dict[str, Any]) -> list[str]:
        return [f"{of['refused']:.1%}", f"{of['of_capacity']:.0%}"]

    size = [f"{case['batch_tokens']:.0f}", f"{case['padding']:.1%}"]
    return [f"{case['per_s']:.3g}", *shares(case), *times(case), *size, *shares(fifo), *times(fifo)]
