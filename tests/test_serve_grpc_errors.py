"""f2rt.v1 and what is wrong: each request that is refused, calls that end early, and what the client raises.

The server is a real process on loopback, and after each of them it still gives a correct vector.
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.errors import DeadlineError, F2rtError, InputError, UnavailableError
from runtime.settings import ServeSettings
from runtime.wire.f2rt_v1 import SERVICE_NAME
from tests.grpc_messages import EMBED, ids_request, same
from tests.serving import LONG, START_S, ServerProcess, child_python, failure, wait_until_busy


@pytest.fixture
def survives(server: ServerProcess, client: EmbeddingClient, embedder: Embedder) -> Iterator[None]:
    """After the test the same process still gives a correct vector and reports SERVING."""
    yield
    assert_alive(server, client, embedder)


def assert_alive(server: ServerProcess, client: EmbeddingClient, embedder: Embedder) -> None:
    assert server.process.poll() is None, "\n".join(server.log)
    assert client.ready()
    text = "still the same vector?"
    assert same(client.embed([text]).vectors, embedder.embed([text]).vectors)


INVALID = grpc.StatusCode.INVALID_ARGUMENT
ONE = pb.EmbedInput(texts=["a"])

WRONG: dict[str, tuple[pb.EmbedRequest, grpc.StatusCode, str, str]] = {
    "no input": (pb.EmbedRequest(), INVALID, "0 items; it may have 1 to 2048", "at least one"),
    "empty input": (pb.EmbedRequest(input=pb.EmbedInput()), INVALID, "0 items", "at least one"),
    "both lists": (ids_request([5], texts=["a"]), INVALID, "both given", "Send two requests"),
    "empty row": (ids_request([5], []), INVALID, "token_ids 1 is empty", "Give at least"),
    "id too large": (ids_request([5, 16000]), INVALID, "holds 16000; ids go from 0 to 15999", "own tokenizer"),
    "id negative": (ids_request([5], [-1]), INVALID, "token_ids 1 holds -1", "own tokenizer"),
    "id int32 min": (ids_request([-(1 << 31)]), INVALID, "holds -2147483648", "own tokenizer"),
    "too many ids": (ids_request([5] * 1025), INVALID, "1025 ids; the limit is 1024", "Shorten"),
    "millions of ids": (ids_request([5] * 3_000_000), INVALID, "3000000 ids; the limit is 1024", "Shorten"),
    "too many texts": (pb.EmbedRequest(input=pb.EmbedInput(texts=["a"] * 2049)), INVALID, "2049 items", "Split"),
    "a million texts": (pb.EmbedRequest(input=pb.EmbedInput(texts=[""] * 10**6)), INVALID, "1000000 items", "Split"),
    "too many rows": (ids_request(*[[5]] * 2049), INVALID, "2049 items; it may have 1 to 2048", "Split"),
    "unknown prompt": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a"], prompt_name="nope")),
        grpc.StatusCode.NOT_FOUND,
        "no prompt 'nope'; this model has: document, query",
        "Choose one of these",
    ),
    "endless prompt name": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a"], prompt_name="é" * 100_000)),
        grpc.StatusCode.NOT_FOUND,
        "no prompt 'éééé",
        "Choose one of these",
    ),
    "prompt name with ids": (ids_request([5], prompt_name="query"), INVALID, "used verbatim", "Leave it out"),
    "prompt with ids": (ids_request([5], prompt=""), INVALID, "used verbatim", "Leave it out"),
    "prompt fills the limit": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a" * 99], prompt="word " * 2000)),
        INVALID,
        "the prompt of text 0 has",
        "Shorten the prompt",
    ),
    # Sent once, it would be repeated 2048 times in memory.
    "prompt times texts": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a"] * 2048, prompt="p" * 500_000)),
        INVALID,
        "the request has 1024002048 characters, 500000 of them in the prompt of each of 2048 texts",
        "shorten the prompt",
    ),
    "prompt of a million": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a"], prompt="p" * 1_000_001)),
        INVALID,
        "the prompt has 1000001 characters",
        "Split it",
    ),
    "dimensions": (
        pb.EmbedRequest(input=ONE, dimensions=257),
        INVALID,
        "dimensions is 257; this model gives 1 to 256",
        "8, 16, 32, 64, 128, 256",
    ),
    "dimensions at their end": (pb.EmbedRequest(input=ONE, dimensions=(1 << 32) - 1), INVALID, "4294967295", "Choose"),
    "dtype": (pb.EmbedRequest(input=ONE, dtype=99), INVALID, "no dtype 99", "DType"),  # type: ignore[arg-type]
    "dtype negative": (pb.EmbedRequest(input=ONE, dtype=-1), INVALID, "no dtype -1", "DType"),  # type: ignore[arg-type]
    "truncate": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a"], truncate=7)),  # type: ignore[arg-type]
        INVALID,
        "no truncate mode 7",
        "Truncate",
    ),
    "characters": (
        pb.EmbedRequest(input=pb.EmbedInput(texts=["a", "x" * 1_000_001])),
        INVALID,
        "text 1 has 1000001 characters; the limit is 1000000",
        "Split it",
    ),
    "tokens in all": (ids_request(*[[5] * 1000] * 301), INVALID, "301000 tokens; the limit is 300000", "Split"),
}


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("case", list(WRONG))
def test_a_wrong_request_gets_its_status_and_a_cure(stub: Any, case: str) -> None:
    request, status, message, cure = WRONG[case]
    error = failure(lambda: stub.Embed(request, timeout=START_S))
    assert error.code() is status, error.details()
    assert message in error.details()
    assert cure in error.details()[error.details().index(message[-8:]) :]
    assert len(error.details().encode()) < 1500


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("case", ["both lists", "empty row", "unknown prompt", "truncate", "too many rows"])
def test_explain_refuses_what_embed_refuses(stub: Any, case: str) -> None:
    request, status, message, _ = WRONG[case]
    error = failure(lambda: stub.Explain(pb.ExplainRequest(input=request.input), timeout=START_S))
    assert error.code() is status
    assert message in error.details()


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("method", ["Embed", "Explain", "Info"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xff\xff", "parsing"),
        (b"\x0a\x7f\x00", "parsing"),  # a length beyond the end
        (b"\x0a\x04\x0a\x02\xff\xfe", "UTF-8"),  # input.texts holds bytes that are no UTF-8
        (b"\x2a\x03\xed\xa0\x80", "UTF-8"),  # request_id holds half of a surrogate pair
    ],
)
def test_bytes_that_are_no_request(channel: grpc.Channel, method: str, data: bytes, message: str) -> None:
    if message == "UTF-8" and method != "Embed":
        data = b"\x0a\x04\x0a\x02\xff\xfe"
    call = channel.unary_unary(f"/{SERVICE_NAME}/{method}")
    error = failure(lambda: call(data))
    assert error.code() is INVALID
    assert message in error.details()
    assert "Send the message of the .proto" in error.details()
    assert "<class" not in error.details()


@pytest.mark.usefixtures("survives")
def test_an_oversized_message(server: ServerProcess, client: EmbeddingClient, channel: grpc.Channel) -> None:
    limit = ServeSettings().max_message_bytes
    error = failure(lambda: channel.unary_unary(EMBED)(b"\x00" * (limit + 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert f"{limit + 1} vs. {limit}" in error.details()
    # For the typed client it is the request that has to change: coming back later does not help.
    with pytest.raises(InputError, match="too large") as caught:
        client.embed(["x" * 999_999] * 34)
    assert caught.value.cure == "Split the request."


@pytest.mark.usefixtures("survives")
@pytest.mark.parametrize("method", [f"/{SERVICE_NAME}/Nope", "/no.Such/Method", "/x"])
def test_an_unknown_method(channel: grpc.Channel, method: str) -> None:
    assert failure(lambda: channel.unary_unary(method)(b"")).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.usefixtures("survives")
def test_a_deadline_that_cannot_be_met(client: EmbeddingClient, stub: Any) -> None:
    work = ["more than a moment of work " * 30] * 500
    error = failure(lambda: stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=work)), timeout=0.01))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    with pytest.raises(DeadlineError):
        client.embed(work, timeout_s=0.01)


@pytest.mark.usefixtures("survives")
def test_a_client_that_cancels_in_the_middle(client: EmbeddingClient, stub: Any) -> None:
    call = stub.Embed.future(ids_request(*LONG))
    wait_until_busy(client)
    assert call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED


@pytest.mark.usefixtures("survives")
def test_a_deadline_in_the_middle(stub: Any) -> None:
    error = failure(lambda: stub.Embed(ids_request(*LONG), timeout=0.5))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.usefixtures("survives")
def test_a_client_killed_in_the_middle(server: ServerProcess, client: EmbeddingClient) -> None:
    code = (
        "import sys\nfrom runtime.client import EmbeddingClient\n"
        "client = EmbeddingClient(sys.argv[1])\nclient.wait_ready()\nprint('ready', flush=True)\n"
        "client.embed(token_ids=[[5] * 512] * 96)\nprint('answered', flush=True)\n"
    )
    with child_python(code, server.address) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        wait_until_busy(client)
        process.send_signal(signal.SIGKILL)
        assert process.wait(START_S) == -signal.SIGKILL
        assert process.stdout.read() == "", "it was killed before its answer"


@pytest.mark.usefixtures("survives")
def test_what_the_typed_client_refuses_itself(client: EmbeddingClient) -> None:
    with pytest.raises(InputError, match="one string"):
        client.embed("text")
    with pytest.raises(InputError, match="both"):
        client.embed(["a"], prompt="p", prompt_name="query")
    for dimensions in (0, -1, 1 << 31):
        with pytest.raises(InputError, match="dimensions"):
            client.embed(["a"], dimensions=dimensions)
    for wrong in ({"texts": ["half \ud800"]}, {"texts": [None]}, {"texts": [b"\xff"]}):
        with pytest.raises(InputError, match="cannot be sent"):
            client.embed(**wrong)  # type: ignore[arg-type]
    for ids in ([1 << 31], ["5"], [1.5]):
        with pytest.raises(InputError, match="cannot be sent"):
            client.embed(token_ids=[ids])  # type: ignore[list-item]
        with pytest.raises(InputError, match="cannot be sent"):
            client.explain(token_ids=[ids])  # type: ignore[list-item]
    for both in (client.embed, client.explain):
        with pytest.raises(InputError, match="both given"):
            both(["a"], token_ids=[[5]])
        with pytest.raises(InputError, match="0 items"):
            both()


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as taken:  # bound and not listening: nobody answers, and nobody else can take it
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with EmbeddingClient(address) as client:
            for call in (client.info, client.ready, lambda: client.embed(["a"])):
                with pytest.raises(UnavailableError, match=address) as caught:
                    call()
                assert "f2rt serve" in caught.value.cure
            with pytest.raises(UnavailableError, match=address):
                client.wait_ready(timeout_s=0.2)


def test_every_error_the_client_can_raise_is_an_f2rt_error(server: ServerProcess) -> None:
    """A server that is no f2rt server: the method does not exist there."""
    with server.client() as client:
        client._stub.Embed = client._channel.unary_unary("/other.Service/Embed", lambda r: r.SerializeToString())
        with pytest.raises(F2rtError) as caught:
            client.embed(["a"])
        assert caught.value.message
