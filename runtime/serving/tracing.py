"""OpenTelemetry spans of requests, made after the answer is out: tracing costs a request nothing but its header.

A request's span has the caller's span as its parent (W3C `traceparent`), and children for tokenization, queue and
inference. Spans go to an OTLP endpoint over HTTP. Texts are not in them.
"""

from __future__ import annotations

from typing import Protocol

from runtime.errors import missing_extra
from runtime.serving.outcome import Outcome


class Tracer(Protocol):
    """What the recorder needs of tracing."""

    def request(self, outcome: Outcome) -> None:
        """Emit the span of one request that ended just now."""
        ...

    def close(self) -> None:
        """Send what is not sent yet."""
        ...


class OtlpTracer:
    """Sends spans to an OTLP/HTTP endpoint, for example http://localhost:4318/v1/traces."""

    def __init__(self, endpoint: str, version: str) -> None:
        """Raises MissingExtraError when OpenTelemetry is not installed."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise missing_extra(str(error.name), "tracing") from error
        resource = Resource.create({"service.name": "f2rt", "service.version": version})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("f2rt")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, outcome: Outcome) -> None:
        """Emit the span of one request that ended just now."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        context = self._propagator.extract({"traceparent": outcome.traceparent})
        start = end = outcome.received_ns
        answered = outcome.answered
        attributes: dict[str, str | int] = {
            "rpc.system": outcome.protocol,
            "f2rt.model": outcome.model,
            "f2rt.status": outcome.status,
            "f2rt.request_id": outcome.request_id[:100],
            "f2rt.items": outcome.items,
        }
        if answered is not None:
            attributes |= {"f2rt.fingerprint": answered.fingerprint, "f2rt.tokens": answered.tokens}
            end = start + int(1e6 * answered.timings.total_ms)
        span = self._tracer.start_span("embed", context=context, start_time=start, attributes=attributes)
        if answered is not None:
            timings, at, inside = answered.timings, start, set_span_in_context(span)
            for name, ms in (
                ("tokenize", timings.tokenize_ms),
                ("queue", timings.queue_ms),
                ("infer", timings.infer_ms),
            ):
                child = self._tracer.start_span(name, context=inside, start_time=at)
                at += int(1e6 * ms)
                child.end(end_time=at)
        if outcome.status != "OK":
            span.set_status(StatusCode.ERROR, outcome.status)
        span.end(end_time=max(end, start))

    def close(self) -> None:
        """Send what is not sent yet."""
        self._provider.shutdown()
