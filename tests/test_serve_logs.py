"""The log's lines: written in order by a thread of their own, and nobody waits for who reads them."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.serving import logs
from runtime.serving.logs import BackgroundLines, JsonLines, TextLines
from runtime.serving.metrics import Metrics
from tests.serving import ROOT
from tests.serving_in_process import wait_until


class Pipe:
    """A pipe, and a logger that writes to it."""

    def __init__(self, most: int) -> None:
        reading, self.writing = os.pipe()
        self.stream = os.fdopen(reading, encoding="utf-8")
        self.handler = BackgroundLines(self.writing, most)
        self.log = logging.Logger("f2rt.test")
        self.log.addHandler(self.handler)

    def fill(self) -> int:
        """Log long lines, more than a pipe holds, until one is dropped; returns how many were not."""
        fcntl.fcntl(self.writing, fcntl.F_SETPIPE_SZ, 4096)
        self.log.warning("00000 %s", "x" * 9000)
        wait_until(lambda: self.handler._waiting.empty())  # the thread stands in the middle of it
        lines = 1
        while not self.handler.dropped:
            self.log.warning("%05d %s", lines, "x" * 9000)
            lines += 1
        return lines - 1

    def read(self, lines: int) -> list[str]:
        return [self.stream.readline().rstrip("\n") for _ in range(lines)]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    monkeypatch.setattr(logs, "_LAST_S", 0.2)
    pipe = Pipe(20)
    yield pipe
    pipe.stream.close()  # what is stuck in a write ends with it
    pipe.handler.close()
    pipe.handler._thread.join(5)
    assert not pipe.handler._thread.is_alive()
    os.close(pipe.writing)


def test_lines_come_in_order_and_a_flush_waits_for_them(pipe: Pipe) -> None:
    for number in range(5):
        pipe.log.warning("line %d", number)
    pipe.handler.flush()
    os.set_blocking(pipe.stream.fileno(), False)
    assert os.read(pipe.stream.fileno(), 1 << 16).decode() == "".join(f"line {number}\n" for number in range(5))
    assert pipe.handler.dropped == 0


def test_lines_that_nobody_reads_are_dropped_and_counted_and_a_line_says_so(pipe: Pipe) -> None:
    kept = pipe.fill()
    assert kept == 21
    for _ in range(6):
        pipe.log.warning("too many")
    pipe.handler.flush()  # comes back
    assert pipe.handler.dropped == 7
    got = pipe.read(kept + 1)
    assert got.pop(1) == "7 lines were dropped: nobody read those before them"  # while others still wait
    assert [line[:5] for line in got] == [f"{number:05}" for number in range(kept)]
    pipe.log.warning("and on")
    pipe.handler.flush()
    assert pipe.read(1) == ["and on"]
    assert pipe.handler.dropped == 7


def test_several_threads_lose_no_line(pipe: Pipe) -> None:
    pipe.handler._most = 10_000
    threads = [
        threading.Thread(target=lambda: [pipe.log.warning("%s", "y" * 500) for _ in range(200)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert set(pipe.read(800)) == {"y" * 500}
    for thread in threads:
        thread.join()


def test_a_reader_who_is_gone() -> None:
    pipe = Pipe(20)
    pipe.stream.close()
    pipe.log.warning("a")
    pipe.log.warning("b")
    pipe.handler.close()
    assert pipe.handler.dropped == 2
    assert not pipe.handler._thread.is_alive()
    os.close(pipe.writing)


def test_a_pipe_that_does_not_block(pipe: Pipe) -> None:
    """As a parent leaves it that reads it without blocking."""
    os.set_blocking(pipe.writing, False)
    kept = pipe.fill()
    got = pipe.read(kept + 1)
    del got[1]  # how many were dropped
    assert [line[:5] for line in got] == [f"{number:05}" for number in range(kept)]


def test_the_metrics_count_what_was_dropped(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [pipe.handler])
    registry = Metrics().registry
    assert registry.get_sample_value("f2rt_log_lines_dropped_total") == 0
    pipe.fill()
    assert registry.get_sample_value("f2rt_log_lines_dropped_total") == 1


def test_what_cannot_be_encoded_or_formatted_takes_nothing_along(pipe: Pipe) -> None:
    pipe.log.warning("lone \ud800")
    pipe.log.warning("no number: %d", "x")
    pipe.log.warning("after")
    first, second, third = pipe.read(3)
    assert (first, third) == ("lone \\ud800", "after")
    assert second.startswith("f2rt.test 'no number: %d' could not be written: TypeError(")


def test_lines_for_people_and_for_machines(pipe: Pipe) -> None:
    fields = {"request_id": "a b\n", "infer_ms": 1.5, "status": "OK"}
    pipe.handler.setFormatter(TextLines())
    pipe.log.warning("request", extra={"fields": fields})
    text = pipe.read(1)[0]
    assert text.endswith(" WARNING f2rt.test request request_id='a b\\n' infer_ms=1.50 status=OK")
    pipe.handler.setFormatter(JsonLines())
    try:
        raise ValueError("broken")
    except ValueError:
        pipe.log.exception("request", extra={"fields": fields})
    line = json.loads(pipe.read(1)[0])
    assert fields.items() <= line.items()
    assert (line["level"], line["logger"], line["message"]) == ("error", "f2rt.test", "request")
    assert "ValueError: broken" in line["exception"]


def test_a_flush_waits_as_long_as_lines_are_read(pipe: Pipe) -> None:
    """Each within the limit, all of them together not."""
    kept = pipe.fill()

    def read_slowly() -> list[str]:
        got = []
        for _ in range(kept + 1):
            time.sleep(logs._LAST_S / 4)
            got += pipe.read(1)
        return got

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_slowly)
        pipe.handler.flush()
        assert pipe.handler._waiting.empty()
        assert len(reading.result()) == kept + 1


def test_what_python_itself_would_print_goes_to_the_log() -> None:
    code = """
import threading, warnings
from runtime.serving import logs
logs.configure("json")
class Bad:
    def __del__(self): raise ValueError("in a finalizer")
Bad()
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start(); thread.join()
warnings.warn("a warning")
logs.flush()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["logger"] for line in lines] == ["f2rt.log", "f2rt.log", "py.warnings"]
    assert "in a finalizer" in lines[0]["exception"]
    assert lines[1]["message"] == "the thread worker ended"
    assert "ZeroDivisionError" in lines[1]["exception"]
    assert "a warning" in lines[2]["message"]


@pytest.mark.parametrize(("standing_in", "kind"), [(None, logging.NullHandler), (io.StringIO(), logging.StreamHandler)])
def test_a_process_without_a_file_for_standard_error(
    monkeypatch: pytest.MonkeyPatch, standing_in: io.StringIO | None, kind: type[logging.Handler]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    for name in ("sys.unraisablehook", "threading.excepthook"):
        monkeypatch.setattr(name, None)
    monkeypatch.setattr(logging, "captureWarnings", lambda on: None)
    monkeypatch.setattr("sys.stderr", standing_in)
    logs.configure("json")
    assert [type(handler) for handler in root.handlers] == [kind]
