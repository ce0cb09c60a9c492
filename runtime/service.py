"""The gRPC service f2rt.v1: requests in, embedder calls, responses out. Owns no engine and no thread pool's size.

Tokenization runs in its own threads and the engine in one thread of its own; nothing blocks the event loop. Each batch
waits for the engine by itself: a long request does not hold it, and a cancelled one gives it back after one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc
import numpy as np
from numpy.typing import NDArray

import runtime
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.embedder import Embedder, finish
from runtime.encoding import OutputDType, encode
from runtime.errors import DeadlineError, F2rtError, InputError, OverloadedError, UnavailableError, status_of
from runtime.settings import ServeSettings
from runtime.tokenizer import Instruction, TokenizedText, Truncate

log = logging.getLogger("f2rt.service")

_PACKED_IN_LOOP = 1 << 16  # values

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
_TRUNCATE = {
    pb.TRUNCATE_ERROR: Truncate.ERROR,
    pb.TRUNCATE_END: Truncate.END,
    pb.TRUNCATE_START: Truncate.START,
}
_DTYPE = {
    pb.DTYPE_UNSPECIFIED: OutputDType.FLOAT32,
    pb.DTYPE_FLOAT32: OutputDType.FLOAT32,
    pb.DTYPE_FLOAT16: OutputDType.FLOAT16,
    pb.DTYPE_INT8: OutputDType.INT8,
    pb.DTYPE_BINARY: OutputDType.BINARY,
}
_PB_DTYPE = {dtype: number for number, dtype in _DTYPE.items() if number != pb.DTYPE_UNSPECIFIED}

# Details travel in a trailer, which gRPC drops above 8 KiB, and percent-encoded: up to 12 bytes a character.
_MAX_MESSAGE_CHARS = 400
_MAX_LOGGED_CHARS = 100

Request = TypeVar("Request")
Response = TypeVar("Response")
Result = TypeVar("Result")


class EmbeddingService(pb_grpc.EmbeddingServiceServicer):
    """Answers f2rt.v1.EmbeddingService with one embedder."""

    def __init__(self, embedder: Embedder, settings: ServeSettings) -> None:
        self._embedder = embedder
        self._settings = settings
        self._tokenizer_threads = ThreadPoolExecutor(2, thread_name_prefix="f2rt-tokenize")
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="f2rt-engine")
        self._admitted = 0
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """Embed one request; see the .proto for its fields."""
        return await self._answer(self._embed, request, context)

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:  # noqa: N802
        """Tokenize only, and show what the engine would see."""
        return await self._answer(self._explain, request, context)

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:  # noqa: N802
        """Say which engine answers here."""
        return await self._answer(self._info, request, context)

    async def idle(self) -> None:
        """Return once no call is open: each has its response sent, or was cancelled."""
        await self._idle.wait()

    def close(self) -> None:
        """Stop the threads once the work they have is done."""
        self._tokenizer_threads.shutdown()
        self._engine_thread.shutdown()

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        if self.draining:
            raise UnavailableError("the server is shutting down.", cure="Ask another replica.")
        if self._admitted >= self._settings.max_waiting_requests:
            raise OverloadedError(
                f"{self._admitted} requests are waiting; the limit is {self._settings.max_waiting_requests}.",
                cure="Try again in a moment.",
            )
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def _embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        with self._admission():
            return await self._admitted_embed(request, context)

    async def _admitted_embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        start = time.perf_counter()
        embedder = self._embedder
        dimensions = request.dimensions or None
        embedder.check_dimensions(dimensions)
        dtype = _DTYPE.get(request.dtype)
        if dtype is None:
            raise InputError(f"there is no dtype {request.dtype}.", cure="Use one of the DType enum.")
        items = await _run(self._tokenizer_threads, self._tokenization(request.input))
        tokenized = time.perf_counter()
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the engine was free.", cure="Allow more time.")
        vectors, infer_s = await self._infer(items)
        inferred = time.perf_counter()
        normalize = request.normalize if request.HasField("normalize") else True

        def pack() -> tuple[int, bytes, NDArray[np.float32] | None]:
            finished = finish(vectors, dimensions, normalize)
            return finished.shape[1], *encode(finished, dtype)

        # A thread costs more than a small response, and a large one would hold up the event loop.
        small = vectors.size <= _PACKED_IN_LOOP
        dim, data, scales = pack() if small else await _run(self._tokenizer_threads, pack)
        total_ms = 1e3 * (time.perf_counter() - start)
        if request.request_id:
            log.info("request %s: %d items in %.1f ms", _logged(request), len(items), total_ms)
        return pb.EmbedResponse(
            embeddings=data,
            rows=len(items),
            dim=dim,
            dtype=_PB_DTYPE[dtype],
            items=[_item(item, 0.0 if scales is None else float(scales[i])) for i, item in enumerate(items)],
            timings=pb.Timings(
                tokenize_ms=1e3 * (tokenized - start),
                queue_ms=1e3 * (inferred - tokenized - infer_s),
                infer_ms=1e3 * infer_s,
                total_ms=total_ms,
            ),
            fingerprint=embedder.fingerprint,
            request_id=request.request_id,
            trained_dimension=dim in embedder.contract.trained_dims,
        )

    async def _infer(self, items: Sequence[TokenizedText]) -> tuple[NDArray[np.float32], float]:
        """Return the vectors of `items`, and the seconds the engine worked on them."""
        embedder = self._embedder
        vectors = np.empty((len(items), embedder.contract.dim), np.float32)
        infer_s = 0.0

        def run(rows: list[int]) -> tuple[NDArray[np.float32], float]:
            began = time.perf_counter()
            return embedder.infer_rows(items, rows), time.perf_counter() - began

        loop = asyncio.get_running_loop()
        for rows in embedder.plan(items):
            vectors[rows], took_s = await loop.run_in_executor(self._engine_thread, run, rows)
            infer_s += took_s
        return vectors, infer_s

    async def _explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        with self._admission():
            tokenize = self._tokenization(request.input)
            spell = self._embedder.loaded.tokenizer.spell

            def explain() -> list[pb.Explanation]:
                return [
                    pb.Explanation(
                        rendered=item.rendered,
                        ids=item.ids,
                        tokens=spell(item.ids),
                        pooled_position=len(item.ids) - 1,
                        pooled_id=item.ids[-1],
                        truncated=item.truncated,
                        original_tokens=item.original_tokens,
                    )
                    for item in tokenize()
                ]

            items = await _run(self._tokenizer_threads, explain)
            return pb.ExplainResponse(items=items, fingerprint=self._embedder.fingerprint)

    async def _info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        embedder, limits = self._embedder, self._settings.limits
        manifest, record = embedder.bundle.manifest, embedder.loaded.record
        contract = manifest.contract
        default = next(number for number, truncate in _TRUNCATE.items() if truncate is self._settings.truncate)
        return pb.InfoResponse(
            model=manifest.source.id,
            revision=manifest.source.revision or "",
            engine=record.name,
            precision=record.precision,
            fingerprint=embedder.fingerprint,
            dim=contract.dim,
            trained_dims=contract.trained_dims,
            max_tokens=contract.max_tokens,
            prompts=contract.prompts,
            default_prompt_name=contract.default_prompt_name or "",
            default_truncate=default,
            max_items=limits.max_items,
            max_request_tokens=limits.max_request_tokens,
            license=manifest.source.license or "",
            verdict=record.parity.verdict if record.parity else "",
            min_cosine=record.parity.min_cosine if record.parity else 0.0,
            version=runtime.__version__,
            selection=embedder.loaded.selection,
        )

    def _tokenization(self, source: pb.EmbedInput) -> Callable[[], list[TokenizedText]]:
        """Return the tokenization of `source` as work for a thread. Raises InputError."""
        embedder, limits = self._embedder, self._settings.limits
        texts, sequences = source.texts, source.token_ids
        chosen = source.WhichOneof("instruction")
        if texts and sequences:
            raise InputError("texts and token_ids were both given.", cure="Send two requests.")
        if sequences:
            if chosen:
                raise InputError("a prompt was given with token_ids, which are used verbatim.", cure="Leave it out.")
            if len(sequences) > limits.max_items:  # before millions of empty rows become Python objects
                raise InputError(
                    f"the request has {len(sequences)} items; it may have 1 to {limits.max_items}.",
                    cure="Split the request.",
                )
            return lambda: embedder.verbatim([row.ids for row in sequences])
        wanted = self._settings.truncate if not source.truncate else _TRUNCATE.get(source.truncate)
        if wanted is None:
            raise InputError(f"there is no truncate mode {source.truncate}.", cure="Use one of the Truncate enum.")
        instruction = Instruction(
            prompt_name=source.prompt_name if chosen == "prompt_name" else None,
            prompt=source.prompt if chosen == "prompt" else None,
        )
        return lambda: embedder.tokenize(texts, instruction, wanted)

    async def _answer(
        self, work: Callable[[Request, Any], Awaitable[Response]], request: Request, context: Any
    ) -> Response:
        """Run one call; an error becomes its status, with message and cure in the details."""
        self._calls += 1
        self._idle.clear()
        context.add_done_callback(self._ended)
        try:
            return await work(request, context)
        except F2rtError as error:
            status = status_of(error)
            if status.http == 500:
                log.error("request %s: %s", _logged(request), error)
            elif getattr(request, "request_id", ""):
                log.info("request %s: %s: %.400s", _logged(request), status.grpc, error)
            await context.abort(grpc.StatusCode[status.grpc], _details(error))
        except Exception:
            # A fault of ours: the caller learns no internals, the log has all of them.
            log.exception("request %s: unexpected error", _logged(request))
            await context.abort(grpc.StatusCode.INTERNAL, "an unexpected error; the server's log has the details.")
        raise AssertionError("abort raises")

    def _ended(self, context: Any) -> None:
        self._calls -= 1
        if not self._calls:
            self._idle.set()


async def _run(threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
    return await asyncio.get_running_loop().run_in_executor(threads, work)


def _item(item: TokenizedText, scale: float) -> pb.Item:
    return pb.Item(tokens=len(item.ids), truncated=item.truncated, original_tokens=item.original_tokens, scale=scale)


def _details(error: F2rtError) -> str:
    message = error.message
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[:_MAX_MESSAGE_CHARS] + "…"
    return f"{message} {error.cure}".rstrip()


def _logged(request: Any) -> str:
    """Return the request's id for the log: quoted, so that it stays on one line, and cut."""
    return repr(getattr(request, "request_id", "")[:_MAX_LOGGED_CHARS])
