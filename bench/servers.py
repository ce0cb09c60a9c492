"""Servers under load: ours and its peers, each a process of its own on loopback with the same checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.load import GrpcAsker, OpenAIAsker
from runtime.cpu import cpu_extensions

_ROOT = Path(__file__).resolve().parents[1]
_COMMAND = [sys.executable, "-c", "from export.cli import main; main()"]
START_S = 300.0
_PINS = ("PYTHON", "VIRTUAL_ENV", "F2RT_")
# Checkpoints are in bfloat16, and so is a peer that is not told otherwise; a CPU that does not multiply it emulates it,
# many times as slowly as float32.
PEER_DTYPE = "bfloat16" if cpu_extensions() & {"avx512_bf16", "amx_bf16"} else "float32"


@dataclass(frozen=True)
class Contender:
    """One server: its name, the environment it needs ("" is ours), and how it is asked."""

    name: str
    environment: str = ""
    protocol: str = "http"
    encoding: str = "base64"

    @property
    def peer(self) -> str:
        """A peer's short name, as `--leave-out` takes it; "" for a server of ours."""
        return self.environment.removeprefix(".venv-")

    def not_there(self) -> str | None:
        """Return why it cannot be measured here, or None."""
        if self.environment and not (_ROOT / self.environment / "bin" / "python").exists():
            return f"{self.environment} is not there: run make serve-peers"
        return None


GRPC = Contender("f2rt gRPC", protocol="grpc")
HTTP = Contender("f2rt HTTP")
INFINITY = Contender("infinity", ".venv-infinity", encoding="float")
VLLM = Contender("vLLM", ".venv-vllm")
FASTAPI = Contender("sentence-transformers + FastAPI", ".venv-fastapi", encoding="float")
PEERS = (INFINITY, VLLM, FASTAPI)


@dataclass(frozen=True)
class Running:
    """A server that answers: how to ask it, and where its metrics are ("" for none)."""

    connect: Callable[[], GrpcAsker | OpenAIAsker]  # called inside the event loop that asks
    metrics: str
    pid: int
    grpc: str = ""
    http: str = ""

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Have all of its processes stand still."""
        os.killpg(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.pid, signal.SIGCONT)


@contextlib.contextmanager
def running(
    contender: Contender, checkpoint: Path, bundle: Path, engine: str, log: Path, start_s: float = START_S
) -> Iterator[Running]:
    """Start a server, wait until it answers, and stop it.

    Raises RuntimeError with its last words if it does not within `start_s`.
    """
    port, second = free_port(), free_port()
    environment = {n: v for n, v in os.environ.items() if not n.startswith(_PINS)} | {"HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    model = str(checkpoint)
    if not contender.environment:
        command = [*_COMMAND, "serve", f"bench={bundle}", "--engine", engine, "--http", f"127.0.0.1:{port}"]
        command += ["--grpc", f"127.0.0.1:{second}", "--set", "access_log=false"]
        ready, model = f"{url}/health/ready", "bench"
    else:
        python = str(_ROOT / contender.environment / "bin" / "python")
        ready = f"{url}/health"
        if contender is INFINITY:
            command = [
                python,
                str(Path(python).with_name("infinity_emb")),
                "v2",
                "--model-id",
                model,
                "--engine",
                "torch",
            ]
            command += ["--device", "cpu", "--port", str(port), "--host", "127.0.0.1", "--no-bettertransformer"]
            command += ["--served-model-name", "bench", "--url-prefix", "/v1", "--dtype", PEER_DTYPE]
            command += ["--no-model-warmup"]  # it measures long batches, for minutes; all servers are warmed alike
            model = "bench"
            environment["INFINITY_ANONYMOUS_USAGE_STATS"] = "0"
        elif contender is VLLM:
            command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--runner", "pooling"]
            command += [
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--dtype",
                PEER_DTYPE,
                "--served-model-name",
                "bench",
            ]
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
            model = "bench"
        else:
            command = [python, "-P", str(_ROOT / "bench" / "peer_fastapi.py"), model, str(port), PEER_DTYPE]
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=_ROOT, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        _wait(ready, process, log, start_s)

        def connect() -> GrpcAsker | OpenAIAsker:
            if contender.protocol == "grpc":
                return GrpcAsker(f"127.0.0.1:{second}")
            return OpenAIAsker(f"{url}/v1/embeddings", model, contender.encoding)

        ours = not contender.environment
        yield Running(
            connect, f"{url}/metrics" if ours else "", process.pid, f"127.0.0.1:{second}" if ours else "", url
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, start_s: float) -> None:
    end = time.monotonic() + start_s
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.2)
    words = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = words[-1][:300].replace(f"{_ROOT}/", "") if words else "it said nothing"
    status = process.poll()
    raise RuntimeError(f"it did not answer within {start_s:g} s: {said}" if status is None else f"it ended: {said}")


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
