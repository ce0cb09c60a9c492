"""Streams that a test keeps open."""

from __future__ import annotations

import queue
from typing import Any

from runtime._pb.f2rt.v1 import embedding_pb2 as pb

ONE = pb.EmbedRequest(input=pb.EmbedInput(texts=["a"]))


class OpenStream:
    """A stream that a client keeps open without asking anything after the first request."""

    def __init__(self, stub: Any) -> None:
        self._requests: queue.Queue[pb.EmbedRequest | None] = queue.Queue()
        self.call = stub.EmbedStream(iter(self._requests.get, None))

    def ask(self) -> pb.EmbedStreamResponse:
        self._requests.put(ONE)
        return next(self.call)

    def cancel(self) -> None:
        self.call.cancel()
        self._requests.put(None)
