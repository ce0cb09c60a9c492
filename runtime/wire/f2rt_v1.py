"""f2rt.v1 over gRPC: requests in, calls to models, responses out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

import runtime
from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime.embedder import finish
from runtime.encoding import OutputDType, encode
from runtime.errors import AccessError, F2rtError, InputError, OverloadedError, status_of
from runtime.serving.access import Keys
from runtime.serving.call import EmbedCall, EmbedReply
from runtime.serving.models import Models, request_id
from runtime.settings import ServeSettings
from runtime.tokenizer import Instruction, TokenizedText, Truncate
from runtime.wire.grpc_calls import UNEXPECTED, Calls, Dropping, details, header, unreadable
from runtime.wire.tls import TlsFiles

log = logging.getLogger("f2rt.grpc")

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
ADMIN_NAME = pb.DESCRIPTOR.services_by_name["AdminService"].full_name

MOST_STREAMS = 256  # open at a time: each has threads of its own
_STREAM_WINDOW = 8  # requests of one stream that are worked on at a time
_TRUNCATE = {
    pb.TRUNCATE_ERROR: Truncate.ERROR,
    pb.TRUNCATE_END: Truncate.END,
    pb.TRUNCATE_START: Truncate.START,
}
_PB_TRUNCATE = {truncate: number for number, truncate in _TRUNCATE.items()}
_DTYPE = {
    pb.DTYPE_UNSPECIFIED: OutputDType.FLOAT32,
    pb.DTYPE_FLOAT32: OutputDType.FLOAT32,
    pb.DTYPE_FLOAT16: OutputDType.FLOAT16,
    pb.DTYPE_INT8: OutputDType.INT8,
    pb.DTYPE_BINARY: OutputDType.BINARY,
}
_PB_DTYPE = {dtype: number for number, dtype in _DTYPE.items() if number != pb.DTYPE_UNSPECIFIED}


class EmbeddingService:
    """Answers f2rt.v1.EmbeddingService and AdminService for all models of a server."""

    def __init__(self, models: Models, settings: ServeSettings, keys: Keys, tls: TlsFiles | None) -> None:
        self._models = models
        self._settings = settings
        self._keys, self._tls = keys, tls
        self._loop = asyncio.get_running_loop()
        self._streams = threading.BoundedSemaphore(MOST_STREAMS)

    def handlers(self, calls: Calls) -> list[Any]:
        """Return the generic handlers of both services."""
        return [
            calls.service(
                SERVICE_NAME,
                {
                    "Embed": calls.unary(self.embed, pb.EmbedRequest, pb.EmbedResponse, protocol="grpc"),
                    "EmbedStream": calls.stream(self.embed_stream, pb.EmbedRequest, pb.EmbedStreamResponse),
                    "Explain": calls.unary(self.explain, pb.ExplainRequest, pb.ExplainResponse),
                    "Info": calls.unary(self.info, pb.InfoRequest, pb.InfoResponse),
                },
            ),
            calls.service(ADMIN_NAME, {"Reload": calls.unary(self.reload, pb.ReloadRequest, pb.ReloadResponse)}),
        ]

    def embed(self, request: pb.EmbedRequest, context: Any) -> pb.EmbedResponse:
        """Embed one request; see the .proto for its fields."""
        return self._embed(request, context, Dropping(context))

    def _embed(self, request: pb.EmbedRequest, context: Any, dropping: Dropping) -> pb.EmbedResponse:
        dtype = _DTYPE.get(request.dtype)
        if dtype is None:
            raise InputError(f"there is no dtype {request.dtype}.", cure="Use one of the DType enum.")
        traceparent = header(context, "traceparent") if self._settings.otlp_endpoint else ""
        call = _call(request, context.time_remaining(), traceparent)
        reply = self._models.answer(call, "grpc", dropping.begun)
        vectors = finish(reply.vectors, call.dimensions, call.normalize)
        data, scales = encode(vectors, dtype)
        return _response(call, reply, vectors.shape[1], data, scales, dtype)

    def embed_stream(self, requests: Iterator[Any], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        """Answer a stream of requests in their order. What fails is told in its place, and the stream goes on."""
        if not self._streams.acquire(blocking=False):
            raise OverloadedError(
                f"{MOST_STREAMS} streams are open, and the server takes no more.",
                cure="Ask again in a second, or send single requests.",
                retry_after_s=1.0,
            )
        try:
            yield from self._answers(requests, context)
        finally:
            self._streams.release()

    def _answers(self, requests: Iterator[Any], context: Any) -> Iterator[pb.EmbedStreamResponse]:
        answers: queue.Queue[Future[pb.EmbedStreamResponse] | None] = queue.Queue(_STREAM_WINDOW)
        ended = threading.Event()

        def over() -> None:
            ended.set()
            while True:  # whoever waits for an answer is woken, or its thread would be gone for good
                with contextlib.suppress(queue.Full):
                    answers.put_nowait(None)
                    return
                with contextlib.suppress(queue.Empty):
                    answers.get_nowait()

        if not context.add_callback(over):  # it ended before it began
            return

        def put(answer: Future[pb.EmbedStreamResponse] | None) -> None:
            while not ended.is_set():  # nobody takes any more once the call is over
                with contextlib.suppress(queue.Full):
                    answers.put(answer, timeout=0.2)
                    return

        dropping = Dropping(context)

        def read() -> None:
            with contextlib.suppress(grpc.RpcError), ThreadPoolExecutor(_STREAM_WINDOW) as window:
                for request in requests:
                    put(window.submit(self._stream_item, request, context, dropping))
            put(None)

        reader = threading.Thread(target=read, name="f2rt-stream", daemon=True)
        reader.start()
        while (answer := answers.get()) is not None:
            yield answer.result()

    def _stream_item(self, request: Any, context: Any, dropping: Dropping) -> pb.EmbedStreamResponse:
        try:
            if isinstance(request, DecodeError):
                raise unreadable(request)
            return pb.EmbedStreamResponse(response=self._embed(request, context, dropping))
        except F2rtError as error:
            self._models.refused(error, "grpc", "" if isinstance(request, DecodeError) else request.request_id)
            retry_s = error.retry_after_s if isinstance(error, OverloadedError) else 0.0
            code, message = grpc.StatusCode[status_of(error).grpc], details(error)
        except Exception:
            log.exception("unexpected error in a stream")
            code, message, retry_s = grpc.StatusCode.INTERNAL, UNEXPECTED, 0.0
        given = "" if isinstance(request, DecodeError) else request.request_id
        told = pb.StreamError(code=code.value[0], message=message, request_id=given, retry_after_s=retry_s)
        return pb.EmbedStreamResponse(error=told)

    def explain(self, request: pb.ExplainRequest, context: Any) -> pb.ExplainResponse:
        """Tokenize only, and show what the engine would see."""
        model = self._models.get(request.model)
        call = _call(pb.EmbedRequest(input=request.input), None)
        with model.entered() as pipeline:
            embedder = pipeline.embedder
            call.check(embedder.limits.max_items)
            if call.token_ids:
                items = embedder.verbatim(call.token_ids)
            else:
                items = pipeline.tokenize(call.texts, call.instruction, call.truncate)
        spell = embedder.loaded.tokenizer.spell
        return pb.ExplainResponse(
            items=[_explanation(item, spell(item.ids)) for item in items], fingerprint=embedder.fingerprint
        )

    def info(self, request: pb.InfoRequest, context: Any) -> pb.InfoResponse:
        """Say which engine answers for a model, from which checkpoint, within which limits."""
        model = self._models.get(request.model)
        embedder, limits = model.embedder, self._settings.limits
        manifest, record = embedder.bundle.manifest, embedder.loaded.record
        contract = manifest.contract
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
            default_truncate=_PB_TRUNCATE[self._settings.truncate],
            max_items=limits.max_items,
            max_request_tokens=limits.max_request_tokens,
            license=manifest.source.license or "",
            verdict=record.parity.verdict if record.parity else "",
            min_cosine=record.parity.min_cosine if record.parity else 0.0,
            version=runtime.__version__,
            selection=embedder.loaded.selection,
            name=model.name,
            models=[m.name for m in self._models],
            state=model.state,
            golden_cosine=model.golden_cosine,
            unverified=embedder.loaded.unverified,
            policy_sha256=embedder.loaded.policy.sha256,
        )

    def reload(self, request: pb.ReloadRequest, context: Any) -> pb.ReloadResponse:
        """Read keys and certificates again, and switch a model to its bundle as it is now on disk."""
        if not self._keys.required and not _is_local(context.peer()):
            raise AccessError(
                "without API keys a reload is taken from this machine only.",
                cure="Serve with --keys-file, or use SIGHUP.",
            )
        try:
            self._keys.reload()
            if self._tls is not None:
                self._tls.reload()
        except F2rtError as error:
            log.error("a reload was asked for, and everything stays as it was: %s", error)
            raise
        reloading = self._models.get(request.model).reload(request.engine or None, wanted=context.is_active)
        done = asyncio.run_coroutine_threadsafe(reloading, self._loop).result()
        return pb.ReloadResponse(
            model=done.model,
            old_fingerprint=done.old_fingerprint,
            new_fingerprint=done.new_fingerprint,
            engine=done.engine,
        )


def _call(request: pb.EmbedRequest, remaining_s: float | None, traceparent: str = "") -> EmbedCall:
    """Translate a request. Raises InputError."""
    source = request.input
    chosen = source.WhichOneof("instruction")
    truncate = _TRUNCATE.get(source.truncate) if source.truncate else None
    if source.truncate and truncate is None:
        raise InputError(f"there is no truncate mode {source.truncate}.", cure="Use one of the Truncate enum.")
    return EmbedCall(
        texts=source.texts,
        token_ids=_Rows(source.token_ids),
        instruction=Instruction(
            prompt_name=source.prompt_name if chosen == "prompt_name" else None,
            prompt=source.prompt if chosen == "prompt" else None,
        ),
        truncate=truncate,
        dimensions=request.dimensions or None,
        normalize=request.normalize if request.HasField("normalize") else True,
        deadline_s=None if remaining_s is None else time.perf_counter() + remaining_s,
        request_id=request_id(request.request_id),
        model=request.model,
        traceparent=traceparent,
    )


class _Rows(Collection[Sequence[int]]):
    """Token id rows of a message, unpacked on a worker: millions of them must not become objects in the event loop."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Sequence[int]]:
        return (row.ids for row in self._rows)

    def __contains__(self, row: object) -> bool:
        return any(row == own for own in self)


def _response(
    call: EmbedCall,
    reply: EmbedReply,
    dim: int,
    data: bytes,
    scales: NDArray[np.float32] | None,
    dtype: OutputDType,
) -> pb.EmbedResponse:
    timings = reply.timings
    return pb.EmbedResponse(
        embeddings=data,
        rows=len(reply.items),
        dim=dim,
        dtype=_PB_DTYPE[dtype],
        items=[_item(item, 0.0 if scales is None else float(scales[i])) for i, item in enumerate(reply.items)],
        timings=pb.Timings(
            tokenize_ms=timings.tokenize_ms,
            queue_ms=timings.queue_ms,
            infer_ms=timings.infer_ms,
            total_ms=timings.total_ms,
        ),
        fingerprint=reply.fingerprint,
        request_id=call.request_id,
        trained_dimension=dim in reply.trained_dims,
    )


def _item(item: TokenizedText, scale: float) -> pb.Item:
    return pb.Item(tokens=len(item.ids), truncated=item.truncated, original_tokens=item.original_tokens, scale=scale)


def _explanation(item: TokenizedText, spelling: list[str]) -> pb.Explanation:
    return pb.Explanation(
        rendered=item.rendered,
        ids=item.ids,
        tokens=spelling,
        pooled_position=len(item.ids) - 1,
        pooled_id=item.ids[-1],
        truncated=item.truncated,
        original_tokens=item.original_tokens,
    )


def _is_local(peer: str) -> bool:
    return peer.startswith(("unix:", "ipv4:127.", "ipv6:[::1]", "ipv6:%5B::1%5D"))
