"""Traces as a collector gets them: a real OTLP receiver on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime._pb.inference import grpc_service_pb2 as kserve
from runtime._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from runtime.bundle import Bundle
from tests.serving import START_S, ServerProcess, failure

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes spans."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/traces"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_requests_span_joins_the_callers_trace(bundle: Bundle, collector: Collector) -> None:
    secret = "nobody may read this"
    with ServerProcess(bundle.folder, "--set", f"otlp_endpoint={collector.url}") as server:
        with grpc.insecure_channel(server.address) as channel:
            stub = pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
            headers = [("traceparent", f"00-{TRACE}-{PARENT}-01")]
            request = pb.EmbedRequest(input=pb.EmbedInput(texts=[secret]), request_id="r1")
            answer = stub.Embed(request, metadata=headers)
            failure(lambda: stub.Embed(pb.EmbedRequest(), metadata=headers))
        assert server.stop() == 0, "what is not sent yet is sent at the end"
    answered, refused = (s for s in collector.spans if s.name == "embed")
    assert (answered.trace_id.hex(), answered.parent_span_id.hex()) == (TRACE, PARENT)
    attributes = {a.key: a.value.string_value or a.value.int_value for a in answered.attributes}
    assert attributes["f2rt.fingerprint"] == answer.fingerprint
    assert attributes["f2rt.request_id"] == "r1"
    assert attributes["f2rt.tokens"] == answer.items[0].tokens
    assert answered.end_time_unix_nano - answered.start_time_unix_nano == pytest.approx(
        1e6 * answer.timings.total_ms, rel=0.01
    )
    children = {s.name: s for s in collector.spans if s.parent_span_id == answered.span_id}
    assert set(children) == {"tokenize", "queue", "infer"}
    assert refused.status.code == 2
    assert {a.key: a.value.string_value for a in refused.attributes}["f2rt.status"] == "INVALID_ARGUMENT"
    assert not any(secret in str(span) for span in collector.spans)


def test_over_http_and_kserve_it_does_as_well(bundle: Bundle, collector: Collector) -> None:
    traceparent = f"00-{TRACE}-{PARENT}-01"
    with ServerProcess(bundle.folder, "--set", f"otlp_endpoint={collector.url}", http=True) as server:
        headers = {"traceparent": traceparent, "x-request-id": "r2"}
        for body in ({"input": "a"}, {"input": []}):
            httpx.post(f"http://{server.http}/v1/embeddings", json=body, headers=headers, timeout=START_S)
        with grpc.insecure_channel(server.address) as channel:
            infer = kserve_grpc.GRPCInferenceServiceStub(channel).ModelInfer  # type: ignore[no-untyped-call]
            message = kserve.ModelInferRequest(model_name="mini", id="r3")
            message.inputs.add(name="text", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"a")
            infer(message, metadata=[("traceparent", traceparent)])
        assert server.stop() == 0
    spans = [s for s in collector.spans if s.name == "embed"]
    told = [{a.key: a.value.string_value for a in s.attributes} for s in spans]
    assert [(t["rpc.system"], t["f2rt.request_id"], t["f2rt.status"]) for t in told] == [
        ("http", "r2", "OK"),
        ("http", "r2", "INVALID_ARGUMENT"),
        ("kserve", "r3", "OK"),
    ]
    for span in spans:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
