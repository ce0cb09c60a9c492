"""Serving under load: throughput at saturation, overload, and padding, beside the raw engine and peer servers.

All servers get the same texts on the same machine, one after the other, in one run. Capacity is what a server answers
in a closed loop; overload is a multiple of its own capacity. The generator is this process: it takes its share of the
same cores, from all of them alike.

A machine's speed changes within minutes, by more than what is looked for. So the raw engine and the closed loop have a
turn before and after every phase of the open loop: a server is compared with what the raw engine did a moment before,
and a phase with the mean of the capacities on either side of it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.inputs import private_cache, short_texts
from bench.load import LEAST_REQUESTS, SETTLED_S, Outcomes, closed_loop, open_loop
from bench.raw_engine import RawEngine
from bench.report import Result, median, percentile
from bench.servers import GRPC, HTTP, PEER_DTYPE, PEERS, START_S, Contender, Running, running
from calibration.texts import verification_texts
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from export.synth import default_tokenizer, write_checkpoint
from runtime.bundle import open_bundle
from runtime.cores import usable_cores
from runtime.embedder import Embedder, open_embedder
from runtime.errors import InputError
from runtime.tokenizer import Instruction, Truncate

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "mini"
TOKENS = (8, 512)
_TEXTS = 512
LOADS = (0.8, 2.0, 10.0)


@dataclass
class Measured:
    """One server's phases: alone (one caller), and open loop at multiples of capacity; or why there are none.

    `raw` (tokens per second) and `saturated` are the turns: one before each phase of the open loop, and one at last.
    """

    name: str
    phases: dict[str, Outcomes] = field(default_factory=dict)
    raw: list[float] = field(default_factory=list)
    saturated: list[Outcomes] = field(default_factory=list)
    waste: float | None = None
    problem: str = ""

    @property
    def of_raw(self) -> list[float]:
        """Tokens per second at saturation to those of the raw engine, turn by turn."""
        return [closed.tokens_per_s / raw for closed, raw in zip(self.saturated, self.raw, strict=True)]

    @property
    def capacity(self) -> float:
        """Tokens per second at saturation, all turns together."""
        return sum(turn.tokens for turn in self.saturated) / sum(turn.seconds for turn in self.saturated)

    def goodput(self, load: float) -> float:
        """Tokens per second of an open loop to the mean of the capacity before and after it."""
        at = LOADS.index(load)
        around = [turn.tokens_per_s for turn in self.saturated[at : at + 2]]
        return self.phases[f"{load:g}x"].tokens_per_s / _mean(around)


@dataclass(frozen=True)
class Load:
    """How much is asked: each phase takes `seconds` or longer, requests have `per_request` texts.

    `callers` of the closed loop are by default as many as keep the engine busy: some answers are on their way while
    others are computed. A server that takes longer than `limit_s` to start, or for all of its phases, is given up.
    Phases of the open loop take `open_s` where it is given: overload as it lasts, not as it begins.
    """

    seconds: float = 15.0
    per_request: int = 16
    callers: int | None = None
    limit_s: float | None = None
    open_s: float | None = None

    @property
    def concurrent(self) -> int:
        """Callers of the closed loop."""
        return self.callers or max(8, 64 // self.per_request)


def measure(
    size: str,
    bundle: Path | None,
    checkpoint: Path | None,
    engine: str,
    work: Path,
    load: Load = Load(),
    leave_out: Sequence[str] = (),
) -> Result:
    """Measure all servers but those peers. Peers that are not there are named with the reason.

    Raises InputError for a peer that does not exist.
    """
    peers = [contender.peer for contender in PEERS]
    if unknown := [name for name in leave_out if name not in peers]:
        raise InputError(f"there is no peer {unknown[0]!r}.", cure=f"Leave out some of: {', '.join(peers)}.")
    checkpoint, bundle = _prepare(size, checkpoint, bundle, engine, work)
    embedder = open_embedder(open_bundle(bundle), engine)
    raw = RawEngine(embedder, mixed_texts(embedder), load.seconds, load.per_request)
    _say(f"{len(raw.texts)} texts; the raw engine's best batch has {raw.budget} tokens")
    measured = []
    for contender in (GRPC, HTTP, *PEERS):
        result = Measured(contender.name)
        measured.append(result)
        reason = "left out" if contender.peer in leave_out else contender.not_there()
        if reason is not None:
            result.problem = reason
            continue
        try:
            log, start_s = work / f"{contender.name.split()[0]}.log", max(START_S, load.limit_s or 0)
            with running(contender, checkpoint, bundle, engine, log, start_s) as server:
                asyncio.run(_in_time(_phases(contender, server, raw, load, result), load.limit_s))
        except RuntimeError as error:
            known = f" (at saturation {result.capacity:.0f} tokens/s)" if result.saturated else ""
            result.problem = f"{error}{known}"
        _say(f"{contender.name}: {result.problem or _summary(result)}")
    embedder.close()
    return _result(size, _command(size, engine, load, leave_out), engine, load, raw, measured)


def mixed_texts(embedder: Embedder) -> list[str]:
    """Return real texts of 8 to 512 tokens, as the engine's own tokenizer counts them, in a fixed mixed order.

    Mixed, so that every phase sees the same lengths, however few texts it gets through.
    """
    texts = [t.text for t in verification_texts()]
    items = embedder.tokenize(texts, Instruction(prompt=""), Truncate.END)
    fitting = [text for text, item in zip(texts, items, strict=True) if TOKENS[0] <= len(item.ids) <= TOKENS[1]]
    random.Random(0).shuffle(fitting)
    return fitting[:_TEXTS]


async def _in_time(phases: Coroutine[None, None, None], limit_s: float | None) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await phases
    except TimeoutError as error:
        raise RuntimeError(f"its phases took longer than {limit_s:g} s") from error


async def _phases(
    contender: Contender,
    server: Running,
    raw: RawEngine,
    load: Load,
    result: Measured,
) -> None:
    ask, requests, seconds = server.connect(), raw.requests, load.seconds
    tokens_per_request = sum(request.tokens for request in requests) / len(requests)

    async def turn() -> float:
        with server.stopped():  # what it does while nobody asks must not slow down what it is compared with
            result.raw.append(raw.tokens_per_s(seconds / 3))
        result.saturated.append(await closed_loop(ask, requests, load.concurrent, seconds / 3, least=2))
        rate = result.saturated[-1].tokens_per_s
        if not rate:
            raise RuntimeError("it answered nothing at saturation")
        return rate / tokens_per_request

    await closed_loop(ask, requests, 4, min(seconds / 4, 5))  # warm
    result.phases["alone"] = await closed_loop(ask, requests, 1, seconds / 2)
    before = _tokens(server)
    # Ten times its capacity a server that refuses nothing works off for minutes, and nothing is learned.
    for times in LOADS if not contender.environment else LOADS[:2]:
        capacity = await turn()
        result.phases[f"{times:g}x"] = await open_loop(ask, requests, times * capacity, load.open_s or seconds)
        await closed_loop(ask, requests, 1, 1.0)  # what still waits is worked off
    await turn()
    after = _tokens(server)
    if before and after:
        result.waste = 1 - (after[0] - before[0]) / (after[1] - before[1])
    await ask.close()


def _tokens(server: Running) -> tuple[float, float] | None:
    """Return the tokens and padded tokens that our server has computed so far."""
    if not server.metrics:
        return None
    text = httpx.get(server.metrics, trust_env=False).text
    found = [
        re.search(rf'^f2rt_{name}_total{{model="bench"}} (\S+)$', text, re.M) for name in ("tokens", "padded_tokens")
    ]
    assert found[0] is not None
    assert found[1] is not None
    return float(found[0][1]), float(found[1][1])


def _prepare(size: str, checkpoint: Path | None, bundle: Path | None, engine: str, work: Path) -> tuple[Path, Path]:
    if checkpoint is None:
        checkpoint = MINI
        if size != "mini":
            checkpoint = work / "checkpoint"
            write_checkpoint(size, checkpoint, tokenizer_from=default_tokenizer())
    if bundle is None:
        bundle = work / "bundle"
        precision = Precision(engine.partition(":")[2])
        with private_cache(work):
            export_bundle(Checkpoint.open(locate(str(checkpoint))), bundle, [precision])
            prove_bundle(bundle, short_texts(8) if size != "mini" else list(verification_texts())[::20])
    return checkpoint, bundle


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _summary(result: Measured) -> str:
    phases = ", ".join(f"{name} {phase.tokens_per_s:.0f} tokens/s" for name, phase in result.phases.items())
    return f"{phases}; at saturation {result.capacity:.0f}, {_percent(median(result.of_raw))} of the raw engine"


def _result(size: str, command: str, engine: str, load: Load, raw: RawEngine, measured: Sequence[Measured]) -> Result:
    rows: list[list[str]] = []
    data: list[dict[str, object]] = []
    notes: list[str] = []
    for one in measured:
        if one.problem:
            notes.append(f"{one.name}: not measured, {one.problem}")
            data.append({"server": one.name, "problem": one.problem})
            continue
        rows += _rows(one)
        data.append(_data(one))
        more = f", {100 * one.waste:.1f} % of its tokens were padding" if one.waste is not None else ""
        late = [ms for phase in one.phases.values() for ms in phase.late_ms]
        more += f"; the generator sent its requests up to {percentile(late, 99):.1f} ms late (p99)"
        taken = {name: phase.generator_cores / usable_cores() for name, phase in one.phases.items()}
        busiest = max(taken, key=lambda name: taken[name])
        more += f" and took up to {_percent(taken[busiest])} of the cores (at {busiest})"
        if not measured[0].problem and one is not measured[0]:
            # Each to the raw engine of its own turns: what the machine did meanwhile is in neither.
            more += f"; f2rt gRPC does {median(measured[0].of_raw) / median(one.of_raw):.2f} times as much"
        notes.append(
            f"{one.name}: {_percent(median(one.of_raw))} of the raw engine's tokens/s at saturation "
            f"({', '.join(map(_percent, one.of_raw))}){more}"
        )
    everything = [rate for one in measured for rate in one.raw]
    return Result(
        name=f"serving-{size}" + ("-lasting" if load.open_s else ""),
        title=f"Serving under load, {size} checkpoint on CPU, {engine}",
        command=command,
        columns=[
            *("server", "load", "texts/s", "tokens/s", "of its capacity", "p50 ms", "p99 ms", "p99 to that at 0.8x"),
            *("after the onset", "refused", "refusals' p50 ms", "p99 ms", "failed"),
        ],
        rows=rows,
        notes=[
            f"requests of {load.per_request} real texts of {TOKENS[0]} to {TOKENS[1]} tokens, the same "
            f"{len(raw.texts)} for all; alone: one caller; saturated: a closed loop of {load.concurrent} callers, in "
            "turns; 0.8x and so on: an open loop at this multiple of the turn before it, set against the mean of the "
            f"turns on either side, times counted from when a request was due, {LEAST_REQUESTS} requests at least; "
            f"after the onset: the same ratio for requests due {SETTLED_S:g} s or more into the phase",
            "the raw engine, in process, sorted by length, best of seven batch sizes, a turn before each saturated "
            f"one: {min(everything, default=0):.0f} to {max(everything, default=0):.0f} tokens/s, as the machine was",
            f"the peers compute in {PEER_DTYPE}: bfloat16 where the CPU multiplies it, else float32",
            "ratios are of tokens/s, without padding: in overload short requests find room more often than long ones",
            *notes,
        ],
        data={
            "size": size,
            "engine": engine,
            "peer_dtype": PEER_DTYPE,
            "texts_per_request": load.per_request,
            "callers": load.concurrent,
            "texts": len(raw.texts),
            "raw_batch_tokens": raw.budget,
            "servers": data,
        },
    )


def _command(size: str, engine: str, load: Load, leave_out: Sequence[str]) -> str:
    command = f"python -m bench serving --size {size} --engine {engine} --seconds {load.seconds:g}"
    command += f" --per-request {load.per_request}"
    command += f" --callers {load.callers}" if load.callers else ""
    command += f" --limit {load.limit_s:g}" if load.limit_s else ""
    command += f" --open-seconds {load.open_s:g}" if load.open_s else ""
    return command + (f" --leave-out {','.join(leave_out)}" if leave_out else "")


def _rows(one: Measured) -> list[list[str]]:
    at_80 = one.phases["0.8x"].as_data().get("ok_p99_ms")
    shares = {f"{load:g}x": one.goodput(load) for load in LOADS if f"{load:g}x" in one.phases}
    phases = [("alone", one.phases["alone"])]
    for number, (turn, load) in enumerate(itertools.zip_longest(one.saturated, shares), 1):
        phases.append((f"saturated {number}", turn))
        if load:
            phases.append((load, one.phases[load]))
    rows = []
    for name, phase in phases:
        numbers, share = phase.as_data(), shares.get(name, phase.tokens_per_s / one.capacity)
        p99 = numbers.get("ok_p99_ms")
        ratios = [
            f"{found / at_80:.2f}" if found and at_80 and name in shares and name != "0.8x" else ""
            for found in (p99, numbers.get("settled_p99_ms"))
        ]
        rows.append(
            [
                *(one.name, name, f"{phase.texts_per_s:.1f}", f"{phase.tokens_per_s:.0f}", f"{share:.2f}"),
                *(_ms(numbers.get("ok_p50_ms")), _ms(p99)),
                *(*ratios, str(len(phase.refused_ms)), _ms(numbers.get("refused_p50_ms"))),
                *(_ms(numbers.get("refused_p99_ms")), str(phase.failed)),
            ]
        )
    return rows


def _data(one: Measured) -> dict[str, object]:
    return {
        "server": one.name,
        "of_raw": median(one.of_raw),
        "of_raw_by_turn": one.of_raw,
        "raw_tokens_per_s": one.raw,
        "saturated": [turn.as_data() for turn in one.saturated],
        "padding_waste": one.waste,
        "goodput": {f"{load:g}x": one.goodput(load) for load in LOADS if f"{load:g}x" in one.phases},
        **{name: phase.as_data() for name, phase in one.phases.items()},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
