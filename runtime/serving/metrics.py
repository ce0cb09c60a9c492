"""What is counted while serving, as Prometheus metrics. Times in seconds, as Prometheus has them.

One registry per server, so that two servers in one process keep apart. Names carry the prefix `f2rt_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from runtime.serving import logs
from runtime.serving.call import Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# From half a millisecond to half a minute, in steps of about 2.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_TOKENS = (16, 64, 256, 1024, 4096, 16384, 65536)
_PADDING = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
_DRIFT = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Metrics:
    """All metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "f2rt_requests", "Requests by protocol and status", ["model", "protocol", "status"], registry=self.registry
        )
        self._rejected = Counter(
            "f2rt_rejected_requests", "Requests not answered, by reason", ["model", "reason"], registry=self.registry
        )
        self.histograms = {
            name: Histogram(f"f2rt_{name}_seconds", text, ["model"], buckets=_SECONDS, registry=self.registry)
            for name, text in (
                ("request", "Time from a request's arrival to its answer"),
                ("tokenize", "Of it, until it was tokenized"),
                ("queue", "Of it, neither tokenization nor inference"),
                ("infer", "Of it, batches that it was part of"),
                ("batch", "Time of a batch in the engine"),
            )
        }
        self.batch_rows = self._histogram("batch_rows", "Texts in a batch", _ROWS)
        self.batch_tokens = self._histogram("batch_tokens", "Padded tokens of a batch", _TOKENS)
        self.padding = self._histogram("batch_padding_ratio", "Part of a batch's tokens that was padding", _PADDING)
        self.tokens = Counter("f2rt_tokens", "Tokens computed, without padding", ["model"], registry=self.registry)
        self.padded = Counter("f2rt_padded_tokens", "Tokens computed, with padding", ["model"], registry=self.registry)
        self.items = Counter("f2rt_texts", "Texts embedded", ["model"], registry=self.registry)
        self.truncated = Counter("f2rt_truncated_texts", "Texts that were cut", ["model"], registry=self.registry)
        self.golden = Gauge(
            "f2rt_golden_cosine", "Smallest cosine to PyTorch in the latest check", ["model"], registry=self.registry
        )
        self.golden_failures = Counter(
            "f2rt_golden_failures", "Checks against PyTorch's vectors that failed", ["model"], registry=self.registry
        )
        self.ready = Gauge("f2rt_ready", "1 while the model answers requests", ["model"], registry=self.registry)
        self.reloads = Counter(
            "f2rt_reloads", "Engine switches by outcome", ["model", "outcome"], registry=self.registry
        )
        self.drift = self._histogram("shadow_drift", "1 - cosine between engine and shadow engine", _DRIFT)
        self.shadow_dropped = Counter(
            "f2rt_shadow_dropped", "Requests the shadow engine had no time for", ["model"], registry=self.registry
        )
        self.registry.register(_LogLines())

    def _histogram(self, name: str, text: str, buckets: Iterable[float]) -> Histogram:
        return Histogram(f"f2rt_{name}", text, ["model"], buckets=tuple(buckets), registry=self.registry)

    def watch(self, read: Callable[[], Iterable[Gauges]]) -> None:
        """Ask `read` for each model's present values whenever metrics are collected."""
        self.registry.register(_Live(read))

    def request(self, model: str, protocol: str, status: str, timings: Timings | None = None) -> None:
        """Count one answered or refused request; `timings` of one that was answered."""
        self._requests.labels(model, protocol, status).inc()
        if timings is not None:
            for name, ms in (
                ("request", timings.total_ms),
                ("tokenize", timings.tokenize_ms),
                ("queue", timings.queue_ms),
                ("infer", timings.infer_ms),
            ):
                self.histograms[name].labels(model).observe(1e-3 * ms)
        elif status not in ("OK", "CANCELLED"):
            self._rejected.labels(model, status.lower()).inc()

    def count(self, model: str, texts: int, truncated: int) -> None:
        """Count the texts of an answered request."""
        self.items.labels(model).inc(texts)
        if truncated:
            self.truncated.labels(model).inc(truncated)

    def expose(self) -> bytes:
        """Return everything in Prometheus' text format."""
        return generate_latest(self.registry)


class EngineMetrics:
    """What a pipeline counts, for one model: the label is looked up once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._time = metrics.histograms["batch"].labels(model)
        self._rows, self._padded = metrics.batch_rows.labels(model), metrics.batch_tokens.labels(model)
        self._padding = metrics.padding.labels(model)
        self._tokens, self._padded_tokens = metrics.tokens.labels(model), metrics.padded.labels(model)

    def batch(self, rows: int, tokens: int, padded_tokens: int, seconds: float) -> None:
        """Count a batch of `rows` texts with `tokens` tokens, `padded_tokens` of which were computed."""
        self._time.observe(seconds)
        self._rows.observe(rows)
        self._padded.observe(padded_tokens)
        self._padding.observe(1 - tokens / padded_tokens)
        self._tokens.inc(tokens)
        self._padded_tokens.inc(padded_tokens)


class Gauges:
    """Present values of one model: what waits, which engine answers, and whether it lacks a verdict that stands."""

    def __init__(
        self, model: str, waiting: tuple[int, int, int], engine: dict[str, str], *, unverified: bool = False
    ) -> None:
        self.model = model
        self.waiting = waiting
        self.engine = engine
        self.unverified = unverified


class _LogLines(Collector):
    """The log belongs to the process, whatever servers are in it: its count is read, not kept."""

    def collect(self) -> Iterable[Any]:
        text = "Lines of the log that were never written: nobody read those before them, or the file takes none"
        return [CounterMetricFamily("f2rt_log_lines_dropped", text, value=logs.dropped())]


class _Live(Collector):
    """Reads the gauges when they are asked for: nothing is counted twice, and nothing goes stale."""

    def __init__(self, read: Callable[[], Iterable[Gauges]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Any]:
        queues = {
            name: GaugeMetricFamily(f"f2rt_queue_{name}", f"{text} that wait for the engine", labels=["model"])
            for name, text in (("requests", "Requests"), ("texts", "Texts"), ("tokens", "Tokens"))
        }
        info = GaugeMetricFamily(
            "f2rt_engine_info", "The engine that answers", labels=["model", "fingerprint", "engine", "precision"]
        )
        unverified = GaugeMetricFamily(
            "f2rt_engine_unverified",
            "1 while an engine answers that has no verdict that stands, see --allow-unverified",
            labels=["model", "engine"],
        )
        for gauges in self._read():
            for family, value in zip(queues.values(), gauges.waiting, strict=True):
                family.add_metric([gauges.model], value)
            engine = gauges.engine
            info.add_metric([gauges.model, engine["fingerprint"], engine["engine"], engine["precision"]], 1)
            unverified.add_metric([gauges.model, engine["engine"]], int(gauges.unverified))
        return [*queues.values(), info, unverified]
