"""Peers that keep a server waiting: for a request that never comes, or with an answer that nobody reads."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.inference import grpc_service_pb2 as kserve
from runtime._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from runtime.bundle import Bundle
from runtime.embedder import Embedder
from runtime.wire import grpc_calls, http_body, http_connection
from runtime.wire.grpc_patience import Patience
from tests.serving import START_S, ServerProcess, failure
from tests.serving_in_process import InProcess, held, wait_until

METHODS = (
    "/f2rt.v1.EmbeddingService/Embed",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


class Double:
    """Stands for a call's context, of which only its end is seen."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


def test_the_oldest_make_room_and_none_waits_for_longer_than_its_time() -> None:
    patience = Patience(10.0, most=100, grace_s=0.0)
    first, second, third, late = (Double() for _ in range(4))
    for context, size in ((first, 60), (second, 40), (third, 50)):
        patience.hold(context, size)
    assert (first.cancelled, second.cancelled, third.cancelled) == (True, False, False)
    patience.release(second)
    patience.release(second)  # nothing is held twice
    patience.hold(late, 50)
    assert not third.cancelled
    patience.look(time.monotonic() + 9)
    assert not third.cancelled
    patience.look(time.monotonic() + 11)
    assert third.cancelled
    assert late.cancelled
    assert not second.cancelled
    alone = Double()
    patience.hold(alone, 1000)
    assert not alone.cancelled, "one that is larger than all together is not cancelled for it"


def test_in_a_burst_nobody_has_to_make_room() -> None:
    patience = Patience(10.0, most=2, grace_s=1.0)
    burst = [Double() for _ in range(50)]
    for context in burst:
        patience.hold(context)
    assert not any(context.cancelled for context in burst)
    patience.look(time.monotonic() + 0.5)
    assert not any(context.cancelled for context in burst)
    patience.look(time.monotonic() + 1.5)
    assert [context.cancelled for context in burst] == [True] * 48 + [False] * 2


class Silent:
    """Calls that are begun, and send no message until they end."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._end = Event()
        self._calls: list[Any] = []

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        for call in self._calls:
            call.cancel()
        self._end.set()
        self._channel.close()

    def _nothing(self) -> Iterator[bytes]:
        self._end.wait(10 * START_S)
        yield from ()

    def call(self, method: str, **options: Any) -> Any:
        call = self._channel.stream_stream(method)(self._nothing(), **options)
        self._calls.append(call)
        return call


@pytest.mark.parametrize("method", METHODS)
def test_calls_without_a_message_shut_nobody_out(bundle: Bundle, method: str) -> None:
    """As many as a small server has threads, and as many again."""
    small = ("--set", "max_waiting_requests=16", "--set", "max_batch_rows=8", "--set", "access_log=false")
    with ServerProcess(bundle.folder, *small) as server, Silent(server.address) as silent:
        for _ in range(900):
            silent.call(method)
        with server.client() as client:
            for _ in range(3):
                client.embed(["others are served"])
                assert client.ready()
        threads = len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))
        assert threads < 700


def test_a_message_that_does_not_come_is_not_waited_for(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_calls, "_MESSAGE_S", 0.2)
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, Silent(server.grpc) as silent:
        calls = [silent.call(method, timeout=START_S) for method in METHODS[:3]]
        assert [failure(lambda c=call: next(c)).code() for call in calls] == [grpc.StatusCode.CANCELLED] * 3  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS[:3])
def test_a_call_that_ends_without_a_message_is_told_so(embedder: Embedder, method: str) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, server.channel() as channel:
        error = failure(lambda: next(channel.stream_stream(method)(iter(()), timeout=START_S)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "no message" in error.details()


def test_without_a_key_no_message_is_waited_for(embedder: Embedder, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a-key-of-sixteen-letters\n")
    _, own = held(embedder, permits=1000)
    with InProcess(own, keys_file=str(file)) as server, Silent(server.grpc) as silent:
        error = failure(lambda: next(silent.call(METHODS[0], timeout=START_S)))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_refused_request_is_logged_under_its_own_id(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="f2rt.access")
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, server.channel() as channel:
        wrong = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"]), request_id="of-a-call", dtype=99)  # type: ignore[arg-type]
        failure(lambda: server.stub(channel).Embed(wrong))
        wrong.request_id = "of-a-stream"
        assert next(server.stub(channel).EmbedStream(iter([wrong]))).error.request_id == "of-a-stream"
        stub = kserve_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        failure(lambda: stub.ModelInfer(kserve.ModelInferRequest(model_name="mini", id="of-kserve")))
        server.models.expose()
    logged = [record.fields["request_id"] for record in caplog.records if record.name == "f2rt.access"]  # type: ignore[attr-defined]
    assert logged == ["of-a-call", "of-a-stream", "of-kserve"]


def test_priority_of_triton_clients_is_taken_and_changes_nothing(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, server.channel() as channel:
        request = kserve.ModelInferRequest(model_name="mini")
        request.inputs.add(name="text", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
        request.parameters["priority"].uint64_param = 3
        stub = kserve_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        assert stub.ModelInfer(request).raw_output_contents[0] == embedder.embed(["a"]).vectors.tobytes()


def test_watch_tells_changes_and_holds_no_thread(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, server.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(200)]
        assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.SERVING}
        server.models.drain()
        server.loop.call_soon_threadsafe(server.server._grpc.show_health)
        assert {next(watch).status for watch in watches} == {health_pb2.HealthCheckResponse.NOT_SERVING}


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Return a frame of HTTP/2 (RFC 9113, 4.1)."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str) -> bytes:
    """Return a header field that no table knows (RFC 7541, 6.2.2)."""
    return b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def read(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = peer.recv(count - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def test_an_answer_that_nobody_reads_is_not_kept(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that lets no byte of an answer through, and answers every PING: it is there, and does not read."""
    monkeypatch.setattr(grpc_calls, "_READ_S", 0.5)
    _, own = held(embedder, permits=1000)
    message = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"])).SerializeToString()
    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", METHODS[0]),
        (":authority", "a"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
    )
    no_window = struct.pack(">HI", 4, 0)
    with InProcess(own) as server:
        host, _, port = server.grpc.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=START_S) as peer:
            peer.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, no_window))
            peer.sendall(frame(1, 4, 1, b"".join(literal(*field) for field in headers)))
            peer.sendall(frame(0, 1, 1, b"\x00" + struct.pack(">I", len(message)) + message))
            kinds: list[int] = []
            while not kinds or kinds[-1] != 3:  # RST_STREAM
                length, kind, flags, stream = struct.unpack(">IBBI", b"\x00" + read(peer, 9))
                payload = read(peer, length)
                assert not (kind == 0 and length), "an answer went through a closed window"
                if kind == 6 and not flags:
                    peer.sendall(frame(6, 1, 0, payload))
                if stream == 1:
                    kinds.append(kind)
        assert server.metric("f2rt_requests_total", model="mini", protocol="grpc", status="OK") == 1


def test_an_http_answer_that_nobody_reads_is_not_kept(
    embedder: Embedder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_connection, "_UNREAD_S", 0.3)
    _, own = held(embedder, permits=1000)
    body = json.dumps({"input": ["a"] * 2000, "encoding_format": "float"}).encode()
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    with InProcess(own, http=True) as server:
        host, _, port = server.http.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=START_S) as peer:
            peer.sendall(head % len(body) + body)
            wait_until(lambda: any("were not read in" in record.getMessage() for record in caplog.records))
            with pytest.raises((ConnectionResetError, EOFError)):
                read(peer, 1 << 30)
        with socket.create_connection((host, int(port)), timeout=START_S) as peer:
            peer.sendall(head.replace(b"host:", b"connection: close\r\nhost:") % len(body) + body)
            size = 0
            while part := peer.recv(1 << 19):  # slowly, and all of it
                size += len(part)
                time.sleep(0.02)
            assert size > 2_000_000


def test_408_for_a_body_that_comes_a_byte_at_a_time(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_BODY_S", 0.5)
    _, own = held(embedder, permits=1000)
    with InProcess(own, http=True) as server:
        host, _, port = server.http.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=0.1) as peer:
            peer.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 10000\r\n\r\n")
            answer, end_s = b"", time.monotonic() + START_S
            while not answer and time.monotonic() < end_s:
                peer.sendall(b" ")
                try:
                    answer = peer.recv(1 << 16)
                except TimeoutError:
                    continue
            peer.settimeout(START_S)
            while b"}}" not in answer:  # head and body come in parts
                part = peer.recv(1 << 16)
                assert part, answer
                answer += part
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"0.5 s in all" in answer
