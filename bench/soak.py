"""A server under mixed traffic for a long time: does it grow, does anything fail?

Callers embed texts of all lengths over gRPC and HTTP, cancel, ask what is refused, stream and reload, all the time.
Memory is the resident set of the server's process; growth is taken from the second tenth of the run to the last, since
pools and caches fill in the first.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import grpc
import httpx

from bench.report import Result, median
from bench.servers import GRPC, Running, running
from bench.serving import mixed_texts
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.bundle import open_bundle
from runtime.embedder import open_embedder

_CALLERS = 6
_EXPECTED = {
    "OK",
    "RESOURCE_EXHAUSTED",
    "INVALID_ARGUMENT as it should",
    "cancelled",
    "HTTP 200",
    "HTTP 429",
    "reloaded",
}


def measure(bundle: Path, engine: str, work: Path, seconds: float) -> Result:
    """Soak a server on `bundle` for `seconds`."""
    embedder = open_embedder(open_bundle(bundle), engine)
    texts = mixed_texts(embedder)
    embedder.close()
    with running(GRPC, bundle, bundle, engine, work / "soak.log") as server:
        counts, memory = asyncio.run(_soak(server, texts, seconds))
    tenth = max(len(memory) // 10, 1)
    early, late = median([m for _, m in memory[tenth : 2 * tenth]]), median([m for _, m in memory[-tenth:]])
    growth = late / early - 1
    wrong = {name: count for name, count in counts.items() if name not in _EXPECTED}
    return Result(
        name="soak",
        title=f"Soak, {bundle.name}, {engine}",
        command=f"python -m bench soak --seconds {seconds:g}",
        columns=["seconds", "requests", "unexpected", "resident MiB early", "late", "growth"],
        rows=[
            [
                *(f"{seconds:g}", str(sum(counts.values())), str(sum(wrong.values()))),
                *(f"{early / 2**20:.1f}", f"{late / 2**20:.1f}", f"{100 * growth:.2f} %"),
            ]
        ],
        notes=[", ".join(f"{name}: {count}" for name, count in sorted(counts.items()))],
        data={
            "seconds": seconds,
            "growth": growth,
            "counts": dict(counts),
            "unexpected": wrong,
            "resident_bytes": [[round(at, 1), size] for at, size in memory],
        },
    )


async def _soak(server: Running, texts: Sequence[str], seconds: float) -> tuple[Counter[str], list[tuple[float, int]]]:
    counts: Counter[str] = Counter()
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
        stub = pb_grpc.EmbeddingServiceStub(channel)  # type: ignore[no-untyped-call]
        admin = pb_grpc.AdminServiceStub(channel)  # type: ignore[no-untyped-call]

        async def call(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                some = chance.sample(texts, chance.choice([1, 1, 1, 4, 16]))
                request = pb.EmbedRequest(input=pb.EmbedInput(texts=some), dimensions=chance.choice([0, 64]))
                kind = chance.random()
                try:
                    if kind < 0.6:
                        await stub.Embed(request, timeout=60)
                        counts["OK"] += 1
                    elif kind < 0.8:
                        answer = await http.post(f"{server.http}/v1/embeddings", json={"input": some})
                        counts[f"HTTP {answer.status_code}"] += 1
                    elif kind < 0.88:
                        pending = stub.Embed(request)
                        await asyncio.sleep(chance.random() * 0.02)
                        pending.cancel()
                        counts["cancelled"] += 1
                    elif kind < 0.95:
                        await stub.Embed(pb.EmbedRequest(input=pb.EmbedInput(texts=some), dimensions=10**6))
                        counts["refused nothing"] += 1
                    elif kind < 0.997:
                        stream = stub.EmbedStream(iter([request] * 4), timeout=60)
                        async for item in stream:
                            counts["OK" if item.WhichOneof("result") == "response" else "RESOURCE_EXHAUSTED"] += 1
                    else:
                        await admin.Reload(pb.ReloadRequest(), timeout=120)
                        counts["reloaded"] += 1
                except grpc.aio.AioRpcError as error:
                    refused = kind >= 0.88 and error.code() is grpc.StatusCode.INVALID_ARGUMENT
                    counts["INVALID_ARGUMENT as it should" if refused else error.code().name] += 1
                except httpx.HTTPError as error:
                    counts[type(error).__name__] += 1

        await asyncio.gather(watch(), *(call(number) for number in range(_CALLERS)))
    return counts, memory
