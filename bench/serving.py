"""Serving under load: throughput at saturation, overload, and padding, beside the raw engine and peer servers.

All servers get the same texts on the same machine, one after the other, in one run. Capacity is what a server answers
in a closed loop; overload is a multiple of its own capacity. The generator is this process: it takes its share of the
same cores, from all of them alike.
"""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.inputs import private_cache, short_texts
from bench.load import SETTLED_S, Outcomes, closed_loop, open_loop
from bench.report import Result
from bench.servers import GRPC, HTTP, PEERS, Contender, Running, running
from calibration.texts import verification_texts
from export.checkpoint import Checkpoint
from export.hub import locate
from export.pipeline import export_bundle
from export.precision import Precision
from export.prove import prove_bundle
from export.synth import default_tokenizer, write_checkpoint
from runtime.bundle import open_bundle
from runtime.embedder import Embedder, open_embedder
from runtime.tokenizer import Instruction, Truncate

MINI = Path(__file__).resolve().parents[1] / "checkpoints" / "mini"
TOKENS = (8, 512)
_TEXTS = 512
LOADS = (0.8, 2.0, 10.0)


@dataclass
class Measured:
    """One server's phases: alone (one caller), saturated, open loop at multiples of capacity; or why there are none."""

    name: str
    texts_per_request: int
    phases: dict[str, Outcomes] = field(default_factory=dict)
    waste: float | None = None
    problem: str = ""


def measure(
    size: str, bundle: Path | None, checkpoint: Path | None, engine: str, work: Path, seconds: float, per_request: int
) -> Result:
    """Measure all servers; each phase takes `seconds`. Peers that are not there are named with the reason."""
    checkpoint, bundle = _prepare(size, checkpoint, bundle, engine, work)
    embedder = open_embedder(open_bundle(bundle), engine)
    texts = mixed_texts(embedder)
    requests = [texts[i : i + per_request] for i in range(0, len(texts) - per_request + 1, per_request)]
    raw = raw_texts_per_s(embedder, texts, seconds)
    _say(f"raw engine: {raw:.1f} texts/s")
    embedder.close()
    measured = []
    for contender in (GRPC, HTTP, *PEERS):
        result = Measured(contender.name, per_request)
        measured.append(result)
        reason = contender.not_there()
        if reason is not None:
            result.problem = reason
            continue
        try:
            with running(contender, checkpoint, bundle, engine, work / f"{contender.name.split()[0]}.log") as server:
                asyncio.run(_phases(contender, server, requests, seconds, result))
        except RuntimeError as error:
            result.problem = str(error)
        _say(f"{contender.name}: {result.problem or _summary(result)}")
    return _result(size, engine, seconds, per_request, raw, measured)


def mixed_texts(embedder: Embedder) -> list[str]:
    """Return real texts of 8 to 512 tokens, as the engine's own tokenizer counts them, in a fixed mixed order.

    Mixed, so that every phase sees the same lengths, however few texts it gets through.
    """
    texts = [t.text for t in verification_texts()]
    items = embedder.tokenize(texts, Instruction(prompt=""), Truncate.END)
    fitting = [text for text, item in zip(texts, items, strict=True) if TOKENS[0] <= len(item.ids) <= TOKENS[1]]
    random.Random(0).shuffle(fitting)
    return fitting[:_TEXTS]


def raw_texts_per_s(embedder: Embedder, texts: Sequence[str], seconds: float) -> float:
    """Return the best throughput of the engine alone over ways to cut texts, sorted by length, into batches.

    As many of the texts as it takes for one pass to fit into `seconds`; always whole passes.
    """
    start = time.perf_counter()
    embedder.embed(texts[:8])
    fitting = int(8 * seconds / 5 / (time.perf_counter() - start))
    items = embedder.tokenize(texts[: max(fitting, 8)], Instruction(prompt=""), Truncate.END)
    items.sort(key=lambda item: len(item.ids))
    best = 0.0
    for budget in (256, 512, 1024, 2048, 4096):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds / 5 or not done:
            batch: list[int] = []
            for row, item in enumerate(items):
                if batch and (len(batch) + 1) * len(item.ids) > budget:
                    embedder.infer_rows(items, batch)
                    done += len(batch)
                    batch = []
                batch.append(row)
            embedder.infer_rows(items, batch)
            done += len(batch)
        best = max(best, done / (time.perf_counter() - start))
    return best


async def _phases(
    contender: Contender, server: Running, requests: Sequence[Sequence[str]], seconds: float, result: Measured
) -> None:
    ask = server.connect()
    await closed_loop(ask, requests, 4, min(seconds / 4, 5))  # warm
    result.phases["alone"] = await closed_loop(ask, requests, 1, seconds)
    before = _tokens(server)
    # As many callers as keep the engine busy: some answers are on their way while others are computed.
    result.phases["saturated"] = await closed_loop(ask, requests, max(8, 64 // result.texts_per_request), seconds)
    after = _tokens(server)
    if before and after:
        result.waste = 1 - (after[0] - before[0]) / (after[1] - before[1])
    capacity = result.phases["saturated"].texts_per_s / result.texts_per_request
    if not capacity:
        raise RuntimeError("it answered nothing at saturation")
    # Ten times its capacity a server that refuses nothing works off for minutes, and nothing is learned.
    for load in LOADS if not contender.environment else LOADS[:2]:
        result.phases[f"{load:g}x"] = await open_loop(ask, requests, load * capacity, seconds)
        await closed_loop(ask, requests, 1, 1.0)  # what still waits is worked off
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
    return ", ".join(f"{name} {phase.texts_per_s:.1f} texts/s" for name, phase in result.phases.items())


def _result(
    size: str, engine: str, seconds: float, per_request: int, raw: float, measured: Sequence[Measured]
) -> Result:
    ours = measured[0].phases.get("saturated")
    rows: list[list[str]] = []
    data: list[dict[str, object]] = []
    notes: list[str] = []
    overloads = [f"{load:g}x" for load in LOADS[1:]]
    for one in measured:
        if one.problem:
            notes.append(f"{one.name}: not measured, {one.problem}")
            data.append({"server": one.name, "problem": one.problem})
            continue
        capacity, at_80 = one.phases["saturated"].texts_per_s, one.phases["0.8x"].as_data().get("ok_p99_ms")
        entry: dict[str, object] = {"server": one.name, "of_raw": capacity / raw, "padding_waste": one.waste}
        for name, phase in one.phases.items():
            numbers = phase.as_data()
            entry[name] = numbers
            p99 = numbers.get("ok_p99_ms")
            rows.append(
                [
                    *(one.name, name, f"{phase.texts_per_s:.1f}", f"{phase.texts_per_s / capacity:.2f}"),
                    *(_ms(numbers.get("ok_p50_ms")), _ms(p99)),
                    *(
                        f"{found / at_80:.2f}" if found and at_80 and name in overloads else ""
                        for found in (p99, numbers.get("settled_p99_ms"))
                    ),
                    *(str(len(phase.refused_ms)), _ms(numbers.get("refused_p99_ms")), str(phase.failed)),
                ]
            )
        data.append(entry)
        more = f", {100 * one.waste:.1f} % of its tokens were padding" if one.waste is not None else ""
        faster = f"; f2rt gRPC answers {ours.texts_per_s / capacity:.2f} times as many" if ours else ""
        notes.append(
            f"{one.name}: {100 * capacity / raw:.0f} % of the raw engine's texts/s at saturation{more}{faster}"
        )
    return Result(
        name=f"serving-{size}",
        title=f"Serving under load, {size} checkpoint on CPU, {engine}",
        command=f"python -m bench serving --size {size} --engine {engine} --seconds {seconds:g}",
        columns=[
            *("server", "load", "texts/s", "of its capacity", "p50 ms", "p99 ms", "p99 to that at 0.8x"),
            *("after the onset", "refused", "refusals' p99 ms", "failed"),
        ],
        rows=rows,
        notes=[
            f"requests of {per_request} real texts of {TOKENS[0]} to {TOKENS[1]} tokens, the same for all; alone: one "
            "caller; saturated: a closed loop; 0.8x and so on: an open loop at this multiple of the server's capacity, "
            "times counted from when a request was due; after the onset: the same ratio for requests due "
            f"{SETTLED_S:g} s or more into the phase",
            f"the raw engine, in process, sorted by length, best of five batch sizes: {raw:.1f} texts/s",
            *notes,
        ],
        data={
            "size": size,
            "engine": engine,
            "texts_per_request": per_request,
            "raw_texts_per_s": raw,
            "servers": data,
        },
    )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
