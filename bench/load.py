"""Load on a server: closed loop (each caller waits for its answer) and open loop (requests come at their own rate).

In the open loop a request's time counts from when it was due, not from when the generator got round to sending it:
a server that stalls delays all that was due meanwhile, and this is seen (coordinated omission, G. Tene).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import aiohttp
import grpc
import orjson

from bench.report import percentile
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.client_errors import retry_delay_s

TIMEOUT_S = 60.0
SETTLED_S = 3.0
LEAST_REQUESTS = 20
_RETRY_S = 0.01  # of a server that does not say
_KEPT_S = 2.0  # between two requests: less than any server keeps a connection, or one it closes is taken for a failure
_JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Request:
    """Texts of one request, and the tokens of all of them together."""

    texts: Sequence[str]
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What became of a request; `retry_after_s` is when a server that refused asked to be asked again."""

    kind: str
    retry_after_s: float = _RETRY_S


OK, REFUSED, FAILED = Answer("ok"), Answer("refused"), Answer("failed")

Ask = Callable[[Sequence[str]], Awaitable[Answer]]


@dataclass
class Outcomes:
    """What became of the requests of one phase. Times in milliseconds; `seconds` is how long the phase was.

    `texts` and `tokens` are of what was answered. Rates are compared by tokens: a phase sees some of the texts more
    often than others, and in overload short requests find room more often than long ones.

    `late_ms` is how late the generator itself was, which is in the times of the open loop, and `generator_cores` how
    many cores it kept busy, which a server on the same machine did not have. `settled_ms` are those of `ok_ms` that
    were due `SETTLED_S` or more after the phase began: what fills the queue at the onset of overload is behind them.
    """

    seconds: float = 0.0
    generator_cores: float = 0.0
    texts: int = 0
    tokens: int = 0
    ok_ms: list[float] = field(default_factory=list)
    settled_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    late_ms: list[float] = field(default_factory=list)
    failed: int = 0

    def add(self, outcome: Answer, request: Request, ms: float, due_s: float = 0.0) -> None:
        """Count one request, due so many seconds after the phase began."""
        if outcome.kind == OK.kind:
            self.texts += len(request.texts)
            self.tokens += request.tokens
            self.ok_ms.append(ms)
            if due_s >= SETTLED_S:
                self.settled_ms.append(ms)
        elif outcome.kind == REFUSED.kind:
            self.refused_ms.append(ms)
        else:
            self.failed += 1

    @property
    def texts_per_s(self) -> float:
        """Texts embedded per second."""
        return self.texts / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens embedded per second, without padding."""
        return self.tokens / self.seconds

    def as_data(self) -> dict[str, float]:
        """Return the numbers; what has no value is left out."""
        data: dict[str, float] = {"texts_per_s": self.texts_per_s, "tokens_per_s": self.tokens_per_s}
        data |= {"ok": len(self.ok_ms), "failed": self.failed, "generator_cores": self.generator_cores}
        data["refused"] = len(self.refused_ms)
        all_times = {"ok": self.ok_ms, "settled": self.settled_ms, "refused": self.refused_ms, "late": self.late_ms}
        for name, times in all_times.items():
            if times:
                data |= {f"{name}_p50_ms": percentile(times, 50), f"{name}_p99_ms": percentile(times, 99)}
        return data


async def closed_loop(ask: Ask, requests: Sequence[Request], callers: int, seconds: float, least: int = 1) -> Outcomes:
    """`callers` callers, each of which asks again when it has its answer, or when the server that refused wants it.

    Each asks `least` times, however long that takes.
    """
    outcomes, end = Outcomes(), time.perf_counter() + seconds

    async def call(number: int) -> None:
        turn = number
        while time.perf_counter() < end or turn < number + least * callers:
            request = requests[turn % len(requests)]
            turn += callers
            start = time.perf_counter()
            outcome = await ask(request.texts)
            outcomes.add(outcome, request, 1e3 * (time.perf_counter() - start))
            if outcome.kind == REFUSED.kind:
                await asyncio.sleep(min(outcome.retry_after_s, max(end - time.perf_counter(), 0)))

    start, used_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(call(number) for number in range(callers)))
    outcomes.seconds = time.perf_counter() - start
    outcomes.generator_cores = (time.process_time() - used_s) / outcomes.seconds
    return outcomes


async def open_loop(ask: Ask, requests: Sequence[Request], per_second: float, seconds: float) -> Outcomes:
    """Requests at a fixed rate, at times of a Poisson process, for `seconds` or as long as `LEAST_REQUESTS` take.

    As many as the rate says, however the times fall: given their number, a Poisson process spreads them evenly.
    """
    outcomes, tasks = Outcomes(), set[asyncio.Task[None]]()
    count = max(round(per_second * seconds), LEAST_REQUESTS)
    seconds, chance = count / per_second, random.Random(7)
    start, used_s = time.perf_counter() + 0.05, time.process_time()

    async def send(request: Request, due_s: float) -> None:
        outcomes.late_ms.append(1e3 * (time.perf_counter() - due_s))
        outcome = await ask(request.texts)
        outcomes.add(outcome, request, 1e3 * (time.perf_counter() - due_s), due_s - start)

    for number, due in enumerate(sorted(start + chance.uniform(0, seconds) for _ in range(count))):
        wait = due - time.perf_counter()
        # Sleeping is not exact below a millisecond; what is due by then goes out together.
        if wait > 0.0005:
            await asyncio.sleep(wait)
        task = asyncio.create_task(send(requests[number % len(requests)], due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        if number % 64 == 63:
            await asyncio.sleep(0)  # answers are read also when the generator is late
    while tasks:
        await asyncio.wait(tasks)
    outcomes.seconds = max(time.perf_counter() - start, seconds)
    outcomes.generator_cores = (time.process_time() - used_s) / outcomes.seconds
    return outcomes


class GrpcAsker:
    """Asks f2rt.v1 over one channel."""

    def __init__(self, address: str) -> None:
        """Open a channel. Must be called inside the event loop that asks."""
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.max_receive_message_length", -1)])
        self._embed = pb_grpc.EmbeddingServiceStub(self._channel).Embed  # type: ignore[no-untyped-call]

    async def __call__(self, texts: Sequence[str]) -> Answer:
        """Embed texts; returns what became of it."""
        try:
            answer = await self._embed(pb.EmbedRequest(input=pb.EmbedInput(texts=texts)), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                return FAILED
            return Answer(REFUSED.kind, retry_delay_s(error) or _RETRY_S)
        return OK if answer.rows == len(texts) else FAILED

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()


class OpenAIAsker:
    """Asks an OpenAI-compatible endpoint, for base64 where it has that."""

    def __init__(self, url: str, model: str, encoding: str = "base64") -> None:
        """Open no connection yet. Must be called inside the event loop that asks."""
        # Not httpx: it takes as much of the cores for a request as a fast server does.
        connector = aiohttp.TCPConnector(limit=2000, keepalive_timeout=_KEPT_S)
        self._client = aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=TIMEOUT_S))
        self._url = url
        self._fields = {"model": model, "encoding_format": encoding}

    async def __call__(self, texts: Sequence[str]) -> Answer:
        """Embed texts; returns what became of it."""
        body = orjson.dumps({"input": texts, **self._fields})
        try:
            async with self._client.post(self._url, data=body, headers=_JSON) as answer:
                content, status, told = await answer.read(), answer.status, answer.headers
        except (aiohttp.ClientError, TimeoutError):
            return FAILED
        if status in (429, 503):
            exact = told.get("retry-after-ms")
            return Answer(REFUSED.kind, float(exact) / 1e3 if exact else float(told.get("retry-after", _RETRY_S)))
        return OK if status == 200 and content.count(b'"index"') == len(texts) else FAILED

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
