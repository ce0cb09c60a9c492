"""Metrics tell what happened, under names that the dashboard and Prometheus know."""

from __future__ import annotations

import json
import re
from pathlib import Path

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

import runtime.serving
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.client import EmbeddingClient
from runtime.embedder import Embedder
from runtime.errors import InputError, NotFoundError
from runtime.tokenizer import Instruction, Truncate
from tests.serving import failure
from tests.serving_in_process import InProcess, held, wait_until

DASHBOARD = Path(runtime.serving.__file__).parent / "grafana.json"


def test_a_caller_that_went_away_is_no_server_that_is_not_ready(embedder: Embedder) -> None:
    """Cancelled ones and those whose time was over are counted as what they are, whoever says it first."""
    engine, own = held(embedder)

    def counted(status: str) -> float:
        return server.metric("f2rt_requests_total", model="mini", protocol="grpc", status=status)

    with InProcess(own) as server, server.channel() as channel:
        stub = server.stub(channel)
        first = stub.Embed.future(pb.EmbedRequest(input=pb.EmbedInput(texts=["computing"])))
        engine.wait_begun(1)
        request = pb.EmbedRequest(input=pb.EmbedInput(texts=["waits"]))
        waiting = [stub.Embed.future(request) for _ in range(3)]
        wait_until(lambda: server.model.pipeline.waiting[0] == 3)
        for call in waiting:
            assert call.cancel()
        wait_until(lambda: counted("CANCELLED") == 3)
        late = [stub.Embed.future(request, timeout=0.3) for _ in range(20)]
        assert {call.exception().code() for call in late} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        wait_until(lambda: counted("DEADLINE_EXCEEDED") == 20)
        engine.allow(10)
        assert first.result().rows == 1
        assert counted("CANCELLED") == 3
        assert counted("UNAVAILABLE") == 0
        assert server.metric("f2rt_rejected_requests_total", model="mini", reason="deadline_exceeded") == 20


def test_what_is_counted(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own, http=True) as server, EmbeddingClient(server.grpc) as client:
        client.embed(["a", "word " * 2000])
        with pytest.raises(InputError):
            client.embed([])
        with pytest.raises(NotFoundError):
            client.embed(["a"], model="made-up")
        with server.channel() as channel:  # refused before any model is asked
            failure(lambda: server.stub(channel).Embed(pb.EmbedRequest(dtype=99)))  # type: ignore[arg-type]
            failure(lambda: channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(b"\xff"))
        httpx.post(f"http://{server.http}/v1/embeddings", content=b"{")
        tokens = (
            sum(len(i.ids) for i in embedder.tokenize(["a"], Instruction(prompt=""), Truncate.END))
            + embedder.contract.max_tokens
        )
        for name, labels, value in (
            ("f2rt_requests_total", {"model": "mini", "protocol": "grpc", "status": "OK"}, 1),
            ("f2rt_requests_total", {"model": "mini", "protocol": "grpc", "status": "INVALID_ARGUMENT"}, 1),
            ("f2rt_requests_total", {"model": "", "protocol": "grpc", "status": "NOT_FOUND"}, 1),
            ("f2rt_requests_total", {"model": "", "protocol": "grpc", "status": "INVALID_ARGUMENT"}, 1),
            ("f2rt_requests_total", {"model": "", "protocol": "kserve", "status": "INVALID_ARGUMENT"}, 1),
            ("f2rt_requests_total", {"model": "", "protocol": "http", "status": "INVALID_ARGUMENT"}, 1),
            ("f2rt_rejected_requests_total", {"model": "mini", "reason": "invalid_argument"}, 1),
            ("f2rt_texts_total", {"model": "mini"}, 2),
            ("f2rt_truncated_texts_total", {"model": "mini"}, 1),
            ("f2rt_tokens_total", {"model": "mini"}, tokens),
            ("f2rt_request_seconds_count", {"model": "mini"}, 1),
            ("f2rt_ready", {"model": "mini"}, 1),
            ("f2rt_queue_requests", {"model": "mini"}, 0),
        ):
            assert server.metric(name, **labels) == value, name
        info = {
            "model": "mini",
            "fingerprint": own.fingerprint,
            "engine": own.loaded.record.full_name,
            "precision": "fp32",
        }
        assert server.metric("f2rt_engine_info", **info) == 1
        whole, parts = (server.metric(f"f2rt_{name}_seconds_sum", model="mini") for name in ("request", "tokenize"))
        assert 0 < parts < whole


def test_the_exposition_is_clean_and_the_dashboard_knows_its_names(embedder: Embedder) -> None:
    _, own = held(embedder, permits=1000)
    with InProcess(own) as server, EmbeddingClient(server.grpc) as client:
        client.embed(["a"])
        text = server.models.expose().decode()
    families = list(text_string_to_metric_families(text))
    samples = {sample.name for family in families for sample in family.samples}
    for family in families:
        assert family.documentation, family.name
        assert family.name.startswith("f2rt_")
        assert len({(s.name, tuple(sorted(s.labels.items()))) for s in family.samples}) == len(family.samples)
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    dashboard = json.loads(DASHBOARD.read_text())
    used = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            used |= set(re.findall(r"f2rt_\w+", target["expr"]))
    # Counters with labels that nothing has set yet have no samples: their declaration counts.
    known = samples | {f"{name}{suffix}" for name in declared for suffix in ("", "_bucket", "_sum", "_count", "_total")}
    assert used <= known, used - known
    assert "f2rt_golden_cosine" in used
    every = next(v["allValue"] for v in dashboard["templating"]["list"] if v["name"] == "model")
    assert re.fullmatch(every, ""), "what was refused before a model was known has none"
