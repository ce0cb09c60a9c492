"""A typed Python client for f2rt.v1. Errors come back as the exceptions the server raised."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from runtime._pb.f2rt.v1 import embedding_pb2 as pb
from runtime._pb.f2rt.v1 import embedding_pb2_grpc as pb_grpc
from runtime.client_answers import EmbedAnswer, EmbeddedItem, ExplainedItem, Reloaded, ServerInfo, Timings
from runtime.client_errors import error_of, input_errors, retry_delay_s, said_by_a_server
from runtime.encoding import OutputDType, decode
from runtime.errors import F2rtError, InputError, UnavailableError
from runtime.files import explain_read_errors
from runtime.tokenizer import Truncate

_DTYPES = {
    OutputDType.FLOAT32: pb.DTYPE_FLOAT32,
    OutputDType.FLOAT16: pb.DTYPE_FLOAT16,
    OutputDType.INT8: pb.DTYPE_INT8,
    OutputDType.BINARY: pb.DTYPE_BINARY,
}
_TRUNCATE = {
    None: pb.TRUNCATE_UNSPECIFIED,
    Truncate.ERROR: pb.TRUNCATE_ERROR,
    Truncate.END: pb.TRUNCATE_END,
    Truncate.START: pb.TRUNCATE_START,
}
_START = "Start one: f2rt serve BUNDLE"
_MAX_MESSAGE_BYTES = 256 << 20  # the default of 4 MiB holds 409 vectors of 2560 dimensions


class EmbeddingClient:
    """A connection to one server. Thread-safe; close it, or use it as a context manager."""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = 60.0,
        key: str | None = None,
        tls_ca: Path | None = None,
        tls_certificate: Path | None = None,
        tls_key: Path | None = None,
    ) -> None:
        """Open a channel to HOST:PORT or unix:PATH; nothing is sent yet. `timeout_s` bounds each call.

        With `tls_ca`, the PEM file of the server's authority, the channel is encrypted; a certificate and its key show
        who asks. `key` is an API key. Raises InputError for files that cannot be read, or do not belong together.
        """
        if (tls_certificate is None) != (tls_key is None) or (tls_certificate is not None and tls_ca is None):
            raise InputError(
                "a certificate of yours, its key and the server's authority go together.",
                cure="Give all three; for a server that asks for no certificate the authority alone.",
            )
        self._target = target
        self._timeout_s = timeout_s
        options = [
            ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ]
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()
        # What a server that wants another kind of connection does looks like no server at all.
        self._tls_cure = "; one with TLS needs tls_ca, the file of its authority"
        if tls_ca is not None and tls_certificate is None:
            self._tls_cure = "; one that asks for certificates needs yours, and its key"
        elif tls_ca is not None:
            self._tls_cure = ""
        if tls_ca is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            files = [None if file is None else _read(file) for file in (tls_ca, tls_key, tls_certificate)]
            self._channel = grpc.secure_channel(target, grpc.ssl_channel_credentials(*files), options=options)
        self._stub = pb_grpc.EmbeddingServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._admin = pb_grpc.AdminServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> EmbeddingClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def embed(
        self,
        texts: Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        truncate: Truncate | None = None,
        dtype: OutputDType = OutputDType.FLOAT32,
        request_id: str = "",
        model: str = "",
        timeout_s: float | None = None,
    ) -> EmbedAnswer:
        """Embed texts, or token ids used verbatim. What is None is left to the server.

        Raises InputError, NotFoundError, OverloadedError, DeadlineError, UnavailableError or EngineError.
        """
        with input_errors():
            request = pb.EmbedRequest(
                input=_input(texts, token_ids, prompt_name, prompt, truncate),
                dimensions=_checked_dimensions(dimensions),
                normalize=normalize,
                dtype=_DTYPES[dtype],
                request_id=request_id,
                model=model,
            )
        response: pb.EmbedResponse = self._call(self._stub.Embed, request, timeout_s)
        return _answer(response, dtype)

    def embed_stream(
        self,
        requests: Iterable[Sequence[str]],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        dimensions: int | None = None,
        truncate: Truncate | None = None,
        dtype: OutputDType = OutputDType.FLOAT32,
        model: str = "",
        timeout_s: float | None = None,
    ) -> Iterator[EmbedAnswer | F2rtError]:
        """Embed many lists of texts over one stream; yields an answer, or the error of that list, for each in turn.

        `timeout_s` bounds the whole stream; None: no bound. Raises UnavailableError when the stream itself breaks.
        """

        def messages() -> Iterator[pb.EmbedRequest]:
            for texts in requests:
                with input_errors():
                    yield pb.EmbedRequest(
                        input=_input(texts, None, prompt_name, prompt, truncate),
                        dimensions=_checked_dimensions(dimensions),
                        dtype=_DTYPES[dtype],
                        model=model,
                    )

        try:
            for item in self._stub.EmbedStream(messages(), timeout=timeout_s, metadata=self._metadata):
                if item.WhichOneof("result") == "response":
                    yield _answer(item.response, dtype)
                else:
                    code = next(code for code in grpc.StatusCode if code.value[0] == item.error.code)
                    yield error_of(code, item.error.message, item.error.retry_after_s or None)
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def reload(self, *, model: str = "", engine: str = "") -> Reloaded:
        """Have the server load a model's bundle again and switch to it. Raises what is wrong with the bundle."""
        r = self._call(self._admin.Reload, pb.ReloadRequest(model=model, engine=engine), None)
        return Reloaded(r.model, r.old_fingerprint, r.new_fingerprint, r.engine)

    def explain(
        self,
        texts: Sequence[str] | None = None,
        *,
        token_ids: Sequence[Sequence[int]] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: Truncate | None = None,
        model: str = "",
    ) -> list[ExplainedItem]:
        """Return what the engine would see for each text. Raises as `embed` does."""
        with input_errors():
            request = pb.ExplainRequest(input=_input(texts, token_ids, prompt_name, prompt, truncate), model=model)
        response: pb.ExplainResponse = self._call(self._stub.Explain, request, None)
        return [
            ExplainedItem(
                rendered=i.rendered,
                ids=list(i.ids),
                tokens=list(i.tokens),
                pooled_position=i.pooled_position,
                pooled_id=i.pooled_id,
                truncated=i.truncated,
                original_tokens=i.original_tokens,
            )
            for i in response.items
        ]

    def info(self, model: str = "") -> ServerInfo:
        """Return what the server says of a model, or of its default. Raises NotFoundError, UnavailableError."""
        r: pb.InfoResponse = self._call(self._stub.Info, pb.InfoRequest(model=model), None)
        return ServerInfo(
            model=r.model,
            revision=r.revision,
            engine=r.engine,
            precision=r.precision,
            fingerprint=r.fingerprint,
            dim=r.dim,
            trained_dims=list(r.trained_dims),
            max_tokens=r.max_tokens,
            prompts=dict(r.prompts),
            default_prompt_name=r.default_prompt_name,
            default_truncate=next(t for t, number in _TRUNCATE.items() if t and number == r.default_truncate),
            max_items=r.max_items,
            max_request_tokens=r.max_request_tokens,
            license=r.license,
            verdict=r.verdict,
            min_cosine=r.min_cosine,
            version=r.version,
            selection=r.selection,
            name=r.name,
            models=list(r.models),
            state=r.state,
            golden_cosine=r.golden_cosine,
            unverified=r.unverified,
            policy_sha256=r.policy_sha256,
        )

    def ready(self) -> bool:
        """Return whether the server reports SERVING. Raises UnavailableError when it cannot be reached."""
        answer = self._call(self._health.Check, health_pb2.HealthCheckRequest(), None)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the server reports SERVING. Raises UnavailableError after `timeout_s` seconds."""
        try:
            request = health_pb2.HealthCheckRequest()
            answer = self._health.Check(request, timeout=timeout_s, wait_for_ready=True)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise UnavailableError(
                    f"no server at {self._target} was ready within {timeout_s:g} s.",
                    cure=f"{_START}{self._tls_cure}",
                ) from error
            raise self._translate(error) from error
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise UnavailableError(f"the server at {self._target} is not ready.", cure="Wait, or look at its log.")

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        try:
            wait_s = self._timeout_s if timeout_s is None else timeout_s
            return method(request, timeout=wait_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: Any) -> F2rtError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.UNAVAILABLE and not said_by_a_server(error):
            return UnavailableError(
                f"no f2rt server answers at {self._target}: {details.rstrip('.')}.", cure=f"{_START}{self._tls_cure}"
            )
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
            return InputError(f"the message is too large: {details}.", cure="Split the request.")
        return error_of(code, details, retry_delay_s(error))


def _read(file: Path) -> bytes:
    with explain_read_errors(file, InputError):
        return file.read_bytes()


def _answer(response: pb.EmbedResponse, dtype: OutputDType) -> EmbedAnswer:
    scales = np.array([i.scale for i in response.items], np.float32)
    t = response.timings
    return EmbedAnswer(
        vectors=decode(response.embeddings, response.rows, response.dim, dtype, scales),
        items=[EmbeddedItem(i.tokens, i.original_tokens, i.truncated) for i in response.items],
        timings=Timings(t.tokenize_ms, t.queue_ms, t.infer_ms, t.total_ms),
        fingerprint=response.fingerprint,
        trained_dimension=response.trained_dimension,
        request_id=response.request_id,
    )


def _checked_dimensions(dimensions: int | None) -> int:
    if dimensions is not None and not 1 <= dimensions < 1 << 31:
        raise InputError(f"dimensions is {dimensions}; it must be at least 1.", cure="Leave it out for all of them.")
    return dimensions or 0


def _input(
    texts: Sequence[str] | None,
    token_ids: Sequence[Sequence[int]] | None,
    prompt_name: str | None,
    prompt: str | None,
    truncate: Truncate | None,
) -> pb.EmbedInput:
    if isinstance(texts, str):
        raise InputError("texts is one string, not a list of strings.", cure="Give [text].")
    if prompt is not None and prompt_name is not None:
        raise InputError("prompt and prompt_name were both given.", cure="Give one of them.")
    return pb.EmbedInput(
        texts=texts or (),
        token_ids=[pb.TokenIds(ids=ids) for ids in token_ids or ()],
        prompt_name=prompt_name,
        prompt=prompt,
        truncate=_TRUNCATE[truncate],
    )
