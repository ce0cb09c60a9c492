"""OpenAI's embeddings API: bodies in, calls to models, bodies out. Knows HTTP's statuses, and no server.

A default call of the stock client asks for base64, which is also the fastest: little-endian float32, as the client
decodes it. Beyond OpenAI's fields there are `prompt_name`, `prompt`, `input_type`, `truncate` and `normalize`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import orjson
from numpy.typing import NDArray

from runtime.embedder import finish
from runtime.errors import F2rtError, InputError, status_of
from runtime.serving.call import EmbedCall, EmbedReply, instruction_for
from runtime.settings import Limits
from runtime.tokenizer import Instruction, Truncate

Number = int | float


class EmbeddingsRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Body of POST /v1/embeddings. `input` is a text, a list of texts, a list of token ids, or a list of such lists.

    null is the default everywhere: clients with optional fields send it. 8.0 is a whole number, in JSON as here.
    """

    input: str | list[str | Number | list[Number]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Number | None = None
    user: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None
    input_type: Literal["query", "passage", "document"] | None = None
    truncate: Literal["error", "end", "start"] | None = None
    normalize: bool | None = None


class EmbeddingObject(msgspec.Struct):
    """One vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(msgspec.Struct):
    """Tokens that the engine saw."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(msgspec.Struct):
    """Body of an answer. `fingerprint` names the engine that made the vectors."""

    data: list[EmbeddingObject]
    model: str
    usage: Usage
    fingerprint: str
    object: Literal["list"] = "list"


class ErrorDetail(msgspec.Struct):
    """What is wrong, and the cure."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(msgspec.Struct):
    """Body of every refusal."""

    error: ErrorDetail


_MAX_PROBLEM_CHARS = 200
_MAX_MESSAGE_CHARS = 400  # as over gRPC
# The words that a field may have, by its place as msgspec's errors name it.
_WORDS = {
    f"`$.{field.encode_name}`": words
    for field in msgspec.structs.fields(EmbeddingsRequest)
    if (words := [word for kind in get_args(field.type) for word in get_args(kind) if isinstance(word, str)])
}
_DECODER = msgspec.json.Decoder(EmbeddingsRequest)
# JSON's escapes, one after the other; the group is a surrogate that is no half of a pair.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u([dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL
)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_COUNTED_BYTES = 1 << 20  # at a time: other threads run in between
# OpenAI's own words for a status: its clients look at the HTTP status, people and gateways at these.
_KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "unavailable"),
    504: ("server_error", "deadline_exceeded"),
}


def decode_request(body: bytes, limits: Limits) -> EmbeddingsRequest:
    """Return the request of a body. Raises InputError."""
    # Decoding is one call that no other thread runs beside: millions of values would stop the process for seconds.
    most = limits.max_items + limits.max_request_tokens
    if _commas(body, 0, len(body)) > most and _has_more_values(body, most):
        raise InputError(
            f"the body has more than {most} values; a request may have {limits.max_items} items and "
            f"{limits.max_request_tokens} tokens.",
            cure="Split the request.",
        )
    try:
        return _DECODER.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:  # ValidationError is a DecodeError
        problem = str(error)
        if half := _half_character(body):
            raise InputError(
                f"the body has half a character: \\u{half} without its other half.",
                cure="Text that was cut in the middle of a character, or lossy decoding, makes these; mend the text.",
            ) from error
        words = next((words for place, words in _WORDS.items() if problem.endswith(place)), None)
        if len(problem) > _MAX_PROBLEM_CHARS:  # it may quote the name of a field
            problem = f"{problem[:_MAX_PROBLEM_CHARS]}…"
        cure = f"Give one of: {', '.join(words)}." if words else "See /docs for its fields."
        raise InputError(f"the body is no embeddings request: {problem}.", cure=cure) from error


def _commas(body: bytes, start: int, end: int) -> int:
    return sum(body.count(b",", at, min(at + _COUNTED_BYTES, end)) for at in range(start, end, _COUNTED_BYTES))


def _has_more_values(body: bytes, most: int) -> bool:
    """Whether more than `most` values follow a comma, or are texts: commas inside of texts do not count."""
    commas = texts = at = 0
    while max(commas, texts) <= most:
        text = body.find(b'"', at)
        commas += body.count(b",", at, text) if text >= 0 else _commas(body, at, len(body))
        at = _end_of_text(body, text) if text >= 0 else 0
        if not at:  # no more texts, or one without an end, where the decoder stops
            break
        texts += 1
    return max(commas, texts) > most


def _end_of_text(body: bytes, start: int) -> int:
    """Return where the JSON string that begins at `start` is over; 0 when it has no end."""
    end = body.find(b'"', start + 1)
    if end >= 0 and body[end - 1] == ord("\\"):  # maybe the quotation mark is escaped
        found = _STRING.match(body, start)
        return found.end() if found else 0
    return end + 1


def _half_character(body: bytes) -> str:
    """Return the first surrogate that stands alone in a body, as its four hexadecimal digits; "" when none does."""
    lone = (match[1] for match in _ESCAPE.finditer(body) if match[1])
    return next(lone, b"").decode("ascii")


def make_call(
    request: EmbeddingsRequest,
    eos_id: int,
    prompts: Mapping[str, str],
    *,
    request_id: str,
    deadline_s: float | None,
    traceparent: str = "",
) -> EmbedCall:
    """Translate a request. Raises InputError."""
    texts, token_ids = _inputs(request.input)
    for row, ids in enumerate(token_ids):
        # Clients that tokenize with OpenAI's own vocabulary send ids that mean other words here, and never this EOS.
        if ids and ids[-1] != eos_id:
            raise InputError(
                f"token ids {row} do not end with this model's EOS id {eos_id}: they come from another tokenizer.",
                cure="Send texts (LangChain: check_embedding_ctx_length=False), or ids of this model's tokenizer.",
            )
    if request.input_type is not None:
        if request.prompt is not None or request.prompt_name is not None:
            raise InputError("input_type and a prompt were both given.", cure="Give one of them.")
        instruction = instruction_for(request.input_type, prompts)
    else:
        instruction = Instruction(request.prompt_name, request.prompt)
    return EmbedCall(
        texts=texts,
        token_ids=token_ids,
        instruction=instruction,
        truncate=None if request.truncate is None else Truncate(request.truncate),
        dimensions=None if request.dimensions is None else _whole("dimensions", request.dimensions),
        normalize=request.normalize is not False,
        deadline_s=deadline_s,
        request_id=request_id,
        model=request.model or "",
        traceparent=traceparent,
    )


def encode_reply(request: EmbeddingsRequest, call: EmbedCall, reply: EmbedReply, model: str) -> bytes:
    """Return the body of an answer."""
    vectors = finish(reply.vectors, call.dimensions, call.normalize)
    tokens = sum(len(item.ids) for item in reply.items)
    data = [
        {"object": "embedding", "index": index, "embedding": embedding}
        for index, embedding in enumerate(_embeddings(vectors, request.encoding_format))
    ]
    body = {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "fingerprint": reply.fingerprint,
    }
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def encode_error(error: F2rtError) -> tuple[int, bytes]:
    """Return the HTTP status of an error and its body. What a message quotes may be as long as a caller likes."""
    status, message = status_of(error).http, error.message
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[:_MAX_MESSAGE_CHARS]}…"
    return status, error_body(status, f"{message} {error.cure}".rstrip())


def error_body(status: int, message: str) -> bytes:
    """Return an error's body as OpenAI's clients read it."""
    kind, code = _KINDS.get(status, ("invalid_request_error" if status < 500 else "server_error", None))
    return msgspec.json.encode(ErrorResponse(ErrorDetail(message, kind, None, code)))


def _inputs(given: str | list[Any]) -> tuple[Sequence[str], Sequence[Sequence[int]]]:
    """Tell texts from token ids: one text, texts, one row of ids, rows of ids. Raises InputError for a mixture."""
    if isinstance(given, str):
        return [given], []
    kinds = {type(item) for item in given}
    if kinds == {str}:
        return given, []
    if kinds and kinds <= {int, float}:
        return [], [_ids(given)]
    if kinds == {list}:
        return [], [_ids(row) for row in given]
    if not kinds:
        raise InputError("input is empty.", cure="Send at least one text.")
    raise InputError("input mixes texts and token ids.", cure="Send texts, or lists of token ids.")


def _ids(given: list[Number]) -> list[int]:
    if all(type(one) is int for one in given):
        return given  # type: ignore[return-value]
    return [_whole("a token id", one) for one in given]


def _whole(what: str, number: Number) -> int:
    if isinstance(number, float) and not number.is_integer():
        raise InputError(f"{what} is {number}.", cure="Send a whole number.")
    return int(number)


def _embeddings(vectors: NDArray[np.float32], encoding: str | None) -> Sequence[Any]:
    if encoding != "base64":
        return list(np.ascontiguousarray(vectors))
    return [base64.b64encode(row).decode("ascii") for row in np.ascontiguousarray(vectors.astype("<f4", copy=False))]
