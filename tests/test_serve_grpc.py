"""The gRPC server as its clients see it: a real process on loopback, and the service in-process where time must stand.

Nothing here sleeps until something is ready: tests wait for a health answer, a log line, or an engine that is held.
"""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgspec
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from numpy.typing import NDArray
from transformers import AutoTokenizer

import runtime
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.batch import Batch
from runtime.bundle import MANIFEST, Bundle, write_manifest
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.encoding import OutputDType, decode, encode
from runtime.engines import Engine
from runtime.errors import (
    DeadlineError,
    EngineError,
    F2rtError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from runtime.server import GrpcServer, _is_loopback
from runtime.service import SERVICE_NAME
from runtime.settings import EngineSettings, Limits, ServeSettings
from runtime.tokenizer import Truncate
from tests.bundles import forge_fingerprint
from tests.serving import START_S, ServerProcess, child_python, f2rt

EMBED = f"/{SERVICE_NAME}/Embed"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
TEXTS = [
    "Where is the library?",
    "La bibliothèque est fermée le lundi.",
    "def add(a, b):\n    return a + b",
    "图书馆在哪里？",
    "a",
    "",
    "  \t\n",
    "emoji 👩‍🔬 and NUL \x00 inside",
    "Where is the library?",  # a duplicate
    "The quick brown fox jumps over the lazy dog. " * 6,
]
BIG = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    opened = open_embedder(bundle)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def server(bundle: Bundle) -> Iterator[ServerProcess]:
    with ServerProcess(bundle.folder) as running:
        yield running
        assert running.process.poll() is None, "the server died:\n" + "\n".join(running.log)


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[EmbeddingClient]:
    with server.client() as opened:
        yield opened


@pytest.fixture
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address, options=BIG) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def survives(server: ServerProcess, client: EmbeddingClient, embedder: Embedder) -> Iterator[None]:
    """After the test the same process still gives a correct vector and reports SERVING."""
    yield
    assert_alive(server, client, embedder)


def assert_alive(server: ServerProcess, client: EmbeddingClient, embedder: Embedder) -> None:
    assert server.process.poll() is None, "\n".join(server.log)
    assert client.ready()
    text = "still the same vector?"
    assert np.array_equal(client.embed([text]).vectors, embedder.embed([text]).vectors)


def failure(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def rows_of_ids(rows: int, tokens: int, first: int = 5) -> list[list[int]]:
    return [[first + row % 7] * tokens for row in range(rows)]


LONG = rows_of_ids(96, 512)  # seconds of work in several batches


def wait_until_busy(client: EmbeddingClient) -> None:
    """Return once the engine works for somebody else: our own short request had to queue behind a long batch."""
    end = time.monotonic() + START_S
    while client.embed(["busy?"]).timings.queue_ms < 50:
        assert time.monotonic() < end, "the engine never was busy"


# --------------------------------------------------------------------------------------------------------------- Embed


def test_vectors_equal_the_embedder_bit_by_bit(client: EmbeddingClient, embedder: Embedder) -> None:
    answer, here = client.embed(TEXTS), embedder.embed(TEXTS)
    assert answer.vectors.dtype == np.float32
    assert answer.vectors.shape == (len(TEXTS), embedder.contract.dim)
    assert np.array_equal(answer.vectors, here.vectors)
    assert np.allclose(np.linalg.norm(answer.vectors, axis=1), 1, atol=1e-5)
    assert [i.tokens for i in answer.items] == [len(i.ids) for i in here.items]
    assert not any(i.truncated for i in answer.items)


def test_order_is_the_requests_and_duplicates_are_equal(client: EmbeddingClient) -> None:
    forward, backward = client.embed(TEXTS).vectors, client.embed(TEXTS[::-1]).vectors
    assert np.allclose(forward, backward[::-1], atol=1e-5)
    # Not the order of length, in which the engine sees them.
    assert [int(np.argmax(forward @ row)) for row in backward[::-1]] == [0, *range(1, 8), 0, 9]
    assert np.allclose(forward[0], forward[8], atol=1e-5)


def test_prompt_by_name_in_words_and_by_default(client: EmbeddingClient, embedder: Embedder, bundle: Bundle) -> None:
    prompts = bundle.manifest.contract.prompts
    assert prompts["query"]
    assert bundle.manifest.contract.default_prompt_name is None
    texts = TEXTS[:3]
    plain, named = client.embed(texts).vectors, client.embed(texts, prompt_name="query").vectors
    assert np.array_equal(plain, embedder.embed(texts).vectors)
    assert np.array_equal(named, embedder.embed(texts, prompt_name="query").vectors)
    assert np.array_equal(named, client.embed(texts, prompt=prompts["query"]).vectors)
    assert np.array_equal(named, client.embed([prompts["query"] + t for t in texts]).vectors)
    assert np.array_equal(plain, client.embed(texts, prompt_name="document").vectors)
    assert np.array_equal(plain, client.embed(texts, prompt="").vectors)
    assert np.abs(named - plain).max() > 0.01
    own = client.embed(texts, prompt="Instruct: sort\nQuery: ").vectors
    assert np.array_equal(own, embedder.embed(texts, prompt="Instruct: sort\nQuery: ").vectors)
    assert np.abs(own - named).max() > 0.01


def test_the_checkpoints_default_prompt_is_applied(bundle_copy: Bundle, embedder: Embedder) -> None:
    """A server whose contract names a default prompt uses it when the request names none."""
    contract = replace(bundle_copy.manifest.contract, default_prompt_name="query")
    write_manifest(bundle_copy.folder, replace(bundle_copy.manifest, contract=contract))
    changed = forge_fingerprint(bundle_copy)

    async def body() -> None:
        async with in_process(open_embedder(changed)) as (_, stub):
            plain = await stub.Embed(embed_request(TEXTS[:2]))
            assert np.array_equal(vectors_of(plain), embedder.embed(TEXTS[:2], prompt_name="query").vectors)
            document = await stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=TEXTS[:2], prompt_name="document")))
            assert np.array_equal(vectors_of(document), embedder.embed(TEXTS[:2], prompt="").vectors)

    asyncio.run(body())


@pytest.mark.parametrize("dim", [1, 7, 8, 128, 255, 256])
def test_dimensions_cut_then_normalize(client: EmbeddingClient, embedder: Embedder, dim: int) -> None:
    full = embedder.embed(TEXTS).vectors
    answer = client.embed(TEXTS, dimensions=dim)
    assert np.array_equal(answer.vectors, embedder.embed(TEXTS, dimensions=dim).vectors)
    assert answer.trained_dimension is (dim in embedder.contract.trained_dims)
    cut = full[:, :dim].astype(np.float64)
    assert np.allclose(answer.vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    raw = client.embed(TEXTS, dimensions=dim, normalize=False)
    assert np.array_equal(raw.vectors, full[:, :dim])
    assert np.array_equal(client.embed(TEXTS, dimensions=dim, normalize=True).vectors, answer.vectors)


def test_dimensions_zero_is_the_full_vector(stub: Any, embedder: Embedder) -> None:
    answer = stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=TEXTS), dimensions=0))
    assert answer.dim == embedder.contract.dim
    assert answer.dtype == pb.DTYPE_FLOAT32
    assert answer.trained_dimension
    assert np.array_equal(vectors_of(answer), embedder.embed(TEXTS).vectors)


@pytest.mark.parametrize("dim", [256, 100, 13])
def test_other_dtypes_stay_within_their_bounds(
    client: EmbeddingClient, stub: Any, embedder: Embedder, dim: int
) -> None:
    exact = embedder.embed(TEXTS, dimensions=dim).vectors

    def embed(dtype: OutputDType) -> NDArray[np.float32]:
        return client.embed(TEXTS, dimensions=dim, dtype=dtype).vectors

    def raw(number: pb.DType) -> pb.EmbedResponse:
        answer: pb.EmbedResponse = stub.Embed(
            pb.EmbedRequest(input=pb.EmbedInput(texts=TEXTS), dimensions=dim, dtype=number)
        )
        assert (answer.rows, answer.dim, answer.dtype) == (len(TEXTS), dim, number)
        return answer

    assert np.array_equal(embed(OutputDType.FLOAT32), exact)
    half = raw(pb.DTYPE_FLOAT16)
    assert np.array_equal(np.frombuffer(half.embeddings, "<f2").reshape(exact.shape), exact.astype(np.float16))
    assert (np.abs(embed(OutputDType.FLOAT16) - exact) <= np.abs(exact) * 2.0**-11 + 2.0**-25).all()
    small = raw(pb.DTYPE_INT8)
    assert len(small.embeddings) == exact.size
    scales = np.array([i.scale for i in small.items])[:, None]
    assert np.allclose(scales[:, 0], np.abs(exact).max(axis=1) / 127, rtol=1e-6)
    q = np.frombuffer(small.embeddings, np.int8).reshape(exact.shape)
    assert (np.abs(q).max(axis=1) == 127).all()
    assert (np.abs(q * scales - exact) <= scales * 0.501).all()
    assert np.allclose(embed(OutputDType.INT8), q * scales, rtol=1e-6)
    bits = raw(pb.DTYPE_BINARY)
    width = (dim + 7) // 8
    assert len(bits.embeddings) == len(TEXTS) * width
    for row, column in ((0, 0), (3, 9), (9, dim - 1)):
        byte = bits.embeddings[row * width + column // 8]
        assert bool(byte & (0x80 >> column % 8)) == bool(exact[row, column] > 0)
    assert np.array_equal(embed(OutputDType.BINARY), np.where(exact > 0, 1, -1))
    assert all(i.scale == 0 for answer in (half, bits) for i in answer.items)


@pytest.mark.parametrize("dtype", list(OutputDType))
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (2, 256)])
def test_encode_and_decode_are_inverse(dtype: OutputDType, shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    vectors[0] = 0  # a row without direction
    data, scales = encode(vectors, dtype)
    back = decode(data, *shape, dtype, scales)
    if dtype is OutputDType.BINARY:
        assert np.array_equal(back, np.where(vectors > 0, 1, -1))
    else:
        assert np.allclose(back, vectors, atol={"float32": 0, "float16": 2e-3, "int8": 2e-2}[dtype])
    with pytest.raises(InputError, match="bytes are not"):
        decode(data[:-1], *shape, dtype, scales)


def test_token_ids_are_used_verbatim(client: EmbeddingClient, embedder: Embedder) -> None:
    explained = client.explain(TEXTS, prompt_name="query")
    by_ids = client.embed(token_ids=[i.ids for i in explained])
    assert np.array_equal(by_ids.vectors, client.embed(TEXTS, prompt_name="query").vectors)
    assert [i.tokens for i in by_ids.items] == [len(i.ids) for i in explained]
    # No EOS is added: without it the vector is another one.
    without = client.embed(token_ids=[explained[0].ids[:-1]])
    assert without.items[0].tokens == len(explained[0].ids) - 1
    assert np.abs(without.vectors[0] - by_ids.vectors[0]).max() > 0.001
    longest = client.embed(token_ids=rows_of_ids(1, embedder.contract.max_tokens))
    assert longest.items[0].tokens == embedder.contract.max_tokens


def test_truncation_modes_and_counts(client: EmbeddingClient, embedder: Embedder) -> None:
    limit, eos = embedder.contract.max_tokens, embedder.contract.eos_id
    long = " ".join(f"word{i}" for i in range(2 * limit))
    texts = ["short", long]
    ends = {mode: client.embed(texts, truncate=mode, prompt_name="query") for mode in (Truncate.END, Truncate.START)}
    for mode, answer in ends.items():
        short, item = answer.items
        assert (short.truncated, short.original_tokens) == (False, short.tokens)
        assert (item.truncated, item.tokens) == (True, limit)
        assert item.original_tokens > limit
        assert np.array_equal(answer.vectors, embedder.embed(texts, truncate=mode, prompt_name="query").vectors)
    assert np.abs(ends[Truncate.END].vectors[1] - ends[Truncate.START].vectors[1]).max() > 0.001
    assert np.array_equal(ends[Truncate.END].vectors, client.embed(texts, prompt_name="query").vectors), "default: end"
    with pytest.raises(InputError, match=f"text 1 has [0-9]+ tokens; the limit is {limit}"):
        client.embed(texts, truncate=Truncate.ERROR)
    whole = embedder.loaded.tokenizer._tokenizer.encode(long).ids
    assert whole[-1] == eos
    for mode in (Truncate.END, Truncate.START):
        (seen,) = client.explain([long], truncate=mode)
        expected = whole[: limit - 1] if mode is Truncate.END else whole[-limit:-1]
        assert seen.ids == [*expected, eos]
        assert seen.truncated
        assert seen.original_tokens == len(whole)
        (prompted,) = client.explain([long], truncate=mode, prompt_name="query")
        (prompt,) = client.explain([""], prompt_name="query")
        assert prompted.ids[: len(prompt.ids) - 2] == prompt.ids[:-2], "the prompt is kept"


def test_timings_are_positive_and_add_up(client: EmbeddingClient) -> None:
    start = time.perf_counter()
    answer = client.embed(TEXTS * 5)
    wall_ms = 1e3 * (time.perf_counter() - start)
    t = answer.timings
    assert t.tokenize_ms > 0
    assert t.queue_ms >= 0
    assert t.infer_ms > 0
    assert t.tokenize_ms + t.queue_ms + t.infer_ms <= t.total_ms * 1.001
    assert t.total_ms <= wall_ms


def test_the_fingerprint_is_the_manifests(
    server: ServerProcess, client: EmbeddingClient, stub: Any, bundle: Bundle
) -> None:
    (record,) = bundle.manifest.engines
    assert re.fullmatch("[0-9a-f]{32}", record.fingerprint)
    explained = stub.Explain(pb.ExplainRequest(input=pb.EmbedInput(texts=["a"])))
    answers = [client.embed(["a"]).fingerprint, client.info().fingerprint, explained.fingerprint, server.fingerprint]
    assert answers == [record.fingerprint] * 4


def test_the_request_id_comes_back_and_is_logged_on_one_line(server: ServerProcess, client: EmbeddingClient) -> None:
    wanted = "id-é\n2026-01-01 00:00:00 INFO forged"
    assert client.embed(["a"], request_id=wanted).request_id == wanted
    assert client.embed(["a"]).request_id == ""
    line = server.wait_for_line("id-é")
    assert "INFO forged" in line, "the line break in the id is escaped"
    with pytest.raises(NotFoundError):
        client.embed(["a"], prompt_name="nope", request_id="id-refused")
    assert "NOT_FOUND" in server.wait_for_line("id-refused")


def test_messages_beyond_grpcs_default_of_4_mib(client: EmbeddingClient, embedder: Embedder, stub: Any) -> None:
    texts = ["The library is open on Mondays and closed on Tuesdays. " * 9000] * 10
    request = pb.EmbedRequest(input=pb.EmbedInput(texts=texts))
    assert request.ByteSize() > 4 << 20
    answer = client.embed(texts)
    assert all(i.truncated and i.tokens == embedder.contract.max_tokens for i in answer.items)
    assert np.allclose(answer.vectors, embedder.embed(texts[:1]).vectors, atol=1e-5)
    contract = embedder.contract
    spelled = embedder.loaded.tokenizer.spell(range(contract.vocab_size))
    longest = max(range(contract.vocab_size), key=lambda i: len(spelled[i]))
    ids = [[longest] * 1000] * 300
    response = stub.Explain(pb.ExplainRequest(input=pb.EmbedInput(token_ids=[pb.TokenIds(ids=r) for r in ids])))
    assert response.ByteSize() > 4 << 20
    explained = client.explain(token_ids=ids)
    assert len(explained) == 300
    assert set(explained[-1].tokens) == {spelled[longest]}


def test_2048_items(client: EmbeddingClient, embedder: Embedder) -> None:
    ids = [[5 + i % 9000, 7 + i // 9, embedder.contract.eos_id][: 2 + i % 2] for i in range(2048)]
    answer = client.embed(token_ids=ids)
    assert answer.vectors.shape == (2048, embedder.contract.dim)
    assert np.array_equal(answer.vectors, embedder.infer(embedder.verbatim(ids)))
    assert [i.tokens for i in answer.items] == [len(i) for i in ids]


# ---------------------------------------------------------------------------------------------------- Explain and Info


def test_explain_gives_transformers_ids(client: EmbeddingClient, bundle: Bundle, mini: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(mini)
    contract = bundle.manifest.contract
    for name, prompt in {None: "", **contract.prompts}.items():
        for text, item in zip(TEXTS, client.explain(TEXTS, prompt_name=name), strict=True):
            assert item.ids == theirs(prompt + text)["input_ids"], (name, text)
            assert item.rendered == prompt + text
            assert item.tokens == theirs.convert_ids_to_tokens(item.ids)
            assert item.pooled_position == len(item.ids) - 1
            assert item.pooled_id == item.ids[-1] == contract.eos_id
            assert (item.truncated, item.original_tokens) == (False, len(item.ids))


def test_explain_of_token_ids(client: EmbeddingClient) -> None:
    (item,) = client.explain(token_ids=[[5, 9, 6]])
    assert (item.ids, item.rendered, item.pooled_position, item.pooled_id) == ([5, 9, 6], "", 2, 6)


def test_info_is_the_manifest(client: EmbeddingClient, bundle: Bundle) -> None:
    info, manifest, limits = client.info(), bundle.manifest, Limits()
    (engine,) = manifest.engines
    assert engine.parity is not None
    assert (info.model, info.revision) == (manifest.source.id, manifest.source.revision or "")
    assert (info.engine, info.precision) == (engine.name, engine.precision)
    assert (info.dim, info.trained_dims) == (manifest.contract.dim, manifest.contract.trained_dims)
    assert info.max_tokens == manifest.contract.max_tokens
    assert info.prompts == manifest.contract.prompts
    assert info.default_prompt_name == (manifest.contract.default_prompt_name or "")
    assert info.default_truncate is ServeSettings().truncate
    assert (info.max_items, info.max_request_tokens) == (limits.max_items, limits.max_request_tokens)
    assert info.license == (manifest.source.license or "")
    assert info.verdict == "pass"
    assert info.min_cosine == pytest.approx(engine.parity.min_cosine)
    assert info.version == runtime.__version__
    assert "passing verdict" in info.selection


# ----------------------------------------------------------------------------------------------- health and reflection


def test_health_check_list_and_watch(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", SERVICE_NAME):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
    statuses = stub.List(health_pb2.HealthListRequest()).statuses
    assert {name: answer.status for name, answer in statuses.items()} == {"": SERVING, SERVICE_NAME: SERVING}
    for name, expected in (("", SERVING), ("nobody", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=name))
        assert next(watch).status == expected
        watch.cancel()
    error = failure(lambda: stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert error.code() is grpc.StatusCode.NOT_FOUND


def test_a_client_without_stubs_embeds_by_reflection(channel: grpc.Channel, embedder: Embedder) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(database.get_services())
    pool = descriptor_pool.DescriptorPool(database)
    method = pool.FindServiceByName(SERVICE_NAME).FindMethodByName("Embed")
    request_class = message_factory.GetMessageClass(method.input_type)
    response_class = message_factory.GetMessageClass(method.output_type)
    assert request_class is not pb.EmbedRequest
    call = channel.unary_unary(
        EMBED, request_serializer=request_class.SerializeToString, response_deserializer=response_class.FromString
    )
    answer = call(request_class(input={"texts": TEXTS, "prompt_name": "query"}, dimensions=64))
    vectors = np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)
    assert np.array_equal(vectors, embedder.embed(TEXTS, prompt_name="query", dimensions=64).vectors)


# ------------------------------------------------------------------------------------------------------ wrong requests

INVALID = grpc.StatusCode.INVALID_ARGUMENT
ONE = pb.EmbedInput(texts=["a"])


def ids_request(*rows: Sequence[int], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(token_ids=[pb.TokenIds(ids=row) for row in rows], **fields))


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
    if message == "UTF-8" and method == "Info":
        call(data)  # InfoRequest has no field 1: unknown fields are skipped
        return
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
        client.embed(["x" * 999_999] * 68)
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


# --------------------------------------------------------------------------------------------------------- concurrency


def test_32_threads_get_their_own_vectors(server: ServerProcess, embedder: Embedder) -> None:
    fields: list[dict[str, Any]] = [
        {"prompt_name": "query"},
        {"dimensions": 64},
        {"dimensions": 100, "normalize": False},
        {},
    ]

    def one(number: int) -> None:
        texts = [f"text {number} of worker {i}: " + "more " * (number % 5 * i) for i in range(1 + number % 6)]
        wanted = fields[number % 4]
        barrier.wait(START_S)
        with server.client() as mine:
            for _ in range(3):
                answer = mine.embed(texts, request_id=str(number), **wanted)
                assert answer.request_id == str(number)
                assert np.allclose(answer.vectors, expected[number], atol=1e-5)
                with pytest.raises(NotFoundError):
                    mine.embed(texts, prompt_name=f"nope {number}")
                assert mine.explain([f"{number}"])[0].rendered == f"{number}"

    expected = {}
    for number in range(32):
        texts = [f"text {number} of worker {i}: " + "more " * (number % 5 * i) for i in range(1 + number % 6)]
        expected[number] = embedder.embed(texts, **fields[number % 4]).vectors
    barrier = threading.Barrier(32)
    with ThreadPoolExecutor(32) as pool:
        list(pool.map(one, range(32)))


# ---------------------------------------------------------------------------------- in-process: the engine in our hand


class HeldEngine:
    """The real engine, which waits for a permit before each batch and writes down what it was asked to run."""

    def __init__(self, engine: Engine, *, permits: int = 0) -> None:
        self.name, self.precision, self.fingerprint = engine.name, engine.precision, engine.fingerprint
        self.max_tokens = engine.max_tokens
        self._engine = engine
        self._permits = threading.Semaphore(permits)
        self.begun: list[int] = []  # the first id of each batch
        self.fault: Exception | None = None
        self.spoil: float | None = None

    def run(self, batch: Batch) -> NDArray[np.float32]:
        self.begun.append(int(batch.input_ids[0, 0]))
        assert self._permits.acquire(timeout=START_S)
        if self.fault:
            raise self.fault
        vectors = self._engine.run(batch)
        if self.spoil is not None:
            vectors[-1, 3] = self.spoil
        return vectors

    def allow(self, batches: int) -> None:
        self._permits.release(batches)

    async def wait_begun(self, batches: int) -> None:
        end = time.monotonic() + START_S
        while len(self.begun) < batches:
            assert time.monotonic() < end
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.allow(1000)


@asynccontextmanager
async def in_process(embedder: Embedder, **settings: Any) -> AsyncIterator[tuple[GrpcServer, Any]]:
    """A GrpcServer in this event loop and an asyncio stub on it."""
    server = GrpcServer(embedder, ServeSettings(grpc_address="127.0.0.1:0", limits=embedder.limits, **settings))
    address = await server.start()
    try:
        async with grpc.aio.insecure_channel(address, options=BIG) as channel:
            yield server, pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
    finally:
        if isinstance(embedder.loaded.engine, HeldEngine):
            embedder.loaded.engine.allow(1000)  # a failed test must not wait for its engine
        await server.stop()


def held(embedder: Embedder, limits: Limits | None = None) -> tuple[HeldEngine, Embedder]:
    engine = HeldEngine(embedder.loaded.engine)
    return engine, Embedder(embedder.bundle, replace(embedder.loaded, engine=engine), limits or Limits())


def embed_request(texts: Sequence[str], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(texts=texts), **fields)


def vectors_of(answer: pb.EmbedResponse) -> NDArray[np.float32]:
    return np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)


async def afailure(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def wait_queued(server: GrpcServer) -> None:
    """Return once a batch waits for the engine."""
    end = time.monotonic() + START_S
    while not server.service._engine_thread._work_queue.qsize():
        assert time.monotonic() < end
        await asyncio.sleep(0.001)


async def until_admitted(stub: Any) -> None:
    """Return once a place is free: Explain is admitted as Embed is, and needs no engine."""
    end = time.monotonic() + START_S
    while True:
        try:
            await stub.Explain(pb.ExplainRequest(input=ONE))
            return
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED or time.monotonic() > end:
                raise
        await asyncio.sleep(0.005)


def test_too_many_waiting_is_resource_exhausted(embedder: Embedder) -> None:
    async def body() -> None:
        engine, own = held(embedder)
        async with in_process(own, max_waiting_requests=1) as (_, stub):
            first = stub.Embed(ids_request([5, 6]))
            await engine.wait_begun(1)
            for call in (stub.Embed(ids_request([7])), stub.Explain(pb.ExplainRequest(input=ONE))):
                error = await afailure(call)
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert error.details() == "1 requests are waiting; the limit is 1. Try again in a moment."
            engine.allow(2)
            answer = await first
            assert np.array_equal(vectors_of(answer), embedder.infer(embedder.verbatim([[5, 6]])))
            await until_admitted(stub)
            await stub.Embed(ids_request([8]))
            assert engine.begun == [5, 8]

    asyncio.run(body())


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_work_dropped_while_it_waits_is_never_computed(embedder: Embedder, how: str) -> None:
    async def body() -> None:
        engine, own = held(embedder)
        async with in_process(own, max_waiting_requests=2) as (server, stub):
            first = stub.Embed(ids_request([5, 6]))
            await engine.wait_begun(1)
            second = stub.Embed(ids_request([7, 7]), timeout=0.3 if how == "deadline" else START_S)
            await wait_queued(server)
            if how == "cancel":
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await second
            else:
                assert (await afailure(second)).code() is grpc.StatusCode.DEADLINE_EXCEEDED
            await until_admitted(stub)
            engine.allow(10)
            await first
            await stub.Embed(ids_request([9]))
            assert engine.begun == [5, 9]

    asyncio.run(body())


def test_a_cancelled_request_gives_the_engine_back_after_one_batch(embedder: Embedder) -> None:
    async def body() -> None:
        engine, own = held(embedder, Limits(max_batch_rows=1))
        async with in_process(own) as (server, stub):
            call = stub.Embed(ids_request(*[[5, 6]] * 50))
            await engine.wait_begun(1)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.wait_for(server.service.idle(), START_S)
            engine.allow(1000)
            await stub.Embed(ids_request([9]))
            assert engine.begun == [5, 9]

    asyncio.run(body())


def test_a_short_request_does_not_wait_for_all_of_a_long_one(embedder: Embedder) -> None:
    async def body() -> None:
        engine, own = held(embedder, Limits(max_batch_rows=1))
        async with in_process(own) as (server, stub):
            rows = [[5, i] for i in range(1, 9)]
            long = stub.Embed(ids_request(*rows))
            await engine.wait_begun(1)
            short = stub.Embed(ids_request([9, 9]))
            await wait_queued(server)
            engine.allow(3)
            await short
            assert len(engine.begun) < 8
            engine.allow(100)
            assert np.allclose(vectors_of(await long), embedder.infer(embedder.verbatim(rows)), atol=1e-6)

    asyncio.run(body())


def test_faults_in_the_engine_thread(embedder: Embedder, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        engine, own = held(embedder)
        engine.allow(1000)
        async with in_process(own) as (_, stub):
            engine.fault = RuntimeError("secret /etc/path")
            error = await afailure(stub.Embed(ids_request([5], [6])))
            assert error.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in error.details()
            assert "log" in error.details()
            assert "secret /etc/path" in caplog.text
            engine.fault = EngineError("the engine is on fire.", cure="Put it out.")
            error = await afailure(stub.Embed(embed_request(["a"], request_id="burning")))
            assert (error.code(), error.details()) == (
                grpc.StatusCode.INTERNAL,
                "the engine is on fire. Put it out.",
            )
            assert "burning" in caplog.text
            engine.fault = None
            for engine.spoil in (float("nan"), float("inf")):
                error = await afailure(stub.Embed(embed_request(["a"])))
                assert error.code() is grpc.StatusCode.INTERNAL
                assert "not finite" in error.details()
            engine.spoil = None
            assert np.array_equal(vectors_of(await stub.Embed(embed_request(TEXTS))), embedder.embed(TEXTS).vectors)

    asyncio.run(body())


def test_the_event_loop_is_never_blocked(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    """The largest requests of each kind, in asyncio's debug mode: no callback takes 100 ms.

    A blocking call shows in every attempt, a busy machine does not.
    """

    def traffic(address: str) -> None:
        with EmbeddingClient(address) as client:
            client.wait_ready(START_S)
            client.embed([f"text {i}" for i in range(2048)], dimensions=200, dtype=OutputDType.INT8)
            client.explain(token_ids=rows_of_ids(300, 1000))
            for wrong in ({"token_ids": rows_of_ids(1, 1_000_000)}, {"texts": ["a"] * 500_000}):
                with pytest.raises(InputError):
                    client.embed(**wrong)  # type: ignore[arg-type]
            client.info()

    async def body() -> None:
        asyncio.get_running_loop().slow_callback_duration = 0.1
        embedder = open_embedder(bundle, settings=EngineSettings(threads=1, spin=False))
        server = GrpcServer(embedder, ServeSettings(grpc_address="127.0.0.1:0"))
        address = await server.start()
        caplog.clear()
        await asyncio.to_thread(traffic, address)
        await server.stop()

    attempts: list[list[str]] = []
    with caplog.at_level(logging.WARNING, "asyncio"):
        while len(attempts) < 3 and all(attempts):
            asyncio.run(body(), debug=True)
            records = [r for r in caplog.records if r.name == "asyncio" and " took " in r.getMessage()]
            attempts.append([r.getMessage() for r in records])
    assert not all(attempts), "\n".join(attempts[-1])


def test_what_outlives_the_drain_is_cut_off_after_its_batch(embedder: Embedder) -> None:
    async def body() -> None:
        engine, own = held(embedder, Limits(max_batch_rows=1))
        server = GrpcServer(own, ServeSettings(grpc_address="127.0.0.1:0", drain_s=0.2))
        address = await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Embed(ids_request(*[[5, 6]] * 9))
            await engine.wait_begun(1)
            stopping = asyncio.ensure_future(server.stop())
            assert (await afailure(call)).code() is grpc.StatusCode.UNAVAILABLE
            engine.allow(1000)
            await asyncio.wait_for(stopping, START_S)
            assert engine.begun == [5]

    asyncio.run(body())


# ------------------------------------------------------------------------------------------------- life of the process


def test_sigterm_finishes_what_was_admitted_and_refuses_the_rest(bundle: Bundle, embedder: Embedder) -> None:
    with ServerProcess(bundle.folder) as server, server.client() as client, ThreadPoolExecutor(1) as pool:
        with grpc.insecure_channel(server.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
            assert next(watch).status == SERVING
            long = pool.submit(client.embed, token_ids=LONG)
            wait_until_busy(client)
            server.process.send_signal(signal.SIGTERM)
            assert next(watch).status == NOT_SERVING
            assert not long.done()
            with pytest.raises(UnavailableError, match="shutting down"):
                client.embed(["too late"])
            with server.client() as late:
                for refused_call in (late.embed, late.explain):
                    with pytest.raises(UnavailableError, match=r"shutting down\. Ask another replica\."):
                        refused_call(["too late"])
                assert not late.ready()
                assert not long.done()
            assert np.array_equal(long.result(START_S).vectors, embedder.infer(embedder.verbatim(LONG)))
            assert server.wait() == 0
            failure(lambda: next(watch))  # the stream ends with the server
        assert any("stopped" in line for line in server.log)
        assert not any("Traceback" in line or "ERROR" in line for line in server.log), server.log


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_idle_server_stops_at_once_even_while_watched(bundle: Bundle, number: signal.Signals) -> None:
    with ServerProcess(bundle.folder) as server, grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        start = time.monotonic()
        assert server.stop(number) == 0
        assert time.monotonic() - start < ServeSettings().drain_s / 2
        assert next(watch).status == NOT_SERVING
        assert not any("Traceback" in line for line in server.log), server.log


def test_a_unix_socket(bundle: Bundle, embedder: Embedder, tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/f2rt.sock"
    with ServerProcess(bundle.folder, "--threads", "1", address=address) as server:
        assert server.address == address
        with server.client() as client:
            assert np.allclose(client.embed(TEXTS).vectors, embedder.embed(TEXTS).vectors, atol=1e-5)
        assert not any("open to the network" in line for line in server.log)
        assert server.stop() == 0


def refused(*arguments: str) -> str:
    """Run `f2rt serve`, expect it to refuse, and return its standard error."""
    done = f2rt("serve", *arguments)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert done.stdout == b""
    assert re.search(r"^error: .+\.$", text, re.MULTILINE), text
    assert re.search(r"^  cure: .+", text, re.MULTILINE), text
    assert "Traceback" not in text
    assert "serving" not in text
    return text


def test_a_port_in_use(bundle: Bundle) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        text = refused(str(bundle.folder), "--grpc", address)
    assert f"cannot listen on {address}" in text
    assert "--grpc HOST:PORT" in text


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:70000", ":50051", "127.0.0.1:-1", "203.0.113.7:50051"])
def test_an_address_that_is_none(bundle: Bundle, address: str) -> None:
    assert address in refused(str(bundle.folder), "--grpc", address)


def test_a_second_server_on_the_port_of_the_first(bundle: Bundle, server: ServerProcess) -> None:
    assert "in use" in refused(str(bundle.folder), "--grpc", server.address)


def test_engines_that_must_not_answer(bundle_copy: Bundle, tmp_path: Path) -> None:
    folder, manifest = bundle_copy.folder, bundle_copy.manifest
    (engine,) = manifest.engines
    assert engine.parity is not None

    def write(**changes: Any) -> None:
        changed = replace(manifest, engines=[replace(engine, **changes)])
        (folder / MANIFEST).write_bytes(msgspec.json.encode(changed))

    write(parity=None)
    text = refused(str(folder), "--grpc", "127.0.0.1:0")
    assert "never compared with PyTorch" in text
    assert f"f2rt parity {folder}" in text
    write(parity=replace(engine.parity, verdict="fail"))
    text = refused(str(folder), "--engine", engine.name, "--grpc", "127.0.0.1:0")
    assert "its verdict is fail" in text
    write()
    graph = bundle_copy.path(manifest.graphs[0].data.file)
    data = bytearray(graph.read_bytes())
    data[len(data) // 2] ^= 0x40
    graph.write_bytes(data)
    assert "SHA-256" in refused(str(folder), "--grpc", "127.0.0.1:0")


def test_what_is_not_there(bundle: Bundle, tmp_path: Path) -> None:
    text = refused(str(bundle.folder), "--engine", "onnxruntime:int3", "--grpc", "127.0.0.1:0")
    assert "onnxruntime:int3" in text
    assert "onnxruntime:fp32" in text
    assert "is not there" in refused(str(tmp_path / "nowhere"))
    assert "not a bundle" in refused(str(tmp_path))


def test_an_address_open_to_the_network_is_warned_about(bundle: Bundle, server: ServerProcess) -> None:
    with ServerProcess(bundle.folder, address="0.0.0.0:0") as open_server:
        assert "WARNING" in open_server.wait_for_line("0.0.0.0:0 is open to the network without key or TLS")
        assert open_server.stop() == 0
    assert not any("open to the network" in line for line in server.log)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("unix:/run/f2rt.sock", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.4:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_which_addresses_are_loopback(address: str, loopback: bool) -> None:
    assert _is_loopback(address) is loopback


def test_every_error_the_client_can_raise_is_an_f2rt_error(server: ServerProcess) -> None:
    """A server that is no f2rt server: the method does not exist there."""
    with server.client() as client:
        client._stub.Embed = client._channel.unary_unary("/other.Service/Embed", lambda r: r.SerializeToString())
        with pytest.raises(F2rtError) as caught:
            client.embed(["a"])
        assert caught.value.message
