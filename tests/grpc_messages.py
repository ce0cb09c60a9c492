"""Messages of f2rt.v1 as tests write and read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime._pb.f2rt.v1 import embedding_pb2 as pb


def texts_request(texts: Sequence[str], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(texts=texts), **fields)


def ids_request(*rows: Sequence[int], **fields: Any) -> pb.EmbedRequest:
    return pb.EmbedRequest(input=pb.EmbedInput(token_ids=[pb.TokenIds(ids=row) for row in rows], **fields))


def vectors_of(answer: pb.EmbedResponse) -> np.ndarray[Any, Any]:
    return np.frombuffer(answer.embeddings, "<f4").reshape(answer.rows, answer.dim)
