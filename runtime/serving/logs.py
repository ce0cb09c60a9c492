"""Log lines for people or for machines. Texts are never logged, and keys neither.

One line per request on the logger `f2rt.access`: id, model, protocol, status, sizes, times, fingerprint.

Whoever logs never waits for who reads: a pipe that nobody empties must stop neither requests nor the server's end.
"""

from __future__ import annotations

import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

log = logging.getLogger("f2rt.log")
access_log = logging.getLogger("f2rt.access")
_MAX_CHARS = 100
_MOST_LINES = 10_000
_LAST_S = 2.0  # without a line read: then nobody reads
_TELL_S = 1.0
_WRITABLE_MS = 1000


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and what a record carries in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level, logger and message, with the fields as NAME=VALUE; what is not printable is escaped."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields: dict[str, Any] = getattr(record, "fields", {})
        return super().format(record) + "".join(f" {name}={_shown(value)}" for name, value in fields.items())


class BackgroundLines(logging.Handler):
    """Writes lines to an open file, on a thread of its own; returns at once to whoever logs.

    Lines beyond `most` that still wait are dropped, and a line says how many.
    """

    def __init__(self, descriptor: int, most: int = _MOST_LINES) -> None:
        super().__init__()
        self._descriptor, self._most = descriptor, most
        self._crowded_out = 0  # counted by who logs, under the handler's lock
        self._written = self._unwritable = 0  # counted by the thread, which must not wait for that lock
        self._stuck = False
        # Not Queue, whose put takes a lock that a signal handler could wait for in vain.
        self._waiting: queue.SimpleQueue[bytes | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="f2rt-log", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Lines that were never written, because nobody read those before them or the file could not be written."""
        return self._crowded_out + self._unwritable

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record written soon."""
        if self._waiting.qsize() >= self._most:
            self._crowded_out += 1
            return
        try:
            line = self.format(record)
        except Exception as error:  # noqa: BLE001  (the library would say so on standard error, and wait for a reader)
            line = f"{record.name} {record.msg!r} could not be written: {error!r}"
        self._waiting.put(f"{line}\n".encode(errors="backslashreplace"))

    def flush(self) -> None:
        """Return when what was logged so far is written, or nobody reads it."""
        done, before = threading.Event(), self._written
        self._waiting.put(done)
        while self._thread.is_alive() and not done.wait(_LAST_S):
            if self._written == before:
                self._stuck = True
                return
            before = self._written

    def close(self) -> None:
        """Write what is left, unless nobody reads it, and end the thread."""
        if not self._stuck:
            self.flush()
        self._waiting.put(None)
        # A write that nobody reads ends with the process: it has none of Python's locks.
        self._thread.join(0 if self._stuck else _LAST_S)
        super().close()

    def _work(self) -> None:
        told, told_s = 0, 0.0
        while (one := self._waiting.get()) is not None:
            if isinstance(one, threading.Event):
                one.set()
            else:
                written = self._write(one)
                self._written += written
                self._unwritable += not written
            if self._crowded_out > told and (self._waiting.empty() or time.monotonic() - told_s > _TELL_S):
                told, told_s = self._tell(told), time.monotonic()

    def _tell(self, told: int) -> int:
        """Write how many lines were crowded out beyond the `told` ones; returns how many that makes."""
        lost = self._crowded_out - told
        words = f"{lost} lines were dropped: nobody read those before them"
        record = logging.LogRecord("f2rt.log", logging.WARNING, __file__, 0, words, (), None)
        self._write(f"{self.format(record)}\n".encode())
        return told + lost

    def _write(self, line: bytes) -> bool:
        """Write past Python's buffers: their locks, held by a thread that waits, would keep the process from ending."""
        left = memoryview(line)
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # whoever started this process made its end of the pipe so
                poll = select.poll()
                poll.register(self._descriptor, select.POLLOUT)
                poll.poll(_WRITABLE_MS)
            except OSError:  # the reader is gone, or the disk is full
                return False
        return True


def configure(style: str) -> None:
    """Send f2rt's log to standard error as `text` or `json`, and what Python itself would print there, too."""
    handler = _handler()
    handler.setFormatter(JsonLines() if style == "json" else TextLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    sys.unraisablehook = lambda one: log.error(
        "%s in %r", one.err_msg or "exception", one.object, exc_info=_raised(one)
    )
    threading.excepthook = lambda one: log.error("the thread %s ended", _name(one), exc_info=_raised(one))


def flush() -> None:
    """Write what was logged so far, unless nobody reads it: what comes next on standard error comes after it."""
    for handler in logging.getLogger().handlers:
        handler.flush()


def dropped() -> int:
    """Return how many lines of this process's log were never written."""
    return sum(one.dropped for one in logging.getLogger().handlers if isinstance(one, BackgroundLines))


def _handler() -> logging.Handler:
    if sys.stderr is None:  # closed when the process began: there may be anything at its number
        return logging.NullHandler()
    try:
        return BackgroundLines(sys.stderr.fileno())
    except io.UnsupportedOperation:  # something in its place that is no file
        return logging.StreamHandler()


def _raised(one: Any) -> Any:
    return one.exc_type, one.exc_value, one.exc_traceback


def _name(one: threading.ExceptHookArgs) -> str:
    return one.thread.name if one.thread else "?"


def cut(text: str) -> str:
    """Return what a caller sent, short enough for a log line."""
    return text[:_MAX_CHARS]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value)
    return text if text.isprintable() and " " not in text and text else repr(text)
