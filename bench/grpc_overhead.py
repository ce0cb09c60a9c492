"""What gRPC adds to a request: the same texts embedded in this process and through `f2rt serve`, by turns.

The server is a real process with the same engine on the same bundle. Before each timed call both rest for 20 ms: the
other side's threads have stopped polling, and requests come one at a time, as from a caller that waits for each.
The difference is what a service pays for asking over gRPC instead of embedding in its own process: both protocol
stacks, the server's queue and its hand-over between threads. How much of it is gRPC's own shows a server beside it that
answers the same bytes without doing anything (`echo`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from bench.peer_echo import METHOD
from bench.report import Result, median, percentile
from bench.servers import free_port
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.bundle import open_bundle
from runtime.client import EmbeddingClient
from runtime.embedder import open_embedder

_ROOT = Path(__file__).resolve().parents[1]
_MINI = _ROOT / "checkpoints" / "mini"
_TEXT = "how do I list the files of a package"
_COMMAND = [sys.executable, "-c", "from export.cli import main; main()"]
_REST_S = 0.02
_WARM_UP = 20
_LEAST, _MOST = 50, 5000  # requests per case


@dataclass(frozen=True)
class Case:
    """Times in milliseconds of one request size; `server_ms` is what the server says of itself."""

    items: int
    tokens: int
    local_ms: list[float]
    client_ms: list[float]
    server_ms: list[float]
    echo_ms: list[float]


def measure(bundle: Path | None, work: Path, seconds: float) -> Result:
    """Measure 1 and 32 items on `bundle`, or on one made of the mini checkpoint; `seconds` bounds the timed part."""
    if bundle is None:
        bundle = work / "bundle-mini"
        _f2rt("export", str(_MINI), "--out", str(bundle))
        _f2rt("parity", str(bundle))
    embedder = open_embedder(open_bundle(bundle), "onnxruntime:fp32")
    with _server(bundle) as address, EmbeddingClient(address) as client:
        client.wait_ready(120)
        cases = []
        for texts in ([_TEXT], [f"{_TEXT} number {i}" for i in range(32)]):
            request, answer = _messages(address, texts)
            with _echo(answer, work) as echo:
                cases.append(_compare(embedder.embed, client, functools.partial(echo, request), texts, seconds / 2))
    embedder.close()
    return _result(cases, seconds)


def _compare(
    local: Callable[..., object],
    client: EmbeddingClient,
    echo: Callable[[], object],
    texts: Sequence[str],
    seconds: float,
) -> Case:
    here, there = local(texts), client.embed(texts)
    if not np.array_equal(here.vectors, there.vectors):  # type: ignore[attr-defined]
        raise RuntimeError("the server's vectors differ from this process's")
    case = Case(len(texts), sum(item.tokens for item in there.items), [], [], [], [])
    for _ in range(_WARM_UP):
        local(texts)
        client.embed(texts)
        echo()
    end = time.monotonic() + seconds
    while len(case.local_ms) < _LEAST or (time.monotonic() < end and len(case.local_ms) < _MOST):
        _timed(case.local_ms, lambda: local(texts))
        answer = _timed(case.client_ms, lambda: client.embed(texts))
        case.server_ms.append(answer.timings.total_ms)
        _timed(case.echo_ms, echo)
    return case


def _timed(times_ms: list[float], call: Callable[[], Any]) -> Any:
    time.sleep(_REST_S)
    start = time.perf_counter()
    answer = call()
    times_ms.append(1e3 * (time.perf_counter() - start))
    return answer


def _messages(address: str, texts: Sequence[str]) -> tuple[bytes, bytes]:
    """Return a request for texts and the server's response, as they go over the wire."""
    request = pb.EmbedRequest(input=pb.EmbedInput(texts=texts))
    with grpc.insecure_channel(address) as channel:
        answer = pb_grpc.EmbeddingServiceStub(channel).Embed(request)  # type: ignore[no-untyped-call]
    return request.SerializeToString(), answer.SerializeToString()


@contextlib.contextmanager
def _echo(answer: bytes, work: Path) -> Iterator[Callable[[bytes], bytes]]:
    """Give what asks a server of its own process that answers `answer`."""
    file, port = work / "answer.bin", free_port()
    file.write_bytes(answer)
    command = [sys.executable, "-m", "bench.peer_echo", str(port), str(file)]
    server = subprocess.Popen(command, cwd=_ROOT)
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            ask = channel.unary_unary(METHOD)
            ask(b"", wait_for_ready=True, timeout=30)
            yield ask
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def _server(bundle: Path) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    command = [*_COMMAND, "serve", str(bundle), "--engine", "onnxruntime:fp32", "--grpc", address]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, cwd=_ROOT, stdout=quiet, stderr=quiet, env=_environment())
    try:
        yield address
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _f2rt(*arguments: str) -> None:
    done = subprocess.run([*_COMMAND, *arguments], cwd=_ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"f2rt {arguments[0]} ended with status {done.returncode}:\n{done.stdout}{done.stderr}")


def _environment() -> dict[str, str]:
    """The environment without settings for the server that would not hold for this process."""
    return {name: value for name, value in os.environ.items() if not name.startswith("F2RT_")}


def _result(cases: list[Case], seconds: float) -> Result:
    rows, data = [], []
    for c in cases:
        numbers = {
            "local_p50_ms": percentile(c.local_ms, 50),
            "local_p99_ms": percentile(c.local_ms, 99),
            "grpc_p50_ms": percentile(c.client_ms, 50),
            "grpc_p99_ms": percentile(c.client_ms, 99),
            "server_p50_ms": percentile(c.server_ms, 50),
            "overhead_p50_ms": percentile(c.client_ms, 50) - percentile(c.local_ms, 50),
            "overhead_p99_ms": percentile(c.client_ms, 99) - percentile(c.local_ms, 99),
            "overhead_paired_median_ms": median([b - a for a, b in zip(c.local_ms, c.client_ms, strict=True)]),
            "echo_p50_ms": percentile(c.echo_ms, 50),
            "echo_p99_ms": percentile(c.echo_ms, 99),
        }
        data.append({"items": c.items, "tokens": c.tokens, "requests": len(c.local_ms), **numbers})
        rows.append([str(c.items), str(c.tokens), *(f"{v:.2f}" for v in numbers.values()), str(len(c.local_ms))])
    return Result(
        name="grpc",
        title="gRPC overhead per request, mini checkpoint on CPU",
        command=f"python -m bench grpc --seconds {seconds:g}",
        columns=[
            *("items", "tokens", "in process p50 ms", "p99 ms", "gRPC p50 ms", "p99 ms", "of it in the server p50 ms"),
            *("overhead p50 ms", "p99 ms", "paired median ms", "echo p50 ms", "p99 ms", "requests"),
        ],
        rows=rows,
        notes=[
            "client and server are two processes on one machine, over 127.0.0.1; one request at a time, by turns with "
            "the same texts embedded in the client's process; both give identical vectors",
            "in the server: what it reports of itself (tokenization, queue, inference); the rest of the request is "
            "protocol and two process switches",
            "echo: a gRPC server in Python that answers the same bytes and does nothing",
        ],
        data={"cases": data},
    )
