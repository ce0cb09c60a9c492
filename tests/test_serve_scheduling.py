"""The way of a request through queue and engine, over gRPC, in this process: the engine is in the test's hand."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

import runtime.scheduler
from runtime.bundle import Bundle
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.encoding import OutputDType
from runtime.errors import AbandonedError, EngineError, InputError
from runtime.fair_order import FairOrder
from runtime.serving.call import EmbedCall
from runtime.settings import EngineSettings, Limits
from tests.grpc_messages import ids_request, texts_request, vectors_of
from tests.serving import START_S, TEXTS, failure, rows_of_ids
from tests.serving_in_process import ROW_BY_ROW, InProcess, held, scheduling, wait_queued, wait_until


def test_a_short_request_passes_what_is_left_of_long_ones(embedder: Embedder) -> None:
    engine, own = held(embedder, ROW_BY_ROW)
    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        rows = [[5] * 20] * 8
        long = [stub.Embed.future(ids_request(*rows)) for _ in range(3)]
        wait_until(lambda: server.model.pipeline.waiting[1] == 23)
        short = stub.Embed.future(ids_request([9, 9]))
        wait_queued(server, 4)
        engine.allow(2)  # the batch that runs, and the next one
        short.result()
        assert engine.begun[:2] == [5, 9]
        engine.allow(100)
        expected = embedder.infer(embedder.verbatim(rows))
        for call in long:
            assert np.allclose(vectors_of(call.result()), expected, atol=1e-6)


def test_one_batch_at_a_time_whoever_asks(embedder: Embedder) -> None:
    """Threads of 40 callers take the engine in turns: it never runs twice at once, and nothing is left behind."""
    engine, own = held(embedder, permits=100_000)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client, ThreadPoolExecutor(40) as pool:
        expected = {n: embedder.infer(embedder.verbatim([[n] * (1 + n % 9)]))[0] for n in range(5, 45)}

        def one(n: int) -> None:
            for _ in range(5):
                got = client.embed(token_ids=[[n] * (1 + n % 9)]).vectors[0]
                assert np.allclose(got, expected[n], atol=1e-5)

        list(pool.map(one, expected))
        assert engine.most_running == 1
        assert max(engine.rows) > 1, "nobody ever shared a batch"
        assert server.model.pipeline.waiting == (0, 0, 0)
        assert server.metric("f2rt_texts_total", model="mini") == 200


def test_a_request_that_cannot_be_run_fails_alone(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        good, bad = stub.Embed.future(ids_request([7, 7])), stub.Embed.future(ids_request([8, 8]))
        wait_queued(server, 2)
        engine.fault, engine.fault_for = EngineError("too hot.", cure="Cool it."), 8
        engine.allow(100)
        first.result()
        assert np.allclose(vectors_of(good.result()), embedder.infer(embedder.verbatim([[7, 7]])), atol=1e-6)
        error = failure(bad.result)
        assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "too hot. Cool it.")


def test_faults_in_the_engine(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    engine, own = held(embedder, permits=100_000)
    with InProcess(own, golden_period_s=0.05) as server, server.channel() as channel:
        stub = server.stub(channel)
        engine.fault = RuntimeError("secret /etc/path")
        error = failure(lambda: stub.Embed(ids_request([5], [6])))
        assert error.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in error.details()
        assert "log" in error.details()
        assert "secret /etc/path" in caplog.text
        wait_until(lambda: server.model.state == "failing")  # else the check that is under way comes out below
        engine.fault = None
        wait_until(lambda: server.model.state == "ready")
        engine.spoil = float("nan")
        error = failure(lambda: stub.Embed(texts_request(["a"])))
        assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)  # whoever saw it first
        assert "not finite" in error.details()
        # Until the golden texts are right again nothing is answered.
        wait_until(lambda: server.model.state == "failing")
        engine.spoil = None
        wait_until(lambda: server.model.state == "ready")
        answer = stub.Embed(texts_request(TEXTS))
        assert np.allclose(vectors_of(answer), embedder.embed(TEXTS).vectors, atol=1e-6)


@pytest.mark.parametrize("part", ["candidates", "fill"])
def test_a_fault_in_planning_is_told_to_all_who_wait_and_the_server_goes_on(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    engine, own = held(embedder)
    owner = {"candidates": FairOrder, "fill": runtime.scheduler}[part]
    plan = getattr(owner, part)

    def broken(*args: Any) -> Any:
        monkeypatch.setattr(owner, part, plan)
        plan(*args)  # the queue does not hold these requests any more
        raise ZeroDivisionError("a fault of ours")

    with InProcess(own, scheduling=scheduling()) as server, server.channel() as channel:
        stub, calls = server.stub(channel), []
        first = stub.Embed.future(ids_request([100, 100]))
        engine.wait_begun(1)
        for id_ in (200, 210, 220):
            calls.append(stub.Embed.future(ids_request([id_, id_], [id_, id_])))
            wait_queued(server, len(calls))
        monkeypatch.setattr(owner, part, broken)
        engine.allow(1000)
        assert [call.exception(START_S).code() for call in calls] == [grpc.StatusCode.INTERNAL] * 3
        assert "ZeroDivisionError" in calls[0].exception().details()
        assert "a fault of ours" in caplog.text
        assert first.result().rows == stub.Embed(ids_request([300, 300])).rows == 1
        wait_until(lambda: server.model.pipeline.waiting == (0, 0, 0))  # the golden texts are asked for after a fault


def test_a_vector_that_has_a_batch_to_itself_is_not_copied(embedder: Embedder) -> None:
    """One text, or several in the engine's order: what is answered is the engine's own array."""
    made: list[Any] = []

    class Noting:
        def __init__(self) -> None:
            inner = embedder.loaded.engine
            self.name, self.precision, self.fingerprint = inner.name, inner.precision, inner.fingerprint
            self.max_tokens, self.buckets = inner.max_tokens, inner.buckets

        def run(self, batch: Any) -> Any:
            made.append(embedder.loaded.engine.run(batch))
            return made[-1]

        def close(self) -> None:
            pass

    own = Embedder(embedder.bundle, replace(embedder.loaded, engine=Noting()), Limits())
    with InProcess(own) as server:
        one = server.model.answer(EmbedCall(texts=["a text"]), lambda job, pipeline: None)
        assert one.vectors is made[-1]
        equal = server.model.answer(EmbedCall(token_ids=[[5, 6], [7, 8]]), lambda job, pipeline: None)
        assert equal.vectors is made[-1]
        # The longer one comes first, whether they share a batch or not: its rows are in another order.
        other = server.model.answer(EmbedCall(token_ids=[[7, 8], [5]]), lambda job, pipeline: None)
        assert not any(other.vectors is array for array in made)


def test_a_request_that_has_ended_before_it_began_is_not_tokenized(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    encode = Embedder.encode
    monkeypatch.setattr(
        Embedder, "encode", lambda self, texts, *a, **k: asked.extend(texts) or encode(self, texts, *a, **k)
    )
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server:
        asked.clear()  # the golden texts
        with pytest.raises(AbandonedError, match="the caller went away"):
            server.model.answer(EmbedCall(texts=["never"]), lambda job, pipeline: pipeline.abandon(job))
        assert asked == []
        server.model.answer(EmbedCall(texts=["now"]), lambda job, pipeline: None)
        assert asked == ["now"]


def test_throughput_preset_waits_for_company(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=1000)
    settings = scheduling(gather_ms=2000.0, least_batch_tokens=4)
    with InProcess(own, scheduling=settings) as server, ThreadPoolExecutor(2) as pool:
        with EmbeddingClient(server.grpc) as client:
            both = [pool.submit(client.embed, token_ids=[[n, n]]) for n in (5, 6)]
            for future in both:
                future.result(START_S)
        assert engine.rows == [2]


def test_a_stream_answers_in_order_and_outlives_its_errors(embedder: Embedder) -> None:
    _, own = held(embedder, permits=100_000)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:
        batches = [["one"], ["two", "three"], [], ["four"] * 3]
        answers = list(client.embed_stream(batches, dimensions=64))
        assert [type(a).__name__ for a in answers] == ["EmbedAnswer", "EmbedAnswer", "InputError", "EmbedAnswer"]
        for texts, answer in zip(batches, answers, strict=True):
            if texts:
                expected = embedder.embed(texts, dimensions=64).vectors
                assert np.allclose(answer.vectors, expected, atol=1e-6)  # type: ignore[union-attr]
        assert "0 items" in str(answers[2])
        many = client.embed_stream(([f"text {n}"] for n in range(200)), dimensions=8)
        assert sum(answer.vectors.shape == (1, 8) for answer in many) == 200  # type: ignore[union-attr]
        wait_until(lambda: not any(t.name == "f2rt-stream" for t in threading.enumerate()))


def test_a_stream_whose_reader_is_gone_stops(embedder: Embedder) -> None:
    engine, own = held(embedder, permits=100_000)
    with InProcess(own) as server:
        with EmbeddingClient(server.grpc) as client:
            endless = client.embed_stream([f"text {n}"] for n in range(1_000_000))
            for _ in range(3):
                next(endless)
        # The channel is closed: the server's side of the stream comes to its end.
        wait_until(lambda: not any(t.name == "f2rt-stream" for t in threading.enumerate()))
        assert len(engine.begun) < 1000
        with EmbeddingClient(server.grpc) as client:
            client.embed(["still there"])


def test_the_event_loop_is_never_blocked(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """The largest requests of each kind, in asyncio's debug mode: no callback takes 100 ms.

    A blocking call shows in every attempt, a busy machine does not.
    """

    def traffic(server: InProcess) -> None:
        with EmbeddingClient(server.grpc) as client:
            client.wait_ready(START_S)
            client.embed([f"text {i}" for i in range(2048)], dimensions=200, dtype=OutputDType.INT8)
            client.explain(token_ids=rows_of_ids(300, 1000))
            for wrong in ({"token_ids": rows_of_ids(1, 1_000_000)}, {"texts": ["a"] * 500_000}):
                with pytest.raises(InputError):
                    client.embed(**wrong)  # type: ignore[arg-type]
            client.info()
        body = {"input": [f"text {i}" for i in range(2048)]}
        answer = httpx.post(f"http://{server.http}/v1/embeddings", json=body, timeout=START_S)
        assert len(answer.json()["data"]) == 2048

    def attempt() -> list[str]:
        embedder = open_embedder(bundle, settings=EngineSettings(threads=1, spin=False))
        caplog.clear()
        with InProcess(embedder, http=True, debug=True) as server:
            server.loop.slow_callback_duration = 0.1
            traffic(server)
        records = [r for r in caplog.records if r.name == "asyncio" and " took " in r.getMessage()]
        return [r.getMessage() for r in records]

    attempts: list[list[str]] = []
    with caplog.at_level(logging.WARNING, "asyncio"):
        while len(attempts) < 3 and all(attempts):
            attempts.append(attempt())
    assert not all(attempts), "\n".join(attempts[-1])
