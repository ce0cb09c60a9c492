"""Bodies of HTTP requests: read within the limits of one, and of all that are being read at a time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from starlette.exceptions import HTTPException
from starlette.requests import Request

from runtime.errors import TooLargeError, UnavailableError

_SILENCE_S, _BODY_S = 30.0, 300.0  # in the middle of a body, and for all of it
_SMALL = 1 << 16  # bytes; as much as a connection may buffer anyway
_LARGEST_AT_A_TIME = 16


class Bodies:
    """Reads bodies. Small ones always; of large ones as many bytes at a time as 16 of the largest have."""

    def __init__(self, limit: int) -> None:
        """`limit`: bytes of one body."""
        self.limit = limit
        self._most = _LARGEST_AT_A_TIME * limit
        self.held = 0

    @contextlib.contextmanager
    def held_by(self) -> Iterator[Body]:
        """Give what reads one body, whose bytes count until the block ends."""
        body = Body(self)
        try:
            yield body
        finally:
            self.held -= body.size

    def grow(self, size: int, part: int) -> None:
        """Count `part` more bytes of a body that then has `size`. Raises TooLargeError, UnavailableError."""
        self.held += part
        if size > self.limit:
            raise self.too_large(size)
        if size > _SMALL and self.held > self._most:
            raise UnavailableError(
                f"the bodies of requests that are being read have {self.held} bytes; the limit is {self._most}.",
                cure=f"Try again later, or send at most {_SMALL} bytes.",
            )

    def too_large(self, size: int) -> TooLargeError:
        """Return the refusal of a body; it may have more bytes than are known."""
        return TooLargeError(
            f"the body has {size} bytes or more; the limit is {self.limit}.", cure="Split the request."
        )


class Body:
    """One body."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self.size = 0

    async def read(self, request: Request) -> bytes:
        """Read the body. Raises TooLargeError, UnavailableError, and HTTPException for what is no plain JSON."""
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "the body is compressed. Send it as it is.")
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"the body is {kind[:60]!r}. Send application/json.")
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > self._bodies.limit:
            raise self._bodies.too_large(int(announced))
        parts: list[bytes] = []
        stream = request.stream()
        loop = asyncio.get_running_loop()
        end_s = loop.time() + _BODY_S
        while True:
            try:
                # Cheaper than wait_for, which makes a task of each part.
                async with asyncio.timeout_at(min(loop.time() + _SILENCE_S, end_s)):
                    part = await anext(stream, None)
            except TimeoutError as error:
                limit = f"{_BODY_S:g} s in all" if loop.time() >= end_s else f"{_SILENCE_S:g} s"
                raise HTTPException(408, f"the rest of the body did not come within {limit}.") from error
            if part is None:
                return b"".join(parts)
            self.size += len(part)
            self._bodies.grow(self.size, len(part))
            parts.append(part)
