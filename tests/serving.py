"""Helpers of the serving tests: a real `f2rt` in a child process, and what a client needs to talk to its server."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from runtime.client import EmbeddingClient

ROOT = Path(__file__).resolve().parent.parent
SERVING = health_pb2.HealthCheckResponse.SERVING
TEXTS = [
    "Where is the library?",
    "La bibliothèque est fermée le lundi.",
    "def add(a, b):\n    return a + b",
    "图书馆在哪里？",
    "a",
    "",
    "  \t\n",
    "emoji 👩‍🔬 and NUL \x00 inside",
    "Where is the library?",  # a duplicate
    "The quick brown fox jumps over the lazy dog. " * 6,
]
START_S = 60.0  # a bound, never a wait: a busy machine may need a while to load and prove an engine
MAIN = "from export.cli import main; main()"
_SERVING_HTTP = re.compile(r"serving HTTP on (\S+)$")
_SERVING = re.compile(r"serving .* on (\S+), fingerprint ([0-9a-f]{32})$")


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This environment, with the repository first on the module path and no F2RT_ variable of the developer's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("F2RT_") and k.lower() not in _PROXIES}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}


_PROXIES = {"http_proxy", "https_proxy", "grpc_proxy", "all_proxy"}


def f2rt(
    *arguments: str,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    prelude: str = "",
    timeout_s: float = START_S,
) -> subprocess.CompletedProcess[bytes]:
    """Run the command to its end, installed or not. `prelude` is Python run before it."""
    return subprocess.run(
        [sys.executable, "-c", f"{prelude}\n{MAIN}", *arguments],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=child_environment(env),
        timeout=timeout_s,
        check=False,
    )


class ServerProcess:
    """`f2rt serve` on a free port. Ready when the constructor returns; killed when the context ends.

    With `http` it serves HTTP as well, at the address `self.http`.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        address: str = "127.0.0.1:0",
        http: bool = False,
        ca: Path | None = None,
        **certificate: Path,
    ) -> None:
        self._tls: dict[str, Any] = {"tls_ca": ca, **certificate}
        command = [sys.executable, "-c", MAIN, "serve", str(folder), "--grpc", address, *options]
        command += ["--http", "127.0.0.1:0"] if http else []
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.log: list[str] = []
        self._logged = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            found = _SERVING.search(self.wait_for_line(_SERVING))
            assert found is not None
            self.address, self.fingerprint = found.groups()
            self.http = ""
            if http:
                heard = _SERVING_HTTP.search(self.wait_for_line(_SERVING_HTTP))
                assert heard is not None
                self.http = heard.group(1)
            with self.client() as client:
                client.wait_ready(START_S)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def client(self) -> EmbeddingClient:
        return EmbeddingClient(self.address, **self._tls)

    def wait_for_line(self, pattern: str | re.Pattern[str]) -> str:
        """Return the first line of the log that matches; fails when the process ends without it."""
        wanted = re.compile(pattern)

        def found() -> str | None:
            return next((line for line in self.log if wanted.search(line)), None)

        with self._logged:
            self._logged.wait_for(lambda: found() is not None or self._ended, START_S)
            line = found()
        assert line is not None, f"no line of the server's log matches {wanted.pattern!r}:\n" + "\n".join(self.log)
        return line

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Return the exit status once the process has ended and its log is complete."""
        status = self.process.wait(START_S)
        self._reader.join(START_S)
        return status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._logged:
                self.log.append(line.rstrip("\n"))
                self._logged.notify_all()
        with self._logged:
            self._ended = True
            self._logged.notify_all()


@contextlib.contextmanager
def child_python(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run Python code as a client in a process of its own; killed when the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=child_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(START_S)
        assert process.stdout is not None
        process.stdout.close()


def failure(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def rows_of_ids(rows: int, tokens: int, first: int = 5) -> list[list[int]]:
    return [[first + row % 7] * tokens for row in range(rows)]


LONG = rows_of_ids(96, 512)  # seconds of work in several batches


def wait_until_busy(client: EmbeddingClient) -> None:
    """Return once the engine works for somebody else: our own short requests had to wait for a batch each."""
    end, waited = time.monotonic() + START_S, 0
    while waited < 3:
        waited = waited + 1 if client.embed(["busy?"]).timings.queue_ms > 1.5 else 0
        assert time.monotonic() < end, "the engine never was busy"
