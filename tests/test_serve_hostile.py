"""What a server has to bear: bombs, floods, clients that stop reading or never finish. It answers or refuses.

One real process bears all of it; each test ends with a correct vector from it, and the last one looks at its memory.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.bundle import Bundle
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.errors import InputError
from tests.serving import START_S, ServerProcess, failure
from tests.serving_in_process import BIG, wait_until

_GROWTH_BYTES = 64 << 20  # what may be kept of it all


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[ServerProcess]:
    with ServerProcess(bundle.folder, "--set", "access_log=false") as running:
        with running.client() as client:
            for _ in range(3):
                client.embed(["a text"] * 64)
                client.embed(["word " * 900] * 18)  # as large a batch as there may be: the engine keeps that much
        yield running
        assert running.process.poll() is None, "the server died:\n" + "\n".join(running.log)


@pytest.fixture(scope="module")
def resident_at_start(server: ServerProcess) -> int:
    return resident_bytes(server)


@pytest.fixture(autouse=True)
def survives(server: ServerProcess, resident_at_start: int, embedder: Embedder) -> Iterator[None]:
    yield
    with server.client() as client:
        assert client.ready()
        text = "still the same vector?"
        assert np.array_equal(client.embed([text]).vectors, embedder.embed([text]).vectors)


def resident_bytes(server: ServerProcess) -> int:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def threads(server: ServerProcess) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


@contextlib.contextmanager
def opened(server: ServerProcess, **options: Any) -> Iterator[Any]:
    with grpc.insecure_channel(server.address, options=BIG, **options) as channel:
        yield pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]


def test_a_message_that_is_large_only_once_it_is_unpacked(server: ServerProcess) -> None:
    """400 MB of one letter travel as 400 kB: what counts is the size it would have here."""
    request = pb.EmbedRequest(input=pb.EmbedInput(texts=["a" * 100_000_000] * 4))
    with opened(server, compression=grpc.Compression.Gzip) as stub:
        error = failure(lambda: stub.Embed(request, timeout=START_S))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in error.details()


def test_small_compressed_messages_are_welcome(server: ServerProcess, embedder: Embedder) -> None:
    with opened(server, compression=grpc.Compression.Gzip) as stub:
        answer = stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=["a"])))
    assert answer.embeddings == embedder.embed(["a"]).vectors.tobytes()


def test_a_text_of_a_million_characters(server: ServerProcess) -> None:
    with server.client() as client:
        answer = client.embed(["word " * 200_000])
        assert answer.items[0].truncated
        assert answer.items[0].original_tokens > 100_000
        hard = client.embed(["👩‍🔬" * 333_333], timeout_s=START_S)  # several tokens for each character
        assert hard.items[0].original_tokens > 1_000_000
        with pytest.raises(InputError, match="1000001 characters"):
            client.embed(["x" * 1_000_001])


def test_ten_thousand_items_and_texts_that_are_hard_to_tokenize(server: ServerProcess) -> None:
    odd = [
        "\x00" * 1000,
        "\u202e" * 1000,
        "é" * 1000,
        "👩‍🔬" * 300,
        " " * 10_000,
        "\n" * 10_000,
        "𒀀" * 500,
        "\ufeff" * 99,
    ]
    with server.client() as client:
        with pytest.raises(InputError, match="10000 items"):
            client.embed(["a"] * 10_000)
        assert np.isfinite(client.embed(odd).vectors).all()


def test_header_floods(server: ServerProcess) -> None:
    with opened(server) as stub:
        request = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"]))
        for metadata in ([(f"x-header-{i}", "v" * 100) for i in range(2000)], [("x-long", "v" * 1_000_000)]):
            error = failure(lambda m=metadata: stub.Embed(request, metadata=m, timeout=START_S))  # type: ignore[misc]
            assert error.code() in (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.INTERNAL,
            )


def test_clients_that_never_finish_what_they_send(server: ServerProcess) -> None:
    """200 connections that say nothing, half a preface, or half a request: nobody else waits for them."""
    host, _, port = server.address.rpartition(":")
    before = threads(server)
    sockets = []
    for number in range(200):
        connection = socket.create_connection((host, int(port)), timeout=START_S)
        connection.sendall(
            [b"", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x04\x04"][number % 3]
        )
        sockets.append(connection)
    with server.client() as client:
        client.embed(["others are served"])
    assert threads(server) < before + 40, "an idle connection costs no thread"
    for connection in sockets:
        connection.close()


def test_connections_are_bounded(bundle: Bundle) -> None:
    """Beyond the limit a connection is closed at once; when others go, there is room again."""
    with ServerProcess(bundle.folder, "--set", "max_connections=50") as limited:
        host, _, port = limited.address.rpartition(":")
        held = [socket.create_connection((host, int(port)), timeout=START_S) for _ in range(120)]

        def is_open(connection: socket.socket) -> bool:
            connection.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                return connection.recv(1 << 16) != b""
            return True

        wait_until(lambda: sum(map(is_open, held)) <= 50)
        for connection in held:
            connection.close()
        with limited.client() as client:
            client.wait_ready(START_S)
            client.embed(["there is room again"])


def test_a_client_that_does_not_read_its_answers(server: ServerProcess) -> None:
    """A stream whose answers nobody takes: it stops at its window, and other callers do not notice."""
    asked: list[int] = []

    def requests() -> Iterator[pb.EmbedRequest]:
        for number in range(100_000):
            asked.append(number)
            yield pb.EmbedRequest(input=pb.EmbedInput(texts=["word " * 20] * 256))

    with opened(server) as stub:
        stream = stub.EmbedStream(requests())
        wait_until(lambda: len(asked) >= 8)
        next(stream)
        with EmbeddingClient(server.address) as client:
            for _ in range(20):
                client.embed(["others are served"])
        stream.cancel()
    assert len(asked) < 2000


def test_a_thousand_callers_at_once(server: ServerProcess) -> None:
    """More callers than threads: each is answered or told to come back, none is forgotten."""
    outcomes: list[str] = []
    with opened(server) as stub:
        request = pb.EmbedRequest(input=pb.EmbedInput(texts=["a short text"]))
        calls = [stub.Embed.future(request, timeout=START_S) for _ in range(3000)]
        for call in calls:
            error = call.exception()
            outcomes.append("OK" if error is None else error.code().name)
    assert set(outcomes) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert "OK" in outcomes  # how many is a matter of how fast the machine is


def test_callers_who_cancel_all_the_time(server: ServerProcess) -> None:
    stop = threading.Event()

    def cancel() -> None:
        with opened(server) as stub:
            while not stop.is_set():
                stub.Embed.future(pb.EmbedRequest(input=pb.EmbedInput(texts=["word " * 50] * 20))).cancel()
                stop.wait(0.002)

    impatient = [threading.Thread(target=cancel) for _ in range(4)]
    for thread in impatient:
        thread.start()
    with server.client() as client:
        for number in range(50):
            client.embed([f"text {number}"])
    stop.set()
    for thread in impatient:
        thread.join(START_S)


def test_afterwards_its_memory_is_what_it_was(server: ServerProcess, resident_at_start: int) -> None:
    def grown() -> int:
        return resident_bytes(server) - resident_at_start

    with contextlib.suppress(AssertionError):
        wait_until(lambda: grown() < _GROWTH_BYTES, 30)
    assert grown() < _GROWTH_BYTES
