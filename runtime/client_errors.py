"""The client's errors: what a gRPC status and its details say, as the exceptions the server raised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from runtime.errors import (
    ERROR_DOMAIN,
    AccessError,
    BundleError,
    DeadlineError,
    EngineError,
    F2rtError,
    InputError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)

_ERRORS: dict[grpc.StatusCode, type[F2rtError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.FAILED_PRECONDITION: BundleError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
}


def error_of(code: grpc.StatusCode, details: str, retry_after_s: float | None) -> F2rtError:
    """Return the error that a status stands for."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and retry_after_s is not None:
        return OverloadedError(details, retry_after_s=retry_after_s)
    return _ERRORS.get(code, EngineError)(details or f"the server answered {code.name}.")


def retry_delay_s(error: Any) -> float | None:
    """Return what the RetryInfo of a grpc.RpcError says, in seconds, or None."""
    info = error_details_pb2.RetryInfo()
    found = any(detail.Unpack(info) for detail in _status_details(error))
    return float(info.retry_delay.ToMilliseconds()) / 1e3 if found else None


def said_by_a_server(error: Any) -> bool:
    """Whether an UNAVAILABLE is an f2rt server's own word: gRPC says the same of one that is not there."""
    info = error_details_pb2.ErrorInfo()
    return any(detail.Unpack(info) and info.domain == ERROR_DOMAIN for detail in _status_details(error))


def _status_details(error: Any) -> Iterator[Any]:
    for name, value in error.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            yield from status_pb2.Status.FromString(value).details


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Translate what protobuf says of a value it cannot hold: no string, a lone surrogate, an id beyond int32."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the request cannot be sent: {error}.", cure="Texts are valid Unicode strings, ids are integers."
        ) from error
