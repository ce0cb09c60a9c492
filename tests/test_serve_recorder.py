"""Counting and logging off the request's way: nothing is lost, nobody is woken while requests come."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from runtime.serving import recorder as recorders
from runtime.serving.call import EmbedCall, EmbedReply, Timings
from runtime.serving.metrics import Metrics
from runtime.serving.outcome import Answered, Outcome
from runtime.serving.recorder import Recorder
from runtime.tokenizer import TokenizedText
from tests.serving_in_process import wait_until

FAILED = Outcome.of("mini", "grpc", "NOT_FOUND", EmbedCall(texts=["a"]), error="there is no such prompt.")


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def recorder(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setattr(recorders, "_PAUSE_S", 0.005)
    monkeypatch.setattr(recorders, "_AWAKE_S", 0.02)
    recorder = Recorder(metrics, log_requests=False)
    yield recorder
    recorder.close()


def counted(metrics: Metrics) -> float:
    labels = {"model": "mini", "protocol": "grpc", "status": "NOT_FOUND"}
    return metrics.registry.get_sample_value("f2rt_requests_total", labels) or 0.0


def test_an_outcome_is_counted_without_anybody_asking(recorder: Recorder, metrics: Metrics) -> None:
    recorder.put(FAILED)
    wait_until(lambda: counted(metrics) == 1)


def test_after_a_time_without_requests_the_next_one_is_counted_as_well(recorder: Recorder, metrics: Metrics) -> None:
    for turn in range(1, 6):
        wait_until(lambda: recorder._asleep)
        recorder.put(FAILED)
        wait_until(lambda turn=turn: counted(metrics) == turn)


def test_nobody_is_woken_while_requests_come(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "_PAUSE_S", 0.005)
    recorder = Recorder(metrics, log_requests=False)
    for turn in range(1, 6):
        recorder.put(FAILED)
        assert not recorder._woken.is_set()
        wait_until(lambda turn=turn: counted(metrics) == turn)
    recorder.close()


def test_reading_the_metrics_counts_what_is_left(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorders, "_PAUSE_S", 60.0)
    recorder = Recorder(metrics, log_requests=False)
    recorder.put(FAILED)
    assert counted(metrics) == 0
    recorder.flush()
    assert counted(metrics) == 1
    recorder.put(FAILED)
    recorder.close()
    assert counted(metrics) == 2


def test_many_threads_at_once_lose_nothing(recorder: Recorder, metrics: Metrics) -> None:
    def put() -> None:
        for _ in range(500):
            recorder.put(FAILED)
            recorder.flush()

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.flush()
    assert counted(metrics) == 2000


def test_one_that_cannot_be_recorded_takes_no_other_along(
    recorder: Recorder, metrics: Metrics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = metrics.request

    def fail_once(*args: Any) -> None:
        monkeypatch.setattr(metrics, "request", request)
        raise RuntimeError("no such label")

    monkeypatch.setattr(metrics, "request", fail_once)
    recorder.put(FAILED)
    recorder.put(FAILED)
    wait_until(lambda: counted(metrics) == 1)
    assert "a request could not be recorded" in caplog.text


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        ("there is no prompt 'my text'; this model has: query.", "there is no prompt '…'; this model has: query."),
        ('there is no prompt "it\'s mine".', "there is no prompt '…'."),
        (r"there is no prompt 'it\'s \"mine\"'.", "there is no prompt '…'."),
        ("the parameter prompt is 'a text that was cut.", "the parameter prompt is '…'"),
        ("Object contains unknown field `my text`", "Object contains unknown field '…'"),
        ("the model's engine failed, and the server's log has it.",) * 2,
    ],
)
def test_what_an_error_quotes_is_not_logged(
    recorder: Recorder, caplog: pytest.LogCaptureFixture, error: str, logged: str
) -> None:
    caplog.set_level("INFO", logger="f2rt.access")
    recorders._log(replace(FAILED, error=error))
    assert caplog.records[-1].fields["error"] == logged  # type: ignore[attr-defined]


def test_an_outcome_keeps_neither_texts_nor_vectors() -> None:
    """However long the log stands still, what waits is small."""
    texts = ["a text"] * 3
    items = [TokenizedText(ids=[1, 2], original_tokens=5), TokenizedText(ids=[3], original_tokens=1)]
    reply = EmbedReply(np.ones((2, 4), np.float32), items, "f", [4], Timings(1.0, 2.0, 3.0, 6.0))
    outcome = Outcome.of("mini", "grpc", "OK", EmbedCall(texts=texts, request_id="r"), reply)
    assert outcome.answered == Answered(2, 1, 3, "f", reply.timings)
    assert (outcome.items, outcome.request_id) == (3, "r")
    kept = gc.get_referents(outcome, outcome.answered, vars(outcome), vars(outcome.answered))
    assert not any(one is thing for one in kept for thing in (texts, items, reply, reply.vectors))
