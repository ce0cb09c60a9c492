"""The serving measurements themselves: that they count what they say, on servers that are known."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.load import FAILED, LEAST_REQUESTS, OK, REFUSED, Answer, Outcomes, Request, closed_loop, open_loop
from bench.raw_engine import RawEngine
from bench.servers import PEERS, Running
from bench.serving import Load, Measured, measure, mixed_texts
from bench.soak import measure as soak
from runtime.bundle import Bundle
from runtime.embedder import open_embedder
from runtime.errors import InputError
from runtime.tokenizer import Instruction, TokenizedText, Truncate
from tests.serving_in_process import wait_until

REQUESTS = [Request(["a"], 1), Request(["b", "c"], 7)]


def test_the_closed_loop_waits_for_each_answer() -> None:
    inside = most = 0

    async def ask(texts: Sequence[str]) -> Answer:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.01)
        inside -= 1
        return OK

    outcomes = asyncio.run(closed_loop(ask, REQUESTS, 3, 0.3))
    assert most == 3
    assert min(outcomes.ok_ms) >= 10
    assert outcomes.texts == pytest.approx(1.5 * len(outcomes.ok_ms), abs=3)
    assert outcomes.texts_per_s == pytest.approx(outcomes.texts / outcomes.seconds)
    assert outcomes.tokens == pytest.approx(4 * len(outcomes.ok_ms), abs=18)
    assert outcomes.tokens_per_s == pytest.approx(outcomes.tokens / outcomes.seconds)


def test_a_caller_that_was_refused_comes_back_when_it_was_told_to() -> None:
    asked: list[float] = []

    async def ask(texts: Sequence[str]) -> Answer:
        asked.append(time.perf_counter())
        return Answer(REFUSED.kind, 0.1)

    outcomes = asyncio.run(closed_loop(ask, REQUESTS, 1, 0.45))
    assert len(outcomes.refused_ms) == len(asked) <= 5
    assert all(later - earlier >= 0.099 for earlier, later in itertools.pairwise(asked))


def test_the_open_loop_counts_from_when_a_request_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stalls once for 300 ms delays all that was due meanwhile, not one request."""
    stalled_until = 0.0

    async def ask(texts: Sequence[str]) -> Answer:
        nonlocal stalled_until
        if not stalled_until:
            stalled_until = time.perf_counter() + 0.3
            time.sleep(0.3)
        return OK

    monkeypatch.setattr("bench.load.SETTLED_S", 0.5)
    outcomes = asyncio.run(open_loop(ask, REQUESTS, 200, 1.0))
    late = [ms for ms in outcomes.ok_ms if ms > 50]
    assert len(late) > 30, "those of a quarter of a second at 200 a second"
    assert len([ms for ms in outcomes.late_ms if ms > 50]) > 30, "the server stood in the generator's own way"
    assert len(outcomes.late_ms) == 200
    assert len(outcomes.ok_ms) == 200, "as many as the rate says"
    assert 0 < len(outcomes.settled_ms) < len(outcomes.ok_ms), "those due after the onset"


@pytest.mark.parametrize("busy", [False, True])
def test_the_generators_own_share_of_the_cores_is_told(busy: bool) -> None:
    """Of a server that stands still, and of one in the generator's own process that computes."""

    async def ask(texts: Sequence[str]) -> Answer:
        end_s = time.process_time() + 0.02
        while busy and time.process_time() < end_s:
            pass
        await asyncio.sleep(0.02)
        return OK

    for outcomes in (
        asyncio.run(open_loop(ask, REQUESTS, 20, 1.0)),
        asyncio.run(closed_loop(ask, REQUESTS, 1, 0.5)),
    ):
        assert (outcomes.generator_cores > 0.15) is busy
        assert outcomes.as_data()["generator_cores"] == outcomes.generator_cores > 0


def test_a_slow_server_is_asked_often_enough() -> None:
    asked = 0

    async def ask(texts: Sequence[str]) -> Answer:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.05)
        return OK

    outcomes = asyncio.run(open_loop(ask, REQUESTS, 50, 0.1))
    assert len(outcomes.ok_ms) == LEAST_REQUESTS
    assert outcomes.seconds >= LEAST_REQUESTS / 50
    asked = 0
    asyncio.run(closed_loop(ask, REQUESTS, 3, 0.01, least=2))
    assert asked == 6


def test_a_server_stands_still_beside_the_raw_engine(tmp_path: Path) -> None:
    source = (
        "import pathlib, sys, time\n"
        "for n in range(10**6): pathlib.Path(sys.argv[1]).write_text(str(n)); time.sleep(0.01)"
    )
    count = tmp_path / "count"
    process = subprocess.Popen([sys.executable, "-c", source, str(count)], start_new_session=True)
    try:
        wait_until(count.exists)
        with Running(lambda: pytest.fail("not asked"), "", process.pid).stopped():
            time.sleep(0.1)
            before = count.read_text()
            time.sleep(0.3)
            assert count.read_text() == before
        wait_until(lambda: count.read_text() not in ("", before))
    finally:
        process.kill()
        process.wait()


def test_outcomes_are_told_apart() -> None:
    kinds = iter([OK, REFUSED, FAILED] * 1000)

    async def ask(texts: Sequence[str]) -> Answer:
        await asyncio.sleep(0.001)
        return next(kinds)

    outcomes = asyncio.run(closed_loop(ask, REQUESTS[:1], 1, 0.2))
    assert abs(len(outcomes.ok_ms) - len(outcomes.refused_ms)) <= 1
    assert abs(len(outcomes.ok_ms) - outcomes.failed) <= 1
    assert outcomes.texts == len(outcomes.ok_ms)


@pytest.mark.slow
def test_a_short_run_of_our_own_server(bundle: Bundle, mini: Path, tmp_path: Path) -> None:
    peers = [peer.peer for peer in PEERS]
    result = measure("mini", bundle.folder, mini, "onnxruntime:fp32", tmp_path, Load(0.5, 4, open_s=1.0), peers)
    assert result.command.endswith(" --open-seconds 1 --leave-out infinity,vllm,fastapi")
    servers = result.data["servers"]
    assert isinstance(servers, list)
    assert [server["server"] for server in servers[:2]] == ["f2rt gRPC", "f2rt HTTP"]
    assert [server["problem"] for server in servers[2:]] == ["left out"] * len(peers)
    for server in servers[:2]:
        assert set(server) >= {"alone", "saturated", "0.8x", "2x", "10x", "padding_waste", "of_raw"}
        assert [phase["failed"] for phase in (server["alone"], *server["saturated"])] == [0] * 5
        assert set(server["goodput"]) == {"0.8x", "2x", "10x"}
        assert len(server["raw_tokens_per_s"]) == 4
        assert 0 <= server["padding_waste"] < 0.5
    assert [row[1] for row in result.rows[:8]] == [
        *("alone", "saturated 1", "0.8x", "saturated 2", "2x", "saturated 3", "10x", "saturated 4")
    ]
    assert len(result.rows) == 16


def test_a_peer_that_does_not_exist_cannot_be_left_out(bundle: Bundle, mini: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no peer 'vlm'") as caught:
        measure("mini", bundle.folder, mini, "onnxruntime:fp32", tmp_path, leave_out=["vlm"])
    assert "infinity, vllm, fastapi" in caught.value.cure


def test_a_phase_is_set_against_the_turns_on_either_side() -> None:
    """A machine that halves its speed within the run changes no ratio by it."""
    one = Measured("known", raw=[100.0, 50.0, 50.0, 100.0])
    one.saturated = [Outcomes(1.0, tokens=tokens) for tokens in (90, 45, 45, 80)]
    one.phases = {"2x": Outcomes(2.0, tokens=90), "10x": Outcomes(1.0, texts=500, tokens=50)}
    assert one.of_raw == [0.9, 0.9, 0.9, 0.8]
    assert one.capacity == 65
    assert one.goodput(2.0) == 1.0
    assert one.goodput(10.0) == 0.8


def test_the_raw_engine_does_whole_passes(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = open_embedder(bundle)
    texts = mixed_texts(embedder)
    raw = RawEngine(embedder, texts, 0.1, 3)
    assert raw.texts == texts[: len(raw.texts)]
    assert len(raw.texts) % 3 == 0, "whole requests, as the servers get them"
    assert [text for request in raw.requests for text in request.texts] == raw.texts
    lengths = [len(item.ids) for item in embedder.tokenize(raw.texts, Instruction(prompt=""), Truncate.END)]
    assert [request.tokens for request in raw.requests] == [sum(lengths[i : i + 3]) for i in range(0, len(lengths), 3)]
    with pytest.raises(ValueError, match="no request of 7"):
        RawEngine(embedder, texts[:6], 0.1, 7)
    rows: list[int] = []
    infer_rows = embedder.infer_rows

    def seen(items: Sequence[TokenizedText], chosen: Sequence[int]) -> object:
        rows.extend(chosen)
        return infer_rows(items, chosen)

    monkeypatch.setattr(embedder, "infer_rows", seen)
    assert raw.tokens_per_s(0.1) > 0
    assert sorted(rows) == sorted(list(range(len(raw.texts))) * (len(rows) // len(raw.texts)))
    embedder.close()


def test_texts_are_of_the_lengths_they_are_said_to_be(bundle: Bundle) -> None:
    embedder = open_embedder(bundle)
    texts = mixed_texts(embedder)
    lengths = [len(i.ids) for i in embedder.tokenize(texts, Instruction(prompt=""), Truncate.END)]
    assert min(lengths) >= 8
    assert max(lengths) <= 512
    assert max(lengths) > 300
    embedder.close()


def test_a_short_soak(bundle: Bundle, tmp_path: Path) -> None:
    result = soak(bundle.folder, "onnxruntime:fp32", tmp_path, 8.0)
    assert result.data["unexpected"] == {}
    counts = result.data["counts"]
    assert isinstance(counts, dict)
    # How many calls eight seconds hold is the machine's matter; that both protocols answered is ours.
    assert counts["OK"] > 0
    assert counts["HTTP 200"] > 0
    assert result.data["growth"] < 1.0  # type: ignore[operator]  # pools fill in the first seconds
