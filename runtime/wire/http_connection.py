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
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.wire.openai_v1 import error_body

HEADERS_S = 30.0
_TOO_MANY = "the server has as many connections as it takes. Try again later, or ask another replica."


class HttpConnection(H11Protocol):
    """`limit_concurrency` of the configuration is how many connections there may be."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most, self.limit_concurrency = self.limit_concurrency, None
        self._waiting_for_headers: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse what comes on a connection too many; a new one has to say something."""
        super().connection_made(transport)
        if self._most is not None and len(self.connections) > self._most:
            self.app = _too_many
        self._watch_headers(expected=True)

    def data_received(self, data: bytes) -> None:
        """Watch whether headers that have begun come to an end. Between two requests uvicorn's own limit counts."""
        super().data_received(data)
        begun = self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])
        self._watch_headers(expected=begun)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._watch_headers(expected=False)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, and close."""
        self._close_with(400, "this is not an HTTP/1.1 request, or its headers are too large.")

    def _watch_headers(self, *, expected: bool) -> None:
        """Start the clock, which further bytes do not set back, or stop it."""
        timer = self._waiting_for_headers
        if expected and timer is None:
            text = f"the request's headers did not come within {HEADERS_S:g} s."
            self._waiting_for_headers = self.loop.call_later(HEADERS_S, self._close_with, 408, text)
        elif not expected and timer is not None:
            timer.cancel()
            self._waiting_for_headers = None

    def _close_with(self, status: int, text: str) -> None:
        self._watch_headers(expected=False)
        if self.transport.is_closing():
            return
        body = error_body(status, text)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events = [h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer is on its way: nothing can be said between
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


async def _too_many(scope: Scope, receive: Receive, send: Send) -> None:
    headers = {"connection": "close", "retry-after": "1"}
    await Response(error_body(503, _TOO_MANY), 503, headers, media_type="application/json")(scope, receive, send)
