"""The HTTP port with a client of its own: every status of the table, hostile requests, keys, metrics, the description.

The server runs in the test's process, with an engine that waits for the test where time must stand.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

import runtime
from runtime.bundle import Bundle
from runtime.embedder import Embedder, open_embedder
from runtime.errors import STATUS, EngineError
from runtime.settings import SchedulingSettings
from runtime.wire import http_app
from tests.serving import ROOT, START_S
from tests.serving_in_process import InProcess, held, wait_until

TEXTS = [
    "Where is the library?",
    "La bibliothèque est fermée le lundi.",
    "图书馆在哪里？",
    "",
    "NUL \x00 inside",
    "👩‍🔬",
]
JSON = {"content-type": "application/json"}
KEY, OTHER = "0123456789abcdef-first", "fedcba9876543210-second"


@pytest.fixture(scope="module")
def embedder(bundle: Bundle) -> Iterator[Embedder]:
    opened = open_embedder(bundle)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[InProcess]:
    with InProcess(open_embedder(bundle), http=True) as server:
        yield server


@pytest.fixture
def web(served: InProcess) -> Iterator[httpx.Client]:
    """A client; after the test the same server still gives the right vector."""
    with client_of(served) as client:
        yield client
        assert client.get("/health/ready").status_code == 200
        assert client.post("/v1/embeddings", json={"input": "still here"}).status_code == 200


def client_of(server: InProcess, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=f"http://{server.http}", timeout=START_S, trust_env=False, **options)


def vectors_of(answer: httpx.Response) -> NDArray[np.float32]:
    """Return float32 [n, dim] of an answer, in whatever encoding it is."""
    assert answer.status_code == 200, answer.text
    rows = []
    for number, row in enumerate(answer.json()["data"]):
        assert (row["index"], row["object"]) == (number, "embedding")
        given = row["embedding"]
        rows.append(
            np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given, np.float32)
        )
    return np.stack(rows)


def refused(answer: httpx.Response, status: int, words: str = "") -> dict[str, Any]:
    """Check a refusal, and return its error as OpenAI's clients read it."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert body["error"]["type"] == (
        "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    )
    assert len(body["error"]["message"]) < 1000
    assert re.search(words, body["error"]["message"]), body["error"]["message"]
    return dict(body["error"])


# --- answers


@pytest.mark.parametrize("encoding", ["float", "base64", None])
def test_vectors_are_the_embedders(web: httpx.Client, embedder: Embedder, encoding: str | None) -> None:
    answer = web.post("/v1/embeddings", json={"input": TEXTS, "model": "mini", "encoding_format": encoding})
    expected = embedder.embed(TEXTS)
    # Rows share batches of other shapes here and there: equal up to the last bits.
    assert np.abs(vectors_of(answer) - expected.vectors).max() < 2e-6
    body = answer.json()
    tokens = sum(len(item.ids) for item in expected.items)
    assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (body["model"], body["object"]) == ("mini", "list")
    assert body["fingerprint"] == answer.headers["x-f2rt-fingerprint"] == embedder.fingerprint


def test_float_and_base64_are_the_same_numbers(web: httpx.Client) -> None:
    answers = [web.post("/v1/embeddings", json={"input": "a", "encoding_format": e}) for e in ("float", "base64")]
    assert np.array_equal(*map(vectors_of, answers))


def test_one_text_is_bitwise_the_embedders(web: httpx.Client, embedder: Embedder) -> None:
    for text in TEXTS:
        got = vectors_of(web.post("/v1/embeddings", json={"input": text, "encoding_format": "base64"}))
        assert np.array_equal(got, embedder.embed([text]).vectors)


def test_four_forms_of_input(web: httpx.Client, embedder: Embedder) -> None:
    expected = embedder.embed(["two words"])
    ids = expected.items[0].ids
    for given in ("two words", ["two words"], ids, [ids], [float(i) for i in ids]):
        assert np.array_equal(vectors_of(web.post("/v1/embeddings", json={"input": given})), expected.vectors)


@pytest.mark.parametrize(
    ("fields", "arguments"),
    [
        ({"dimensions": 64}, {"dimensions": 64}),
        ({"dimensions": 64.0}, {"dimensions": 64}),
        ({"dimensions": None}, {}),
        ({"normalize": False, "dimensions": 64}, {"dimensions": 64, "normalize": False}),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"input_type": "query"}, {"prompt_name": "query"}),
        ({"input_type": "passage"}, {"prompt_name": "document"}),
        ({"input_type": "document"}, {"prompt_name": "document"}),
        ({"prompt": "Say: "}, {"prompt": "Say: "}),
        ({"user": "somebody", "model": None, "truncate": "error"}, {}),
    ],
)
def test_fields(web: httpx.Client, embedder: Embedder, fields: dict[str, Any], arguments: dict[str, Any]) -> None:
    got = vectors_of(web.post("/v1/embeddings", json={"input": "where?", **fields}))
    assert np.array_equal(got, embedder.embed(["where?"], **arguments).vectors)


def test_truncation(web: httpx.Client, embedder: Embedder) -> None:
    long = "many words " * 3000
    end, start = (vectors_of(web.post("/v1/embeddings", json={"input": long, "truncate": t})) for t in ("end", "start"))
    assert np.array_equal(end, embedder.embed([long]).vectors)
    assert not np.array_equal(start, end)
    refused(web.post("/v1/embeddings", json={"input": long, "truncate": "error"}), 400, "tokens")


def test_request_ids(web: httpx.Client) -> None:
    given = web.post("/v1/embeddings", json={"input": "a"}, headers={"X-Request-ID": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [web.post("/v1/embeddings", json={"input": "a"}).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    odd = web.post("/v1/embeddings", json={"input": "a"}, headers={"X-Request-ID": b"a\x7fb"})
    assert odd.headers["x-request-id"] != "a\x7fb"  # it would go into logs


def test_models(web: httpx.Client) -> None:
    listed = web.get("/v1/models").json()
    assert [(m["id"], m["object"], m["owned_by"]) for m in listed["data"]] == [("mini", "model", "f2rt")]
    assert web.get("/v1/models/mini").json() == listed["data"][0]
    refused(web.get("/v1/models/other"), 404, "there is no model 'other'; this server has: mini")
    refused(web.get("/v1/models/"), 404)


def test_health_and_info(web: httpx.Client, served: InProcess, embedder: Embedder) -> None:
    assert web.get("/health/live").json() == {"status": "live"}
    ready = web.get("/health/ready").json()
    assert ready["status"] == "ready"
    assert ready["models"]["mini"]["state"] == "ready"
    assert ready["models"]["mini"]["golden_cosine"] > 0.99999
    info = web.get("/info").json()
    assert info["version"] == runtime.__version__
    (mini,) = info["models"]
    assert mini["fingerprint"] == embedder.fingerprint
    assert (mini["name"], mini["engine"], mini["verdict"]) == ("mini", "onnxruntime:fp32", "pass")
    assert mini["max_tokens"] == embedder.contract.max_tokens
    assert set(mini["prompts"]) == {"query", "document"}


# --- the status table


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "input"),
        ({"input": []}, "empty"),
        ({"input": [[]]}, "empty"),
        ({"input": ["text", 1]}, "mixes"),
        ({"input": [1, [1]]}, "mixes"),
        ({"input": [["text"]]}, r"\$.input\[0\]\[0\]"),
        ({"input": [True]}, r"\$.input\[0\]"),
        ({"input": [0.5]}, "0.5"),
        ({"input": None}, "input"),
        ({"input": "a", "unheard_of": 1}, "unheard_of"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": -1}, "dimensions"),
        ({"input": "a", "dimensions": 257}, "257.*256"),
        ({"input": "a", "dimensions": 1.5}, "1.5"),
        ({"input": "a", "dimensions": "8"}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate": "middle"}, "truncate"),
        ({"input": "a", "normalize": 1}, "normalize"),
        ({"input": "a", "input_type": "clustering"}, "input_type"),
        ({"input": "a", "input_type": "query", "prompt": "p"}, "both"),
        ({"input": "a", "prompt_name": "query", "prompt": "p"}, "both"),
        ({"input": [1, 2, 3]}, "check_embedding_ctx_length"),
        ({"input": [[15986], [7]]}, "token ids 1 .*EOS"),
        ({"input": [10**30]}, "range|EOS"),
        ({"input": [99_999_999, 15986]}, "ids go from 0"),
        ({"input": [-1, 15986]}, "ids go from 0"),
        ({"input": [15986] * 2000}, "limit is 1024"),
        ({"input": "x" * 1_000_001}, "1000001 characters"),
        ({"input": ["a"] * 10_000}, "10000 items; it may have 1 to 2048"),
        ({"input": [15986], "prompt": "p"}, "verbatim"),
    ],
)
def test_400(web: httpx.Client, body: dict[str, Any], words: str) -> None:
    refused(web.post("/v1/embeddings", json=body), 400, words)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"input"',
        b'{"input": "a"} and more',
        b'{"input": NaN}',
        b'{"input": "\xff"}',  # no UTF-8
        b'{"input": "\xed\xa0\x80"}',  # a surrogate, encoded as UTF-8 must not
        b'{"input": "\\ud800"}',  # half a character
        b'{"input": "\\udc00 and text after it"}',
        b'{"input": ["fine", "\\ud800\\ud800"]}',
        b'{"prompt": "\\udfff", "input": "a"}',
        b'\xef\xbb\xbf{"input": "a"}',
        b'{"input": "a", "dimensions": 1e400}',
        b'{"input": "a", "dimensions": ' + b"9" * 5000 + b"}",
        b"[" * 1_000_000,
        b'{"input":' * 200_000,
        b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"input": "a", "' + b"x" * 1_000_000 + b'": 1}',
    ],
)
def test_bodies_that_are_no_request(web: httpx.Client, body: bytes) -> None:
    refused(web.post("/v1/embeddings", content=body, headers=JSON), 400)


def test_escapes_of_whole_characters_are_text(web: httpx.Client, embedder: Embedder) -> None:
    got = vectors_of(web.post("/v1/embeddings", content=b'{"input": "\\ud83d\\ude00 \\u0000"}', headers=JSON))
    assert np.array_equal(got, embedder.embed(["😀 \x00"]).vectors)


def test_a_million_characters_are_cut_and_answered(web: httpx.Client, embedder: Embedder) -> None:
    text = "long " * 200_000
    assert np.array_equal(vectors_of(web.post("/v1/embeddings", json={"input": text})), embedder.embed([text]).vectors)


def test_404_and_405(web: httpx.Client) -> None:
    refused(web.post("/v1/embeddings", json={"input": "a", "model": "gpt-5"}), 404, "there is no model 'gpt-5'")
    refused(web.post("/v1/embeddings", json={"input": "a", "prompt_name": "nope"}), 404, "there is no prompt 'nope'")
    for path in ("/", "/v1", "/v1/embeddings/", "/health/live/", "/%00", "/v1/chat/completions", "/../etc/passwd"):
        refused(web.get(path), 404, "See /docs")
    answer = web.get("/v1/embeddings")
    refused(answer, 405, "does not take GET")
    assert answer.headers["allow"] == "POST"
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        refused(web.request(method, "/v1/models"), 405, method)


def test_415(web: httpx.Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", "multipart/form-data"):
        answer = web.post("/v1/embeddings", content=b'{"input": "a"}', headers={"content-type": kind})
        refused(answer, 415, re.escape(kind))
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        vectors_of(web.post("/v1/embeddings", content=b'{"input": "a"}', headers={"content-type": kind}))


def test_compressed_bodies_are_refused_unread(web: httpx.Client) -> None:
    bomb = gzip.compress(b'{"input": "' + b"a" * 50_000_000 + b'"}')
    for encoding in ("gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"):
        answer = web.post("/v1/embeddings", content=bomb, headers={**JSON, "content-encoding": encoding})
        refused(answer, 415, "compressed")
    vectors_of(web.post("/v1/embeddings", content=b'{"input": "a"}', headers={**JSON, "content-encoding": "identity"}))


def test_413_for_announced_and_for_streamed_bodies(bundle: Bundle) -> None:
    with InProcess(open_embedder(bundle), http=True, max_message_bytes=10_000) as server, client_of(server) as client:
        fits = b'{"input": "' + b"a" * 9_980 + b'"}'
        assert client.post("/v1/embeddings", content=fits, headers=JSON).status_code == 200
        refused(client.post("/v1/embeddings", content=b"x" * 10_001, headers=JSON), 413, "10001 bytes.*limit is 10000")
        streamed = client.post("/v1/embeddings", content=iter([b"x" * 1000] * 11), headers=JSON)
        refused(streamed, 413, "limit is 10000")
        # What is only announced is refused without waiting for it.
        with talk(server) as peer:
            peer.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n")
            assert peer.recv(12) == b"HTTP/1.1 413"
        assert client.post("/v1/embeddings", content=fits, headers=JSON).status_code == 200


def test_429_says_when_to_come_back(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle))
    scheduling = SchedulingSettings(max_waiting_requests=1)
    with (
        InProcess(embedder, http=True, scheduling=scheduling) as server,
        client_of(server) as client,
        sending() as send,
    ):
        first = send(lambda: client.post("/v1/embeddings", json={"input": "computing"}))
        engine.wait_begun(1)
        second = send(lambda: client.post("/v1/embeddings", json={"input": "waiting"}))
        wait_until(lambda: server.model.pipeline.waiting[0] == 1)
        answer = client.post("/v1/embeddings", json={"input": "too many"})
        error = refused(answer, 429, "1 requests are waiting; the limit is 1")
        assert error["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) > 0
        engine.allow(10)
        assert first.result().status_code == second.result().status_code == 200
        assert len(engine.begun) == 2
        assert server.metric("f2rt_rejected_requests_total", model="mini", reason="resource_exhausted") == 1


def test_500_for_an_engine_that_fails_and_503_from_then_on(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle), permits=10_000)
    with InProcess(embedder, http=True) as server, client_of(server) as client:
        engine.fault = EngineError("the device is gone.")
        refused(client.post("/v1/embeddings", json={"input": "a"}), 500, "the device is gone")
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        refused(client.post("/v1/embeddings", json={"input": "a"}), 503, "mini does not answer")
    assert len(engine.begun) < 20  # a broken engine is looked at once a period, not without a pause


def test_500_for_a_fault_of_ours_tells_nothing(
    served: InProcess, web: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise RuntimeError("secret detail")

    with monkeypatch.context() as patch:
        patch.setattr(http_app.openai_v1, "make_call", broken)
        error = refused(web.post("/v1/embeddings", json={"input": "a"}), 500, "unexpected error")
    assert "secret" not in str(error)
    assert "secret detail" in caplog.text  # the operator sees it


def test_503_while_the_golden_check_fails(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle), permits=10**6)
    with InProcess(embedder, http=True, golden_period_s=0.02) as server, client_of(server) as client:
        assert client.get("/health/ready").status_code == 200
        engine.turn = 0.5
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        state = client.get("/health/ready").json()
        assert state["status"] == "not ready"
        assert state["models"]["mini"]["state"] == "failing"
        assert state["models"]["mini"]["golden_cosine"] < 0.99
        refused(client.post("/v1/embeddings", json={"input": "a"}), 503, "mini does not answer")
        assert client.get("/health/live").status_code == 200
        engine.turn = 0.0
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200


def test_503_while_draining_and_what_was_admitted_is_answered(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle))
    with InProcess(embedder, http=True) as server, client_of(server) as client, sending() as send:
        admitted = send(lambda: client.post("/v1/embeddings", json={"input": "admitted"}))
        engine.wait_begun(1)
        stopping = server.stopping()
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        assert client.get("/health/ready").json()["models"]["mini"]["state"] == "draining"
        refused(client.post("/v1/embeddings", json={"input": "late"}), 503, "shutting down")
        engine.allow(10)
        assert admitted.result().status_code == 200
        stopping.result(START_S)
        with pytest.raises(httpx.ConnectError):
            client_of(server).get("/health/live")


def test_504_once_the_callers_time_is_over(bundle: Bundle) -> None:
    engine, embedder = held(open_embedder(bundle))
    with InProcess(embedder, http=True) as server, client_of(server) as client, sending() as send:
        first = send(lambda: client.post("/v1/embeddings", json={"input": "computing"}))
        engine.wait_begun(1)
        late = client.post("/v1/embeddings", json={"input": "no time"}, headers={"X-Request-Timeout": "0.05"})
        assert refused(late, 504, "deadline")["code"] == "deadline_exceeded"
        engine.allow(10)
        assert first.result().status_code == 200
        patient = client.post("/v1/embeddings", json={"input": "time"}, headers={"X-Request-Timeout": "60"})
        assert patient.status_code == 200
        assert len(engine.begun) == 2  # the late one cost the engine nothing


@pytest.mark.parametrize("given", ["", "soon", "-1", "0", "nan", "inf", "1e9", "86401", "1_0", "٣", "0x10", "1 s"])
def test_timeouts_that_are_none(web: httpx.Client, given: str) -> None:
    headers = {"X-Request-Timeout": given.encode()}
    refused(web.post("/v1/embeddings", json={"input": "a"}, headers=headers), 400, "X-Request-Timeout")


def test_every_status_of_the_table_is_tested_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for status in STATUS.values():
        if status.grpc != "FAILED_PRECONDITION":  # of commands, before anything listens
            assert re.search(rf"refused\(.*, {status.http}\b", source), status


# --- keys


def test_keys(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nfirst:{KEY}\n", encoding="utf-8")
    with InProcess(open_embedder(bundle), http=True, keys_file=str(file)) as server, client_of(server) as client:
        assert client.get("/health/live").status_code == 200
        assert client.get("/health/ready").status_code == 200
        closed = ("/v1/models", "/v1/models/mini", "/info", "/metrics", "/docs", "/openapi.json")
        for path in closed:
            answer = client.get(path)
            refused(answer, 401, "no API key")
            assert answer.headers["www-authenticate"] == "Bearer"
            assert client.get(path, headers={"authorization": f"Bearer {KEY}"}).status_code == 200

        def embed(headers: dict[str, str]) -> httpx.Response:
            return client.post("/v1/embeddings", json={"input": "a"}, headers=headers)

        assert refused(embed({}), 401)["code"] == "invalid_api_key"
        for shown in ("Bearer", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY):
            refused(embed({"authorization": shown}), 401)
        refused(embed({"x-api-key": OTHER}), 401)
        refused(embed({"authorization": "Bearer wrong", "x-api-key": KEY}), 401)
        assert embed({"x-api-key": KEY}).status_code == 200
        assert embed({"authorization": f"bearer {KEY}"}).status_code == 200
        # A body without a key is not even read.
        with talk(server) as peer:
            peer.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n")
            assert peer.recv(12) == b"HTTP/1.1 401"

        file.write_text(f"first:{KEY}\nsecond:{OTHER}\n", encoding="utf-8")
        assert embed({"x-api-key": OTHER}).status_code == 401
        reload_keys(server)
        assert embed({"x-api-key": OTHER}).status_code == embed({"x-api-key": KEY}).status_code == 200
        file.write_text(f"second:{OTHER}\n", encoding="utf-8")
        reload_keys(server)
        refused(embed({"x-api-key": KEY}), 401)
        assert embed({"x-api-key": OTHER}).status_code == 200
        file.write_text("short\n", encoding="utf-8")
        reload_keys(server)
        assert embed({"x-api-key": OTHER}).status_code == 200  # a broken file changes nothing


def reload_keys(server: InProcess) -> None:
    async def reload() -> None:
        await server.server._reload()

    server.run(reload())


# --- peers that misbehave


@contextlib.contextmanager
def talk(server: InProcess) -> Iterator[socket.socket]:
    host, _, port = server.http.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=START_S) as peer:
        yield peer


@contextlib.contextmanager
def sending() -> Iterator[Callable[[Callable[[], httpx.Response]], Future[httpx.Response]]]:
    """Give what sends requests from other threads."""
    with ThreadPoolExecutor(4) as threads:
        yield threads.submit


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
    monkeypatch.setattr(http_app, "_SILENCE_S", 0.05)
    with InProcess(open_embedder(bundle), http=True) as server, talk(server) as peer:
        peer.send(b'POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"input": ')
        assert peer.recv(12) == b"HTTP/1.1 408"


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
        big = {"input": ["many words " * 400] * 300}
        assert client.post("/v1/embeddings", json=big).status_code == 200
        assert client.get("/metrics").status_code == 200
    assert not [r.getMessage() for r in caplog.records if "took" in r.getMessage() and r.name == "asyncio"]


# --- what describes the server


def test_openapi_document(web: httpx.Client) -> None:
    document = web.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    statuses = set(document["paths"]["/v1/embeddings"]["post"]["responses"])
    assert statuses == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    for path in document["paths"]:
        if path != "/v1/embeddings":
            assert web.get(path.replace("{name}", "mini")).status_code == 200
    fields = document["components"]["schemas"]["EmbeddingsRequest"]["properties"]
    assert set(fields) == set(http_app.openai_v1.EmbeddingsRequest.__struct_fields__)
    assert "security" not in document


class _Loads(HTMLParser):
    """Collects what a page would load or run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object", "embed", "video", "audio", "base", "form"):
            self.found.append((tag, None))
        self.found += [(name, value) for name, value in attrs if name in ("src", "srcset", "action", "style")]
        self.found += [(n, v) for n, v in attrs if (n == "href" and "//" in (v or "")) or n.startswith("on")]


def test_the_page_loads_nothing(web: httpx.Client) -> None:
    answer = web.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = _Loads()
    page.feed(answer.text)
    assert page.found == []
    assert "url(" not in answer.text
    assert "@import" not in answer.text
    for path in web.get("/openapi.json").json()["paths"]:
        assert path in answer.text
    assert all(field in answer.text for field in http_app.openai_v1.EmbeddingsRequest.__struct_fields__)


# --- metrics

_UNITS = ("_seconds", "_total", "_info", "_ratio", "_cosine", "_rows", "_tokens", "_texts", "_requests", "_ready")


def test_metrics(bundle: Bundle) -> None:
    with InProcess(open_embedder(bundle), http=True) as server, client_of(server) as client:
        before = client.get("/metrics")
        assert before.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert client.post("/v1/embeddings", json={"input": ["a", "b"]}).status_code == 200
        refused(client.post("/v1/embeddings", json={"input": "a", "dimensions": 9999}), 400)
        exposed = client.get("/metrics").text
        families = {family.name: family for family in text_string_to_metric_families(exposed)}
        values = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in families.values()
            for sample in family.samples
        }
        labels = ("model", "mini"), ("protocol", "http")
        assert values["f2rt_requests_total", *labels, ("status", "OK")] == 1
        assert values["f2rt_requests_total", *labels, ("status", "INVALID_ARGUMENT")] == 1
        assert values["f2rt_texts_total", ("model", "mini")] == 2
        assert values["f2rt_request_seconds_count", ("model", "mini")] == 1
        assert values["f2rt_ready", ("model", "mini")] == 1
        assert values["f2rt_golden_cosine", ("model", "mini")] > 0.99999
        info = families["f2rt_engine_info"].samples[0].labels
        assert info["fingerprint"] == server.model.embedder.fingerprint
        assert (info["engine"], info["precision"]) == ("onnxruntime:fp32", "fp32")


def test_metrics_are_clean(web: httpx.Client) -> None:
    assert web.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    exposed = web.get("/metrics").text
    assert exposed.endswith("\n")
    lines = exposed.splitlines()
    typed = [line.split()[2] for line in lines if line.startswith("# TYPE ")]
    assert len(typed) == len(set(typed)), "a family is declared twice"
    for family in text_string_to_metric_families(exposed):
        assert re.fullmatch(r"f2rt_[a-z][a-z0-9_]*", family.name)
        assert family.documentation
        assert not family.documentation.endswith(".")
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert (sample.name.endswith("_total")) == (family.type == "counter"), sample.name
            if family.type == "histogram":
                assert sample.name.endswith(("_bucket", "_sum", "_count"))
            assert all(re.fullmatch(r"[a-z_]+", name) for name in sample.labels)
            assert len(family.samples) < 200  # labels stay few
    seconds = {name for name in typed if re.search("time|latency|duration|_ms|millis", name)}
    assert not seconds, "times are in seconds"
    # One series is one line, or Prometheus throws the scrape away.
    series = [line.rpartition(" ")[0] for line in lines if not line.startswith("#")]
    assert len(series) == len(set(series))


def promtool() -> str | None:
    own = ROOT / ".venv-clients" / "bin" / "promtool"
    return str(own) if own.exists() else shutil.which("promtool")


def test_promtool_has_nothing_to_say(web: httpx.Client) -> None:
    tool = promtool()
    if tool is None:
        pytest.skip("there is no promtool: run make clients")
    assert web.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    done = subprocess.run(
        [tool, "check", "metrics"], input=web.get("/metrics").text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_texts_and_keys_are_not_logged(bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n", encoding="utf-8")
    with InProcess(open_embedder(bundle), http=True, keys_file=str(file)) as server, client_of(server) as client:
        headers = {"authorization": f"Bearer {KEY}"}
        for body in ({"input": "a most private text"}, {"input": ["a most private text", 1]}):
            client.post("/v1/embeddings", json=body, headers=headers)
        client.post("/v1/embeddings", json={"input": "a"}, headers={"authorization": f"Bearer {OTHER}"})
        server.models.expose()
    said = "\n".join(str(record.__dict__) for record in caplog.records if record.name.startswith("f2rt"))
    assert "request" in said
    for secret in ("private", KEY, OTHER):
        assert secret not in said
