"""gRPC streams and the threads they hold: one that ends gives its thread back, and streams never take all of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.errors import AccessError, OverloadedError
from runtime.settings import Limits, SchedulingSettings
from runtime.wire import f2rt_v1
from tests.serving import START_S
from tests.serving_in_process import InProcess, held, wait_until
from tests.streams import ONE, OpenStream


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write down when the handler of a stream begins and when it is over."""
    events: list[str] = []
    answers = f2rt_v1.EmbeddingService._answers

    def watched(self: Any, requests: Any, context: Any) -> Iterator[Any]:
        events.append("begun")
        try:
            yield from answers(self, requests, context)
        finally:
            events.append("over")

    monkeypatch.setattr(f2rt_v1.EmbeddingService, "_answers", watched)
    return events


def test_a_stream_that_is_cancelled_while_idle_gives_its_thread_back(embedder: Embedder, counted: list[str]) -> None:
    _, own = held(embedder, permits=100_000)
    with InProcess(own) as server, server.channel() as channel:
        for number in range(24):
            stream = OpenStream(server.stub(channel))
            if number % 2:
                assert stream.ask().response.rows == 1
            wait_until(lambda opened=number + 1: counted.count("begun") == opened)
            stream.cancel()
        wait_until(lambda: counted.count("over") == 24)
        wait_until(lambda: not any(t.name == "f2rt-stream" for t in threading.enumerate()))


def test_streams_that_do_nothing_leave_room_for_others(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, counted: list[str]
) -> None:
    """As many as the server takes, with few threads for the rest: requests and health are answered as before."""
    monkeypatch.setattr(f2rt_v1, "MOST_STREAMS", 24)
    limits = Limits(max_batch_rows=2)
    _, own = held(embedder, limits, permits=100_000)
    with InProcess(own, scheduling=SchedulingSettings(max_waiting_requests=2)) as server, server.channel() as channel:
        stub = server.stub(channel)
        streams = [OpenStream(stub) for _ in range(24)]
        wait_until(lambda: counted.count("begun") == 24)
        with pytest.raises(grpc.RpcError) as told:
            OpenStream(stub).ask()
        assert told.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "24 streams are open" in told.value.details()
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=START_S)
        assert status.status == health_pb2.HealthCheckResponse.SERVING
        assert stub.Embed(ONE, timeout=START_S).rows == 1
        for stream in streams:
            stream.cancel()
        wait_until(lambda: counted.count("over") == 24)
        again = OpenStream(stub)
        wait_until(lambda: again.ask().response.rows == 1)
        again.cancel()


def test_no_more_requests_are_at_work_than_there_are_threads(embedder: Embedder) -> None:
    """Those that run, wait or are tokenized: one more is refused, and health has a thread still."""
    limits, scheduling = Limits(max_batch_rows=2), SchedulingSettings(max_waiting_requests=3, max_wait_ms=1e9)
    engine, own = held(embedder, limits)
    with InProcess(own, scheduling=scheduling) as server, server.channel() as channel:
        pipeline = server.model.pipeline
        for _ in range(5):  # as if they were being tokenized
            pipeline.enter()
        with EmbeddingClient(server.grpc) as client:
            with pytest.raises(OverloadedError, match=r"5 requests are at work"):
                client.embed(["a"])
            with pytest.raises(OverloadedError, match=r"5 requests are at work"):
                client.explain(["a"])
        for _ in range(5):
            pipeline.leave()
        engine.allow(1)
        assert server.stub(channel).Embed(ONE, timeout=START_S).rows == 1


def test_what_nobody_foresaw_in_a_stream_tells_no_internals(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _, own = held(embedder, permits=100_000)

    def broken(*args: Any) -> Any:
        raise ValueError("secret /etc/path")

    with InProcess(own) as server, server.channel() as channel:
        monkeypatch.setattr(f2rt_v1, "finish", broken)
        (answer,) = server.stub(channel).EmbedStream(iter([ONE]))
        assert (answer.error.code, answer.error.message) == (13, f2rt_v1.UNEXPECTED)
        monkeypatch.setattr(f2rt_v1.EmbeddingService, "_answers", broken)
        with pytest.raises(grpc.RpcError) as told:
            list(server.stub(channel).EmbedStream(iter([ONE])))
        assert (told.value.code(), told.value.details()) == (grpc.StatusCode.INTERNAL, f2rt_v1.UNEXPECTED)
    assert caplog.text.count("ValueError: secret /etc/path") == 2  # the log has all of it


def test_a_refusal_in_a_stream_is_counted(embedder: Embedder) -> None:
    _, own = held(embedder, permits=100_000)
    with InProcess(own) as server, server.channel() as channel:
        wrong = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"]), dtype=77)  # type: ignore[arg-type]
        (answer,) = server.stub(channel).EmbedStream(iter([wrong]))
        assert answer.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        server.models.expose()
        assert server.metric("f2rt_requests_total", model="", protocol="grpc", status="INVALID_ARGUMENT") == 1


def test_reload_reads_the_keys_again(embedder: Embedder, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old:0123456789abcdef\n")
    _, own = held(embedder, permits=100_000)
    with InProcess(own, keys_file=str(keys)) as server:
        with EmbeddingClient(server.grpc, key="0123456789abcdef") as client:
            client.embed(["a"])
            keys.write_text("new:fedcba9876543210\n")
            client.reload()
            with pytest.raises(AccessError):
                client.embed(["a"])
        with EmbeddingClient(server.grpc, key="fedcba9876543210") as client:
            client.embed(["a"])
