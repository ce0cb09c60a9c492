"""The gRPC service f2rt.v1: requests in, embedder calls, responses out. Owns no engine and no thread pool's size.

Tokenization runs in its own threads and the engine in one thread of its own; nothing blocks the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import grpc

import runtime
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.embedder import Embedder, finish
from runtime.encoding import OutputDType, encode
from runtime.errors import DeadlineError, F2rtError, InputError, OverloadedError, UnavailableError, status_of
from runtime.settings import ServeSettings
from runtime.tokenizer import Instruction, TokenizedText, Truncate

log = logging.getLogger("f2rt.service")

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

Request = TypeVar("Request")
Response = TypeVar("Response")


class EmbeddingService(pb_grpc.EmbeddingServiceServicer):
    """Answers f2rt.v1.EmbeddingService with one embedder."""

    def __init__(self, embedder: Embedder, settings: ServeSettings) -> None:
        self._embedder = embedder
        self._settings = settings
        self._tokenizer_threads = ThreadPoolExecutor(2, thread_name_prefix="f2rt-tokenize")
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="f2rt-engine")
        self._admitted = 0
        self.draining = False

    async def Embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:  # noqa: N802
        """Embed one request; see the .proto for its fields."""
        return await _answer(self._embed, request, context)

    async def Explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:  # noqa: N802
        """Tokenize only, and show what the engine would see."""
        return await _answer(self._explain, request, context)

    async def Info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:  # noqa: N802
        """Say which engine answers here."""
        return await _answer(self._info, request, context)

    def close(self) -> None:
        """Stop the threads once the work they have is done."""
        self._tokenizer_threads.shutdown()
        self._engine_thread.shutdown()

    async def _embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        if self.draining:
            raise UnavailableError("the server is shutting down.", cure="Ask another replica.")
        if self._admitted >= self._settings.max_waiting_requests:
            raise OverloadedError(
                f"{self._admitted} requests are waiting; the limit is {self._settings.max_waiting_requests}.",
                cure="Try again in a moment.",
            )
        self._admitted += 1
        try:
            return await self._admitted_embed(request, context)
        finally:
            self._admitted -= 1

    async def _admitted_embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        start = time.perf_counter()
        embedder = self._embedder
        dimensions = request.dimensions or None
        embedder.check_dimensions(dimensions)
        dtype = _DTYPE.get(request.dtype)
        if dtype is None:
            raise InputError(f"there is no dtype {request.dtype}.", cure="Use one of the DType enum.")
        items = await self._tokenize(request.input)
        tokenized = time.perf_counter()
        remaining_s = context.time_remaining()
        if remaining_s is not None and remaining_s <= 0:
            raise DeadlineError("the deadline passed before the engine was free.", cure="Allow more time.")
        began = 0.0

        def infer() -> Any:
            nonlocal began
            began = time.perf_counter()
            return embedder.infer(items)

        vectors = await asyncio.get_running_loop().run_in_executor(self._engine_thread, infer)
        inferred = time.perf_counter()
        normalize = request.normalize if request.HasField("normalize") else True
        vectors = finish(vectors, dimensions, normalize)
        data, scales = encode(vectors, dtype)
        dim = vectors.shape[1]
        return pb.EmbedResponse(
            embeddings=data,
            rows=len(vectors),
            dim=dim,
            dtype=_PB_DTYPE[dtype],
            items=[_item(item, 0.0 if scales is None else float(scales[i])) for i, item in enumerate(items)],
            timings=pb.Timings(
                tokenize_ms=1e3 * (tokenized - start),
                queue_ms=1e3 * (began - tokenized),
                infer_ms=1e3 * (inferred - began),
                total_ms=1e3 * (time.perf_counter() - start),
            ),
            fingerprint=embedder.fingerprint,
            request_id=request.request_id,
            trained_dimension=dim in embedder.contract.trained_dims,
        )

    async def _explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        items = await self._tokenize(request.input)
        spell = self._embedder.loaded.tokenizer.spell
        return pb.ExplainResponse(
            items=[
                pb.Explanation(
                    rendered=item.rendered,
                    ids=item.ids,
                    tokens=spell(item.ids),
                    pooled_position=len(item.ids) - 1,
                    pooled_id=item.ids[-1],
                    truncated=item.truncated,
                    original_tokens=item.original_tokens,
                )
                for item in items
            ],
            fingerprint=self._embedder.fingerprint,
        )

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

    async def _tokenize(self, source: pb.EmbedInput) -> list[TokenizedText]:
        texts, sequences = list(source.texts), [list(t.ids) for t in source.token_ids]
        chosen = source.WhichOneof("instruction")
        instruction = Instruction(
            prompt_name=source.prompt_name if chosen == "prompt_name" else None,
            prompt=source.prompt if chosen == "prompt" else None,
        )
        work: Callable[[], list[TokenizedText]]
        if texts and sequences:
            raise InputError("texts and token_ids were both given.", cure="Send two requests.")
        if sequences:
            if chosen:
                raise InputError("a prompt was given with token_ids, which are used verbatim.", cure="Leave it out.")
            work = lambda: self._embedder.verbatim(sequences)  # noqa: E731
        else:
            truncate = self._settings.truncate if not source.truncate else _TRUNCATE.get(source.truncate)
            if truncate is None:
                raise InputError(f"there is no truncate mode {source.truncate}.", cure="Use one of the Truncate enum.")
            wanted = truncate
            work = lambda: self._embedder.tokenize(texts, instruction, wanted)  # noqa: E731
        return await asyncio.get_running_loop().run_in_executor(self._tokenizer_threads, work)


def _item(item: TokenizedText, scale: float) -> pb.Item:
    return pb.Item(tokens=len(item.ids), truncated=item.truncated, original_tokens=item.original_tokens, scale=scale)


async def _answer(work: Callable[[Request, Any], Awaitable[Response]], request: Request, context: Any) -> Response:
    """Run one call; an error becomes its status, with message and cure in the details."""
    try:
        return await work(request, context)
    except F2rtError as error:
        code = grpc.StatusCode[status_of(error).grpc]
        if status_of(error).http >= 500:
            log.error("%s", error)
        await context.abort(code, str(error))
    except Exception:
        # A fault of ours: the caller learns no internals, the log has all of them.
        log.exception("unexpected error")
        await context.abort(grpc.StatusCode.INTERNAL, "an unexpected error; the server's log has the details.")
    raise AssertionError("abort raises")
