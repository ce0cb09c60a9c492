"""Requests nobody waits for any more: they take no worker, no engine and no memory, and hide no server's state."""

from __future__ import annotations

import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from runtime.embedder import Embedder
from runtime.errors import EngineError
from runtime.serving.job import Job
from tests.grpc_messages import ids_request
from tests.http_client import client_of, sending
from tests.kserve_messages import request, stub_of, with_parameters
from tests.serving import START_S, failure
from tests.serving_in_process import InProcess, held, scheduling, wait_queued, wait_until
from tests.streams import OpenStream

LONG = "word " * 8_000  # more than is tokenized at a time


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokenizer]:
    held_back = Tokenizer()
    encode = Embedder.encode

    def watched(self: Embedder, texts: Any, *rest: Any, **more: Any) -> Any:
        held_back.take(texts)
        return encode(self, texts, *rest, **more)

    monkeypatch.setattr(Embedder, "encode", watched)
    yield held_back
    held_back.free.set()


class Tokenizer:
    """Writes down what is tokenized, and lets no long text through before it is told to."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.begun: list[str] = []

    def take(self, texts: Any) -> None:
        self.begun.append(str(texts[0])[:10])
        if len(texts[0]) >= len(LONG):
            assert self.free.wait(START_S)


def test_long_texts_whose_callers_are_gone_hold_nobody_up(embedder: Embedder, tokenizer: Tokenizer) -> None:
    engine, own = held(embedder, permits=100_000)
    with (
        InProcess(own, http=True, golden_period_s=0.05, golden_timeout_s=2.0) as server,
        client_of(server) as client,
        sending(12) as send,
    ):
        late = {"x-request-timeout": "0.2"}
        giants = [
            send(lambda n=n: client.post("/v1/embeddings", json={"input": f"{n:<10}{LONG}"}, headers=late))
            for n in range(12)
        ]
        assert {one.result().status_code for one in giants} == {504}
        assert client.post("/v1/embeddings", json={"input": "short"}).status_code == 200
        checked = len(engine.begun)
        wait_until(lambda: len(engine.begun) > checked + 3)  # golden texts wait for no tokenizer
        assert client.get("/health/ready").status_code == 200
        begun = [text for text in tokenizer.begun if text.strip().isdecimal()]
        assert len(begun) == 1, "the others were over before it was their turn"
        tokenizer.free.set()
        assert client.post("/v1/embeddings", json={"input": LONG}).status_code == 200
        assert [text for text in tokenizer.begun if text.strip().isdecimal()] == begun


def test_a_body_that_does_not_come_in_time(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own, http=True) as server:
        host, _, port = server.http.rpartition(":")
        with socket.create_connection((host, int(port)), START_S) as peer:
            head = "POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nx-request-timeout: 0.2\r\n\r\n"
            peer.sendall(f'{head}{{"input":'.encode())
            assert peer.recv(4096).startswith(b"HTTP/1.1 504 ")
        wait_until(lambda: server.metric("f2rt_requests_total", protocol="http", status="DEADLINE_EXCEEDED", model=""))


def jobs() -> int:
    gc.collect()
    return sum(type(one) is Job for one in gc.get_objects())


def test_an_idle_worker_keeps_no_request(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own, http=True) as server, client_of(server) as client:
        before = jobs()
        assert client.post("/v1/embeddings", json={"input": LONG}).status_code == 200
        assert client.post("/v1/embeddings", json={"input": "short"}).status_code == 200
        wait_until(lambda: jobs() == before)


def test_a_stream_keeps_neither_what_it_answered_nor_an_engine_that_was_replaced(embedder: Embedder) -> None:
    _, own = held(embedder, permits=100_000)
    with InProcess(own) as server, server.channel() as channel:
        before = jobs()
        stream = OpenStream(server.stub(channel))
        for _ in range(100):
            assert stream.ask().response.rows == 1
        assert jobs() - before < 10
        old = weakref.ref(server.model.pipeline)
        server.run(server.model.reload())

        def freed() -> bool:
            gc.collect()
            return old() is None

        wait_until(freed)
        assert stream.ask().response.rows == 1
        stream.cancel()


def test_what_is_cancelled_is_forgotten_while_the_engine_is_busy(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own, scheduling=scheduling()) as server, server.channel() as channel:
        stub = server.stub(channel)
        before = jobs()
        first = stub.Embed.future(ids_request([5, 5]))
        engine.wait_begun(1)
        waits = stub.Embed.future(ids_request([6, 6]))
        wait_queued(server, 1)
        for _ in range(5):
            calls = [stub.Embed.future(ids_request([7] * 100)) for _ in range(40)]
            wait_queued(server, 41)
            for call in calls:
                call.cancel()
            wait_until(lambda: server.model.pipeline.waiting[0] == 1)
        calls.clear()
        wait_until(lambda: jobs() - before <= 4)
        engine.allow(10)
        assert first.result().rows == waits.result().rows == 1


def test_what_is_cancelled_while_its_batch_fails_is_not_run_again(embedder: Embedder) -> None:
    engine, own = held(embedder)
    with InProcess(own, scheduling=scheduling()) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(ids_request([100, 100]))
        engine.wait_begun(1)
        calls = []
        for id_ in (200, 210, 220, 230):  # one by one: calls overtake each other on their way
            calls.append(stub.Embed.future(ids_request([id_, id_])))
            wait_queued(server, len(calls))
        engine.fault, engine.fault_for = EngineError("no."), 200
        engine.allow(1)
        engine.wait_begun(2)
        for call in calls[2:]:
            call.cancel()
        wait_until(lambda: server.metric("f2rt_requests_total", model="mini", protocol="grpc", status="CANCELLED") == 2)
        engine.allow(1000)
        assert calls[0].exception().code() is grpc.StatusCode.INTERNAL
        assert calls[1].result().rows == first.result().rows == 1
        assert engine.begun[:4] == [100, 200, 200, 210]
        assert not {220, 230} & set(engine.begun)


@pytest.mark.parametrize("known", [True, False], ids=["known costs", "unknown costs"])
def test_kserves_timeout_is_kept_by_a_thread_that_could_compute_itself(embedder: Embedder, known: bool) -> None:
    """The protocol does not end the call. Of known costs it is told in time, and else as soon as the batch is over."""
    engine, own = held(embedder)
    with InProcess(own) as server, server.channel() as channel:
        if known:
            for width in (8, 64, 512):
                server.model.pipeline.learn(1, width, 0.15)
        stub = stub_of(channel)
        end = threading.Timer(0.0 if known else 1.0, lambda: None if known else engine.allow(100))
        end.start()
        start_s = time.perf_counter()
        error = failure(lambda: stub.ModelInfer(with_parameters(request(["a"]), timeout=300_000)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert time.perf_counter() - start_s >= (0.3 if known else 0.9)
        engine.allow(100)
        end.join()


def test_parts_of_a_long_request_are_not_tokenized_after_its_deadline(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    encode: Callable[..., Any] = Embedder.encode

    def slow(self: Embedder, texts: Any, *rest: Any, **more: Any) -> Any:
        asked.append(len(texts))
        time.sleep(0.1)
        return encode(self, texts, *rest, **more)

    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, server.channel() as channel:
        monkeypatch.setattr(Embedder, "encode", slow)
        stub = stub_of(channel)
        error = failure(lambda: stub.ModelInfer(with_parameters(request(["word " * 7_000] * 12), timeout=150_000)))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(asked) <= 3
