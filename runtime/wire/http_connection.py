"""One HTTP connection: uvicorn's, with a limit on how long headers may take, and refusals that clients read.

uvicorn answers what it refuses by itself in plain text. Here a request that is none, one too many, and one that does
not come to an end have OpenAI's error body as every other refusal has.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import h11
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.wire.openai_v1 import error_body

HEADERS_S = 30.0
_SURPLUS_S = 1.0  # for the headers of a connection too many
_UNREAD_S = 30.0  # in which a peer reads nothing of an answer
_LINGER_S = 1.0  # in which the peer may go on sending, so that it gets to read why it was refused
_TOO_MANY = "the server has as many connections as it takes. Try again later, or ask another replica."


class HttpConnection(H11Protocol):
    """`limit_concurrency` of the configuration is how many connections there may be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._awaited: asyncio.TimerHandle | None = None
        self._refused = False
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse what comes on a connection too many; a new one has to say something."""
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self.logger.warning(
                "refusing a connection: %d are open, the limit is %d", len(self.connections), self._most
            )
            self.app = _too_many(self.app)
            self._awaited = self.loop.call_later(_SURPLUS_S, self._close_with, 503, _TOO_MANY)
        else:
            self._watch(expected=True)

    def data_received(self, data: bytes) -> None:
        """Take in what comes, unless it was refused."""
        if not self._refused:
            super().data_received(data)
            self._look()

    def on_response_complete(self) -> None:
        """Go on with the next request."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """Have the peer read on: what it does not read is kept here."""
        super().pause_writing()
        if self._reading is None:
            self._expect_reading()

    def resume_writing(self) -> None:
        """Go on: enough was read."""
        super().resume_writing()
        self._stop_expecting()

    def _expect_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._reading = self.loop.call_later(_UNREAD_S, self._look_at_reading, left)

    def _look_at_reading(self, before: int) -> None:
        self._reading = None
        if self.transport.get_write_buffer_size() < before:
            self._expect_reading()
            return
        self.logger.warning("closing a connection: of its answer, %d bytes were not read in %g s", before, _UNREAD_S)
        self.transport.abort()

    def _stop_expecting(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_expecting()
        self._watch(expected=False)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and close."""
        self._close_with(400, "this is not an HTTP/1.1 request that can be read, or its headers are too large.")

    def _look(self) -> None:
        """Watch what has begun and must come to an end. Between two requests uvicorn's own limit counts."""
        theirs = self.conn.their_state
        headers = theirs is h11.IDLE and bool(self.conn.trailing_data[0])
        unread_body = theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE  # answered before it was sent
        self._watch(expected=headers or unread_body)

    def _watch(self, *, expected: bool) -> None:
        """Start the clock, which further bytes do not set back, or stop it."""
        if expected and self._awaited is None:
            text = f"the request's headers did not come within {HEADERS_S:g} s."
            self._awaited = self.loop.call_later(HEADERS_S, self._close_with, 408, text)
        elif not expected and self._awaited is not None:
            self._awaited.cancel()
            self._awaited = None

    def _close_with(self, status: int, text: str) -> None:
        self._watch(expected=False)
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        body = error_body(status, text)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = [h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        try:
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:  # an answer is on its way, or was given: nothing can be said any more
            self.transport.close()
            return
        # Closed while the peer still sends, the connection is reset, and the peer never reads this.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)


def _too_many(app: Any) -> Any:
    """Return what answers once on a connection too many: health, which says how the server is, and else a refusal."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        async def send_last(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        if scope["path"].startswith("/health/"):
            await app(scope, receive, send_last)
            return
        with contextlib.suppress(TimeoutError):  # what the peer sends is read, so that it gets to read the answer
            async with asyncio.timeout(_LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        refusal = Response(error_body(503, _TOO_MANY), 503, {"retry-after": "1"}, media_type="application/json")
        await refusal(scope, receive, send_last)

    return answer
