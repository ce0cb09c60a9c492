"""Who is let into the queue and who is dropped, over gRPC, in this process: the engine is in the test's hand."""

from __future__ import annotations

import asyncio
from functools import partial

import grpc
import httpx
import numpy as np
import pytest

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.errors import OverloadedError, UnavailableError
from runtime.serving.call import EmbedCall
from runtime.settings import SchedulingSettings
from tests.grpc_messages import ids_request, texts_request, vectors_of
from tests.serving import START_S, failure
from tests.serving_in_process import ROW_BY_ROW, InProcess, held, scheduling, wait_queued, wait_until

FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


def test_too_many_waiting_is_refused_with_the_time_to_come_back(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own, scheduling=scheduling(max_waiting_requests=1)) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        second = stub.Embed.future(ids_request([7, 7]))
        wait_queued(server, 1)
        error = failure(lambda: stub.Embed(ids_request([8])))
        assert error.code() is FULL
        assert "1 requests are waiting; the limit is 1. Try again in" in error.details()
        with EmbeddingClient(server.grpc) as client, pytest.raises(OverloadedError) as caught:
            client.embed(["a"])
        assert caught.value.retry_after_s > 0
        # Refused at the door: it costs no tokenization, and Explain, which needs no engine, still answers.
        stub.Explain(pb.ExplainRequest(input=pb.EmbedInput(texts=["a"])))
        engine.allow(10)
        assert np.array_equal(vectors_of(first.result()), embedder.infer(embedder.verbatim([[5, 6]])))
        second.result()
        stub.Embed(ids_request([8]))
        assert engine.begun == [5, 7, 8]
        assert server.metric("f2rt_rejected_requests_total", model="mini", reason="resource_exhausted") == 2


def test_requests_that_are_wrong_are_not_taken_for_overload(embedder: Embedder) -> None:
    """They pass the door and never reach the engine: others must not be refused because of them."""
    engine, own = held(embedder)
    with InProcess(own, scheduling=SchedulingSettings(burst_ms=1.0, max_wait_ms=1e9)) as server:
        queue = server.model.pipeline._turns._queue
        queue.cost.observe(1, 1000.0)
        absent = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"], prompt_name="no such prompt"))
        with server.channel() as channel:
            stub = server.stub(channel)
            waiting = [stub.Embed.future(ids_request([5] * 100)) for _ in range(8)]
            engine.wait_begun(1)
            wait_queued(server, 7)
            for _ in range(100):
                wrong = failure(lambda: stub.Embed(absent))
                assert wrong.code() is grpc.StatusCode.NOT_FOUND
            waiting.append(stub.Embed.future(ids_request([7])))
            wait_queued(server, 8)
            engine.allow(10)
            for answer in waiting:
                answer.result()


@pytest.mark.parametrize("over", ["gRPC", "HTTP"])
def test_what_cannot_be_admitted_is_refused_without_being_tokenized(
    embedder: Embedder, over: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, own = held(embedder)
    with InProcess(own, http=True, scheduling=SchedulingSettings(max_wait_ms=1000.0)) as server:
        engine.allow(1)
        with EmbeddingClient(server.grpc) as client:
            client.embed(["what a text has in tokens is learned from one"])
        # Of whatever the engine takes for a batch, so that what is waited for is in the test's hand.
        cost = server.model.pipeline._turns._queue.cost
        for tokens in [1, 1000] * 500:
            cost.observe(tokens, 10.0 * tokens)
        tokenized: list[int] = []
        encode = own.encode
        monkeypatch.setattr(
            own, "encode", lambda texts, *rest, **more: tokenized.append(len(texts)) or encode(texts, *rest, **more)
        )
        with server.channel() as channel:
            stub = server.stub(channel)
            admitted = [stub.Embed.future(ids_request([5] * 200))]
            engine.wait_begun(2)
            admitted.append(stub.Embed.future(ids_request([7] * 200)))
            wait_queued(server, 1)
            texts = ["as many words as it takes for two hundred tokens " * 30]
            if over == "gRPC":
                for request in (texts_request(texts), ids_request([9] * 200)):
                    refusal = failure(partial(stub.Embed, request))
                    assert refusal.code() is FULL
                    assert "the limit is 900 ms" in refusal.details()  # a little less than what is let in at last
            else:
                answer = httpx.post(f"http://{server.http}/v1/embeddings", json={"input": texts}, trust_env=False)
                assert answer.status_code == 429
            assert tokenized == []
            short = stub.Embed.future(texts_request(["short"]))
            wait_queued(server, 2)
            assert tokenized == [1]
            engine.allow(10)
            for answer in (*admitted, short):
                answer.result()


@pytest.mark.parametrize(
    ("limits", "what"),
    [({"max_waiting_items": 3}, "3 texts are waiting"), ({"max_waiting_tokens": 6}, "6 tokens are waiting")],
)
def test_items_and_tokens_are_bounded_and_a_request_is_admitted_whole(
    embedder: Embedder, limits: dict[str, int], what: str
) -> None:
    engine, own = held(embedder)
    with InProcess(own, scheduling=scheduling(**limits)) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        second = stub.Embed.future(ids_request([7, 7], [7, 8], [7, 9]))  # larger than the queue, which is empty
        wait_queued(server, 1)
        error = failure(lambda: stub.Embed(ids_request([8], [9])))
        assert error.code() is FULL
        assert what in error.details()
        engine.allow(10)
        first.result()
        assert second.result().rows == 3
        assert 8 not in engine.begun


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_dropped_while_it_waits_is_never_computed(embedder: Embedder, how: str) -> None:
    engine, own = held(embedder)
    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        second = stub.Embed.future(ids_request([7, 7]), timeout=0.3 if how == "deadline" else START_S)
        wait_queued(server, 1)
        if how == "cancel":
            second.cancel()
        else:
            assert failure(second.result).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until(lambda: server.model.pipeline.waiting == (0, 0, 0))
        engine.allow(10)
        first.result()
        stub.Embed(ids_request([9]))
        assert engine.begun == [5, 9]


def test_a_deadline_that_cannot_be_met_is_refused_at_once(embedder: Embedder) -> None:
    """The engine needs a second per token, as far as it is known: 3 tokens wait, and 5 s are given for 4 more."""
    engine, own = held(embedder)
    with InProcess(own, scheduling=scheduling()) as server, server.channel() as channel:
        stub = server.stub(channel)
        cost = server.model.pipeline._turns._queue.cost
        for tokens in (1, 10, 100, 1000):
            cost.observe(tokens, 1000.0 * tokens)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        second = stub.Embed.future(ids_request([7, 7, 7]))
        wait_queued(server, 1)
        error = failure(lambda: stub.Embed(ids_request([8] * 4), timeout=5.0))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "the answer would take 7000 ms, and the deadline leaves" in error.details()
        engine.allow(10)
        first.result()
        second.result()
        assert 8 not in engine.begun


def test_a_cancelled_request_gives_the_engine_back_after_one_batch(embedder: Embedder) -> None:
    engine, own = held(embedder, ROW_BY_ROW)
    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        call = stub.Embed.future(ids_request(*[[5, 6]] * 50))
        engine.wait_begun(1)
        call.cancel()
        wait_until(lambda: server.model.pipeline.waiting == (0, 0, 0))
        engine.allow(1000)
        stub.Embed(ids_request([9]))
        assert engine.begun == [5, 9]


def test_a_cancelled_coroutine_drops_its_work(embedder: Embedder) -> None:
    engine, own = held(embedder, ROW_BY_ROW)
    with InProcess(own) as server:
        call = EmbedCall(token_ids=[[5, 6]] * 20)
        future = asyncio.run_coroutine_threadsafe(server.model.embed(call), server.loop)
        engine.wait_begun(1)
        future.cancel()
        wait_until(lambda: server.model.pipeline.waiting == (0, 0, 0))
        engine.allow(100)
        answered = server.run(server.model.embed(EmbedCall(token_ids=[[9, 9]])))
        assert np.allclose(answered.vectors, embedder.infer(embedder.verbatim([[9, 9]])), atol=1e-6)
        assert engine.begun == [5, 9]


def test_what_outlives_the_drain_is_cut_off_after_its_batch(embedder: Embedder) -> None:
    engine, own = held(embedder, ROW_BY_ROW)
    with InProcess(own, drain_s=0.2) as server, server.channel() as channel:
        call = server.stub(channel).Embed.future(ids_request(*[[5, 6]] * 9))
        engine.wait_begun(1)
        stopping = server.stopping()
        assert failure(call.result).code() is grpc.StatusCode.UNAVAILABLE
        engine.allow(1000)
        stopping.result(START_S)
        assert engine.begun == [5]


def test_draining_finishes_what_was_admitted_and_refuses_the_rest(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([5, 6]))
        engine.wait_begun(1)
        stopping = server.stopping()
        with EmbeddingClient(server.grpc) as client:
            wait_until(lambda: not client.ready())
            with pytest.raises(UnavailableError, match="shutting down"):
                client.embed(["a"])
        assert not stopping.done()
        engine.allow(10)
        assert first.result().rows == 1
        stopping.result(START_S)
