"""The HTTP port and peers that misbehave: half-sent requests, floods, what is no HTTP, many and large requests.

The server runs in the test's process, with an engine that waits for the test where time must stand.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from runtime.bundle import Bundle
from runtime.embedder import Embedder, open_embedder
from runtime.wire import http_body, http_connection
from tests.http_client import client_of, refused, sending, talk, vectors_of
from tests.serving_in_process import InProcess, held, wait_until


def test_a_gone_clients_work_is_dropped(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle))
    with InProcess(embedder, http=True) as server, client_of(server) as client, sending() as send:
        first = send(lambda: client.post("/v1/embeddings", json={"input": "computing"}))
        engine.wait_begun(1)
        body = b'{"input": "nobody waits for this"}'
        with talk(server) as peer:
            peer.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
            wait_until(lambda: server.model.pipeline.waiting[0] == 1)
        wait_until(lambda: server.model.pipeline.waiting[0] == 0)
        engine.allow(10)
        assert first.result().status_code == 200
        assert client.post("/v1/embeddings", json={"input": "after"}).status_code == 200
        assert len(engine.begun) == 2
        assert server.metric("f2rt_requests_total", model="mini", protocol="http", status="CANCELLED") == 1


def test_half_sent_requests_hold_nobody_up(served: InProcess, web: httpx.Client) -> None:
    with contextlib.ExitStack() as stack:
        for sent in (
            b"",
            b"P",
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n",
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"input": ',
            b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\na\r\n{"input": ',
        ):
            for _ in range(20):
                stack.enter_context(talk(served)).send(sent)
        assert web.post("/v1/embeddings", json={"input": "meanwhile"}).status_code == 200


def test_408_for_a_body_that_stops_coming(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_SILENCE_S", 0.05)
    with InProcess(open_embedder(bundle), http=True) as server, talk(server) as peer:
        peer.send(b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"input": ')
        assert peer.recv(12) == b"HTTP/1.1 408"


def test_503_for_large_bodies_beyond_those_that_are_read_at_a_time(bundle: Bundle) -> None:
    limit = 100_000
    large = b'{"input": "%s"}' % (b"a" * 90_000)
    head = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % limit
    with (
        InProcess(open_embedder(bundle), http=True, max_message_bytes=limit) as server,
        client_of(server) as client,
    ):

        def ask(body: bytes) -> httpx.Response:
            return client.post("/v1/embeddings", content=body, headers={"content-type": "application/json"})

        assert server.server._http is not None
        bodies = server.server._http._http._bodies
        with contextlib.ExitStack() as stack:
            for _ in range(16):
                stack.enter_context(talk(server)).sendall(head + large)  # all but its end
            wait_until(lambda: bodies.held == 16 * len(large))
            assert ask(large).status_code == 200  # there is room for 16 of the largest, and these are smaller
            stack.enter_context(talk(server)).sendall(head + large)
            wait_until(lambda: bodies.held == 17 * len(large))
            answer = ask(large)
            refused(answer, 503, "being read have .* bytes; the limit is 1600000")
            assert answer.headers["retry-after"] == "1"
            assert ask(b'{"input": "small"}').status_code == 200
        wait_until(lambda: bodies.held == 0)
        assert ask(large).status_code == 200
        assert server.metric("f2rt_requests_total", model="", protocol="http", status="UNAVAILABLE") == 1


def said_by(peer: socket.socket) -> httpx.Response:
    """Read one answer, up to the end of the connection."""
    data = b""
    while part := peer.recv(1 << 16):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    return httpx.Response(int(first.split()[1]), headers=[line.split(": ", 1) for line in lines], content=body)


@pytest.mark.parametrize("sent", [b"", b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\n"])
def test_408_for_headers_that_stop_coming(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.1)
    with InProcess(open_embedder(bundle), http=True) as server, talk(server) as peer:
        peer.sendall(sent)
        refused(said_by(peer), 408, "headers did not come within 0.1 s")


def test_headers_in_drops_have_no_more_time(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.3)
    with InProcess(open_embedder(bundle), http=True) as server, talk(server) as peer:
        sent = 0
        with contextlib.suppress(ConnectionError):
            for letter in itertools.cycle(b"GET /health/live HTTP/1.1\r\nhost: x\r\nx-long: yyyyyyyyyyyyyyy"):
                peer.sendall(bytes([letter]))
                sent += 1
                time.sleep(0.01)
                assert sent < 6000, "it may go on for ever"


def test_a_connection_at_rest_and_a_slow_answer_are_no_missing_headers(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.1)
    engine, embedder = held(open_embedder(bundle))
    with InProcess(embedder, http=True) as server, talk(server) as peer:
        body = b'{"input": "a"}'
        request = b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body)
        for _ in range(2):
            peer.sendall(request)
            engine.wait_begun(1)
            time.sleep(0.3)
            engine.allow(1)
            answer = peer.recv(1 << 16)
            while not answer.endswith(b"}"):
                answer += peer.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 200")
            time.sleep(0.3)


def test_503_beyond_the_connections_that_may_be(bundle: Bundle) -> None:
    """As many as are allowed are answered; the next is told so, and when one goes there is room again."""
    with InProcess(open_embedder(bundle), http=True, max_connections=3) as server, contextlib.ExitStack() as stack:
        ask = b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"
        peers = [stack.enter_context(talk(server)) for _ in range(3)]
        for peer in peers:
            peer.sendall(ask)
            assert peer.recv(12) == b"HTTP/1.1 200"
        with talk(server) as fourth:
            fourth.sendall(ask)
            answer = said_by(fourth)
        refused(answer, 503, "as many connections as it takes")
        assert answer.headers["retry-after"] == "1"
        with talk(server) as silent:
            refused(said_by(silent), 503, "as many connections as it takes")
        for body in (b"", b"content-length: 5\r\n"):  # answered before it is read
            with talk(server) as probe:
                probe.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\n%s\r\n" % body)
                answer = said_by(probe)  # to the end: the connection does not stay
            assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        peers[0].close()

        def has_room() -> bool:
            with talk(server) as peer:
                peer.sendall(ask)
                return peer.recv(12) == b"HTTP/1.1 200"

        wait_until(has_room)


def test_header_flood(served: InProcess, web: httpx.Client) -> None:
    def answered(head: bytes) -> bytes:
        """Send without end until the server has enough; returns what it said."""
        with talk(served) as peer:
            with contextlib.suppress(ConnectionError):
                for _ in range(10_000):
                    peer.sendall(head)
            said = b""
            with contextlib.suppress(ConnectionError):
                said = peer.recv(12)
            return said

    start = b"GET /health/live HTTP/1.1\r\nhost: x\r\n"
    for head in (b"x-flood: " + b"y" * 1000 + b"\r\n", b"y" * 1000, b"a:b\r\n" * 200):
        with talk(served) as peer:
            peer.sendall(start)
        assert answered(start + head) in (b"HTTP/1.1 400", b"")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00" * 100 + b"\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",  # TLS
        b"GET /health/live HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        b"GET /health/live HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET  HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(served: InProcess, web: httpx.Client, sent: bytes) -> None:
    with talk(served) as peer:
        peer.sendall(sent)
        assert peer.recv(12) in (b"HTTP/1.1 400", b"HTTP/1.1 404", b"")


@pytest.mark.parametrize("sent", [b"\x00" * 100 + b"\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"y" * 400_000])
def test_400_can_be_read(served: InProcess, web: httpx.Client, sent: bytes) -> None:
    """Also where more was sent than the server cares to read: the connection is not reset before."""
    with talk(served) as peer:
        peer.sendall(sent)
        refused(said_by(peer), 400, "not an HTTP/1.1 request")


def test_a_body_that_stops_after_the_answer(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer needed no body: what is left of it may not hold the connection for ever."""
    monkeypatch.setattr(http_connection, "HEADERS_S", 0.1)
    with InProcess(open_embedder(bundle), http=True) as server, talk(server) as peer:
        peer.sendall(b"GET /health/live HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n")
        answer = b""
        while not answer.endswith(b'{"status":"live"}'):  # headers and body may come one by one
            part = peer.recv(1 << 16)
            assert part
            answer += part
        assert answer.startswith(b"HTTP/1.1 200")
        peer.sendall(b"y")
        assert peer.recv(1 << 16) == b""


def test_pipelined_requests_are_answered_in_order(served: InProcess, web: httpx.Client) -> None:
    request = b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 14\r\n\r\n{"input": "a"}'
    last = b"GET /health/live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    with talk(served) as peer:
        peer.sendall(request * 3 + last)
        said = b""
        while part := peer.recv(1 << 16):
            said += part
    assert said.count(b"HTTP/1.1 200") == 4
    assert said.endswith(b'{"status":"live"}')


def test_large_answers_arrive_whole(web: httpx.Client, embedder: Embedder) -> None:
    texts = [f"text {i}" for i in range(1500)]
    got = vectors_of(web.post("/v1/embeddings", json={"input": texts}))
    assert got.shape == (1500, embedder.contract.dim)
    assert np.abs(got[[0, 700, 1499]] - embedder.embed([texts[0], texts[700], texts[1499]]).vectors).max() < 2e-6


def test_many_at_once(web: httpx.Client, served: InProcess, embedder: Embedder) -> None:
    texts = [f"number {i}" for i in range(60)]
    expected = embedder.embed(texts).vectors
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(lambda text: web.post("/v1/embeddings", json={"input": text}), texts))
    assert np.abs(np.concatenate([vectors_of(answer) for answer in answers]) - expected).max() < 2e-6


def test_nothing_blocks_the_event_loop(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    with InProcess(open_embedder(bundle), http=True, debug=True) as server, client_of(server) as client:
        server.loop.slow_callback_duration = 0.5
        big = {"input": ["many words " * 100] * 300}
        assert client.post("/v1/embeddings", json=big).status_code == 200
        assert client.get("/metrics").status_code == 200
    assert not [r.getMessage() for r in caplog.records if "took" in r.getMessage() and r.name == "asyncio"]
