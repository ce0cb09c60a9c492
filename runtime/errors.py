"""Every error f2rt raises on purpose, and the one table that gives each its status.

    F2rtError
    ├── InputError             a request, file or argument the caller has to change
    │   ├── TooLargeError      a message beyond the limit
    │   └── CheckpointError    a checkpoint that breaks the contract; names the file and the field
    ├── NotFoundError          an engine, model or prompt that does not exist
    ├── AccessError            no API key, or a wrong one
    ├── OverloadedError        full: come back later
    ├── DeadlineError          could not be answered in time
    ├── AbandonedError         the caller went away: nobody gets it, it is for the log and the metrics
    ├── UnavailableError       not ready, draining, or the server cannot be reached
    ├── MissingExtraError      an optional dependency is not installed; says which extra has it
    ├── OutputError            the result could not be written: disk full, folder not writable
    ├── BundleError            a bundle that is damaged, incomplete or from another version
    │   └── UnverifiedError    an engine that was not shown to give PyTorch's vectors
    └── EngineError            the engine failed, or gave what it must not give
        ├── NotExecutableError this machine or this version cannot run the engine at all
        └── OutOfMemoryError   it did not fit; says nothing of the engine itself

A message says what is wrong, where, the value and the limit; `cure` says what to do. Foreign errors are translated
once, where they appear, and chained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

# How the libraries we use say that memory ran out: few of them raise MemoryError.
_OUT_OF_MEMORY = (
    "bad_alloc",
    "bad allocation",
    "failed to allocate memory",
    "cannot allocate memory",
    "can't allocate memory",
    "can't start new thread",
    "failed to map segment",
    "out of memory",
)
_LINE_CHARS = 200

ERROR_DOMAIN = "f2rt"  # of google.rpc.ErrorInfo: what a server says itself, and not gRPC for it


class F2rtError(Exception):
    """Base of all errors above. `message` is for people; `cure` is one sentence in the imperative."""

    def __init__(self, message: str, *, cure: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cure = cure
        self.counted = False  # in a server's metrics: once, whoever answers with it

    def __str__(self) -> str:
        return f"{self.message} {self.cure}".rstrip()


class InputError(F2rtError):
    """The caller's request, file or argument has to change."""


class TooLargeError(InputError):
    """A message beyond the limit."""


class CheckpointError(InputError):
    """The checkpoint breaks the contract."""


class NotFoundError(F2rtError):
    """No such engine, model or prompt."""


class AccessError(F2rtError):
    """No key, or not a known one."""


class OverloadedError(F2rtError):
    """The server is full. `retry_after_s`: when it is worth asking again."""

    def __init__(self, message: str, *, cure: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(message, cure=cure)
        self.retry_after_s = retry_after_s


class DeadlineError(F2rtError):
    """The answer would come too late."""


class AbandonedError(F2rtError):
    """The caller waits no longer."""


class UnavailableError(F2rtError):
    """Not ready, draining, or not reachable."""


class MissingExtraError(F2rtError):
    """An optional dependency is not installed."""


class OutputError(F2rtError):
    """The result could not be written."""


class BundleError(F2rtError):
    """The bundle is damaged, incomplete or from another version."""


class UnverifiedError(BundleError):
    """The engine was not shown to give PyTorch's vectors."""


class EngineError(F2rtError):
    """The engine failed."""


class NotExecutableError(EngineError):
    """This machine or this version cannot run the engine."""


class OutOfMemoryError(EngineError):
    """Memory ran out."""


@dataclass(frozen=True)
class Status:
    """What an error becomes outside: a gRPC status name, an HTTP status, and the command's exit code."""

    grpc: str
    http: int
    exit_code: int = 2


STATUS: dict[type[F2rtError], Status] = {
    InputError: Status("INVALID_ARGUMENT", 400),
    TooLargeError: Status("INVALID_ARGUMENT", 413),
    NotFoundError: Status("NOT_FOUND", 404),
    AccessError: Status("UNAUTHENTICATED", 401),
    OverloadedError: Status("RESOURCE_EXHAUSTED", 429),
    DeadlineError: Status("DEADLINE_EXCEEDED", 504),
    AbandonedError: Status("CANCELLED", 499),
    UnavailableError: Status("UNAVAILABLE", 503),
    MissingExtraError: Status("FAILED_PRECONDITION", 500),
    OutputError: Status("INTERNAL", 500),
    BundleError: Status("FAILED_PRECONDITION", 500),
    EngineError: Status("INTERNAL", 500),
    F2rtError: Status("INTERNAL", 500),
}


def status_of(error: F2rtError) -> Status:
    """Return the status of the error's nearest class in `STATUS`."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def missing_extra(module: str, extra: str) -> MissingExtraError:
    """Return the error for an import of `module` that failed, naming the extra that installs it."""
    return MissingExtraError(
        f"the module {module!r} is not installed.", cure=f"Install it with: pip install 'f2rt[{extra}]'"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this error, by its kind or its words, says that memory ran out."""
    words = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in words for phrase in _OUT_OF_MEMORY)


@contextlib.contextmanager
def explain_memory_errors(what: str, cure: str) -> Iterator[None]:
    """Turn whatever says that memory ran out while doing `what` into an OutOfMemoryError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemoryError) or not is_out_of_memory(error):
            raise
        words = f" ({first_line(error)})" if str(error).strip() else ""
        raise OutOfMemoryError(f"not enough memory to {what}{words}. Nothing was changed.", cure=cure) from error


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, cut where it goes on for long."""
    line = str(error).strip().partition("\n")[0]
    return line if len(line) <= _LINE_CHARS else f"{line[:_LINE_CHARS]}…"
