"""The HTTP port: keys, the description of the API, metrics, and what is logged."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from runtime.bundle import Bundle
from runtime.embedder import open_embedder
from runtime.wire import http_app, http_body
from tests.http_client import KEY, OTHER, client_of, refused, talk
from tests.serving import ROOT, START_S
from tests.serving_in_process import InProcess

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


# --- what describes the server


def test_openapi_document(web: httpx.Client) -> None:
    document = web.get("/openapi.json").json()
    assert document["openapi"] == "3.1.0"
    statuses = set(document["paths"]["/v1/embeddings"]["post"]["responses"])
    assert statuses == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    for path in document["paths"]:
        if path != "/v1/embeddings":
            assert web.get(path.replace("{name}", "mini")).status_code == 200
    described = document["paths"]["/v1/embeddings"]["post"]["responses"]["200"]["headers"]
    answer = web.post("/v1/embeddings", json={"input": "many words " * 3000})
    assert {name.lower() for name in described} == {name for name in answer.headers if name.startswith("x-")}
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
        quoted = "a most private prompt, with 'quotes' in it"
        for body in (
            {"input": "a most private text"},
            {"input": ["a most private text", 1]},
            {"input": "a", "prompt_name": quoted},
            {"input": "a", "truncate": quoted},
            {"input": "a", "input_type": quoted},
            {"input": "a", "model": quoted},
            {"input": "a", quoted: 1},
        ):
            client.post("/v1/embeddings", json=body, headers=headers)
        client.post("/v1/embeddings", json={"input": "a"}, headers={"authorization": f"Bearer {OTHER}"})
        server.models.expose()
    said = "\n".join(str(record.__dict__) for record in caplog.records if record.name.startswith("f2rt"))
    assert "request" in said
    for secret in ("private", KEY, OTHER):
        assert secret not in said


def test_the_document_is_of_the_engines_that_answer_now(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload may bring a bundle with another contract."""
    with InProcess(open_embedder(bundle), http=True) as server, client_of(server) as client:

        def longest() -> set[int]:
            document = client.get("/openapi.json").json()
            forms = document["components"]["schemas"]["EmbeddingsRequest"]["properties"]["input"]["anyOf"]
            return {form["maxItems"] for form in forms if form.get("items", {}).get("type") == "integer"}

        contract = server.model.embedder.contract
        assert longest() == {contract.max_tokens}
        other = replace(contract, max_tokens=77)
        monkeypatch.setattr(server.model.embedder, "contract", other)
        assert longest() == {77}


def test_metrics_answer_while_every_worker_is_taken(bundle: Bundle) -> None:
    """They are asked for just when a server has much to do."""
    go = threading.Event()
    with InProcess(open_embedder(bundle), http=True) as server, client_of(server) as client:
        taken = [threading.Event() for _ in range(8)]

        def take(event: threading.Event) -> None:
            event.set()
            go.wait(START_S)

        for event in taken:
            work = server.model.pipeline.in_thread(partial(take, event))
            asyncio.run_coroutine_threadsafe(work, server.loop)
        try:
            assert taken[0].wait(START_S)
            assert taken[1].wait(START_S)
            assert not taken[2].is_set()
            assert "f2rt_ready" in client.get("/metrics", timeout=START_S).text
            assert not taken[2].is_set()
        finally:
            go.set()


def test_bodies_that_cannot_be_read_are_counted(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_body, "_SILENCE_S", 0.2)
    with InProcess(open_embedder(bundle), http=True) as server, client_of(server) as client:
        plain = client.post("/v1/embeddings", content="{}", headers={"content-type": "text/plain"})
        assert plain.status_code == 415
        half = b"POST /v1/embeddings HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"
        with talk(server) as peer:
            peer.sendall(half)
            assert peer.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        exposed = client.get("/metrics").text
    for reason in ("invalid_argument", "deadline_exceeded"):
        assert f'f2rt_rejected_requests_total{{model="",reason="{reason}"}} 1.0' in exposed, reason
