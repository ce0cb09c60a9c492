"""What every gRPC method here has in common: readable requests, keys, errors as statuses, calls counted.

Handlers run on gRPC's threads, not in an event loop: a request is then tokenized and computed where it arrived. One
wrapper around each method does it all; interceptors would run for every call before it starts.

Methods with one request are registered as if they took a stream of them, which is the same on the wire: gRPC would else
keep a thread waiting for the message before any of our code runs, for as long as the peer likes and without a key.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NoReturn

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from runtime.errors import ERROR_DOMAIN, F2rtError, InputError, OverloadedError, UnavailableError, status_of
from runtime.serving.access import Keys
from runtime.serving.job import Job
from runtime.serving.pipeline import Pipeline
from runtime.wire.grpc_patience import Patience, Watchman

log = logging.getLogger("f2rt.grpc")

# Details travel in a trailer, which gRPC drops above 8 KiB, and percent-encoded: up to 12 bytes a character.
_MAX_MESSAGE_CHARS = 400

MOST_WAITING = 256  # calls whose message has not come; each has a thread
MOST_REFLECTING = 16  # streams of reflection; each has a thread, too
_MOST_WATCHING = 1 << 20
_MESSAGE_S, _REFLECTION_S = 120.0, 60.0
_WATCH_S = 2.0  # in which a peer that watches something lets a message through
_READ_S, _UNREAD_BYTES = 120.0, 256 << 20  # of answers that were given and not read yet

UNEXPECTED = "an unexpected error; the server's log has the details."  # a caller learns no internals

Unary = Callable[[Any, Any], Any]
Stream = Callable[[Iterator[Any], Any], Iterator[Any]]


class Calls:
    """Wraps methods, and knows how many calls are open."""

    def __init__(self, keys: Keys, refused: Callable[[F2rtError, str, str], None]) -> None:
        """`refused` hears of requests for vectors that got an error, in which protocol, and what id they have."""
        self._keys = keys
        self._refused = refused
        self._open = 0
        self._changed = threading.Condition()
        self._messages = Patience(_MESSAGE_S, MOST_WAITING)
        self._reflecting = Patience(_REFLECTION_S, MOST_REFLECTING)
        self._unread = Patience(_READ_S, _UNREAD_BYTES)
        self._watching = Patience(_WATCH_S, _MOST_WATCHING)
        self._watchman = Watchman(self._messages, self._reflecting, self._unread, self._watching)

    def close(self) -> None:
        """Watch no calls any more."""
        self._watchman.close()

    def wait_idle(self, seconds: float) -> bool:
        """Wait until no call is open: each has its response sent, or was cancelled. Returns whether it came to that."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._open, seconds)

    def service(self, name: str, methods: Mapping[str, Any]) -> Any:
        """Return the generic handler of a service from its methods as `unary` and `stream` made them."""
        return grpc.method_handlers_generic_handler(name, methods)

    def unary(self, behavior: Unary, request: Any, response: Any, *, public: bool = False, protocol: str = "") -> Any:
        """Return the handler of a method with one request and one response.

        A `public` one needs no key. `protocol` is what one that makes vectors is counted under.
        """

        def answer(messages: Iterator[Any], context: Any) -> tuple[Any, Any]:
            message: Any = None
            try:
                if not public:
                    self._check_key(context)
                message = self._message(messages, context)
                self._opened(context)
                if isinstance(message, DecodeError):
                    raise unreadable(message)
                return behavior(message, context), context
            except grpc.RpcError:  # the call is over: nobody is there to be told
                raise
            except F2rtError as error:
                failure: Exception = error
                if protocol:
                    self._refused(error, protocol, _id(message))
            except Exception as error:
                # A fault of ours: the caller learns no internals, the log has all of them.
                log.exception("unexpected error in %s", behavior.__name__)
                failure = error
            return abort(context, failure)

        def serialize(answered: tuple[Any, Any]) -> bytes:
            data: bytes = answered[0].SerializeToString()
            self._unread.hold(answered[1], len(data))
            return data

        return grpc.stream_unary_rpc_method_handler(answer, _parser(request), serialize)

    def stream(self, behavior: Stream, request: Any, response: Any) -> Any:
        """Return the handler of a bidirectional stream. Unreadable requests reach `behavior` as DecodeError."""

        def answer(messages: Iterator[Any], context: Any) -> Iterator[Any]:
            self._opened(context)
            try:
                self._check_key(context)
                yield from behavior(messages, context)
            except F2rtError as error:
                failure: Exception = error
            except Exception as error:
                log.exception("unexpected error in %s", behavior.__name__)
                failure = error
            else:
                return
            abort(context, failure)

        return grpc.stream_stream_rpc_method_handler(answer, _parser(request), response.SerializeToString)

    def watch(self, behavior: Callable[..., Any], request: Any, response: Any) -> Any:
        """Return the handler of a public method with one request whose responses come later, and hold no thread."""

        def answer(messages: Iterator[Any], context: Any, send_response_callback: Callable[[Any], None]) -> None:
            def send(message: Any) -> None:
                with self._watching.waiting(context):  # sent when the peer's window lets it through
                    send_response_callback(message)

            try:
                message = self._message(messages, context)
            except F2rtError as error:
                abort(context, error)
            behavior(message, context, send)

        answer.experimental_non_blocking = True  # type: ignore[attr-defined]
        return grpc.stream_stream_rpc_method_handler(answer, request.FromString, response.SerializeToString)

    def reflection(self, behavior: Stream, request: Any, response: Any) -> Any:
        """Return the handler of reflection: questions of a moment, which shutting down does not wait for."""

        def answer(messages: Iterator[Any], context: Any) -> Iterator[Any]:
            with self._reflecting.waiting(context):
                yield from behavior(messages, context)

        return grpc.stream_stream_rpc_method_handler(answer, request.FromString, response.SerializeToString)

    def _message(self, messages: Iterator[Any], context: Any) -> Any:
        """Return a call's message once it has come. Raises InputError where none does, RpcError when the call ends."""
        with self._messages.waiting(context):
            message = next(messages, None)
        if message is None:
            raise InputError("the call has no message.", cure="Send the message of the .proto.")
        return message

    def _check_key(self, context: Any) -> None:
        if self._keys.required:
            shown = {key: value for key, value in context.invocation_metadata() if key in _KEY_HEADERS}
            self._keys.check(shown.get("authorization"), shown.get("x-api-key"))

    def _opened(self, context: Any) -> None:
        with self._changed:
            self._open += 1
        ended = partial(self._ended, context)
        if not context.add_callback(ended):  # it ended before it began
            ended()

    def _ended(self, context: Any) -> None:
        self._unread.release(context)
        with self._changed:
            self._open -= 1
            if not self._open:
                self._changed.notify_all()


def _id(message: Any) -> str:
    """Return the id that a request says it has, as far as it could be read."""
    return str(getattr(message, "request_id", "") or getattr(message, "id", ""))


_KEY_HEADERS = ("authorization", "x-api-key")


def header(context: Any, name: str) -> str:
    """Return a call's header, or ""."""
    return next((str(value) for key, value in context.invocation_metadata() if key == name), "")


class Dropping:
    """Drops the requests of a call when it ends before they do: cancelled, or over its deadline.

    A stream is one call for as many requests as its client likes: what was answered is forgotten, and an engine that
    was replaced is not kept.
    """

    def __init__(self, context: Any) -> None:
        self._jobs: dict[Job, weakref.ref[Pipeline]] = {}
        self._lock = threading.Lock()
        self._over = False
        if not context.add_callback(self._ended):  # it ended before it began
            self._ended()

    def begun(self, job: Job, pipeline: Pipeline) -> None:
        """Take note of a request that is on its way."""
        with self._lock:
            over = self._over
            if not over:
                for done in [other for other in self._jobs if other.done]:
                    del self._jobs[done]
                self._jobs[job] = weakref.ref(pipeline)
        if over:
            pipeline.abandon(job)

    def _ended(self) -> None:
        with self._lock:
            self._over = True
            jobs, self._jobs = self._jobs, {}
        for job, reference in jobs.items():
            pipeline = reference()
            if pipeline is not None and not job.done:
                pipeline.abandon(job)


def abort(context: Any, error: Exception) -> NoReturn:
    """End a call with an error's status; overload says in a RetryInfo when to come back. Raises."""
    if not isinstance(error, F2rtError):
        context.abort(grpc.StatusCode.INTERNAL, UNEXPECTED)
        raise AssertionError("abort raises")
    status = status_of(error)
    if status.http == 500:
        log.error("%s: %s", status.grpc, error)
    code = grpc.StatusCode[status.grpc]
    context.set_trailing_metadata(status_details(code, error))
    context.abort(code, details(error))
    raise AssertionError("abort raises")


def status_details(code: grpc.StatusCode, error: F2rtError) -> tuple[tuple[str, bytes], ...]:
    """Return the trailing metadata of an error, as google.rpc has it.

    RetryInfo where the error says when to come back. ErrorInfo of a server that is not ready: gRPC itself says
    UNAVAILABLE when there is no server at all.
    """
    if isinstance(error, OverloadedError):
        delay = Duration()
        delay.FromMilliseconds(int(1e3 * error.retry_after_s))
        detail: Any = error_details_pb2.RetryInfo(retry_delay=delay)
    elif isinstance(error, UnavailableError):
        detail = error_details_pb2.ErrorInfo(reason="NOT_READY", domain=ERROR_DOMAIN)
    else:
        return ()
    status = status_pb2.Status(code=code.value[0], message=details(error))
    status.details.add().Pack(detail)
    return (("grpc-status-details-bin", status.SerializeToString()),)


def details(error: F2rtError) -> str:
    """Return message and cure, short enough for a trailer."""
    message = error.message
    if len(message) > _MAX_MESSAGE_CHARS:
        message = message[:_MAX_MESSAGE_CHARS] + "…"
    return f"{message} {error.cure}".rstrip()


def unreadable(error: DecodeError) -> InputError:
    """Return the error for bytes that are no request; the library's own answer would be UNKNOWN."""
    return InputError(f"{error}.", cure="Send the message of the .proto; strings are valid UTF-8.")


def _parser(request: Any) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        try:
            return request.FromString(data)
        except DecodeError as error:
            return error

    return parse
