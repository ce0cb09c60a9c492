"""f2rt.v1 as its clients see it: a real process on loopback.

Nothing here sleeps until something is ready: tests wait for a health answer, a log line, or an engine that is held.
"""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.bundle import Bundle, write_manifest
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder, open_embedder
from runtime.encoding import OutputDType, decode, encode
from runtime.errors import InputError, NotFoundError
from runtime.tokenizer import Truncate
from tests.bundles import forge_fingerprint
from tests.grpc_messages import same, vectors_of
from tests.serving import START_S, TEXTS, ServerProcess, rows_of_ids
from tests.serving_in_process import InProcess


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
