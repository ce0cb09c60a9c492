"""The HTTP port with a client of its own: answers, and every status of the table.

The server runs in the test's process, with an engine that waits for the test where time must stand.
"""

from __future__ import annotations

import gzip
import re
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import runtime
from runtime.bundle import Bundle
from runtime.embedder import Embedder, open_embedder
from runtime.errors import STATUS, EngineError, InputError
from runtime.settings import Limits, SchedulingSettings
from runtime.wire import http_app
from runtime.wire.openai_v1 import decode_request
from tests.http_client import JSON, TEXTS, client_of, refused, sending, talk, vectors_of
from tests.serving import START_S
from tests.serving_in_process import InProcess, held, wait_until

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
    for given, cut in (([long, "short", long], "2"), (["short"], None)):
        answer = web.post("/v1/embeddings", json={"input": given})
        assert answer.headers.get("x-f2rt-truncated") == cut


def test_request_ids(web: httpx.Client) -> None:
    given = web.post("/v1/embeddings", json={"input": "a"}, headers={"X-Request-ID": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    made = [web.post("/v1/embeddings", json={"input": "a"}).headers["x-request-id"] for _ in range(2)]
    assert made[0] != made[1]
    odd = web.post("/v1/embeddings", json={"input": "a"}, headers={"X-Request-ID": b"a\x7fb"})
    assert odd.headers["x-request-id"] != "a\x7fb"  # it would go into logs


def test_a_refusal_has_the_requests_id(web: httpx.Client, served: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "f2rt.access")
    for number, (path, more, status) in enumerate(
        [
            ("/v1/embeddings", {"json": {"input": "a", "dimensions": 9999}}, 400),
            ("/v1/embeddings", {"content": b"{"}, 400),
            ("/v1/embeddings", {"json": {"input": "a", "model": "other"}}, 404),
            ("/v1/embeddings", {"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
            ("/v1/nowhere", {"json": {}}, 404),
            ("/info", {"json": {}}, 405),
        ]
    ):
        headers = {**more.pop("headers", {}), "x-request-id": f"mine-{number}"}  # type: ignore[dict-item, attr-defined]
        answer = web.post(path, headers=headers, **more)  # type: ignore[arg-type]
        refused(answer, status)
        assert answer.headers["x-request-id"] == f"mine-{number}"
        assert len(web.post(path, **more).headers["x-request-id"]) == 16  # type: ignore[arg-type]
    served.models.expose()
    logged = [r.fields["request_id"] for r in caplog.records if r.name == "f2rt.access"]  # type: ignore[attr-defined]
    assert {"mine-0", "mine-1", "mine-2"} <= set(logged)
    assert "" not in logged


def test_what_a_refusal_quotes_is_cut(web: httpx.Client) -> None:
    for field in ("prompt_name", "model", "input_type"):
        answer = web.post("/v1/embeddings", json={"input": "a", field: "x" * 200_000})
        refused(answer, 400 if field == "input_type" else 404, "Give one of: query" if field == "input_type" else "")
        assert len(answer.content) < 1000


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
        ({"input": "a", "encoding_format": "hex"}, "encoding_format.*Give one of: float, base64"),
        ({"input": "a", "truncate": "middle"}, "truncate.*Give one of: error, end, start"),
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


def flood(value: str, number: int, first: str = "") -> bytes:
    return f'{{"input": [{first}{",".join([value] * number)}]}}'.encode()


FLOODS = {
    "lists": flood("[]", 400_000),
    "floats": flood("0.5", 400_000),
    "ids": flood("7", 400_000),
    "rows": flood("[7,7]", 200_000),
    "texts": flood('""', 400_000),
    "lists after a text": flood("[]", 400_000, first='"a, \\\\\\" and \\\\",'),
    "lists before a text without an end": flood("[]", 400_000) + b'"',
    "texts without a comma": flood("7", 310_000) + b'""' * 400_000,
}


@pytest.mark.parametrize("case", list(FLOODS))
def test_a_flood_of_values_is_refused_before_anything_is_made_of_it(web: httpx.Client, case: str) -> None:
    refused(web.post("/v1/embeddings", content=FLOODS[case], headers=JSON), 400, "more than 302048 values")
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="more than 302048 values"):
            decode_request(FLOODS[case], Limits())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_commas_in_texts_are_no_values(web: httpx.Client, embedder: Embedder) -> None:
    texts = [', , \\ " ,[' * 60_000, "a,b"]
    got = vectors_of(web.post("/v1/embeddings", json={"input": texts}))
    assert np.abs(got - embedder.embed(texts).vectors).max() < 2e-6


@pytest.mark.parametrize(
    ("body", "half"),
    [
        (b'{"input": "\\ud800"}', "ud800"),
        (b'{"input": "\\\\ud83d\\ude00 \\udc00 and text after it"}', "ude00"),
        (b'{"input": ["\\ud83d\\ude00 is fine", "\\uD800\\ud800"]}', "uD800"),
        (b'{"prompt": "\\udfff", "input": "a"}', "udfff"),
    ],
)
def test_half_a_character_is_named(web: httpx.Client, body: bytes, half: str) -> None:
    answer = web.post("/v1/embeddings", content=body, headers=JSON)
    refused(answer, 400, rf"half a character: \\{half} without its other half")


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
        server.models.expose()
        registry = server.models.metrics.registry
        seen = {
            (sample.labels["model"], sample.labels["status"]): sample.value
            for family in registry.collect()
            for sample in family.samples
            if sample.name == "f2rt_requests_total" and sample.value
        }
        assert seen == {("mini", "DEADLINE_EXCEEDED"): 1}  # once, and under its model's name
        engine.allow(10)
        assert first.result().status_code == 200
        patient = client.post("/v1/embeddings", json={"input": "time"}, headers={"X-Request-Timeout": "60"})
        assert patient.status_code == 200
        assert len(engine.begun) == 2  # the late one cost the engine nothing


@pytest.mark.parametrize("given", ["", "soon", "-1", "0", "nan", "inf", "1e9", "86401", "1_0", "٣", "0x10", "1 s"])
def test_timeouts_that_are_none(web: httpx.Client, given: str) -> None:
    headers = {"X-Request-Timeout": given.encode()}
    refused(web.post("/v1/embeddings", json={"input": "a"}, headers=headers), 400, "X-Request-Timeout")


def test_every_status_of_the_table_is_tested() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_serve_http*.py"))
    for status in STATUS.values():
        # The first are of commands, before anything listens; the second nobody waits for.
        if status.grpc not in ("FAILED_PRECONDITION", "CANCELLED"):
            assert re.search(rf"refused\(.*, {status.http}\b", source), status
