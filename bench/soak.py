"""A server under mixed traffic for a long time: does it grow, does anything fail, is a vector ever wrong?

Callers embed texts of all lengths over gRPC, KServe and HTTP, cancel, ask what is refused, stream, leave streams in the
middle, and reload, all the time. Every vector is compared with the one that this process computed beforehand. Memory is
the resident set of the server's process; growth is taken from the second tenth of the run to the last, since pools and
caches fill in the first. It is the median's: what is there between reloads, with the memory that the largest batch
since the last one needed. The lowest values beside it are those of an engine just loaded: what never goes away.
"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc
import httpx
import numpy as np
from numpy.typing import NDArray

from bench.report import Result, median
from bench.servers import GRPC, Running, running
from bench.serving import mixed_texts
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime._pb.inference import grpc_service_pb2 as kserve
from runtime._pb.inference import grpc_service_pb2_grpc as kserve_grpc
from runtime.bundle import open_bundle
from runtime.embedder import open_embedder
from runtime.golden import row_cosines

_CALLERS = 6
_LEAST_COSINE = 0.9999  # of an fp32 engine's own vectors, in other batches
_CUT = 64
_EXPECTED = {
    "OK",
    "RESOURCE_EXHAUSTED",
    "INVALID_ARGUMENT as it should",
    "cancelled",
    "stream left",
    "KServe OK",
    "HTTP 200",
    "HTTP 429",
    "reloaded",
}


def measure(bundle: Path, engine: str, work: Path, seconds: float) -> Result:
    """Soak a server on `bundle` for `seconds`."""
    embedder = open_embedder(open_bundle(bundle), engine)
    texts = mixed_texts(embedder)
    expected = embedder.embed(texts, prompt="").vectors
    embedder.close()
    with running(GRPC, bundle, bundle, engine, work / "soak.log") as server:
        counts, memory = asyncio.run(_soak(server, texts, expected, seconds))
    tenth = max(len(memory) // 10, 1)
    early, late = median([m for _, m in memory[tenth : 2 * tenth]]), median([m for _, m in memory[-tenth:]])
    growth = late / early - 1
    low_early, low_late = _low([m for _, m in memory[tenth : 2 * tenth]]), _low([m for _, m in memory[-tenth:]])
    wrong = {name: count for name, count in counts.items() if name not in _EXPECTED}
    return Result(
        name="soak",
        title=f"Soak, {bundle.name}, {engine}",
        command=f"python -m bench soak --seconds {seconds:g}",
        columns=["seconds", "requests", "unexpected", "resident MiB early", "late", "growth", "lowest tenth"],
        rows=[
            [
                *(f"{seconds:g}", str(sum(counts.values())), str(sum(wrong.values()))),
                *(f"{early / 2**20:.1f}", f"{late / 2**20:.1f}", f"{100 * growth:.2f} %"),
                f"{low_early / 2**20:.1f} to {low_late / 2**20:.1f} ({100 * (low_late / low_early - 1):.2f} %)",
            ]
        ],
        notes=[", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))],
        data={
            "seconds": seconds,
            "growth": growth,
            "lowest_tenth_growth": low_late / low_early - 1,
            "counts": dict(counts),
            "unexpected": wrong,
            "least_cosine_asked": _LEAST_COSINE,
            "resident_bytes": [[round(at, 1), size] for at, size in memory],
        },
    )


def _low(sizes: Sequence[int]) -> int:
    """Return the value below which a tenth lies."""
    return sorted(sizes)[len(sizes) // 10]


async def _soak(
    server: Running, texts: Sequence[str], expected: NDArray[np.float32], seconds: float
) -> tuple[Counter[str], list[tuple[float, int]]]:
    memory: list[tuple[float, int]] = []
    start = time.monotonic()
    end = start + seconds

    async def watch() -> None:
        while time.monotonic() < end:
            pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
            memory.append((time.monotonic() - start, pages * os.sysconf("SC_PAGE_SIZE")))
            await asyncio.sleep(max(seconds / 600, 0.1))

    async with (
        grpc.aio.insecure_channel(server.grpc, options=[("grpc.max_receive_message_length", -1)]) as channel,
        httpx.AsyncClient(timeout=60, trust_env=False) as http,
    ):
        callers = _Callers(channel, http, server.http, texts, expected)
        await asyncio.gather(watch(), *(callers.ask_until(end, number) for number in range(_CALLERS)))
    return callers.counts, memory


class _Callers:
    """What callers do, and how often it came out how."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        http: httpx.AsyncClient,
        url: str,
        texts: Sequence[str],
        expected: NDArray[np.float32],
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._stub = pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        self._admin = pb_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]
        self._kserve = kserve_grpc.GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
        self._http, self._url = http, url
        self._texts, self._expected = texts, expected

    async def ask_until(self, end: float, number: int) -> None:
        """Ask one thing after the other, each by chance."""
        chance = random.Random(number)
        while time.monotonic() < end:
            rows = chance.sample(range(len(self._texts)), min(chance.choice([1, 1, 1, 4, 16]), len(self._texts)))
            dim = chance.choice([self._expected.shape[1], _CUT])
            kind = chance.random()
            try:
                await self._ask(kind, chance, rows, dim)
            except grpc.aio.AioRpcError as error:
                self.counts[error.code().name] += 1
            except httpx.HTTPError as error:
                self.counts[type(error).__name__] += 1

    async def _ask(self, kind: float, chance: random.Random, rows: list[int], dim: int) -> None:
        some = [self._texts[row] for row in rows]
        request = pb.EmbedRequest(input=pb.EmbedInput(texts=some, prompt=""), dimensions=dim)
        if kind < 0.5:
            self._judge("OK", (await self._stub.Embed(request, timeout=60)).embeddings, rows)
        elif kind < 0.6:
            await self._ask_kserve(some, rows, dim)
        elif kind < 0.8:
            asked = {"input": some, "dimensions": dim, "encoding_format": "base64"}
            answer = await self._http.post(f"{self._url}/v1/embeddings", json=asked)
            if answer.status_code == 200:
                parts = [base64.b64decode(item["embedding"]) for item in answer.json()["data"]]
                self._judge("HTTP 200", b"".join(parts), rows)
            else:
                self.counts[f"HTTP {answer.status_code}"] += 1
        elif kind < 0.87:
            pending = self._stub.Embed(request)
            await asyncio.sleep(chance.random() * 0.02)
            pending.cancel()
            self.counts["cancelled"] += 1
        elif kind < 0.94:
            await self._ask_nonsense(some)
        elif kind < 0.96:
            # Left in the middle, with nothing more to ask: the server has to notice by itself.
            stream = self._stub.EmbedStream(timeout=60)
            await stream.write(request)
            self._stream_answer(await stream.read(), rows)
            stream.cancel()
            self.counts["stream left"] += 1
        elif kind < 0.997:
            async for item in self._stub.EmbedStream(iter([request] * 4), timeout=60):
                self._stream_answer(item, rows)
        else:
            await self._admin.Reload(pb.ReloadRequest(), timeout=120)
            self.counts["reloaded"] += 1

    async def _ask_nonsense(self, some: list[str]) -> None:
        try:
            await self._stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=some), dimensions=10**6))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                raise
            self.counts["INVALID_ARGUMENT as it should"] += 1
        else:
            self.counts["refused nothing"] += 1

    async def _ask_kserve(self, some: list[str], rows: list[int], dim: int) -> None:
        request = kserve.ModelInferRequest(model_name="bench")
        tensor = request.inputs.add(name="text", datatype="BYTES", shape=[len(some), 1])
        tensor.contents.bytes_contents.extend(text.encode() for text in some)
        request.parameters["dimensions"].int64_param = dim
        request.parameters["prompt"].string_param = ""
        answer = await self._kserve.ModelInfer(request, timeout=60)
        self._judge("KServe OK", answer.raw_output_contents[0], rows)

    def _stream_answer(self, item: pb.EmbedStreamResponse, rows: list[int]) -> None:
        if item.WhichOneof("result") == "response":
            self._judge("OK", item.response.embeddings, rows)
        else:
            self.counts[_CODES[item.error.code]] += 1

    def _judge(self, name: str, data: bytes, rows: list[int]) -> None:
        """Count an answer under `name` if its vectors, float32 [rows, dim], are what they should be."""
        vectors = np.frombuffer(data, "<f4").reshape(len(rows), -1)
        right = row_cosines(vectors, self._expected[rows, : vectors.shape[1]]) >= _LEAST_COSINE
        self.counts[name if right.all() else "wrong vector"] += 1


_CODES = {code.value[0]: code.name for code in grpc.StatusCode}
