"""f2rt.v1 as its clients see it: a real process on loopback.

Nothing here sleeps until something is ready: tests wait for a health answer, a log line, or an engine that is held.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
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
from runtime.bundle import Bundle, write_manifest
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.encoding import OutputDType, decode, encode
from runtime.errors import (
    DeadlineError,
    F2rtError,
    InputError,
    NotFoundError,
    UnavailableError,
)
from runtime.settings import Limits, ServeSettings
from runtime.tokenizer import Truncate
from runtime.wire.f2rt_v1 import SERVICE_NAME
from runtime.wire.kserve_v2 import SERVICE_NAME as KSERVE
from tests.bundles import forge_fingerprint
from tests.serving import (
    LONG,
    SERVING,
    START_S,
    TEXTS,
    ServerProcess,
    child_python,
    failure,
    rows_of_ids,
    wait_until_busy,
)
from tests.serving_in_process import InProcess

EMBED = f"/{SERVICE_NAME}/Embed"
MODEL = "mini"
BIG = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    """Whether vectors are equal up to rounding: how texts share batches follows what batches cost."""
    return a.shape == b.shape and np.allclose(a, b, rtol=0, atol=1e-6)


def vectors_of(answer: pb.EmbedResponse) -> NDArray[np.float32]:
    return np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)


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
    assert same(client.embed([text]).vectors, embedder.embed([text]).vectors)


# --------------------------------------------------------------------------------------------------------------- Embed


def test_vectors_equal_the_embedder_bit_by_bit(client: EmbeddingClient, embedder: Embedder) -> None:
    answer, here = client.embed(TEXTS), embedder.embed(TEXTS)
    assert answer.vectors.dtype == np.float32
    assert answer.vectors.shape == (len(TEXTS), embedder.contract.dim)
    assert same(answer.vectors, here.vectors)
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
    assert same(plain, embedder.embed(texts).vectors)
    assert same(named, embedder.embed(texts, prompt_name="query").vectors)
    assert same(named, client.embed(texts, prompt=prompts["query"]).vectors)
    assert same(named, client.embed([prompts["query"] + t for t in texts]).vectors)
    assert same(plain, client.embed(texts, prompt_name="document").vectors)
    assert same(plain, client.embed(texts, prompt="").vectors)
    assert np.abs(named - plain).max() > 0.01
    own = client.embed(texts, prompt="Instruct: sort\nQuery: ").vectors
    assert same(own, embedder.embed(texts, prompt="Instruct: sort\nQuery: ").vectors)
    assert np.abs(own - named).max() > 0.01


def test_the_checkpoints_default_prompt_is_applied(bundle_copy: Bundle, embedder: Embedder) -> None:
    """A server whose contract names a default prompt uses it when the request names none."""
    contract = replace(bundle_copy.manifest.contract, default_prompt_name="query")
    write_manifest(bundle_copy.folder, replace(bundle_copy.manifest, contract=contract))
    changed = forge_fingerprint(bundle_copy)

    with InProcess(open_embedder(changed)) as server, EmbeddingClient(server.grpc) as client:
        plain = client.embed(TEXTS[:2])
        assert same(plain.vectors, embedder.embed(TEXTS[:2], prompt_name="query").vectors)
        document = client.embed(TEXTS[:2], prompt_name="document")
        assert same(document.vectors, embedder.embed(TEXTS[:2], prompt="").vectors)


@pytest.mark.parametrize("dim", [1, 7, 8, 128, 255, 256])
def test_dimensions_cut_then_normalize(client: EmbeddingClient, embedder: Embedder, dim: int) -> None:
    full = embedder.embed(TEXTS).vectors
    answer = client.embed(TEXTS, dimensions=dim)
    assert same(answer.vectors, embedder.embed(TEXTS, dimensions=dim).vectors)
    assert answer.trained_dimension is (dim in embedder.contract.trained_dims)
    cut = full[:, :dim].astype(np.float64)
    assert np.allclose(answer.vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    raw = client.embed(TEXTS, dimensions=dim, normalize=False)
    assert same(raw.vectors, full[:, :dim])
    assert same(client.embed(TEXTS, dimensions=dim, normalize=True).vectors, answer.vectors)


def test_dimensions_zero_is_the_full_vector(stub: Any, embedder: Embedder) -> None:
    answer = stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=TEXTS), dimensions=0))
    assert answer.dim == embedder.contract.dim
    assert answer.dtype == pb.DTYPE_FLOAT32
    assert answer.trained_dimension
    assert same(vectors_of(answer), embedder.embed(TEXTS).vectors)


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

    assert same(embed(OutputDType.FLOAT32), exact)
    half = raw(pb.DTYPE_FLOAT16)
    halves = np.frombuffer(half.embeddings, "<f2").reshape(exact.shape).astype(np.float32)
    assert (np.abs(halves - exact) <= np.abs(exact) * 2.0**-11 + 2e-6).all()
    assert (np.abs(embed(OutputDType.FLOAT16) - exact) <= np.abs(exact) * 2.0**-11 + 2e-6).all()
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
    assert same(embed(OutputDType.BINARY), np.where(exact > 0, 1, -1))
    assert all(i.scale == 0 for answer in (half, bits) for i in answer.items)


@pytest.mark.parametrize("dtype", list(OutputDType))
@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (2, 256)])
def test_encode_and_decode_are_inverse(dtype: OutputDType, shape: tuple[int, int]) -> None:
    vectors = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    vectors[0] = 0  # a row without direction
    data, scales = encode(vectors, dtype)
    back = decode(data, *shape, dtype, scales)
    if dtype is OutputDType.BINARY:
        assert same(back, np.where(vectors > 0, 1, -1))
    else:
        assert np.allclose(back, vectors, atol={"float32": 0, "float16": 2e-3, "int8": 2e-2}[dtype])
    with pytest.raises(InputError, match="bytes are not"):
        decode(data[:-1], *shape, dtype, scales)


def test_token_ids_are_used_verbatim(client: EmbeddingClient, embedder: Embedder) -> None:
    explained = client.explain(TEXTS, prompt_name="query")
    by_ids = client.embed(token_ids=[i.ids for i in explained])
    assert same(by_ids.vectors, client.embed(TEXTS, prompt_name="query").vectors)
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
        assert same(answer.vectors, embedder.embed(texts, truncate=mode, prompt_name="query").vectors)
    assert np.abs(ends[Truncate.END].vectors[1] - ends[Truncate.START].vectors[1]).max() > 0.001
    assert same(ends[Truncate.END].vectors, client.embed(texts, prompt_name="query").vectors), "default: end"
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
    made = client.embed(["a"]).request_id
    assert re.fullmatch("[0-9a-f]{16}", made), "who gives no id gets one, for the log"
    server.wait_for_line(made)
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
    assert same(answer.vectors, embedder.infer(embedder.verbatim(ids)))
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
    names = ("", SERVICE_NAME, KSERVE, MODEL)
    for name in names:
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
    statuses = stub.List(health_pb2.HealthListRequest()).statuses
    assert {name: answer.status for name, answer in statuses.items()} == dict.fromkeys(names, SERVING)
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
    assert same(vectors, embedder.embed(TEXTS, prompt_name="query", dimensions=64).vectors)


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


def test_every_error_the_client_can_raise_is_an_f2rt_error(server: ServerProcess) -> None:
    """A server that is no f2rt server: the method does not exist there."""
    with server.client() as client:
        client._stub.Embed = client._channel.unary_unary("/other.Service/Embed", lambda r: r.SerializeToString())
        with pytest.raises(F2rtError) as caught:
            client.embed(["a"])
        assert caught.value.message
